//! Which piece of the product a block computes.
//!
//! The host knows the number of tokens only, so it launches an upper bound of blocks. Each block
//! looks up on the device which expert and which of its rows it has; blocks past the last row end.

use super::{
    Kernel,
    device::{ballot, lowest_bit, narrow, number, scan, shuffle},
    schedule::Mode,
};
use crate::{
    grouped::RowSource,
    mlir::{Builder, V},
};

/// Row tiles that share their weight tiles in the second-level cache before the next ones start.
const GROUP: i64 = 8;

/// Height of a row tile, a power of two (i32).
#[derive(Clone, Copy)]
pub(super) struct Height<'c> {
    pub(super) rows: V<'c>,
    pub(super) bits: V<'c>,
}

impl<'c> Height<'c> {
    /// The height of the tiles of `mode`.
    pub(super) fn new(b: &Builder<'c>, mode: &Mode) -> Self {
        debug_assert!(mode.rows().is_power_of_two());
        Self { rows: number(b, mode.rows()), bits: number(b, mode.rows().ilog2()) }
    }
}

/// Rows of one block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'c> {
    /// Expert (i32), counted from the first of this part.
    pub(super) expert: V<'c>,
    /// First row in sorted order (i32).
    pub(super) first: V<'c>,
    /// Rows, from 1 to the height of the tile (i32).
    pub(super) count: V<'c>,
}

