//! Weights of a stage that are codes: where a lane finds them, and what they stand for.

use super::{
    Kernel,
    device::{at, wide},
    schedule::{self, Tile, packed_rows, staged_bytes},
    swizzle::Swizzle,
    tile::{Rows, int},
};
use crate::{
    codes::{Codes, Places},
    mlir::V,
};
use moec_abi::DType;
use std::collections::BTreeMap;

/// Rows of one matrix whose scales are neighbours.
const BLOCK: i64 = schedule::BLOCK.cast_signed();

/// Scales and zeros that were read: those of a group of inputs and a column.
pub(super) type Factors<'c> = BTreeMap<(u64, u32), [Option<V<'c>>; 2]>;

/// The codes of a lane's packed columns, which lie eight apart.
pub(super) struct Staged<'c> {
    codes: Codes,
    depth: u32,
    /// Bytes of a packed row in a stage.
    row_bytes: u32,
    /// Scale and zero of each column: the values if a row has one of each, else the addresses of the first.
    columns: Vec<[Option<V<'c>>; 2]>,
}

/// Four neighbouring weights of a stage.
#[derive(Clone, Copy)]
pub(super) struct Four<'c> {
    /// Row of the stage (i32).
    pub(super) row: V<'c>,
    /// Number of the lane's column.
    pub(super) column: u32,
    /// First input in the stage.
    pub(super) first: u32,
    /// By how many times four inputs, less than four, the lane is beside it (i32).
    pub(super) beside: Option<V<'c>>,
}

impl<'c> Staged<'c> {
    /// The codes of `count` columns from `first` (i32) of the column tile on; `None` where weights are values.
    pub(super) fn new(
        kernel: &Kernel<'_, 'c>,
        tile: &Tile,
        rows: Rows<'c>,
        column_tile: V<'c>,
        (first, count): (V<'c>, u32),
    ) -> Option<Self> {
        let (b, spec) = (kernel.b, kernel.spec);
        let codes = spec.codes?;
        let packed = i64::try_from(packed_rows(spec)).expect("weights fit in memory");
        let first = b.addi(b.mulc(column_tile, i64::from(kernel.mode.columns)), first);
        let groups = i64::try_from(codes.groups(spec.k)).expect("groups fit in memory");
        let factors = |j: u32| {
            // Columns past the last one are not stored: any scale serves.
            let column = b.minsi(b.addc(first, i64::from(j * 8)), b.i32(int(packed - 1)));
            let row = b.addi(b.mulc(wide(b, rows.expert), packed), wide(b, column));
            let panel = b.mulc(b.divui(row, b.i64(BLOCK)), groups * BLOCK);
            let place = b.addi(panel, b.remui(row, b.i64(BLOCK)));
            let scale = kernel.args.scales.map(|of| at(b, of, b.mulc(place, codes.scale.bytes().cast_signed())));
            let zero = kernel.args.zeros.map(|of| b.gep(of, "f32", place));
            if groups == 1 {
                [scale.map(|at| codes.scales(b, at, Places(None))), zero.map(|at| b.load(at, "f32", 4))]
            } else {
                [scale, zero]
            }
        };
        let columns = (0..count).map(factors).collect();
        Some(Self { codes, depth: tile.depth, row_bytes: staged_bytes(spec, tile), columns })
    }

    /// Scale and zero of input `k` of stage `index`, for column `j` of the lane.
    fn factors(
        &self,
        kernel: &Kernel<'_, 'c>,
        index: V<'c>,
        (j, k): (u32, u32),
        known: &mut Factors<'c>,
    ) -> [Option<V<'c>>; 2] {
        let (b, codes) = (kernel.b, &self.codes);
        let groups = codes.groups(kernel.spec.k);
        let column = self.columns[j as usize];
        if groups == 1 {
            return column;
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
            let [scale, zero] = column;
            let bytes = codes.scale.bytes().cast_signed();
            let scale = scale.map(|of| codes.scales(b, at(b, of, wide(b, b.mulc(group, bytes))), Places(None)));
            [scale, zero.map(|of| b.load(b.gep(of, "f32", group), "f32", 4))]
        })
    }

    /// Four neighbouring weights of stage `index`, which lies at `base`, of type `w`.
    pub(super) fn four(
        &self,
        kernel: &Kernel<'_, 'c>,
        (base, index): (V<'c>, V<'c>),
        four: Four<'c>,
        w: DType,
        known: &mut Factors<'c>,
    ) -> [V<'c>; 4] {
        let b = kernel.b;
        let bits = u32::try_from(self.codes.bits).expect("codes are small");
        let byte = four.first / 4 * bits / 2;
        let place = Swizzle { row_bytes: self.row_bytes }.offset(b, four.row, b.i32((byte / 16).cast_signed()));
        let place = b.addc(place, i64::from(byte % 16));
        let place = four.beside.map_or(place, |beside| b.addi(place, b.mulc(beside, i64::from(bits / 2))));
        let word = b.load(at(b, base, place), &format!("i{}", 4 * bits), bits / 2);
        let word = if bits == 8 { word } else { b.cast("arith.extui", word, "i32") };
        std::array::from_fn(|i| {
            let i = u32::try_from(i).expect("one of four");
            let code = b.andi(b.shrui(word, b.i32((i * bits).cast_signed())), b.i32((1 << bits) - 1));
            // Lanes side by side share a scale.
            let input = four.first + if four.beside.is_some() { 0 } else { i };
            let [scale, zero] = self.factors(kernel, index, (four.column, input), known);
            self.codes.decode(b, (code, Places(None)), (scale.expect("codes have scales"), zero), w)
        })
    }
}
