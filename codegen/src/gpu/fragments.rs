//! Products on tensor cores: `mma.sync` m16n8k16 on fragments that `ldmatrix` reads, or of decoded weights.
//!
//! In every lane `l` with `g = l / 4` and `t = l % 4`, a 16x8 block of sums holds places
//! `(g, 2t)`, `(g, 2t + 1)`, `(g + 8, 2t)` and `(g + 8, 2t + 1)`.

use super::{
    Kernel,
    codes::{Factors, Four, Staged},
    device::{at, at_const, element, field, vector},
    epilogue::Place,
    pipeline::Step,
    schedule::Tile,
    swizzle::Swizzle,
    tile::Rows,
};
use crate::mlir::{Builder, V};
use moec_abi::DType;

/// The part of a tile that one warp computes: `m` times `n` blocks of 16x8.
pub(super) struct Mma<'c> {
    m: u32,
    n: u32,
    depth: u32,
    /// First row and first packed column of the warp (i32).
    origin: [V<'c>; 2],
    /// The weights of the lane's columns, if they are codes.
    codes: Option<Staged<'c>>,
}

impl<'c> Mma<'c> {
    /// The part of this warp.
    pub(super) fn new(kernel: &Kernel<'_, 'c>, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>) -> Self {
        let b = kernel.b;
        let columns = kernel.mode.columns;
        let across = kernel.schedule.warps / tile.down;
        let (m, n) = (tile.rows / tile.down / 16, columns / across / 8);
        let down = b.i32(tile.down.cast_signed());
        let origin = [
            b.mulc(b.remui(kernel.warp, down), i64::from(m * 16)),
            b.mulc(b.divui(kernel.warp, down), i64::from(n * 8)),
        ];
        let column = b.addi(origin[1], b.shrui(kernel.lane, b.i32(2)));
        let codes = Staged::new(kernel, tile, rows, column_tile, (column, n));
        Self { m, n, depth: tile.depth, origin, codes }
    }

    /// Number of sums of a lane.
    pub(super) fn sums(&self) -> usize {
        (self.m * self.n * 4) as usize
    }

    /// Row and result column that the places of this lane count from.
    pub(super) fn lane_origin(&self, kernel: &Kernel<'_, 'c>) -> [V<'c>; 2] {
        let b = kernel.b;
        let row = b.addi(self.origin[0], b.shrui(kernel.lane, b.i32(2)));
        let pair = b.shli(b.andi(kernel.lane, b.i32(3)), b.i32(1));
        [row, b.addi(kernel.result_column(self.origin[1]), pair)]
    }

    /// What this lane holds of the result: pairs of neighbouring columns.
    pub(super) fn places(&self, matrices: usize) -> Vec<Place> {
        let each = u32::try_from(matrices).expect("one or two matrices");
        let mut places = Vec::new();
        for i in 0..self.m {
            for q in 0..self.n / each {
                for half in 0..2 {
                    let sum = |matrix: u32, c: u32| ((i * self.n + q * each + matrix) * 4 + half * 2 + c) as usize;
                    let columns = (0..2).map(|c| (0..each).map(|matrix| sum(matrix, c)).collect()).collect();
                    places.push(Place { row: i * 16 + half * 8, column: q * 8, columns });
                }
            }
        }
        places
    }
}

impl<'c> Step<'c> for Mma<'c> {
    fn step(&self, kernel: &Kernel<'_, 'c>, index: V<'c>, a: V<'c>, w: V<'c>, sums: &[V<'c>]) -> Vec<V<'c>> {
        if let Some(codes) = &self.codes {
            return self.decoded(kernel, codes, (a, w, index), sums);
        }
        let b = kernel.b;
        let swizzle = Swizzle { row_bytes: self.depth * 2 };
        let (lane, row_bytes) = (kernel.lane, u64::from(swizzle.row_bytes));
        let low = b.andi(lane, b.i32(7));
        // Lanes 0-15 name the rows of the left half of a 16x16 block, lanes 16-31 those of the right half.
        let a_row = b.addi(self.origin[0], b.andi(lane, b.i32(15)));
        let a_half = b.shrui(lane, b.i32(4));
        // Lanes 0-7 and 8-15 name the two halves of eight packed rows, the others those of the next eight.
        let w_row = b.addi(self.origin[1], b.addi(low, b.shli(b.shrui(lane, b.i32(4)), b.i32(3))));
        let w_half = b.andi(b.shrui(lane, b.i32(3)), b.i32(1));
        let mut sums = sums.to_vec();
        for part in 0..self.depth / 16 {
            // Blocks of 16 rows do not change the order of pieces, so one address serves all.
            let piece = |half: V<'c>| b.ori(half, b.i32((part * 2).cast_signed()));
            let a_at = at(b, a, swizzle.offset(b, a_row, piece(a_half)));
            let w_at = at(b, w, swizzle.offset(b, w_row, piece(w_half)));
            let block = |i: u32| u64::from(i) * 16 * row_bytes;
            let left: Vec<_> = (0..self.m).map(|i| ldmatrix(b, at_const(b, a_at, block(i)))).collect();
            for j in 0..self.n.div_ceil(2) {
                let right = ldmatrix(b, at_const(b, w_at, block(j)));
                for (i, left) in left.iter().enumerate() {
                    for side in 0..2.min(self.n - 2 * j) {
                        let place = (i * self.n as usize + (2 * j + side) as usize) * 4;
                        let pair = &right[2 * side as usize..][..2];
                        let next = mma(b, left, pair, &sums[place..place + 4]);
                        sums[place..place + 4].copy_from_slice(&next);
                    }
                }
            }
        }
        sums
    }
}

