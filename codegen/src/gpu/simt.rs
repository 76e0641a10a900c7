//! Products by fused multiply-adds: exact f32, and every mixture of f32 and bf16 operands and codes.
//!
//! A warp is 4 lanes high and 8 wide. Lane `(y, x)` holds rows `y, y + 4, ..` and packed columns
//! `x, x + 8, ..`, so that gate and up of one output meet in one lane, and eight lanes read eight
//! rows of weights from different banks.

use super::{
    Kernel,
    codes::{Factors, Four, Staged},
    device::{at, element},
    epilogue::Place,
    pipeline::Step,
    schedule::{Tile, size},
    swizzle::Swizzle,
    tile::Rows,
};
use crate::mlir::V;
use moec_abi::DType;

/// The part of a tile that one lane computes: `m` rows times `n` columns.
pub(super) struct Simt<'c> {
    m: u32,
    n: u32,
    depth: u32,
    /// First row and first packed column of the lane (i32).
    origin: [V<'c>; 2],
    /// First packed column of the warp (i32).
    warp_column: V<'c>,
    /// The weights of the lane's columns, if they are codes.
    codes: Option<Staged<'c>>,
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
        let codes = Staged::new(kernel, tile, rows, column_tile, (column, n));
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
                let right = match &self.codes {
                    Some(codes) => {
                        let four = Four { row: column, column: j, first: group * 4, beside: None };
                        codes.four(kernel, (w, index), four, kernel.spec.w, &mut known)
                    }
                    None => self.four(kernel, w, kernel.spec.w, column, group),
                };
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
