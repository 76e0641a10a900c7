//! A grouped product with data: what the kernel gets, what it must give, and the comparison.

use half::bf16;
use moec_abi::{DType, Layout};
use moec_codegen::grouped::{Epilogue, Grouped, RowScale, RowSource};
use moec_ir::ops::{BinaryFn, UnaryFn};

/// How rows are spread over experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Routing {
    /// As evenly as possible.
    Even,
    /// Expert 0 gets half, expert 1 a quarter, ..
    Skewed,
    /// All rows to one expert.
    AllTo(u64),
    /// Evenly, but none to this expert.
    NoneTo(u64),
}

/// One launch.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) spec: Grouped,
    pub(crate) tokens: u64,
    pub(crate) routing: Routing,
}

/// Memory of a launch: the arguments in order, as bytes, and the place of the result among them.
pub(crate) struct Data {
    pub(crate) arguments: Vec<Argument>,
    pub(crate) expected: Vec<f64>,
    pub(crate) sorted_rows: u64,
}

/// One argument of the kernel.
pub(crate) enum Argument {
    Read(Vec<u8>),
    Written(u64),
    Value(u64),
}

/// Numbers in `(-1, 1)` with a fixed sequence.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / f64::from(1 << 23) - 1.0
    }
}

fn rounded(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        DType::Bf16 => bf16::from_f64(value).to_f64(),
        other => panic!("{other:?} is not tested"),
    }
}

fn bytes(values: &[f64], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|v| bf16::from_f64(*v).to_le_bytes()).collect(),
        other => panic!("{other:?} is not tested"),
    }
}

fn evaluate(epilogue: &Epilogue, sums: &[f64]) -> f64 {
    match epilogue {
        Epilogue::Sum(i) => sums[*i],
        Epilogue::Constant(value) => f64::from(*value),
        Epilogue::Unary(UnaryFn::Silu, x) => {
            let x = evaluate(x, sums);
            x / (1.0 + (-x).exp())
        }
        Epilogue::Unary(UnaryFn::GeluTanh, x) => {
            let x = evaluate(x, sums);
            0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh())
        }
        Epilogue::Binary(BinaryFn::Mul, x, y) => evaluate(x, sums) * evaluate(y, sums),
        Epilogue::Binary(BinaryFn::Min, x, y) => evaluate(x, sums).min(evaluate(y, sums)),
        other => panic!("{other:?} is not tested"),
    }
}

/// `silu(gate) * up`.
pub(crate) fn swiglu() -> Epilogue {
    let gate = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
    Epilogue::Binary(BinaryFn::Mul, Box::new(gate), Box::new(Epilogue::Sum(1)))
}

/// Gate and up of a small layer.
pub(crate) fn up(dtype: DType) -> Grouped {
    Grouped {
        symbol: "up".to_owned(),
        experts: 5,
        rows: RowSource::Gathered,
        rows_per_token: 2,
        matrices: 2,
        first: 0,
        given: Vec::new(),
        k: 128,
        n: 72,
        a_stride: 128,
        out_stride: 72,
        a: dtype,
        w: dtype,
        codes: None,
        out: dtype,
        bias: false,
        scale: RowScale::None,
        epilogue: swiglu(),
    }
}

/// The product back to the width of the model.
pub(crate) fn down(dtype: DType) -> Grouped {
    Grouped {
        symbol: "down".to_owned(),
        rows: RowSource::Sorted,
        matrices: 1,
        k: 192,
        n: 136,
        a_stride: 192,
        out_stride: 136,
        scale: RowScale::Output,
        epilogue: Epilogue::Sum(0),
        ..up(dtype)
    }
}

/// A product of all rows with one matrix.
pub(crate) fn dense(dtype: DType) -> Grouped {
    Grouped {
        symbol: "dense".to_owned(),
        experts: 1,
        rows: RowSource::Dense,
        rows_per_token: 1,
        scale: RowScale::None,
        ..down(dtype)
    }
}

impl Case {
    fn rows(&self) -> u64 {
        match self.spec.rows {
            RowSource::Dense => self.tokens,
            RowSource::Gathered | RowSource::Sorted => self.tokens * self.spec.rows_per_token,
        }
    }

