//! From sums to the result: scale, bias, activation, rounding, and stores of whole lines.

use super::{
    Kernel,
    device::{at, number, vector, wide},
    schedule::size,
    swizzle::Swizzle,
    tile::{Rows, int},
};
use crate::{
    grouped::{Epilogue, RowScale},
    math,
    mlir::{Builder, V},
};
use moec_abi::DType;
use moec_ir::ops::UnaryFn;
use std::collections::BTreeMap;

/// Neighbouring columns of the result that one lane holds.
pub(super) struct Place {
    /// Row, from the lane's first.
    pub(super) row: u32,
    /// Column of the result, from the lane's first.
    pub(super) column: u32,
    /// For each column, which sum of the lane belongs to which matrix.
    pub(super) columns: Vec<Vec<usize>>,
}

/// The part of a tile that some threads store together.
pub(super) struct Part<'c> {
    /// Where its rows pass through shared memory.
    pub(super) base: V<'c>,
    /// First row of the tile, and their number.
    pub(super) first_row: u32,
    pub(super) rows: u32,
    /// First column of the result (i32).
    pub(super) first_column: V<'c>,
    /// Columns of the result.
    pub(super) columns: u32,
    /// Whether pieces of rows in shared memory are mixed, or rows have gaps, against bank conflicts.
    pub(super) swizzled: bool,
}

impl<'c> Part<'c> {
    /// Address in shared memory of a byte of a row of the part (i32 values).
    pub(super) fn address(&self, b: &Builder<'c>, row: V<'c>, byte: V<'c>, element: u32) -> V<'c> {
        let row_bytes = self.columns * element;
        let offset = if self.swizzled {
            let piece = Swizzle { row_bytes }.offset(b, row, b.shrui(byte, b.i32(4)));
            b.addi(piece, b.andi(byte, b.i32(15)))
        } else {
            b.addi(b.mulc(row, i64::from(row_bytes + GAP * element)), byte)
        };
        at(b, self.base, offset)
    }
}

/// Elements between rows in shared memory, unless their pieces are mixed.
pub(super) const GAP: u32 = 8;

impl<'c> Kernel<'_, 'c> {
    /// Stores a part of a tile, of which `write` brings results to shared memory, so that rows leave in 16-byte pieces.
    /// Places of this lane count from row and column `origin`.
    pub(super) fn store(
        &self,
        rows: Rows<'c>,
        part: &Part<'c>,
        origin: [V<'c>; 2],
        write: impl FnOnce(&mut Values<'_, '_, 'c>),
    ) {
        let b = self.b;
        let first = i64::from(part.first_row);
        let rows = Rows { first: b.addc(rows.first, first), count: b.addc(rows.count, -first), ..rows };
        write(&mut Values::new(self, rows, origin, part.first_column));
        self.meet();
        self.copy_out(rows, part);
    }

    /// Writes the results of this lane as it holds them.
    pub(super) fn write(&self, part: &Part<'c>, places: &[Place], sums: &[V<'c>], values: &mut Values<'_, '_, 'c>) {
        let (b, spec) = (self.b, self.spec);
        let element = size(spec.out);
        let origin = values.origin;
        for place in places {
            let results = (place.column..).zip(&place.columns).map(|(column, of)| {
                let sums: Vec<_> = of.iter().map(|i| sums[*i]).collect();
                values.value(place.row, column, &sums)
            });
            let results: Vec<_> = results.collect();
            let value = vector(b, &results);
            let count = results.len();
            let value = if spec.out == DType::F32 {
                value
            } else {
                b.cast("arith.truncf", value, &format!("vector<{count}xbf16>"))
            };
            let row = b.addc(origin[0], i64::from(place.row));
            let byte = b.mulc(b.addc(origin[1], i64::from(place.column)), i64::from(element));
            let to = part.address(b, row, byte, element);
            b.store(value, to, element * u32::try_from(count).expect("one or two columns"));
        }
    }

    /// Copies the rows that exist from shared memory to the result.
    fn copy_out(&self, rows: Rows<'c>, part: &Part<'c>) {
        let (b, spec) = (self.b, self.spec);
        let element = size(spec.out);
        // The widest piece that starts at a multiple of its size in every row and never crosses the last column.
        let pieces = [16 / element, 8 / element, 4 / element];
        let fits = |p: &u32| [spec.out_stride, spec.n].iter().all(|n| n.is_multiple_of(u64::from(*p)));
        let piece = pieces.into_iter().find(fits).unwrap_or(1);
        let per_row = i64::from(part.columns / piece);
        let ty = match piece {
            1 => self.element(spec.out).to_owned(),
            _ => format!("vector<{piece}x{}>", self.element(spec.out)),
        };
        let bytes = piece * element;
        let total = b.mulc(b.minsi(rows.count, number(b, part.rows)), per_row);
        // Where every tile is full of columns, so is every piece.
        let full = spec.n.is_multiple_of(u64::from(self.mode.out_columns(spec)));
        let copy = |index: V<'c>| {
            let per_row = b.i32(int(per_row));
            let (row, place) = (b.divui(index, per_row), b.remui(index, per_row));
            let column = b.addi(part.first_column, b.mulc(place, i64::from(piece)));
            let copy = || {
                let from = part.address(b, row, b.mulc(place, i64::from(bytes)), element);
                let value = b.load(from, &ty, bytes);
                let stride = i64::try_from(spec.out_stride).expect("rows fit in memory");
                let to = b.mulc(wide(b, b.addi(rows.first, row)), stride);
                let to = b.gep(self.args.out, self.element(spec.out), b.addi(to, wide(b, column)));
                b.store(value, to, bytes);
            };
            if full {
                copy();
            } else {
                let n = i64::try_from(spec.n).expect("columns fit in 32 bits");
                b.if_(b.cmpi("slt", column, b.i32(int(n))), copy);
            }
        };
        // Pieces of a thread lie side by side in time: each waits for shared memory.
        let each = (part.rows * (part.columns / piece)).div_ceil(self.threads);
        let turn = each.min(4);
        let some = |first: V<'c>| {
            for i in 0..turn {
                let index = b.addc(first, i64::from(i * self.threads));
                b.if_(b.cmpi("slt", index, total), || copy(index));
            }
        };
        if each == turn {
            some(self.thread);
        } else {
            b.rolled(self.thread, total, number(b, turn * self.threads), &[], |first, _| {
                some(first);
                Vec::new()
            });
        }
    }
}

