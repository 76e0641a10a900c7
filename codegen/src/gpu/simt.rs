//! Products by fused multiply-adds: exact f32, and every mixture of f32 and bf16 operands and codes.
//!
//! A warp is 4 lanes high and 8 wide. Lane `(y, x)` holds rows `y, y + 4, ..` and packed columns
//! `x, x + 8, ..`, so that gate and up of one output meet in one lane, and eight lanes read eight
//! rows of weights from different banks.

use super::{
    Kernel,
    device::{at, element, wide},
    epilogue::Place,
    pipeline::Step,
    schedule::{self, Tile, packed_rows, size, staged_bytes},
    swizzle::Swizzle,
    tile::{Rows, int},
};
use crate::{grouped::Codes, mlir::V};
use moec_abi::DType;
use std::collections::BTreeMap;

/// Rows of one matrix whose scales are neighbours.
const BLOCK: i64 = schedule::BLOCK.cast_signed();

/// The part of a tile that one lane computes: `m` rows times `n` columns.
pub(super) struct Simt<'c> {
    m: u32,
    n: u32,
    depth: u32,
    /// First row and first packed column of the lane (i32).
    origin: [V<'c>; 2],
    /// First packed column of the warp (i32).
    warp_column: V<'c>,
    /// Codes, the bytes of their rows in a stage, and the scale and zero of each of the lane's columns: the values if
    /// a row has one of each, else their addresses.
    codes: Option<(Codes, u32, Vec<[Option<V<'c>>; 2]>)>,
}

impl<'c> Simt<'c> {
    /// The part of this lane.
    pub(super) fn new(kernel: &Kernel<'_, 'c>, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>) -> Self {
        let b = kernel.b;
        let columns = kernel.mode.columns;
        let across = kernel.schedule.warps / tile.down;
        let (m, n) = (tile.rows / tile.down / 4, columns / across / 8);
        let down = b.i32(tile.down.cast_signed());
        let warp_row = b.mulc(b.remui(kernel.warp, down), i64::from(m * 4));
        let warp_column = b.mulc(b.divui(kernel.warp, down), i64::from(n * 8));
        let row = b.addi(warp_row, b.shrui(kernel.lane, b.i32(3)));
        let column = b.addi(warp_column, b.andi(kernel.lane, b.i32(7)));
        let spec = kernel.spec;
        let codes = spec.codes.map(|codes| {
            let packed = i64::try_from(packed_rows(spec)).expect("weights fit in memory");
            let first = b.addi(b.mulc(column_tile, i64::from(columns)), column);
            let factors = |j: u32| {
                // Columns past the last one are not stored: any scale serves.
                let column = b.minsi(b.addc(first, i64::from(j * 8)), b.i32(int(packed - 1)));
                let row = b.addi(b.mulc(wide(b, rows.expert), packed), wide(b, column));
                let groups = i64::try_from(codes.groups(spec.k)).expect("groups fit in memory");
                let panel = b.mulc(b.divui(row, b.i64(BLOCK)), groups * BLOCK);
                let place = b.addi(panel, b.remui(row, b.i64(BLOCK)));
                [kernel.args.scales, kernel.args.zeros].map(|of| {
                    let at = of.map(|of| b.gep(of, "f32", place));
                    if groups == 1 { at.map(|at| b.load(at, "f32", 4)) } else { at }
                })
            };
            (codes, staged_bytes(spec, tile), (0..n).map(factors).collect())
        });
        Self { m, n, depth: tile.depth, origin: [row, column], warp_column, codes }
    }

    /// Number of sums of a lane.
    pub(super) fn sums(&self) -> usize {
        (self.m * self.n) as usize
    }

    /// Row and result column that the places of this lane count from.
    pub(super) fn lane_origin(&self, kernel: &Kernel<'_, 'c>) -> [V<'c>; 2] {
        let b = kernel.b;
        let column = kernel.result_column(self.warp_column);
        [self.origin[0], b.addi(column, b.andi(kernel.lane, b.i32(7)))]
    }

    /// What this lane holds of the result: single places.
    pub(super) fn places(&self, matrices: usize) -> Vec<Place> {
        let each = u32::try_from(matrices).expect("one or two matrices");
        let mut places = Vec::new();
        for i in 0..self.m {
            for q in 0..self.n / each {
                let sums = (0..each).map(|matrix| (i * self.n + q * each + matrix) as usize).collect();
                places.push(Place { row: i * 4, column: q * 8, columns: vec![sums] });
            }
        }
        places
    }

    /// Four neighbouring elements of a staged row, as f32.
    fn four(&self, kernel: &Kernel<'_, 'c>, base: V<'c>, dtype: DType, row: V<'c>, group: u32) -> [V<'c>; 4] {
        let b = kernel.b;
        let swizzle = Swizzle { row_bytes: self.depth * size(dtype) };
        let byte = group * 4 * size(dtype);
        let place = b.addc(swizzle.offset(b, row, b.i32((byte / 16).cast_signed())), i64::from(byte % 16));
        let ty = format!("vector<4x{}>", kernel.element(dtype));
        let values = b.load(at(b, base, place), &ty, 4 * size(dtype));
        let values = if dtype == DType::F32 { values } else { b.cast("arith.extf", values, "vector<4xf32>") };
        std::array::from_fn(|i| element(b, values, i, "f32"))
    }
}

/// Scales and zeros that were read: those of a group of inputs and a column.
type Factors<'c> = BTreeMap<(u64, u32), [Option<V<'c>>; 2]>;

impl<'c> Simt<'c> {
    /// Scale and zero of input `k` of stage `index`, for column `j` of the lane.
    fn factors(
        &self,
        kernel: &Kernel<'_, 'c>,
        index: V<'c>,
        (j, k): (u32, u32),
        known: &mut Factors<'c>,
    ) -> [Option<V<'c>>; 2] {
        let b = kernel.b;
        let Some((codes, _, columns)) = &self.codes else { return [None; 2] };
        let groups = codes.groups(kernel.spec.k);
        if groups == 1 {
            return columns[j as usize];
        }
        let depth = u64::from(self.depth);
        // Inputs of a stage that surely share a group are known by the first of them.
        let span = if codes.group.is_multiple_of(depth) {
            depth
        } else if depth.is_multiple_of(codes.group) {
            codes.group
        } else {
            1
        };
        let first = u64::from(k) / span * span;
        *known.entry((first, j)).or_insert_with(|| {
            let input = b.addc(b.mulc(index, i64::from(self.depth)), first.cast_signed());
            let number = |value: u64| b.i32(int(value.cast_signed()));
            // Inputs past the last one are zero: any scale serves.
            let group = b.minsi(b.divui(input, number(codes.group)), number(groups - 1));
            let group = b.mulc(group, BLOCK);
            columns[j as usize].map(|of| of.map(|of| b.load(b.gep(of, "f32", group), "f32", 4)))
        })
    }

    /// Four neighbouring weights of a staged row, decoded.
    fn decoded(
        &self,
        kernel: &Kernel<'_, 'c>,
        (base, index): (V<'c>, V<'c>),
        (row, j, group): (V<'c>, u32, u32),
        known: &mut Factors<'c>,
    ) -> Option<[V<'c>; 4]> {
        let b = kernel.b;
        let (codes, row_bytes, _) = self.codes.as_ref()?;
        let bits = u32::try_from(codes.bits).ok()?;
        let byte = group * bits / 2;
        let place = Swizzle { row_bytes: *row_bytes }.offset(b, row, b.i32((byte / 16).cast_signed()));
        let ty = format!("i{}", 4 * bits);
        let word = b.load(at(b, base, b.addc(place, i64::from(byte % 16))), &ty, bits / 2);
        let word = if bits == 8 { word } else { b.cast("arith.extui", word, "i32") };
        let mut values = Vec::new();
        for i in 0..4 {
            let code = b.andi(b.shrui(word, b.i32((i * bits).cast_signed())), b.i32((1 << bits) - 1));
            let [scale, zero] = self.factors(kernel, index, (j, group * 4 + i), known);
            values.push(codes.decode(b, code, "f32", scale?, zero));
        }
        values.try_into().ok()
    }
}

impl<'c> Step<'c> for Simt<'c> {
    fn step(&self, kernel: &Kernel<'_, 'c>, index: V<'c>, a: V<'c>, w: V<'c>, sums: &[V<'c>]) -> Vec<V<'c>> {
        let b = kernel.b;
        let mut sums = sums.to_vec();
        let mut known = Factors::new();
        for group in 0..self.depth / 4 {
            let row = |i: u32| b.addc(self.origin[0], i64::from(i * 4));
            let left: Vec<_> = (0..self.m).map(|i| self.four(kernel, a, kernel.spec.a, row(i), group)).collect();
            for j in 0..self.n {
                let column = b.addc(self.origin[1], i64::from(j * 8));
                let right = self
                    .decoded(kernel, (w, index), (column, j, group), &mut known)
                    .unwrap_or_else(|| self.four(kernel, w, kernel.spec.w, column, group));
                for (i, left) in left.iter().enumerate() {
                    let sum = &mut sums[i * self.n as usize + j as usize];
                    for (x, y) in left.iter().zip(right) {
                        *sum = b.fma(*x, y, *sum);
                    }
                }
            }
        }
        sums
    }
}
