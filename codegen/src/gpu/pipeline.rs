//! The ring of stages in shared memory that asynchronous copies fill ahead of the products.

use super::{
    Kernel,
    device::{at, at_const, barrier, commit, copy_async, wait_copies, wide},
    schedule::{Tile, packed_columns, packed_rows, size, staged_bytes},
    swizzle::Swizzle,
    tile::{Rows, int},
};
use crate::{grouped::RowSource, mlir::V};
use moec_abi::DType;
use std::slice::SliceIndex;

/// What one thread copies of one operand in every stage.
pub(super) struct Loader<'c> {
    /// Bytes of one copy.
    unit: u32,
    /// Bytes of a row in one stage.
    row_bytes: u32,
    /// Valid bytes of a whole row in memory, when a stage may reach past them.
    row_end: Option<u64>,
    /// Byte of the row at which this thread's pieces start (i32).
    start: V<'c>,
    /// Rows to which the threads together have one piece each.
    rows: u32,
    pieces: Vec<Piece<'c>>,
}

impl Loader<'_> {
    /// Pieces of a thread in the first rows.
    pub(super) fn pieces_of(&self, rows: u32) -> usize {
        rows.div_ceil(self.rows) as usize
    }
}

/// What one thread copies of one row.
pub(super) struct Piece<'c> {
    /// Address of the piece in the first stage, and bytes past it.
    from: (V<'c>, u64),
    /// Place in the stage, and bytes past it.
    to: (V<'c>, u64),
    /// Whether the row exists; rows that do not are zero.
    exists: Option<V<'c>>,
    /// Whether this thread has such a piece at all.
    mine: Option<V<'c>>,
}

/// Where a row starts: an address and bytes past it, and whether the row exists; rows that do not are zero.
type Start<'c> = ((V<'c>, u64), Option<V<'c>>);

/// Carried through the loop of stages: the products, from the addresses of both operands in a stage.
pub(super) trait Step<'c> {
    /// Adds the products of stage `index` of the sums, which lies at `a` and `w`.
    fn step(&self, kernel: &Kernel<'_, 'c>, index: V<'c>, a: V<'c>, w: V<'c>, sums: &[V<'c>]) -> Vec<V<'c>>;
}

