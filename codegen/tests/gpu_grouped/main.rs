//! Grouped products run on the interpreter and agree with sums in f64.

mod case;
mod codes;

use case::{Argument, Case, Routing, dense, down, up};
use moec_abi::{DType, Expr, TensorMap};
use moec_codegen::{
    Target,
    codes::{Codes, Number},
    gpu::{self, tuned::Choice},
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    mlir::{Keep, Session},
};
use moec_sim::{Arg, Counts, Finding, Launch, MapType, Memory, Module, Options, Swizzle, TensorMapDesc};

type Cases<'a> = &'a [(u64, Routing)];

fn check(spec: &Grouped, target: Target, cases: Cases<'_>) {
    check_schedule(spec, &gpu::schedule(spec, target, &Choice::without_few(spec, target)), target, cases);
}

fn check_hopper(spec: &Grouped, cases: Cases<'_>) {
    let kernels = gpu::specialised(spec, Target::Sm90a, &Choice::without_few(spec, Target::Sm90a));
    assert!(!kernels.is_empty(), "bf16 has Hopper kernels");
    for (schedule, _) in kernels {
        // So few blocks walk from tile to tile even here.
        let schedule = gpu::Schedule { walk: Some(5), ..schedule };
        check_schedule(spec, &schedule, Target::Sm90a, cases);
    }
}

/// Runs the cases in each mode alone, since small products never leave the mode for few rows, and one with all modes.
fn check_schedule(spec: &Grouped, schedule: &gpu::Schedule, target: Target, cases: Cases<'_>) {
    for mode in &schedule.modes {
        let alone = gpu::Schedule { modes: vec![gpu::Mode { limit: None, ..mode.clone() }], ..schedule.clone() };
        run(spec, &alone, target, cases);
    }
    if schedule.modes.len() > 1 {
        let limited = |mode: &gpu::Mode| gpu::Mode { limit: mode.limit.map(|_| 64), ..mode.clone() };
        let schedule = gpu::Schedule { modes: schedule.modes.iter().map(limited).collect(), ..schedule.clone() };
        run(spec, &schedule, target, &[(32, Routing::Even), (33, Routing::Even)]);
    }
}

/// Compiles a product once and runs the cases, with the checker on.
/// Returns the counts of the last case.
fn run(spec: &Grouped, schedule: &gpu::Schedule, target: Target, cases: Cases<'_>) -> Counts {
    let compiled =
        Session::new().compile(&target, Keep::default(), |b| gpu::emit(b, spec, schedule, target)).expect("compiles");
    let ptx = String::from_utf8(compiled.code).expect("PTX is text");
    let module = Module::parse(&ptx).unwrap_or_else(|e| panic!("{e}\n{ptx}"));
    let mut counts = Counts::default();
    for &(tokens, routing) in cases {
        let case = Case { spec: spec.clone(), tokens, routing };
        let data = case.data(&schedule.layout(spec));
        let mut memory = Memory::new();
        let mut out = (0, 0);
        let mut args = Vec::new();
        for (parameter, argument) in schedule.parameters(spec).into_iter().zip(&data.arguments) {
            let value = match argument {
                Argument::Read(bytes) => {
                    let address = memory.alloc(bytes.len() as u64, 256);
                    memory.write(address, bytes).expect("in bounds");
                    address
                }
                Argument::Written(bytes) => {
                    out = (memory.alloc(*bytes, 256), *bytes);
                    out.0
                }
                Argument::Value(value) => *value,
            };
            args.push(match parameter {
                gpu::Parameter::WeightMap => Arg::TensorMap(tensor_map(&schedule.weight_map(spec, 0), value)),
                _ => Arg::U64(value),
            });
        }
        let grid = schedule.grid(spec);
        let blocks = grid.blocks.each_ref().map(|e| u32::try_from(e.eval(tokens).expect("fits")).expect("fits"));
        let launch = Launch {
            entry: &spec.symbol,
            grid: blocks,
            block: grid.threads,
            cluster: grid.cluster,
            dynamic_shared: grid.shared,
            dependent: false,
            args,
        };
        let options = Options { seed: tokens, ..Options::default() };
        let report = moec_sim::launch(&module, &mut memory, &launch, &options).expect("launches");
        let findings: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
        assert!(findings.is_empty(), "{case:?}: {}\n{}", findings.join("\n"), lines(&ptx, &report.findings));
        case.compare(&data, &memory.read(out.0, out.1).expect("in bounds"));
        counts = report.counts;
    }
    counts
}

/// The lines that findings name.
fn lines(ptx: &str, findings: &[Finding]) -> String {
    let line = |n: u32| ptx.lines().nth(n as usize - 1).unwrap_or_default().to_owned();
    findings.iter().map(|f| line(f.line)).collect::<Vec<_>>().join("\n")
}

