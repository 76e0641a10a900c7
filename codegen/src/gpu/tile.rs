//! Which piece of the product a block computes.
//!
//! The host knows the number of tokens only, so it launches an upper bound of blocks. Each block
//! looks up on the device which expert and which of its rows it has; blocks past the last row end.

use super::{
    Kernel,
    device::{ballot, barrier, lowest_bit, narrow, number, scan, shuffle},
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

/// Two lists in shared memory, each of a number for every expert and one more (i32).
#[derive(Clone, Copy)]
pub(super) struct Table<'c> {
    /// The first row of each expert, and the number of rows: the offsets.
    rows: V<'c>,
    /// The first row tile of each expert, and the number of tiles.
    tiles: V<'c>,
}

impl<'c> Table<'c> {
    /// Bytes for so many experts.
    pub(super) const fn bytes(experts: u64) -> u64 {
        2 * (experts + 1) * 4
    }
}

impl<'c> Kernel<'_, 'c> {
    /// Writes the table to an address in shared memory. All threads of the block take part, and have to meet after it.
    pub(super) fn fill_table(&self, to: V<'c>) -> Table<'c> {
        let b = self.b;
        let table = Table { rows: to, tiles: b.gep(to, "i32", b.addc(self.experts(), 1)) };
        let from = self.args.offsets.expect("grouped products have offsets");
        b.rolled(self.thread, b.addc(self.experts(), 1), number(b, self.threads), &[], |i, _| {
            b.store(b.load(b.gep(from, "i32", i), "i32", 4), b.gep(table.rows, "i32", i), 4);
            Vec::new()
        });
        barrier(b);
        let kernel = Self { table: Some(table), ..*self };
        b.if_(b.cmpi("eq", self.warp, b.i32(0)), || {
            let own = kernel.own_tiles(b.i32(0), self.span());
            let sum = scan(b, own.count, self.lane);
            b.rolled(b.i32(0), b.i32(own.each), b.i32(1), &[b.subi(sum, own.count)], |i, before| {
                let expert = b.addi(own.begin, i);
                b.if_(b.cmpi("slt", expert, self.experts()), || {
                    b.store(before[0], b.gep(table.tiles, "i32", expert), 4);
                });
                vec![b.addi(before[0], kernel.tiles(kernel.offset(expert), kernel.offset(b.addc(expert, 1))))]
            });
            let last = b.cmpi("eq", self.lane, b.i32(31));
            b.if_(last, || b.store(sum, b.gep(table.tiles, "i32", self.experts()), 4));
        });
        table
    }

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
        self.b.i32(self.span())
    }

    /// Number of experts.
    fn span(&self) -> i32 {
        int(i64::try_from(self.spec.experts).expect("experts fit in 32 bits"))
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
                if let Some(table) = self.table {
                    return self.look_up(table, tile);
                }
                let [expert, first, count] = self.search(b.i32(0), self.span(), tile)[..] else {
                    unreachable!("a search has three results")
                };
                Rows { expert, first, count }
            }
        }
    }

    /// Number of pairs that have rows, by the offsets. All lanes of the warp take part.
    pub(super) fn filled_pairs(&self) -> V<'c> {
        let b = self.b;
        let tiles = match (self.spec.rows, self.table) {
            (RowSource::Dense, _) => self.tiles(b.i32(0), narrow(b, self.args.tokens)),
            (RowSource::Gathered | RowSource::Sorted, Some(table)) => {
                b.load(b.gep(table.tiles, "i32", self.experts()), "i32", 4)
            }
            (RowSource::Gathered | RowSource::Sorted, None) => {
                let sum = scan(b, self.own_tiles(b.i32(0), self.span()).count, self.lane);
                shuffle(b, sum, b.i32(31))
            }
        };
        b.mulc(tiles, self.column_tiles())
    }

    /// Rows of row tile `tile`, which there is: a search by halves for the last expert whose tiles start no later.
    fn look_up(&self, table: Table<'c>, tile: V<'c>) -> Rows<'c> {
        let b = self.b;
        let bits = self.spec.experts.next_power_of_two().ilog2();
        let half = b.i32(int((1 << bits) / 2));
        let found = b.rolled(b.i32(0), number(b, bits), b.i32(1), &[b.i32(0), half], |_, carried| {
            let next = b.minsi(b.addi(carried[0], carried[1]), self.experts());
            let start = b.load(b.gep(table.tiles, "i32", next), "i32", 4);
            let expert = b.select(b.cmpi("sle", start, tile), next, carried[0]);
            vec![expert, b.shrui(carried[1], b.i32(1))]
        });
        let expert = found[0];
        let part = |of| b.load(b.gep(of, "i32", expert), "i32", 4);
        let inside = b.subi(tile, part(table.tiles));
        let first = b.addi(part(table.rows), b.shli(inside, self.height.bits));
        let left = b.subi(self.offset(b.addc(expert, 1)), first);
        Rows { expert, first, count: b.minsi(left, self.height.rows) }
    }

    /// First row of an expert.
    fn offset(&self, expert: V<'c>) -> V<'c> {
        let b = self.b;
        let place = b.minsi(expert, self.experts());
        let offsets = self.table.map(|table| table.rows).or(self.args.offsets).expect("grouped products have offsets");
        b.load(b.gep(offsets, "i32", place), "i32", 4)
    }

    fn tiles(&self, begin: V<'c>, end: V<'c>) -> V<'c> {
        let b = self.b;
        let whole = b.addi(b.subi(end, begin), b.addc(self.height.rows, -1));
        b.shrui(whole, self.height.bits)
    }

    /// Counts the tiles of this lane's share of `span` experts from `base` on.
    fn own_tiles(&self, base: V<'c>, span: i32) -> Own<'c> {
        let b = self.b;
        // An odd number, so that the lanes read different banks.
        let each = ((span + 31) / 32) | 1;
        let begin = b.addi(base, b.muli(self.lane, b.i32(each)));
        let first = self.offset(begin);
        let (mut count, mut last) = (b.i32(0), first);
        if each <= 9 {
            for i in 1..=each {
                let high = self.offset(b.addc(begin, i64::from(i)));
                count = b.addi(count, self.tiles(last, high));
                last = high;
            }
        } else {
            let result = b.rolled(b.i32(1), b.i32(each + 1), b.i32(1), &[count, last], |i, carried| {
                let high = self.offset(b.addi(begin, i));
                vec![b.addi(carried[0], self.tiles(carried[1], high)), high]
            });
            (count, last) = (result[0], result[1]);
        }
        Own { each, begin, first, last, count }
    }

    /// Finds the expert that holds tile `wanted` of those of `span` experts from `base` on, with the first row of the
    /// tile and their number: each lane counts the tiles of a few experts, a scan over the warp finds the lane, and its
    /// experts are searched again.
    fn search(&self, base: V<'c>, span: i32, wanted: V<'c>) -> Vec<V<'c>> {
        let b = self.b;
        // The span of an inner search may reach past its lane's experts, but never before the one that is found.
        let Own { each, first, last, count, .. } = self.own_tiles(base, span);
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

/// What a lane counts: experts from `begin` on (i32).
struct Own<'c> {
    /// How many experts.
    each: i32,
    begin: V<'c>,
    /// Their first row, and the row after their last.
    first: V<'c>,
    last: V<'c>,
    /// Their tiles.
    count: V<'c>,
}

/// A number of the schedule as an i32 literal.
pub(super) fn int(value: i64) -> i32 {
    i32::try_from(value).expect("sizes of a schedule fit in 32 bits")
}