/// Computes results; biases and scales are read once each.
pub(super) struct Values<'k, 'b, 'c> {
    kernel: &'k Kernel<'b, 'c>,
    rows: Rows<'c>,
    origin: [V<'c>; 2],
    first_column: V<'c>,
    biases: BTreeMap<u32, Vec<V<'c>>>,
    scales: BTreeMap<u32, V<'c>>,
}

impl<'k, 'b, 'c> Values<'k, 'b, 'c> {
    /// Results of `rows` from row and column `origin` of the tile on, whose first column is `first_column`.
    pub(super) fn new(kernel: &'k Kernel<'b, 'c>, rows: Rows<'c>, origin: [V<'c>; 2], first_column: V<'c>) -> Self {
        Self { kernel, rows, origin, first_column, biases: BTreeMap::new(), scales: BTreeMap::new() }
    }

    /// The result of one place, from the sums of all matrices.
    pub(super) fn value(&mut self, row: u32, column: u32, sums: &[V<'c>]) -> V<'c> {
        let (b, spec) = (self.kernel.b, self.kernel.spec);
        let given = self.given(row, column);
        let mut sums = spec.start(b, sums, &given, b.f32(0.0));
        if spec.scale == RowScale::Input {
            let scale = self.scale(row);
            sums = sums.into_iter().map(|s| b.mulf(s, scale)).collect();
        }
        if spec.bias {
            let biases = self.bias(column);
            sums = sums.into_iter().zip(biases).map(|(s, bias)| b.addf(s, bias)).collect();
        }
        let value = if spec.out == DType::F32 { spec.epilogue.emit(b, &sums) } else { fast(b, &spec.epilogue, &sums) };
        if spec.scale == RowScale::Output { b.mulf(value, self.scale(row)) } else { value }
    }

    fn bias(&mut self, column: u32) -> Vec<V<'c>> {
        let (b, spec, args) = (self.kernel.b, self.kernel.spec, &self.kernel.args);
        let (origin, first, expert) = (self.origin[1], self.first_column, self.rows.expert);
        self.biases
            .entry(column)
            .or_insert_with(|| {
                let n = i64::try_from(spec.n).expect("columns fit in 32 bits");
                // Columns past the last one are not stored: any bias serves.
                let column = b.minsi(b.addc(b.addi(first, origin), i64::from(column)), b.i32(int(n - 1)));
                let sums = i64::try_from(spec.sums()).expect("one or two sums");
                let start = b.addi(b.mulc(wide(b, expert), sums * n), wide(b, column));
                let bias = args.bias.expect("a product with bias has the argument");
                (0..sums).map(|m| b.load(b.gep(bias, "f32", b.addc(start, m * n)), "f32", 4)).collect()
            })
            .clone()
    }

    /// What the sums of a place start from.
    fn given(&self, row: u32, column: u32) -> Vec<V<'c>> {
        let (b, spec, rows) = (self.kernel.b, self.kernel.spec, self.rows);
        let n = i64::try_from(spec.n).expect("columns fit in 32 bits");
        // Places outside the result are not stored: any number serves.
        let column = b.addc(b.addi(self.first_column, self.origin[1]), i64::from(column));
        let column = wide(b, b.minsi(column, b.i32(int(n - 1))));
        let row = b.minsi(b.addc(self.origin[0], i64::from(row)), b.addc(rows.count, -1));
        let row = b.addi(rows.first, row);
        let load = |(numbers, map): &(V<'c>, Option<V<'c>>)| {
            let row = map.map_or(row, |map| b.load(b.gep(map, "i32", row), "i32", 4));
            b.load(b.gep(*numbers, "f32", b.addi(b.mulc(wide(b, row), n), column)), "f32", 4)
        };
        self.kernel.args.given.iter().flatten().map(load).collect()
    }

    fn scale(&mut self, row: u32) -> V<'c> {
        let (b, args, rows, origin) = (self.kernel.b, &self.kernel.args, self.rows, self.origin[0]);
        *self.scales.entry(row).or_insert_with(|| {
            // Rows past the last one are not stored: any scale serves.
            let row = b.minsi(b.addc(origin, i64::from(row)), b.addc(rows.count, -1));
            let scale = args.scale.expect("a product with a row scale has the argument");
            b.load(b.gep(scale, "f32", b.addi(rows.first, row)), "f32", 4)
        })
    }
}