    /// First row of each expert, and the end.
    fn offsets(&self) -> Vec<u64> {
        let (experts, rows) = (self.spec.experts, self.rows());
        let part = |e: u64, of: u64| rows * (e + 1) / of - rows * e / of;
        let mut left = rows;
        let counts = (0..experts).map(|e| match self.routing {
            Routing::Even => part(e, experts),
            Routing::Skewed => {
                let count = if e + 1 == experts { left } else { left.div_ceil(2) };
                left -= count;
                count
            }
            Routing::AllTo(chosen) => {
                if e == chosen {
                    rows
                } else {
                    0
                }
            }
            Routing::NoneTo(skipped) => match e.cmp(&skipped) {
                std::cmp::Ordering::Less => part(e, experts - 1),
                std::cmp::Ordering::Equal => 0,
                std::cmp::Ordering::Greater => part(e - 1, experts - 1),
            },
        });
        let mut offsets = vec![0];
        for count in counts {
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        offsets
    }

    /// Makes operands and the result in f64.
    pub(crate) fn data(&self, layout: &Layout) -> Data {
        let spec = &self.spec;
        let mut numbers = Numbers(self.tokens ^ 0x9e37_79b9);
        let rows = self.rows();
        let a_rows = if spec.rows == RowSource::Sorted { rows } else { self.tokens };
        // What lies between rows must not matter.
        let mut a = vec![f64::NAN; (a_rows * spec.a_stride) as usize];
        for row in 0..a_rows {
            for c in 0..spec.k {
                a[(row * spec.a_stride + c) as usize] = rounded(numbers.next(), spec.a);
            }
        }
        let matrices = spec.matrices as u64;
        let size = 2.0 / (spec.k as f64).sqrt();
        let (w, packed) = if spec.codes.is_some() {
            let coded = crate::codes::draw(spec, layout, &mut numbers);
            (coded.weights, coded.packed)
        } else {
            let count = spec.experts * matrices * spec.n * spec.k;
            let w: Vec<f64> = (0..count).map(|_| rounded(numbers.next() * size, spec.w)).collect();
            let packed = bytes(&self.pack(&w, layout), spec.w);
            (w, vec![packed])
        };
        let bias: Vec<f64> =
            (0..spec.experts * matrices * spec.n).map(|_| rounded(numbers.next(), DType::F32)).collect();
        let offsets = self.offsets();
        let map: Vec<u64> = (0..rows).map(|p| (p * 7 + 3) % self.tokens).collect();
        let scale: Vec<f64> = (0..rows).map(|_| rounded(numbers.next(), DType::F32)).collect();

        let mut expected = vec![f64::NAN; (rows * spec.out_stride) as usize];
        for p in 0..rows {
            let expert = match spec.rows {
                RowSource::Dense => 0,
                RowSource::Gathered | RowSource::Sorted => offsets.partition_point(|o| *o <= p) as u64 - 1,
            };
            let row = if spec.rows == RowSource::Gathered { map[p as usize] } else { p };
            let a = &a[(row * spec.a_stride) as usize..][..spec.k as usize];
            for n in 0..spec.n {
                let sums: Vec<f64> = (0..matrices)
                    .map(|m| {
                        let at = (expert * matrices + m) * spec.n + n;
                        let w = &w[(at * spec.k) as usize..][..spec.k as usize];
                        let mut sum: f64 = a.iter().zip(w).map(|(x, y)| x * y).sum();
                        if spec.scale == RowScale::Input {
                            sum *= scale[p as usize];
                        }
                        if spec.bias { sum + bias[at as usize] } else { sum }
                    })
                    .collect();
                let value = evaluate(&spec.epilogue, &sums);
                let factor = if spec.scale == RowScale::Output { scale[p as usize] } else { 1.0 };
                expected[(p * spec.out_stride + n) as usize] = value * factor;
            }
        }

        let ints = |values: &[u64]| values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect::<Vec<_>>();
        let mut arguments = vec![Argument::Read(bytes(&a, spec.a))];
        arguments.extend(packed.into_iter().map(Argument::Read));
        if spec.bias {
            arguments.push(Argument::Read(bytes(&bias, DType::F32)));
        }
        if spec.rows != RowSource::Dense {
            arguments.push(Argument::Read(ints(&offsets)));
        }
        if spec.rows == RowSource::Gathered {
            arguments.push(Argument::Read(ints(&map)));
        }
        if spec.scale != RowScale::None {
            arguments.push(Argument::Read(bytes(&scale, DType::F32)));
        }
        arguments.push(Argument::Written(rows * spec.out_stride * spec.out.bytes()));
        arguments.push(Argument::Value(self.tokens));
        Data { arguments, expected, sorted_rows: rows }
    }

    /// Weights in the order of `layout`.
    fn pack(&self, w: &[f64], layout: &Layout) -> Vec<f64> {
        let spec = &self.spec;
        let Layout::Interleaved { block, columns } = *layout else { panic!("{layout:?} is not what kernels ask for") };
        let (rows, width) = (spec.n.next_multiple_of(block), spec.k.next_multiple_of(columns));
        let matrices = spec.matrices as u64;
        let mut packed = vec![0.0; (spec.experts * matrices * rows * width) as usize];
        for e in 0..spec.experts {
            for m in 0..matrices {
                for r in 0..spec.n {
                    let row = ((e * rows / block + r / block) * matrices + m) * block + r % block;
                    let from = ((e * matrices + m) * spec.n + r) * spec.k;
                    packed[(row * width) as usize..][..spec.k as usize]
                        .copy_from_slice(&w[from as usize..][..spec.k as usize]);
                }
            }
        }
        packed
    }

    /// Compares the bytes of a result, all 0xff before the launch.
    pub(crate) fn compare(&self, data: &Data, result: &[u8]) {
        let spec = &self.spec;
        let got: Vec<f64> = match spec.out {
            DType::F32 => result.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            _ => result.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect(),
        };
        // The error of f32 sums, and half a unit in the last place of the result.
        let rounding = if spec.out == DType::F32 { 0.0 } else { 1.0 / 256.0 };
        for p in 0..data.sorted_rows {
            let row = &data.expected[(p * spec.out_stride) as usize..][..spec.out_stride as usize];
            let largest = row.iter().take(spec.n as usize).fold(0.0_f64, |m, v| m.max(v.abs()));
            for (c, want) in row.iter().enumerate() {
                let got = got[p as usize * spec.out_stride as usize + c];
                if want.is_nan() {
                    assert!(got.is_nan(), "row {p}, column {c} is outside the result but was written: {self:?}");
                    continue;
                }
                let error = (got - want).abs();
                let allowed = want.abs() * rounding + largest.max(0.1) * 4e-6;
                assert!(error <= allowed, "row {p}, column {c}: {got}, want {want}: {self:?}");
            }
        }
    }
}
