//! Grouped products on the CPU: against f64, with guarded memory, for every target that this machine runs.

mod case;
mod emulator;
mod harness;
mod kernel;

use case::{Case, ROUTINGS, Routing};
use harness::Random;
use kernel::{Kernel, kernels, runs};
use moec_abi::DType;
use moec_codegen::{
    Target, cpu,
    cpu::Schedule,
    grouped::{Epilogue, Grouped, RowScale, RowSource},
};
use moec_ir::ops::{BinaryFn, UnaryFn};

const TARGETS: [Target; 5] = [Target::X86V3, Target::X86V4, Target::X86V4Bf16, Target::X86V4Amx, Target::Aarch64];

fn gated() -> Epilogue {
    let silu = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
    Epilogue::Binary(BinaryFn::Mul, Box::new(silu), Box::new(Epilogue::Sum(1)))
}

fn spec(k: u64, n: u64, matrices: usize) -> Grouped {
    Grouped {
        symbol: String::new(),
        experts: 3,
        rows: RowSource::Gathered,
        rows_per_token: 2,
        matrices,
        first: 0,
        given: Vec::new(),
        codes: None,
        k,
        n,
        a_stride: k,
        out_stride: n,
        a: DType::F32,
        w: DType::Bf16,
        out: DType::F32,
        bias: false,
        scale: RowScale::None,
        epilogue: if matrices == 2 { gated() } else { Epilogue::Sum(0) },
    }
}

/// A product with everything drawn at random.
fn any(random: &mut Random) -> Grouped {
    fn pick<T: Copy>(random: &mut Random, of: &[T]) -> T {
        of[random.below(of.len() as u64) as usize]
    }
    let k = match random.below(4) {
        0 => 1 + random.below(40),
        1 => 32 * (1 + random.below(6)),
        _ => 1 + random.below(300),
    };
    let n = match random.below(4) {
        0 => 1 + random.below(20),
        1 => 16 * (1 + random.below(12)),
        _ => 1 + random.below(200),
    };
    let rows = pick(random, &[RowSource::Dense, RowSource::Gathered, RowSource::Sorted]);
    let mut spec = spec(k, n, pick(random, &[1, 2]));
    spec.experts = if rows == RowSource::Dense { 1 } else { 1 + random.below(5) };
    spec.rows = rows;
    spec.rows_per_token = 1 + random.below(3);
    spec.a_stride += random.below(3) * random.below(20);
    spec.out_stride += random.below(2) * random.below(20);
    spec.a = pick(random, &[DType::F32, DType::Bf16, DType::Bf16]);
    spec.w = pick(random, &[DType::F32, DType::Bf16, DType::Bf16]);
    spec.out = pick(random, &[DType::F32, DType::Bf16]);
    spec.bias = random.below(2) == 0;
    spec.scale = pick(random, &[RowScale::None, RowScale::Input, RowScale::Output]);
    if spec.matrices == 1 && random.below(2) == 0 {
        spec.epilogue = Epilogue::Unary(UnaryFn::Relu2, Box::new(Epilogue::Sum(0)));
    }
    spec
}

/// Compiles all products for a target into one library.
fn compile(target: Target, specs: &mut [Grouped]) -> Vec<(Grouped, Schedule, Kernel)> {
    for (i, spec) in specs.iter_mut().enumerate() {
        spec.symbol = format!("product_{i}");
    }
    let schedules: Vec<_> = specs.iter().map(|s| cpu::schedule(s, target)).collect();
    let names: Vec<_> = specs.iter().map(|s| s.symbol.clone()).collect();
    let kernels = kernels(target, &names, |b| {
        for (spec, schedule) in specs.iter().zip(&schedules) {
            cpu::emit(b, spec, schedule, target);
        }
    });
    specs
        .iter()
        .cloned()
        .zip(schedules)
        .zip(kernels)
        .map(|((spec, schedule), kernel)| (spec, schedule, kernel))
        .collect()
}

fn targets() -> impl Iterator<Item = Target> {
    TARGETS.into_iter().filter(|t| {
        let runs = runs(*t);
        if !runs {
            println!("{} does not run on this machine", t.name());
        }
        runs
    })
}