/// The epilogue with the approximate exponential and reciprocal of the hardware: two units in the
/// last place of f32, far below the rounding of a bf16 result.
fn fast<'c>(b: &Builder<'c>, epilogue: &Epilogue, sums: &[V<'c>]) -> V<'c> {
    match epilogue {
        Epilogue::Sum(i) => sums[*i],
        Epilogue::Constant(value) => b.f32(*value),
        Epilogue::Binary(function, x, y) => math::binary(b, *function, fast(b, x, sums), fast(b, y, sums)),
        Epilogue::Unary(function, x) => {
            let x = fast(b, x, sums);
            match function {
                UnaryFn::Silu => b.mulf(x, sigmoid(b, x)),
                UnaryFn::Sigmoid => sigmoid(b, x),
                UnaryFn::GeluTanh => {
                    let cubic = b.fma(b.mulf(b.mulf(x, x), x), b.f32(0.044_715), x);
                    b.mulf(x, sigmoid(b, b.mulf(cubic, b.f32(1.595_769))))
                }
                UnaryFn::Relu
                | UnaryFn::Relu2
                | UnaryFn::Gelu
                | UnaryFn::Tanh
                | UnaryFn::Exp
                | UnaryFn::Log
                | UnaryFn::Neg
                | UnaryFn::Square
                | UnaryFn::Softplus
                | UnaryFn::Sqrt
                | UnaryFn::Sign
                | UnaryFn::Abs
                | UnaryFn::Identity => math::unary(b, *function, x),
            }
        }
    }
}

fn sigmoid<'c>(b: &Builder<'c>, x: V<'c>) -> V<'c> {
    let power = b.mulf(x, b.f32(-std::f32::consts::LOG2_E));
    let power = b.intrinsic("llvm.nvvm.ex2.approx.ftz.f", &[power], "f32");
    b.intrinsic("llvm.nvvm.rcp.approx.ftz.f", &[b.addf(power, b.f32(1.0))], "f32")
}
