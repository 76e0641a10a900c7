//! Grouped products in one mode alone.

use super::{Fault, Outcome, Program, Spread, Subject};
use moec_abi::{DType, Expr};
use moec_codegen::{
    Target,
    gpu::{self, tuned::Choice},
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    mlir::{Keep, Session},
};
use moec_ir::ops::{BinaryFn, UnaryFn};
use moec_sim::{Arg, Launch, MapType, Memory, Module, Swizzle, TensorMapDesc};

struct Product {
    spec: Grouped,
    schedule: gpu::Schedule,
}

/// Gate and up, k and n beside every tile.
fn up(dtype: DType, k: u64) -> Grouped {
    let gate = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
    Grouped {
        symbol: "up".to_owned(),
        experts: 5,
        rows: RowSource::Gathered,
        rows_per_token: 2,
        matrices: 2,
        first: 0,
        given: Vec::new(),
        codes: None,
        k,
        n: 72,
        a_stride: k,
        out_stride: 72,
        a: dtype,
        w: dtype,
        out: dtype,
        bias: false,
        scale: RowScale::None,
        epilogue: Epilogue::Binary(BinaryFn::Mul, Box::new(gate), Box::new(Epilogue::Sum(1))),
    }
}

fn down(dtype: DType, k: u64) -> Grouped {
    Grouped {
        symbol: "down".to_owned(),
        rows: RowSource::Sorted,
        matrices: 1,
        n: 136,
        out_stride: 136,
        scale: RowScale::Output,
        epilogue: Epilogue::Sum(0),
        ..up(dtype, k)
    }
}

pub(super) fn subjects(seeds: u64, filter: &str) -> Vec<Subject> {
    let mut all = Vec::new();
    for spec in [up(DType::F32, 136), down(DType::F32, 136)] {
        all.extend(modes(
            &spec,
            &gpu::schedule(&spec, Target::Sm80, &Choice::without_few(&spec, Target::Sm80)),
            "simt",
            Target::Sm80,
            seeds,
            filter,
        ));
    }
    for spec in [up(DType::Bf16, 584), down(DType::Bf16, 584)] {
        // Kernels for Ada are those for Ampere.
        let target = if spec.matrices == 1 { Target::Sm89 } else { Target::Sm80 };
        all.extend(modes(
            &spec,
            &gpu::schedule(&spec, target, &Choice::without_few(&spec, target)),
            "mma",
            target,
            seeds,
            filter,
        ));
        for target in [target, Target::Sm90a] {
            if let Some((schedule, _)) = gpu::decode(&spec, target) {
                all.extend(modes(&spec, &schedule, "decode", target, seeds, filter));
            }
        }
    }
    // Tiles of fewer steps than the ring has stages: warps of different tiles are under way at once. The widest tiles have
    // another one beside them.
    let wide = |spec: Grouped, n| Grouped { n, out_stride: n, ..spec };
    for spec in [wide(up(DType::Bf16, 200), 136), wide(down(DType::Bf16, 200), 264)] {
        let hopper = Target::Sm90a;
        for (schedule, _) in gpu::specialised(&spec, hopper, &Choice::without_few(&spec, hopper)) {
            // One block walks through all tiles, so that its ring is filled again and again.
            let schedule = gpu::Schedule { walk: Some(1), ..schedule };
            all.extend(modes(&spec, &schedule, "wgmma", hopper, seeds, filter));
        }
    }
    all
}

/// A product in its first and in its last mode.
fn modes(
    spec: &Grouped,
    schedule: &gpu::Schedule,
    name: &str,
    target: Target,
    seeds: u64,
    filter: &str,
) -> Vec<Subject> {
    let shapes = [(1, Spread::Skewed), (5, Spread::Nobody), (19, Spread::Skewed), (67, Spread::Last)];
    let alone = |mode: &gpu::Mode| {
        let tall = schedule.kind == gpu::Kind::Wgmma;
        let height = if tall { format!("x{}", mode.rows()) } else { String::new() };
        let name = format!("{} {name} x{}{height} {}", spec.symbol, mode.columns, target.name());
        if !name.contains(filter) {
            return None;
        }
        let modes = vec![gpu::Mode { limit: None, ..mode.clone() }];
        let schedule = gpu::Schedule { modes, ..schedule.clone() };
        let compiled = Session::new()
            .compile(&target, Keep::default(), |b| gpu::emit(b, spec, &schedule, target))
            .expect("products compile");
        let ptx = String::from_utf8(compiled.code).expect("PTX is text");
        Some(Subject::new(&name, ptx, Box::new(Product { spec: spec.clone(), schedule }), &shapes, seeds))
    };
    let last = schedule.modes.len().saturating_sub(1);
    schedule.modes.iter().enumerate().filter(|(i, _)| *i == 0 || *i == last).filter_map(|(_, m)| alone(m)).collect()
}