fn tensor_map(map: &TensorMap, base: u64) -> TensorMapDesc {
    let known = |e: &Expr| e.known().expect("weights do not depend on tokens");
    TensorMapDesc {
        dtype: if map.dtype == DType::I32 { MapType::S32 } else { MapType::Bf16 },
        base,
        dims: map.dims.iter().map(known).collect(),
        strides: map.strides.iter().map(known).collect(),
        box_dims: map.box_dims.clone(),
        element_strides: Vec::new(),
        swizzle: if map.swizzle == 0 { Swizzle::None } else { Swizzle::B128 },
    }
}

const EVEN: [(u64, Routing); 9] = [
    (1, Routing::Even),
    (2, Routing::Even),
    (7, Routing::Even),
    (16, Routing::Even),
    (17, Routing::Even),
    (63, Routing::Even),
    (64, Routing::Even),
    (65, Routing::Even),
    (129, Routing::Even),
];

#[test]
fn gate_and_up_in_bf16() {
    check(&up(DType::Bf16), Target::Sm80, &EVEN);
}

#[test]
fn down_in_bf16() {
    check(&down(DType::Bf16), Target::Sm80, &EVEN);
}

#[test]
fn gate_and_up_in_f32() {
    check(&up(DType::F32), Target::Sm80, &EVEN);
}

#[test]
fn down_in_f32() {
    check(&down(DType::F32), Target::Sm80, &EVEN);
}

#[test]
fn dense_products() {
    for dtype in [DType::Bf16, DType::F32] {
        check(&dense(dtype), Target::Sm80, &EVEN);
    }
}

#[test]
fn uneven_routing() {
    let routings = [Routing::Skewed, Routing::AllTo(0), Routing::AllTo(4), Routing::NoneTo(0), Routing::NoneTo(2)];
    for dtype in [DType::Bf16, DType::F32] {
        check(&up(dtype), Target::Sm80, &routings.map(|r| (70, r)));
    }
}

#[test]
fn every_target() {
    for spec in [up(DType::Bf16), down(DType::Bf16)] {
        check(&spec, Target::Sm89, &[(3, Routing::Skewed), (40, Routing::Skewed), (150, Routing::Skewed)]);
    }
}

#[test]
fn hopper() {
    let routings = [Routing::Skewed, Routing::AllTo(0), Routing::AllTo(4), Routing::NoneTo(0)];
    for spec in [up(DType::Bf16), down(DType::Bf16)] {
        check_hopper(&spec, &EVEN);
        check_hopper(&spec, &routings.map(|r| (70, r)));
    }
    check_hopper(&dense(DType::Bf16), &EVEN);
    // Results of f32 leave 32 rows at a time, fewer than the lowest tile of dense products has.
    check_hopper(&Grouped { out: DType::F32, ..dense(DType::Bf16) }, &EVEN[5..]);
    check_hopper(&Grouped { out: DType::F32, ..down(DType::Bf16) }, &[(70, Routing::AllTo(3))]);
    let spec =
        Grouped { bias: true, scale: RowScale::Input, k: 100, n: 70, a_stride: 102, out_stride: 70, ..up(DType::Bf16) };
    check_hopper(&spec, &[(1, Routing::Even), (19, Routing::Skewed), (70, Routing::AllTo(3))]);
    let spec = Grouped { out: DType::F32, k: 7, n: 5, a_stride: 7, out_stride: 6, ..down(DType::Bf16) };
    check_hopper(&spec, &[(1, Routing::Even), (19, Routing::Skewed)]);
}

/// So many experts that tiles are as wide as they get: the last one of three, or of two, is not full.
#[test]
fn hopper_with_wide_tiles() {
    let codes = kinds();
    for (i, codes) in [None, Some(codes[0]), Some(codes[2]), Some(codes[5]), Some(codes[7])].into_iter().enumerate() {
        let experts = 70;
        let up = Grouped { experts, codes, n: 424, out_stride: 424, ..up(DType::Bf16) };
        let down =
            Grouped { experts, codes, bias: true, k: 72, n: 520, a_stride: 72, out_stride: 520, ..down(DType::Bf16) };
        let (some, many) = ((20, Routing::Skewed), (150, Routing::AllTo(3)));
        match i {
            0 => {
                check_hopper(&up, &[(1, Routing::Even), (90, Routing::Even), some, many]);
                check_hopper(&down, &[some, many]);
            }
            _ if i % 2 == 0 => check_hopper(&up, &[some]),
            _ => check_hopper(&down, &[some]),
        }
    }
}