impl<'c> Kernel<'_, 'c> {
    /// Rows of the whole launch (i32).
    pub(super) fn launch_rows(&self) -> V<'c> {
        let tokens = narrow(self.b, self.args.tokens);
        match self.spec.rows {
            RowSource::Dense => tokens,
            RowSource::Gathered | RowSource::Sorted => {
                let slots = i64::try_from(self.spec.rows_per_token).expect("slots fit in 32 bits");
                self.b.mulc(tokens, slots)
            }
        }
    }

    /// Number of pairs of a row tile and a column tile, as on the host.
    pub(super) fn pairs(&self) -> V<'c> {
        let b = self.b;
        let rows = self.launch_rows();
        let full = self.tiles(b.i32(0), rows);
        let row_tiles = match self.spec.rows {
            RowSource::Dense => full,
            RowSource::Gathered | RowSource::Sorted => {
                // No tile is empty.
                b.minsi(rows, b.addi(b.minsi(rows, self.experts()), full))
            }
        };
        b.mulc(row_tiles, self.column_tiles())
    }

    fn column_tiles(&self) -> i64 {
        i64::try_from(self.mode.column_tiles(self.spec)).expect("column tiles fit in a grid")
    }

    fn experts(&self) -> V<'c> {
        self.b.i32(int(i64::try_from(self.spec.experts).expect("experts fit in 32 bits")))
    }

    /// Splits the number of a pair, less than `pairs`, into its row tile and its column tile.
    pub(super) fn pair(&self, id: V<'c>, pairs: V<'c>) -> (V<'c>, V<'c>) {
        let b = self.b;
        let columns = self.column_tiles();
        let row_tiles = b.divui(pairs, b.i32(int(columns)));
        let group = b.divui(id, b.i32(int(GROUP * columns)));
        let first = b.mulc(group, GROUP);
        let size = b.minsi(b.subi(row_tiles, first), b.i32(int(GROUP)));
        let inside = b.subi(id, b.mulc(group, GROUP * columns));
        (b.addi(first, b.remui(inside, size)), b.divui(inside, size))
    }

    /// Calls `body` with the rows and the column tile of pair `id`, if there are any rows.
    pub(super) fn with_pair(&self, id: V<'c>, pairs: V<'c>, body: impl FnOnce(Rows<'c>, V<'c>)) {
        let b = self.b;
        let (row_tile, column_tile) = self.pair(id, pairs);
        let rows = self.rows(row_tile);
        b.if_(b.cmpi("sgt", rows.count, b.i32(0)), || body(rows, column_tile));
    }

    /// Rows of row tile `tile`; none if there are fewer tiles.
    pub(super) fn rows(&self, tile: V<'c>) -> Rows<'c> {
        let b = self.b;
        match self.spec.rows {
            RowSource::Dense => {
                let first = b.shli(tile, self.height.bits);
                let count = b.minsi(b.subi(narrow(b, self.args.tokens), first), self.height.rows);
                Rows { expert: b.i32(0), first, count }
            }
            RowSource::Gathered | RowSource::Sorted => {
                let experts = int(i64::try_from(self.spec.experts).expect("experts fit in 32 bits"));
                let [expert, first, count] = self.search(b.i32(0), experts, tile)[..] else {
                    unreachable!("a search has three results")
                };
                Rows { expert, first, count }
            }
        }
    }

    /// Number of pairs that have rows, by the offsets. All lanes of the warp take part.
    pub(super) fn filled_pairs(&self) -> V<'c> {
        let b = self.b;
        let tiles = match self.spec.rows {
            RowSource::Dense => self.tiles(b.i32(0), narrow(b, self.args.tokens)),
            RowSource::Gathered | RowSource::Sorted => {
                let own = b.rolled(self.lane, self.experts(), b.i32(32), &[b.i32(0)], |e, sum| {
                    vec![b.addi(sum[0], self.tiles(self.offset(e), self.offset(b.addc(e, 1))))]
                });
                shuffle(b, scan(b, own[0], self.lane), b.i32(31))
            }
        };
        b.mulc(tiles, self.column_tiles())
    }

    /// First row of an expert.
    fn offset(&self, expert: V<'c>) -> V<'c> {
        let b = self.b;
        let place = b.minsi(expert, self.experts());
        let table = self.table.or(self.args.offsets).expect("grouped products have offsets");
        b.load(b.gep(table, "i32", place), "i32", 4)
    }

    fn tiles(&self, begin: V<'c>, end: V<'c>) -> V<'c> {
        let b = self.b;
        let whole = b.addi(b.subi(end, begin), b.addc(self.height.rows, -1));
        b.shrui(whole, self.height.bits)
    }

    /// Finds the expert that holds tile `wanted` of those of `span` experts from `base` on, with the first row of the
    /// tile and their number: each lane counts the tiles of a few experts, a scan over the warp finds the lane, and its
    /// experts are searched again.
    fn search(&self, base: V<'c>, span: i32, wanted: V<'c>) -> Vec<V<'c>> {
        let b = self.b;
        // An odd number, so that the lanes read different banks.
        let each = (span + 31) / 32 | 1;
        let begin = b.addi(base, b.muli(self.lane, b.i32(each)));
        // The span of an inner search may reach past its lane's experts, but never before the one that is found.
        let first = self.offset(begin);
        let (count, last) = if each <= 9 {
            let mut sum = b.i32(0);
            let mut low = first;
            for i in 1..=each {
                let high = self.offset(b.addc(begin, i64::from(i)));
                sum = b.addi(sum, self.tiles(low, high));
                low = high;
            }
            (sum, low)
        } else {
            let result = b.rolled(b.i32(1), b.i32(each + 1), b.i32(1), &[b.i32(0), first], |i, carried| {
                let high = self.offset(b.addi(begin, i));
                vec![b.addi(carried[0], self.tiles(carried[1], high)), high]
            });
            (result[0], result[1])
        };
        let sum = scan(b, count, self.lane);
        let found = ballot(b, b.cmpi("ugt", sum, wanted));
        let inside = || {
            let lane = lowest_bit(b, found);
            let before = shuffle(b, b.subi(sum, count), lane);
            let rest = b.subi(wanted, before);
            let expert = b.addi(base, b.muli(lane, b.i32(each)));
            if each > 1 {
                return self.search(expert, each, rest);
            }
            let first = b.addi(shuffle(b, first, lane), b.shli(rest, self.height.bits));
            let left = b.subi(shuffle(b, last, lane), first);
            vec![expert, first, b.minsi(left, self.height.rows)]
        };
        let none = || vec![b.i32(0), b.i32(0), b.i32(0)];
        b.if_else(b.cmpi("ne", found, b.i32(0)), &["i32", "i32", "i32"], inside, none)
    }
}

/// A number of the schedule as an i32 literal.
pub(super) fn int(value: i64) -> i32 {
    i32::try_from(value).expect("sizes of a schedule fit in 32 bits")
}