/// Numbers in `(-1, 1)` with a fixed sequence.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// So many elements of this type.
    pub(super) fn bytes(&mut self, dtype: DType, count: usize) -> Vec<u8> {
        if dtype == DType::Bf16 {
            return (0..count).flat_map(|_| half::bf16::from_f32(self.next()).to_le_bytes()).collect();
        }
        assert_eq!(dtype, DType::F32, "inputs are bf16 or f32");
        (0..count).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

/// Lets some rows of so many elements start with an infinity: what reads past the end of the row before gets a NaN from
/// it, even where weights are zero.
pub(super) fn spoil(rows: &mut [u8], dtype: DType, width: usize) {
    let size = dtype.bytes() as usize;
    // The upper bytes of an f32 are a bf16.
    let infinity = &f32::INFINITY.to_le_bytes()[4 - size..];
    for row in rows.chunks_exact_mut(width * size).skip(1).step_by(3) {
        row[..size].copy_from_slice(infinity);
    }
}

impl Product {
    fn rows(&self, tokens: u64) -> u64 {
        tokens * self.spec.rows_per_token
    }

    fn offsets(&self, tokens: u64, spread: Spread) -> Vec<u32> {
        let mut left = self.rows(tokens);
        let mut offsets = vec![0];
        for e in 0..self.spec.experts {
            let last = e + 1 == self.spec.experts;
            let count = match spread {
                Spread::Skewed if !last => left.div_ceil(2),
                Spread::Last if !last => 0,
                Spread::Nobody => 0,
                Spread::Skewed | Spread::Last => left,
            };
            left -= count;
            offsets.push(u32::try_from(self.rows(tokens) - left).expect("few rows"));
        }
        offsets
    }

    /// Rows of the operand.
    fn operand(&self, numbers: &mut Numbers, rows: u64) -> Vec<u8> {
        let spec = &self.spec;
        let mut out = numbers.bytes(spec.a, (rows * spec.a_stride) as usize);
        spoil(&mut out, spec.a, spec.a_stride as usize);
        out
    }

    /// Packed weights: padding is zero, as the runtime leaves it.
    fn weights(&self, numbers: &mut Numbers) -> Vec<u8> {
        let spec = &self.spec;
        let size = spec.w.bytes();
        let columns = spec.k.next_multiple_of(128 / size);
        let matrices = spec.matrices as u64;
        let rows = spec.n.next_multiple_of(8) * matrices;
        let mut out = Vec::new();
        for row in 0..spec.experts * rows {
            let row = row % rows;
            let exists = row / 8 / matrices * 8 + row % 8 < spec.n;
            let used = if exists { spec.k } else { 0 };
            out.extend(numbers.bytes(spec.w, used as usize));
            out.resize(out.len() + ((columns - used) * size) as usize, 0);
        }
        out
    }
}

/// A buffer that another launch of the program writes or reads.
struct Shared {
    address: u64,
    bytes: u64,
}

/// A kernel that copies each pair of buffers, word by word, once the launches before have ended. Its parameters are
/// the two addresses and the words of each pair.
fn copying(pairs: usize) -> String {
    let mut text = String::from(".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry copy(");
    let parameters = (0..pairs).map(|i| format!(".param .u64 to{i}, .param .u64 from{i}, .param .u32 words{i}"));
    text += &parameters.collect::<Vec<_>>().join(", ");
    text += ")\n{\n.reg .pred %p;\n.reg .b32 %i, %n, %v;\n.reg .b64 %to, %from, %by, %a;\ngriddepcontrol.wait;\n";
    for i in 0..pairs {
        text += &format!(
            "ld.param.u64 %to, [to{i}];\nld.param.u64 %from, [from{i}];\nld.param.u32 %n, [words{i}];\n\
             mov.u32 %i, %tid.x;\nLOOP{i}:\nsetp.ge.u32 %p, %i, %n;\n@%p bra END{i};\nmul.wide.u32 %by, %i, 4;\n\
             add.s64 %a, %from, %by;\nld.global.b32 %v, [%a];\nadd.s64 %a, %to, %by;\nst.global.b32 [%a], %v;\n\
             add.u32 %i, %i, 256;\nbra LOOP{i};\nEND{i}:\n"
        );
    }
    text + "griddepcontrol.launch_dependents;\nret;\n}\n"
}

/// Launches [`copying`] of buffers to others.
fn copy(
    memory: &mut Memory,
    pairs: &[[&Shared; 2]],
    dependent: bool,
    options: &moec_sim::Options,
) -> Result<moec_sim::Report, moec_sim::Error> {
    let words = |s: &Shared| u32::try_from(s.bytes / 4).expect("buffers are small");
    let args = pairs.iter().flat_map(|[to, from]| [Arg::U64(to.address), Arg::U64(from.address), Arg::U32(words(to))]);
    let [grid, cluster] = [[1, 1, 1]; 2];
    let args = args.collect();
    let launch = Launch { entry: "copy", grid, block: [256, 1, 1], cluster, dynamic_shared: 0, dependent, args };
    moec_sim::launch(&Module::parse(&copying(pairs.len()))?, memory, &launch, options)
}

impl Program for Product {
    /// The product among other launches: two that write what the kernels before it write, and one that reads that and
    /// its result. A product of sorted rows comes behind the one that made the rows, others come behind the sort.
    /// Where the product may start early, so may its neighbours.
    fn run(&self, ptx: &str, tokens: u64, spread: Spread, options: moec_sim::Options) -> Outcome {
        let error = |e: moec_sim::Error| Fault::of(&[], || e.to_string());
        let module = Module::parse(ptx).map_err(error)?;
        let (spec, schedule) = (&self.spec, &self.schedule);
        let mut memory = Memory::new();
        let mut numbers = Numbers(tokens);
        let rows = self.rows(tokens);
        let operand_rows = if spec.rows == RowSource::Gathered { tokens } else { rows };
        let words = |v: Vec<u32>| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let (mut given, mut made) = (Vec::new(), Vec::new());
        let mut args = Vec::new();
        for parameter in schedule.parameters(spec) {
            let bytes = match parameter {
                gpu::Parameter::Operand => self.operand(&mut numbers, operand_rows),
                gpu::Parameter::Weights | gpu::Parameter::WeightMap => {
                    let weights = self.weights(&mut numbers);
                    let base = memory.alloc(weights.len() as u64, 256);
                    memory.write(base, &weights).map_err(error)?;
                    args.push(match parameter {
                        gpu::Parameter::Weights => Arg::U64(base),
                        _ => Arg::TensorMap(tensor_map(&schedule.weight_map(spec, 0), base)),
                    });
                    continue;
                }
                gpu::Parameter::Scales
                | gpu::Parameter::Zeros
                | gpu::Parameter::Bias
                | gpu::Parameter::Given(_)
                | gpu::Parameter::GivenMap(_) => unreachable!("these products have neither codes nor biases"),
                gpu::Parameter::Offsets => words(self.offsets(tokens, spread)),
                gpu::Parameter::Map => {
                    words((0..rows).map(|r| u32::try_from(r * 7 % tokens).expect("few tokens")).collect())
                }
                gpu::Parameter::Scale => numbers.bytes(DType::F32, rows as usize),
                gpu::Parameter::Out => Vec::new(),
                gpu::Parameter::Tokens => {
                    args.push(Arg::U64(tokens));
                    continue;
                }
            };
            let result = rows * spec.out_stride * spec.out.bytes();
            let size = if parameter == gpu::Parameter::Out { result } else { bytes.len() as u64 };
            let [place, copy] = [0, 1].map(|_| Shared { address: memory.alloc(size, 256), bytes: size });
            args.push(Arg::U64(place.address));
            if parameter == gpu::Parameter::Out {
                made.push([copy, place]);
            } else {
                memory.write(copy.address, &bytes).map_err(error)?;
                given.push((parameter, [place, copy]));
            }
        }
        let grid = schedule.grid(spec);
        let launch = Launch {
            entry: &spec.symbol,
            grid: grid.blocks.each_ref().map(|e| u32::try_from(known(&e.clone(), tokens)).expect("small grids")),
            block: grid.threads,
            cluster: grid.cluster,
            dynamic_shared: grid.shared,
            dependent: schedule.dependent,
            args,
        };
        let fine = |report: &moec_sim::Report| match report.findings.as_slice() {
            [] => Ok(()),
            findings => Err(Fault::of(findings, String::new)),
        };
        let operand_last = spec.rows == RowSource::Sorted;
        for last in [false, true] {
            let now =
                given.iter().filter(|(parameter, _)| (*parameter == gpu::Parameter::Operand) == (last == operand_last));
            let now: Vec<_> = now.map(|(_, [place, copy])| [place, copy]).collect();
            fine(&copy(&mut memory, &now, last && schedule.dependent, &options).map_err(error)?)?;
        }
        let report = moec_sim::launch(&module, &mut memory, &launch, &options).map_err(error)?;
        fine(&report)?;
        let seen: Vec<Shared> =
            given.iter().map(|(_, [place, _])| Shared { address: memory.alloc(place.bytes, 256), ..*place }).collect();
        let read = seen.iter().zip(&given).map(|(to, (_, [from, _]))| [to, from]);
        let made = made.iter().filter(|_| spread != Spread::Nobody);
        let after: Vec<_> = made.map(|[to, from]| [to, from]).chain(read).collect();
        fine(&copy(&mut memory, &after, schedule.dependent, &options).map_err(error)?)?;
        let mut out = Vec::new();
        for [to, _] in after {
            out.extend(memory.read(to.address, to.bytes).map_err(error)?);
        }
        Ok((out, report.counts.warp_instructions))
    }

    fn cluster(&self) -> u32 {
        self.schedule.grid(&self.spec).cluster.iter().product()
    }

    fn stands_alone(&self, _: &str, _: u64) -> bool {
        false
    }
}

fn known(e: &Expr, tokens: u64) -> u64 {
    e.eval(tokens).expect("sizes are small")
}

fn tensor_map(map: &moec_abi::TensorMap, base: u64) -> TensorMapDesc {
    TensorMapDesc {
        dtype: MapType::Bf16,
        base,
        dims: map.dims.iter().map(|e| known(e, 0)).collect(),
        strides: map.strides.iter().map(|e| known(e, 0)).collect(),
        box_dims: map.box_dims.clone(),
        element_strides: Vec::new(),
        swizzle: Swizzle::B128,
    }
}