#[test]
fn few_rows() {
    let check_decode = |spec: &Grouped, target, cases: Cases<'_>| {
        let (schedule, _) = gpu::decode(spec, target).expect("rows are of 16-byte pieces");
        for columns in [16, 64] {
            run(spec, &with_columns(&schedule, columns), target, cases);
        }
        run(spec, &schedule, target, cases)
    };
    let routings = [Routing::Skewed, Routing::AllTo(0), Routing::AllTo(4), Routing::NoneTo(0)];
    for target in [Target::Sm80, Target::Sm90a] {
        for spec in [up(DType::Bf16), down(DType::Bf16), dense(DType::Bf16)] {
            check_decode(&spec, target, &EVEN[..6]);
        }
        for tokens in [3, 8, 20] {
            check_decode(&up(DType::Bf16), target, &routings.map(|r| (tokens, r)));
        }
    }
    // Whole rounds, a last round that is not full, and rows that end inside a chunk.
    for (k, n, a_stride) in [(2048, 40, 2048), (1304, 9, 1312), (8, 1, 8), (2880, 24, 2880)] {
        let spec = Grouped { bias: true, scale: RowScale::Input, k, n, a_stride, out_stride: n + 1, ..up(DType::Bf16) };
        check_decode(&spec, Target::Sm90a, &[(1, Routing::Even), (5, Routing::Skewed)]);
        let spec = Grouped { out: DType::F32, k, n, a_stride, out_stride: n, ..down(DType::Bf16) };
        check_decode(&spec, Target::Sm80, &[(1, Routing::Even), (5, Routing::Skewed)]);
    }
}

/// The kernel for few rows of a product that has many, or hardly any, weights.
fn with_columns(schedule: &gpu::Schedule, columns: u32) -> gpu::Schedule {
    let modes = schedule.modes.iter().map(|mode| gpu::Mode { columns, ..mode.clone() });
    gpu::Schedule { modes: modes.collect(), ..schedule.clone() }
}

/// Codes of every kind, with one group for each row, several in a stage, and one for several stages.
fn kinds() -> Vec<Codes> {
    let integer =
        |bits, offset, group, zero| Codes { bits, number: Number::Integer { offset }, group, zero, scale: DType::F32 };
    let fp8 = |group| Codes { bits: 8, number: Number::E4m3, group, zero: false, scale: DType::F32 };
    let mxfp4 = Codes { bits: 4, number: Number::E2m1, group: 32, zero: false, scale: DType::U8 };
    vec![
        fp8(128),
        fp8(64),
        mxfp4,
        integer(8, 128, 1 << 20, false),
        integer(8, 0, 16, true),
        integer(4, 0, 32, true),
        integer(4, 8, 128, false),
        integer(2, 1, 1 << 20, false),
        integer(2, 0, 64, true),
    ]
}

#[test]
fn codes_on_hopper() {
    for (i, codes) in kinds().into_iter().enumerate() {
        let codes = Some(codes);
        check_hopper(&Grouped { codes, ..up(DType::Bf16) }, &[(9, Routing::Even), (150, Routing::Skewed)]);
        if i % 2 == 0 {
            let spec = Grouped { codes, k: 320, a_stride: 320, ..down(DType::Bf16) };
            check_hopper(&spec, &[(40, Routing::AllTo(3))]);
        } else {
            // Rows that end inside a stage, inside a group, and outside whole tiles.
            let spec = Grouped { codes, bias: true, k: 100, n: 70, a_stride: 102, out_stride: 70, ..up(DType::Bf16) };
            check_hopper(&spec, &[(1, Routing::Even), (9, Routing::Skewed)]);
        }
    }
}

#[test]
fn few_rows_of_codes() {
    let shapes = [(2048, 40, 2048), (1304, 9, 1312), (8, 1, 8), (320, 24, 320)];
    let check = |spec: &Grouped, cases| {
        let (schedule, _) = gpu::decode(spec, Target::Sm90a).expect("codes have a kernel for few rows");
        for columns in [16, 32, 64] {
            run(spec, &with_columns(&schedule, columns), Target::Sm90a, cases);
        }
    };
    for (i, codes) in kinds().into_iter().enumerate() {
        let codes = Some(codes);
        let (k, n, a_stride) = shapes[i % 4];
        let spec = Grouped { codes, bias: true, k, n, a_stride, out_stride: n + 1, ..up(DType::Bf16) };
        check(&spec, &[(1, Routing::Even), (5, Routing::Skewed)]);
        let (k, n, a_stride) = shapes[(i + 1) % 4];
        let spec = Grouped { codes, out: DType::F32, k, n, a_stride, out_stride: n, ..down(DType::Bf16) };
        check(&spec, &[(3, Routing::AllTo(1))]);
    }
}