impl<'c> Mma<'c> {
    /// The products of stage `index` with decoded weights. A lane decodes four neighbouring codes at a time, so inputs
    /// `4t..4t + 4` of the operand take the places of `2t`, `2t + 1`, `2t + 8` and `2t + 9` in both fragments.
    fn decoded(
        &self,
        kernel: &Kernel<'_, 'c>,
        codes: &Staged<'c>,
        (a, w, index): (V<'c>, V<'c>, V<'c>),
        sums: &[V<'c>],
    ) -> Vec<V<'c>> {
        let b = kernel.b;
        let swizzle = Swizzle { row_bytes: self.depth * 2 };
        let (group, four) = (b.shrui(kernel.lane, b.i32(2)), b.andi(kernel.lane, b.i32(3)));
        let (a_row, w_row) = (b.addi(self.origin[0], group), b.addi(self.origin[1], group));
        let (piece, inside) = (b.shrui(four, b.i32(1)), b.shli(b.andi(four, b.i32(1)), b.i32(3)));
        let mut sums = sums.to_vec();
        let mut known = Factors::new();
        for part in 0..self.depth / 16 {
            // Blocks of eight rows do not change the order of pieces, so one address serves all.
            let place = swizzle.offset(b, a_row, b.ori(piece, b.i32((part * 2).cast_signed())));
            let a_at = at(b, a, b.addi(place, inside));
            let half = |row: u32| {
                let both = b.load(at_const(b, a_at, u64::from(row * swizzle.row_bytes)), "vector<2xi32>", 8);
                [0, 1].map(|i| element(b, both, i, "i32"))
            };
            let left: Vec<_> = (0..self.m)
                .map(|i| {
                    let ([low, next], [below, last]) = (half(i * 16), half(i * 16 + 8));
                    [low, below, next, last]
                })
                .collect();
            for j in 0..self.n {
                let row = b.addc(w_row, i64::from(j * 8));
                let wanted = Four { row, column: j, first: part * 16, beside: Some(four) };
                // The conversion rounds, so that decoding need not.
                let values = codes.four(kernel, (w, index), wanted, DType::F32, &mut known);
                let pair = |i: usize| {
                    let narrow = b.cast("arith.truncf", vector(b, &values[i..i + 2]), "vector<2xbf16>");
                    b.bitcast(narrow, "i32")
                };
                let right = [pair(0), pair(2)];
                for (i, left) in left.iter().enumerate() {
                    let place = (i * self.n as usize + j as usize) * 4;
                    let next = mma(b, left, &right, &sums[place..place + 4]);
                    sums[place..place + 4].copy_from_slice(&next);
                }
            }
        }
        sums
    }
}

/// Four 8x8 blocks of 16-bit elements.
fn ldmatrix<'c>(b: &Builder<'c>, from: V<'c>) -> [V<'c>; 4] {
    let name = "llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4.b16.p3";
    let blocks = b.intrinsic(name, &[from], "!llvm.struct<(i32, i32, i32, i32)>");
    std::array::from_fn(|i| field(b, blocks, i, "i32"))
}

/// `c + a * b` for blocks of 16x16 and 16x8.
pub(super) fn mma<'c>(b: &Builder<'c>, left: &[V<'c>], right: &[V<'c>], sums: &[V<'c>]) -> [V<'c>; 4] {
    let operands: Vec<_> = [left, right, sums].concat();
    let result = b.intrinsic("llvm.nvvm.mma.m16n8k16.row.col.bf16", &operands, "!llvm.struct<(f32, f32, f32, f32)>");
    std::array::from_fn(|i| field(b, result, i, "f32"))
}
