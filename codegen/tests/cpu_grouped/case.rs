//! One product with random operands, run through the kernel and in f64.

use crate::{
    harness::{Memory, Random, pack},
    kernel::{Argument, Kernel, run},
};
use half::bf16;
use moec_abi::DType;
use moec_codegen::{
    cpu::Schedule,
    grouped::{Epilogue, Grouped, RowScale, RowSource},
};
use moec_ir::ops::{BinaryFn, UnaryFn};

/// Numbers in memory as f32 or bf16.
#[derive(Clone)]
pub(crate) struct Numbers {
    pub(crate) values: Vec<f32>,
    pub(crate) dtype: DType,
}

impl Numbers {
    fn random(n: u64, dtype: DType, amplitude: f32, random: &mut Random) -> Self {
        let round = |x: f32| if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x };
        Self { values: (0..n).map(|_| round(random.float() * amplitude)).collect(), dtype }
    }

    fn memory(&self) -> Memory {
        if self.dtype == DType::Bf16 {
            Memory::of(&self.values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<_>>())
        } else {
            Memory::of(&self.values)
        }
    }
}

/// Operands of a product.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) spec: Grouped,
    pub(crate) tokens: u64,
    /// First sorted row of each expert; one entry more than experts.
    pub(crate) offsets: Vec<i32>,
    pub(crate) map: Vec<i32>,
    pub(crate) a: Numbers,
    pub(crate) w: Numbers,
    pub(crate) bias: Vec<f32>,
    pub(crate) scale: Vec<f32>,
}

/// How rows fall on experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Routing {
    /// Every row to any expert.
    Random,
    /// All rows to the last expert.
    One,
    /// Most rows to the first expert, none to the second.
    Skewed,
}

pub(crate) const ROUTINGS: [Routing; 3] = [Routing::Random, Routing::One, Routing::Skewed];

impl Case {
    pub(crate) fn new(spec: &Grouped, tokens: u64, routing: Routing, random: &mut Random) -> Self {
        let sorted = if spec.rows == RowSource::Dense { tokens } else { tokens * spec.rows_per_token };
        let mut counts = vec![0_i32; spec.experts as usize];
        for row in 0..sorted {
            let expert = match routing {
                _ if spec.experts < 2 => 0,
                Routing::Random => random.below(spec.experts),
                Routing::One => spec.experts - 1,
                Routing::Skewed if row % 8 != 0 => 0,
                Routing::Skewed => (1 + random.below(spec.experts - 1)) % spec.experts,
            };
            // The second expert of a skewed routing stays empty.
            let expert = if routing == Routing::Skewed && expert == 1 { 0 } else { expert };
            counts[expert as usize] += 1;
        }
        let mut offsets = vec![0];
        for count in counts {
            offsets.push(offsets.last().copied().unwrap_or(0) + count);
        }
        let rows = if spec.rows == RowSource::Gathered { tokens } else { sorted };
        let map = (0..sorted).map(|_| random.below(rows.max(1)) as i32).collect();
        // The last row ends where its inputs end, so that reading beyond them is seen.
        let elements = if rows == 0 { 0 } else { (rows - 1) * spec.a_stride + spec.k };
        let weights = spec.experts * spec.matrices as u64 * spec.n * spec.k;
        Self {
            spec: spec.clone(),
            tokens,
            offsets,
            map,
            a: Numbers::random(elements, spec.a, 1.0, random),
            w: Numbers::random(weights, spec.w, 3.0 / (spec.k as f32).sqrt(), random),
            bias: (0..spec.experts * spec.matrices as u64 * spec.n).map(|_| random.float()).collect(),
            scale: (0..sorted).map(|_| random.float() + 1.5).collect(),
        }
    }

    /// Rows of the result.
    pub(crate) fn rows(&self) -> u64 {
        if self.spec.rows == RowSource::Dense { self.tokens } else { self.map.len() as u64 }
    }

    fn row(&self, p: usize) -> usize {
        if self.spec.rows == RowSource::Gathered { self.map[p] as usize } else { p }
    }