#[test]
fn codes_are_read_once_and_without_bank_conflicts() {
    for codes in kinds() {
        for (spec, k, n) in [(up(DType::Bf16), 2048, 256), (down(DType::Bf16), 512, 1024)] {
            let codes = Codes { group: codes.group.min(k), ..codes };
            let scale = RowScale::None;
            let spec = Grouped { codes: Some(codes), k, n, a_stride: k, out_stride: n, experts: 2, scale, ..spec };
            let kernels = gpu::variants(&spec, Target::Sm90a);
            let kinds: Vec<_> = kernels.iter().map(|v| v.schedule.kind).collect();
            assert_eq!(kinds, [gpu::Kind::Decode, gpu::Kind::Wgmma, gpu::Kind::Wgmma], "{codes:?}");
            for variant in kernels {
                let counts = run(&spec, &variant.schedule, Target::Sm90a, &[(1, Routing::Even)]);
                let factor = codes.scale.bytes() + if codes.zero { 4 } else { 0 };
                // Rows with one group: eight warps of a block read its factors.
                let readers = if codes.groups(k) == 1 && variant.name == "_few" { 8 } else { 1 };
                let row = k * codes.bits / 8 + codes.groups(k) * factor * readers;
                let weights = 2 * spec.matrices as u64 * n * row;
                // Each column tile reads the row of its expert.
                let operand = 2 * variant.schedule.modes[0].column_tiles(&spec) * k * 2;
                let read = counts.global_bytes_read - operand;
                println!("{} {codes:?}: {read} of {weights} and {operand}: {counts:?}", spec.symbol);
                assert!(read >= weights, "{counts:?}");
                assert!(read <= weights + weights / 10, "{codes:?}: {weights}, {counts:?}");
                assert!(counts.bank_conflicts() * 20 <= counts.shared_wavefronts_ideal, "{codes:?}: {counts:?}");
            }
        }
    }
}

#[test]
fn codes_on_older_devices() {
    for codes in kinds() {
        check(&Grouped { codes: Some(codes), ..up(DType::Bf16) }, Target::Sm80, &[(9, Routing::Skewed)]);
    }
}

#[test]
fn odd_sizes() {
    for (k, n, a_stride, out_stride) in [(1, 1, 1, 1), (33, 17, 40, 17), (100, 70, 102, 72), (65, 9, 66, 12)] {
        let spec = Grouped { k, n, a_stride, out_stride, ..up(DType::Bf16) };
        check(&spec, Target::Sm80, &[(1, Routing::Even), (19, Routing::Skewed), (70, Routing::AllTo(3))]);
    }
    let spec = Grouped { k: 7, n: 5, a_stride: 7, out_stride: 6, ..up(DType::F32) };
    check(&spec, Target::Sm80, &[(1, Routing::Even), (19, Routing::Skewed)]);
}

#[test]
fn mixed_types_bias_and_scales() {
    let (f32, bf16) = (DType::F32, DType::Bf16);
    for (a, w, out, scale) in [
        (f32, bf16, f32, RowScale::Input),
        (bf16, f32, bf16, RowScale::Output),
        (bf16, bf16, f32, RowScale::Input),
        (f32, bf16, bf16, RowScale::None),
    ] {
        let spec = Grouped { a, w, out, scale, bias: true, ..up(a) };
        check(&spec, Target::Sm80, &[(9, Routing::Skewed)]);
    }
}

#[test]
fn many_experts() {
    for experts in [1, 32, 33, 257, 4096] {
        let spec = Grouped {
            experts,
            rows: RowSource::Sorted,
            n: 8,
            k: 16,
            a_stride: 16,
            out_stride: 8,
            epilogue: Epilogue::Sum(0),
            matrices: 1,
            ..up(DType::F32)
        };
        check(&spec, Target::Sm80, &[(3, Routing::AllTo(experts - 1)), (40, Routing::Skewed)]);
    }
}

/// Two experts of a Qwen3-30B-A3B layer, one row each: what a token costs.
#[test]
fn weights_are_read_once_and_without_bank_conflicts() {
    let shapes = [(up(DType::Bf16), 2048, 768), (down(DType::Bf16), 768, 2048)];
    for (spec, k, n) in shapes {
        let spec = Grouped { k, n, a_stride: k, out_stride: n, experts: 2, ..spec };
        let portable = (gpu::schedule(&spec, Target::Sm80, &Choice::without_few(&spec, Target::Sm80)), Target::Sm80);
        let hopper = gpu::variants(&spec, Target::Sm90a).into_iter().map(|v| (v.schedule, Target::Sm90a));
        for (schedule, target) in hopper.chain([portable]) {
            let counts = run(&spec, &schedule, target, &[(1, Routing::Even)]);
            println!("{} {}: {counts:?}", spec.symbol, target.name());
            let weights = 2 * spec.matrices as u64 * k * n * 2;
            assert!(counts.global_bytes_read >= weights, "{counts:?}");
            assert!(counts.global_bytes_read <= weights + weights / 10, "{counts:?}");
            assert!(counts.bank_conflicts() * 20 <= counts.shared_wavefronts_ideal, "{counts:?}");
        }
    }
}