#[test]
fn any_product_matches_f64_for_any_number_of_rows() {
    for target in targets() {
        let mut random = Random(target as u64);
        let mut specs: Vec<_> = (0..10).map(|_| any(&mut random)).collect();
        for (i, (spec, schedule, kernel)) in compile(target, &mut specs).into_iter().enumerate() {
            for tokens in [0, 1, 2, 7, 16, 17, 63, 64, 65, 129] {
                let routing = ROUTINGS[(i + tokens as usize) % 3];
                Case::new(&spec, tokens, routing, &mut random).check(&kernel, &schedule);
            }
        }
    }
}

#[test]
fn a_thousand_rows_to_one_expert() {
    for target in targets() {
        let mut random = Random(7);
        let mut specs = vec![spec(70, 50, 2), spec(64, 96, 1)];
        for spec in &mut specs {
            spec.a = cpu::operand_type(target, spec.w);
        }
        for (spec, schedule, kernel) in compile(target, &mut specs) {
            Case::new(&spec, 1000, Routing::One, &mut random).check(&kernel, &schedule);
        }
    }
}

#[test]
fn a_long_sum_is_cut_into_blocks() {
    for target in targets() {
        let mut random = Random(8);
        let mut specs = vec![spec(9000, 40, 2), spec(8191, 33, 1), spec(6000, 33, 1)];
        specs[0].rows = RowSource::Sorted;
        for spec in &mut specs[..2] {
            spec.a = cpu::operand_type(target, spec.w);
        }
        for (spec, schedule, kernel) in compile(target, &mut specs) {
            for tokens in [1, 40] {
                Case::new(&spec, tokens, Routing::Skewed, &mut random).check(&kernel, &schedule);
            }
        }
    }
}

#[test]
fn threads_and_grain_do_not_change_a_bit() {
    for target in targets() {
        let mut random = Random(9);
        let mut specs: Vec<_> = (0..4).map(|_| any(&mut random)).collect();
        for (spec, schedule, kernel) in compile(target, &mut specs) {
            let case = Case::new(&spec, 50, Routing::Random, &mut random);
            let bits = |threads, grain| {
                let result = case.run(&kernel, &schedule, threads, grain);
                result.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let one = bits(1, 1);
            for (threads, grain) in [(1, 1000), (2, 1), (3, 2)] {
                assert_eq!(one, bits(threads, grain), "{spec:?} with {threads} threads, grain {grain}");
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_other_rows() {
    for target in targets() {
        let mut random = Random(10);
        // Every run of another architecture's code starts an emulator.
        let products = if target == Target::Aarch64 { 1 } else { 5 };
        let mut specs: Vec<_> = (0..products).map(|_| any(&mut random)).collect();
        specs.push(spec(9000, 20, 1));
        for spec in &mut specs {
            spec.rows = RowSource::Gathered;
        }
        for (spec, schedule, kernel) in compile(target, &mut specs) {
            let all = Case::new(&spec, 40, Routing::Random, &mut random);
            let together = all.run(&kernel, &schedule, 2, 1);
            let out = |result: &[f32], p: usize| {
                let row = &result[p * spec.out_stride as usize..][..spec.n as usize];
                row.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            for expert in 0..spec.experts as usize {
                let rows = all.offsets[expert] as usize..all.offsets[expert + 1] as usize;
                for p in rows.clone().step_by(5) {
                    // The same row alone.
                    let mut alone = all.clone();
                    alone.map = vec![all.map[p]];
                    alone.scale = vec![all.scale[p]];
                    alone.offsets = (0..=spec.experts as usize).map(|e| i32::from(e > expert)).collect();
                    assert_eq!(out(&together, p), out(&alone.run(&kernel, &schedule, 1, 1), 0), "{spec:?}, row {p}");
                }
                // The rows of the expert the other way round.
                let mut turned = all.clone();
                turned.map[rows.clone()].reverse();
                turned.scale[rows.clone()].reverse();
                let turned = turned.run(&kernel, &schedule, 1, 1);
                for (p, q) in rows.clone().zip(rows.clone().rev()) {
                    assert_eq!(out(&together, p), out(&turned, q), "{spec:?}, rows {p} and {q}");
                }
            }
        }
    }
}