    /// The result of the kernel, as bit patterns widened to f32.
    pub(crate) fn run(&self, kernel: &Kernel, schedule: &Schedule, threads: usize, grain: u64) -> Vec<f32> {
        let spec = &self.spec;
        let layout = schedule.layout(spec);
        let weight = |e: u64, m: u64, r: u64, c: u64| {
            self.w.values[(((e * spec.matrices as u64 + m) * spec.n + r) * spec.k + c) as usize]
        };
        let sizes = [spec.experts, spec.matrices as u64, spec.n, spec.k];
        let w = Numbers { values: pack(&layout, sizes, weight), dtype: spec.w }.memory();
        let (a, bias, scale) = (self.a.memory(), Memory::of(&self.bias), Memory::of(&self.scale));
        let (offsets, map) = (Memory::of(&self.offsets), Memory::of(&self.map));
        let elements = if self.rows() == 0 { 0 } else { (self.rows() - 1) * spec.out_stride + spec.n };
        // An uncommon bit pattern shows places that must not be written.
        let out = Memory::new((elements * spec.out.bytes()) as usize, 0xa5);
        let mut args = vec![Argument::Read(&a), Argument::Read(&w)];
        if spec.bias {
            args.push(Argument::Read(&bias));
        }
        if spec.rows != RowSource::Dense {
            args.push(Argument::Read(&offsets));
        }
        if spec.rows == RowSource::Gathered {
            args.push(Argument::Read(&map));
        }
        if spec.scale != RowScale::None {
            args.push(Argument::Read(&scale));
        }
        args.extend([Argument::Write(&out), Argument::Value(self.tokens)]);
        let grid = schedule.grid(spec);
        let scratch: Vec<_> = (0..threads).map(|_| Memory::new(grid.scratch as usize, 0xff)).collect();
        run(kernel, &args, grid.items.eval(self.tokens).expect("fits"), grain, &scratch);
        if spec.out == DType::Bf16 {
            out.slice::<u16>().iter().map(|x| f32::from_bits(u32::from(*x) << 16)).collect()
        } else {
            out.slice::<f32>().to_vec()
        }
    }

    /// Runs the kernel and holds every element against f64; places between rows must stay as they were.
    pub(crate) fn check(&self, kernel: &Kernel, schedule: &Schedule) -> Vec<f32> {
        let spec = &self.spec;
        let result = self.run(kernel, schedule, 2, 1);
        let untouched = if spec.out == DType::Bf16 { 0xa5a5_0000_u32 } else { 0xa5a5_a5a5 };
        let mut expert = 0;
        for p in 0..self.rows() as usize {
            while spec.rows != RowSource::Dense && p as i32 >= self.offsets[expert + 1] {
                expert += 1;
            }
            let row = &self.a.values[self.row(p) * spec.a_stride as usize..][..spec.k as usize];
            let out = &result[p * spec.out_stride as usize..];
            for (n, got) in out[..spec.n as usize].iter().enumerate() {
                let (mut sums, mut size) = (Vec::new(), 0_f64);
                for m in 0..spec.matrices {
                    let matrix = expert * spec.matrices + m;
                    let w = &self.w.values[(matrix * spec.n as usize + n) * spec.k as usize..][..spec.k as usize];
                    let mut sum: f64 = row.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let mut magnitude: f64 = row.iter().zip(w).map(|(x, w)| f64::from((x * w).abs())).sum();
                    if spec.scale == RowScale::Input {
                        sum *= f64::from(self.scale[p]);
                        magnitude *= f64::from(self.scale[p]);
                    }
                    if spec.bias {
                        sum += f64::from(self.bias[matrix * spec.n as usize + n]);
                    }
                    size = size.max(magnitude + sum.abs());
                    sums.push(sum);
                }
                let mut y = evaluate(&spec.epilogue, &sums);
                let mut tolerance = size * (1.0 + size) * (4.0 + (spec.k as f64).sqrt()) * 2_f64.powi(-24);
                if spec.scale == RowScale::Output {
                    y *= f64::from(self.scale[p]);
                    tolerance *= f64::from(self.scale[p]);
                }
                tolerance += y.abs() * if spec.out == DType::Bf16 { 2_f64.powi(-8) } else { 2_f64.powi(-21) } + 1e-30;
                let got = f64::from(*got);
                assert!(
                    (got - y).abs() <= tolerance,
                    "{spec:?}\n{schedule:?}\ntokens {}, row {p}, column {n}: {got} is not {y} within {tolerance}",
                    self.tokens,
                );
            }
            if p + 1 < self.rows() as usize {
                let gap = &out[spec.n as usize..spec.out_stride as usize];
                assert!(gap.iter().all(|x| x.to_bits() == untouched), "{spec:?}: written beyond row {p}");
            }
        }
        result
    }
}

fn evaluate(e: &Epilogue, sums: &[f64]) -> f64 {
    match e {
        Epilogue::Sum(i) => sums[*i],
        Epilogue::Constant(c) => f64::from(*c),
        Epilogue::Unary(UnaryFn::Silu, x) => {
            let x = evaluate(x, sums);
            x / (1.0 + (-x).exp())
        }
        Epilogue::Unary(UnaryFn::Sigmoid, x) => 1.0 / (1.0 + (-evaluate(x, sums)).exp()),
        Epilogue::Unary(UnaryFn::Relu2, x) => evaluate(x, sums).max(0.0).powi(2),
        Epilogue::Unary(f, _) => panic!("{f:?} is not part of these tests"),
        Epilogue::Binary(BinaryFn::Mul, x, y) => evaluate(x, sums) * evaluate(y, sums),
        Epilogue::Binary(BinaryFn::Add, x, y) => evaluate(x, sums) + evaluate(y, sums),
        Epilogue::Binary(f, ..) => panic!("{f:?} is not part of these tests"),
    }
}