impl<'c> Kernel<'_, 'c> {
    /// Sums over all of `k` for one tile. Ends with all copies done, and all threads past their last read of where results
    /// pass through.
    pub(super) fn accumulate(
        &self,
        tile: &Tile,
        rows: Rows<'c>,
        column_tile: V<'c>,
        sums: Vec<V<'c>>,
        products: &impl Step<'c>,
    ) -> Vec<V<'c>> {
        let b = self.b;
        let loaders = [self.operand(tile, rows), self.weights(tile, rows, column_tile)];
        let a_bytes = u64::from(tile.rows * tile.depth * size(self.spec.a));
        let stage = int(i64::from(self.mode.stage_bytes(self.spec, tile)));
        let ring = stage * int(i64::from(tile.stages));
        let steps = int(i64::try_from(self.spec.k.div_ceil(u64::from(tile.depth))).expect("steps fit in 32 bits"));
        let ahead = int(i64::from(tile.stages)) - 1;
        let issue = |place: V<'c>, step: V<'c>| {
            let to = at(b, self.shared, place);
            self.issue(&loaders[0], .., to, step);
            self.issue(&loaders[1], .., at_const(b, to, a_bytes), step);
        };
        for s in 0..ahead {
            if s < steps {
                issue(b.i32(s * stage), b.i32(s));
            }
            commit(b);
        }
        let advance = |place: V<'c>| {
            let next = b.addc(place, i64::from(stage));
            b.select(b.cmpi("eq", next, b.i32(ring)), b.i32(0), next)
        };
        let width = sums.len();
        let carried: Vec<_> = sums.into_iter().chain([b.i32(0), b.i32(ahead * stage)]).collect();
        let mut result = b.rolled(b.i32(0), b.i32(steps), b.i32(1), &carried, |i, carried| {
            let (sums, places) = carried.split_at(width);
            // Step `i` has landed for this thread, and after the barrier for all; all are done with step `i - 1`,
            // whose stage is filled next.
            wait_copies(b, tile.stages - 2);
            barrier(b);
            let next = b.addc(i, i64::from(ahead));
            b.if_(b.cmpi("slt", next, b.i32(steps)), || issue(places[1], next));
            commit(b);
            let from = at(b, self.shared, places[0]);
            let mut sums = products.step(self, i, from, at_const(b, from, a_bytes), sums);
            sums.extend([advance(places[0]), advance(places[1])]);
            sums
        });
        result.truncate(width);
        // All copies have landed: what is committed behind them is empty. Results pass through the start of the ring,
        // where others may be at the last step still.
        let last = (steps - 1) % int(i64::from(tile.stages)) * stage;
        if last < int(i64::from(tile.rows * self.mode.staging_pitch(self.spec))) {
            barrier(b);
        }
        result
    }

    /// The rows of the operand, looked up through the map if there is one.
    pub(super) fn operand(&self, tile: &Tile, rows: Rows<'c>) -> Loader<'c> {
        let (b, spec) = (self.b, self.spec);
        let row_bytes = tile.depth * size(spec.a);
        let whole_rows = spec.k.is_multiple_of(u64::from(tile.depth));
        let stride = spec.a_stride * spec.a.bytes();
        // The widest copy for which every row starts at a multiple of it.
        let unit = [16, 8, 4].into_iter().find(|u| stride.is_multiple_of(u64::from(*u))).unwrap_or(2);
        let last = b.addc(rows.count, -1);
        let row_end = (!whole_rows).then_some(spec.k * spec.a.bytes());
        self.loader(tile.rows, row_bytes, unit, row_end, |row, past| {
            let row = b.addc(row, i64::from(past));
            let exists = b.cmpi("slt", row, rows.count);
            let sorted = b.addi(rows.first, b.minsi(row, last));
            let row = match self.args.map {
                Some(map) if spec.rows == RowSource::Gathered => b.load(b.gep(map, "i32", sorted), "i32", 4),
                Some(_) | None => sorted,
            };
            let bytes = b.mulc(wide(b, row), i64::try_from(stride).expect("rows fit in memory"));
            ((at(b, self.args.a, bytes), 0), Some(exists))
        })
    }

    /// The packed rows of one column tile. Rows past the last one repeat it; their results are not stored.
    fn weights(&self, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>) -> Loader<'c> {
        let (b, spec) = (self.b, self.spec);
        let row_bytes = staged_bytes(spec, tile);
        let packed = i64::try_from(packed_rows(spec)).expect("weights fit in memory");
        let stride = i64::try_from(packed_columns(spec) * spec.packed().bytes()).expect("weights fit in memory");
        let columns = i64::from(self.mode.columns);
        let expert = at(b, self.args.w, b.mulc(wide(b, rows.expert), packed * stride));
        let first = b.mulc(column_tile, columns);
        let base = at(b, expert, b.mulc(wide(b, first), stride));
        let start = |row| at(b, base, b.mulc(wide(b, row), stride));
        self.loader(self.mode.columns, row_bytes, 16, None, |row, past| {
            if packed % columns == 0 {
                return ((start(row), u64::from(past) * stride.unsigned_abs()), None);
            }
            let last = b.subi(b.i32(int(packed - 1)), first);
            ((start(b.minsi(b.addc(row, i64::from(past)), last)), 0), None)
        })
    }

    /// Deals the pieces of `rows` rows to the threads of the block. `source` says where the row so many past another
    /// starts: bytes that are known now are no work for the kernel.
    fn loader(
        &self,
        rows: u32,
        row_bytes: u32,
        unit: u32,
        row_end: Option<u64>,
        source: impl Fn(V<'c>, u32) -> Start<'c>,
    ) -> Loader<'c> {
        let b = self.b;
        let threads = self.threads;
        let per_row = row_bytes / unit;
        let constant = |value: u32| b.i32(int(i64::from(value)));
        let start = b.mulc(b.remui(self.thread, constant(per_row)), i64::from(unit));
        let swizzle = Swizzle { row_bytes };
        let total = rows * per_row;
        // Threads are a multiple of the pieces of a row, so each stays in its column of pieces.
        let row = b.divui(self.thread, constant(per_row));
        let chunk = b.shrui(start, b.i32(4));
        let inside = b.andi(start, b.i32(15));
        let pieces = (0..total.div_ceil(threads)).map(|i| {
            let mine = (!total.is_multiple_of(threads)).then(|| {
                let index = b.addc(self.thread, i64::from(i * threads));
                b.cmpi("ult", index, constant(total))
            });
            let past = i * (threads / per_row);
            let ((from, past_from), exists) = source(row, past);
            let from = at(b, from, wide(b, start));
            let (row, past_to) = match past % Swizzle::PERIOD {
                0 => (row, past * row_bytes),
                _ => (b.addc(row, i64::from(past)), 0),
            };
            let to = b.addi(swizzle.offset(b, row, chunk), inside);
            let (from, to) = ((from, past_from), (to, u64::from(past_to)));
            Piece { from, to, exists, mine }
        });
        let pieces = pieces.collect();
        Loader { unit, row_bytes, row_end, start, rows: threads / per_row, pieces }
    }

    /// Starts the copies of some pieces of step `step` into the stage at `to`.
    pub(super) fn issue(
        &self,
        loader: &Loader<'c>,
        pieces: impl SliceIndex<[Piece<'c>], Output = [Piece<'c>]>,
        to: V<'c>,
        step: V<'c>,
    ) {
        let b = self.b;
        let along = b.mulc(step, i64::from(loader.row_bytes));
        // Bytes of this thread's piece that lie inside the row.
        let inside = loader.row_end.map(|end| {
            let end = b.i32(int(i64::try_from(end).expect("rows fit in memory")));
            let rest = b.subi(end, b.addi(along, loader.start));
            b.minsi(b.maxsi(rest, b.i32(0)), b.i32(int(i64::from(loader.unit))))
        });
        for piece in &loader.pieces[pieces] {
            let copy = || {
                let from = at_const(b, at(b, piece.from.0, wide(b, along)), piece.from.1);
                let to = at_const(b, at(b, to, piece.to.0), piece.to.1);
                let bytes = match (piece.exists, inside) {
                    (None, inside) => inside,
                    (Some(exists), inside) => {
                        let all = inside.unwrap_or_else(|| b.i32(int(i64::from(loader.unit))));
                        Some(b.select(exists, all, b.i32(0)))
                    }
                };
                if loader.unit >= 4 {
                    return copy_async(b, to, from, loader.unit, bytes);
                }
                // Rows of an odd number of bf16: no asynchronous copy is that narrow.
                let ty = self.element(DType::Bf16);
                let bytes = bytes.unwrap_or_else(|| b.i32(2));
                let value =
                    b.if_else(b.cmpi("sgt", bytes, b.i32(0)), &[ty], || vec![b.load(from, ty, 2)], || vec![b.zero(ty)]);
                b.store(value[0], to, 2);
            };
            match piece.mine {
                Some(mine) => b.if_(mine, copy),
                None => copy(),
            }
        }
    }
}
