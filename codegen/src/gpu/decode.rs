//! Products of few rows: weights go from memory straight into fragments of `mma.sync`.
//!
//! A block takes one or two times 16 packed rows of one expert and all of `k`, which its warps share in turn: a lane
//! loads 16 neighbouring bytes of a weight row and of a row of the operand, and both count as fragments of a product
//! whose depth is permuted alike on both sides. So weights need no shared memory, no barrier and no other order. Their
//! loads run ahead of the products in registers. The sums of the warps are added in the order of the warps.

use super::{
    Kernel, Schedule,
    device::{asm, asm0, at, at_const, barrier, element, field, register, vector, wide},
    epilogue::Values,
    fragments::mma,
    schedule::{Kind, Mode, Tile, packed_columns, packed_rows, size},
    tile::{Rows, int},
};
use crate::{
    Target,
    grouped::{Grouped, RowSource},
    mlir::{Builder, V},
};
use moec_abi::DType;

/// Warps of a block; they take chunks of `k` in turn.
const WARPS: u32 = 8;
/// Most 16-row units of packed weights of a block.
const UNITS: u32 = 2;
/// Elements of `k` that a warp takes at a time: 16 bytes of four lanes.
const CHUNK: u64 = 32;
/// Most tokens for which these kernels are launched: the width of their only tile.
const TOKENS: u64 = 8;
/// Most packed rows of one matrix for all rows (a router) that is read again for every eight tokens, and most tokens
/// for which it is: the tiles of the other kernels would occupy a few multiprocessors alone.
const SMALL: (u64, u64) = (1024, 512);

/// The schedule for few tokens, and the most tokens that it is for; `None` where rows do not consist of 16-byte pieces.
pub fn decode(spec: &Grouped, target: Target) -> Option<(Schedule, u64)> {
    let whole = [spec.k, spec.a_stride].iter().all(|n| n.is_multiple_of(8));
    if spec.a != DType::Bf16 || spec.w != DType::Bf16 || spec.codes.is_some() || !whole {
        return None;
    }
    let steps = steps(spec);
    let tile = Tile { rows: 8, depth: CHUNK as u32, stages: steps.min(4), down: 1 };
    let small = spec.rows == RowSource::Dense && packed_rows(spec) <= SMALL.0;
    let modes = vec![Mode { limit: None, columns: if small { 16 } else { 16 * UNITS }, tiles: vec![tile] }];
    let dependent = super::starts_early(target);
    Some((
        Schedule { kind: Kind::Decode, warps: WARPS, blocks: 2, modes, dependent, walk: None },
        if small { SMALL.1 } else { TOKENS },
    ))
}

/// Chunks of one warp.
fn steps(spec: &Grouped) -> u32 {
    let chunks = packed_columns(spec) / CHUNK;
    u32::try_from(chunks.div_ceil(u64::from(WARPS))).expect("rows have fewer than 2^37 elements")
}

/// Bytes of the sums of all warps.
const SUMS_BYTES: u32 = WARPS * UNITS * 32 * 16;
/// Bytes of shared memory: the sums, and which rows the block has.
pub(super) const SHARED_BYTES: u32 = SUMS_BYTES + 16;

/// 16 bytes, as operands of a product.
type Piece<'c> = [V<'c>; 4];

/// Addresses of a lane.
struct Source<'c> {
    /// Its weight rows: `UNITS` pairs, eight rows apart.
    weights: Vec<V<'c>>,
    /// Its row of the operand, and whether that exists.
    operand: (V<'c>, V<'c>),
}

impl<'c> Kernel<'_, 'c> {
    /// The body of the kernel.
    pub(super) fn decode(&self) {
        let b = self.b;
        // Which rows there are is what the launch before found out, unless rows are sorted already.
        if self.spec.follows() {
            self.wait_for_predecessor();
        }
        let pairs = self.pairs();
        let id = register(b, "ctaid.x");
        b.if_(b.cmpi("ult", id, pairs), || {
            let (row_tile, column_tile) = self.pair(id, pairs);
            let rows = self.shared_rows(row_tile);
            b.if_(b.cmpi("sgt", rows.count, b.i32(0)), || self.decode_tile(rows, column_tile));
        });
        // A block without rows must not end first either: the launch after relies on all before this one.
        if !self.spec.follows() {
            self.wait_for_predecessor();
        }
    }

    /// 16-row units of packed weights of the block.
    fn units(&self) -> u32 {
        self.mode.columns / 16
    }

    /// Rows of a row tile, which the first warp looks up for all.
    fn shared_rows(&self, row_tile: V<'c>) -> Rows<'c> {
        let b = self.b;
        if self.spec.rows == RowSource::Dense {
            return self.rows(row_tile);
        }
        let place = at_const(b, self.shared, u64::from(SUMS_BYTES));
        b.if_(b.cmpi("eq", self.warp, b.i32(0)), || {
            let Rows { expert, first, count } = self.rows(row_tile);
            let all = vector(b, &[expert, first, count, count]);
            b.if_(b.cmpi("eq", self.lane, b.i32(0)), || b.store(all, place, 16));
        });
        barrier(b);
        let all = b.load(place, "vector<4xi32>", 16);
        let part = |i| element(b, all, i, "i32");
        Rows { expert: part(0), first: part(1), count: part(2) }
    }

    fn decode_tile(&self, rows: Rows<'c>, column_tile: V<'c>) {
        let b = self.b;
        let depth = self.mode.tiles[0].stages;
        let rounds = steps(self.spec).div_ceil(depth);
        if self.schedule.dependent && !self.spec.follows() {
            self.fetch_weights(rows, column_tile);
            self.wait_for_predecessor();
        }
        let source = Source { weights: self.weight_rows(rows, column_tile), operand: self.operand_row(rows) };
        let mut ring = Vec::new();
        for u in 0..depth {
            ring.extend(self.weight_pieces(&source, b.i32(int(u.into()))));
            ring.push(self.operand_piece(&source, b.i32(int(u.into()))));
        }
        let each = ring.len() / depth as usize;
        let zero = b.f32(0.0);
        let mut carried = vec![zero; self.units() as usize * 4];
        carried.extend(ring.concat());
        let last = b.i32(int(i64::from(rounds) - 1));
        // Each step is multiplied, and its registers are filled with the step of the next round.
        let carried = b.rolled(b.i32(0), last, b.i32(1), &carried, |round, carried| {
            let (sums, ring) = carried.split_at(self.units() as usize * 4);
            let (mut sums, mut next) = (sums.to_vec(), Vec::new());
            let from = b.mulc(b.addc(round, 1), i64::from(depth));
            for (u, pieces) in ring.chunks(each * 4).enumerate() {
                sums = products(b, &sums, pieces);
                let step = b.addc(from, u as i64);
                next.extend(self.weight_pieces(&source, step).concat());
                next.extend(self.operand_piece(&source, step));
            }
            sums.extend(next);
            sums
        });
        let (sums, ring) = carried.split_at(self.units() as usize * 4);
        let sums = ring.chunks(each * 4).fold(sums.to_vec(), |sums, pieces| products(b, &sums, pieces));
        self.reduce(rows, column_tile, &sums);
    }

    /// Asks for all weights of the block, so that they are on their way while the predecessor still runs. (Loads into
    /// registers would do that too, but the assembler moves them behind the wait.)
    fn fetch_weights(&self, rows: Rows<'c>, column_tile: V<'c>) {
        let (b, spec) = (self.b, self.spec);
        let packed = i64::try_from(packed_rows(spec)).expect("weights fit in memory");
        let stride = i64::try_from(packed_columns(spec) * spec.w.bytes()).expect("weights fit in memory");
        let columns = i64::from(self.mode.columns);
        b.if_(b.cmpi("eq", self.thread, b.i32(0)), || {
            let expert = at(b, self.args.w, b.mulc(wide(b, rows.expert), packed * stride));
            let first = b.mulc(column_tile, columns);
            let count = b.minsi(b.i32(int(columns)), b.subi(b.i32(int(packed)), first));
            let from = at(b, expert, b.mulc(wide(b, first), stride));
            asm0(b, "cp.async.bulk.prefetch.L2.global [$0], $1;", "l,r", &[from, b.mulc(count, stride)]);
        });
    }

    /// Byte of a row at which this lane starts.
    fn lane_start(&self) -> V<'c> {
        let b = self.b;
        b.addi(b.mulc(self.warp, 64), b.shli(b.andi(self.lane, b.i32(3)), b.i32(4)))
    }

    /// Rows past the last one repeat it; their results are not stored.
    fn weight_rows(&self, rows: Rows<'c>, column_tile: V<'c>) -> Vec<V<'c>> {
        let (b, spec) = (self.b, self.spec);
        let packed = i64::try_from(packed_rows(spec)).expect("weights fit in memory");
        let stride = i64::try_from(packed_columns(spec) * spec.w.bytes()).expect("weights fit in memory");
        let expert = at(b, self.args.w, b.mulc(wide(b, rows.expert), packed * stride));
        let first = b.addi(b.mulc(column_tile, i64::from(self.mode.columns)), b.shrui(self.lane, b.i32(2)));
        let start = wide(b, self.lane_start());
        let row = |i: u32| {
            let row = b.minsi(b.addc(first, i64::from(i * 8)), b.i32(int(packed - 1)));
            at(b, at(b, expert, b.mulc(wide(b, row), stride)), start)
        };
        (0..2 * self.units()).map(row).collect()
    }

    fn operand_row(&self, rows: Rows<'c>) -> (V<'c>, V<'c>) {
        let (b, spec) = (self.b, self.spec);
        let row = b.shrui(self.lane, b.i32(2));
        let exists = b.cmpi("slt", row, rows.count);
        let sorted = b.addi(rows.first, b.minsi(row, b.addc(rows.count, -1)));
        let row = match self.args.map {
            Some(map) if spec.rows == RowSource::Gathered => b.load(b.gep(map, "i32", sorted), "i32", 4),
            Some(_) | None => sorted,
        };
        let stride = i64::try_from(spec.a_stride * spec.a.bytes()).expect("rows fit in memory");
        (at(b, at(b, self.args.a, b.mulc(wide(b, row), stride)), wide(b, self.lane_start())), exists)
    }

    /// Distance of a step from the lane's start, in bytes.
    fn along(&self, step: V<'c>) -> V<'c> {
        wide(self.b, self.b.mulc(step, i64::from(WARPS) * 64))
    }

    /// This lane's pieces of its weight rows. Chunks past the end of a row are zero.
    fn weight_pieces(&self, source: &Source<'c>, step: V<'c>) -> Vec<Piece<'c>> {
        let b = self.b;
        let chunks = packed_columns(self.spec) / CHUNK;
        let even = chunks.is_multiple_of(u64::from(WARPS * self.mode.tiles[0].stages));
        let exists = (!even).then(|| {
            let chunk = b.addi(b.mulc(step, i64::from(WARPS)), self.warp);
            b.cmpi("ult", chunk, b.i32(int(i64::try_from(chunks).expect("chunks fit in 32 bits"))))
        });
        let along = self.along(step);
        source.weights.iter().map(|row| load(b, Cache::Streamed, at(b, *row, along), exists)).collect()
    }

    /// This lane's piece of its row of the operand; zero where there is none.
    fn operand_piece(&self, source: &Source<'c>, step: V<'c>) -> Piece<'c> {
        let (b, spec) = (self.b, self.spec);
        let (row, exists) = source.operand;
        let distance = b.addi(b.mulc(step, i64::from(WARPS) * 64), self.lane_start());
        let end = b.i32(int(i64::try_from(spec.k * spec.a.bytes()).expect("rows fit in 32 bits")));
        let exists = b.andi(exists, b.cmpi("ult", distance, end));
        load(b, Cache::Shared, at(b, row, self.along(step)), Some(exists))
    }

    /// Adds the sums of all warps and stores the tile.
    fn reduce(&self, rows: Rows<'c>, column_tile: V<'c>, sums: &[V<'c>]) {
        let (b, spec) = (self.b, self.spec);
        let mine = at(b, self.shared, b.mulc(b.addi(b.mulc(self.warp, i64::from(self.units()) * 32), self.lane), 16));
        for (unit, sums) in (0..).zip(sums.chunks(4)) {
            b.store(vector(b, sums), at_const(b, mine, unit * 512), 16);
        }
        barrier(b);
        b.if_(b.cmpi("ult", self.warp, b.i32(int(self.units().into()))), || {
            let from = at(b, self.shared, b.mulc(self.thread, 16));
            let part = |warp: u32| b.load(at_const(b, from, u64::from(warp * self.units()) * 512), "vector<4xf32>", 16);
            let total = (1..WARPS).fold(part(0), |sum, warp| b.addf(sum, part(warp)));
            let sums: Vec<_> = (0..4).map(|i| element(b, total, i, "f32")).collect();
            let group = b.shrui(self.lane, b.i32(2));
            let pair = b.shli(b.andi(self.lane, b.i32(3)), b.i32(1));
            let each = u32::try_from(spec.matrices).expect("one or two matrices");
            let column = b.addi(b.mulc(self.warp, i64::from(16 / each)), group);
            let first_column = b.mulc(column_tile, i64::from(self.mode.out_columns(spec)));
            let mut values = Values::new(self, rows, [pair, column], first_column);
            // Sums 0 and 1 are two tokens of row `group` of the weights, 2 and 3 those of the row eight below.
            let places: Vec<(u32, u32, Vec<V<'c>>)> = (0..2u32)
                .flat_map(|c| {
                    let at = |half: u32| sums[(2 * half + c) as usize];
                    if each == 2 {
                        vec![(c, 0, vec![at(0), at(1)])]
                    } else {
                        vec![(c, 0, vec![at(0)]), (c, 8, vec![at(1)])]
                    }
                })
                .collect();
            for (row, column_offset, sums) in places {
                let value = values.value(row, column_offset, &sums);
                let value = if spec.out == DType::F32 { value } else { b.cast("arith.truncf", value, "bf16") };
                let row = b.addc(pair, i64::from(row));
                let column = b.addi(first_column, b.addc(column, i64::from(column_offset)));
                let n = b.i32(int(i64::try_from(spec.n).expect("columns fit in 32 bits")));
                let inside = b.andi(b.cmpi("slt", row, rows.count), b.cmpi("slt", column, n));
                b.if_(inside, || {
                    let stride = i64::try_from(spec.out_stride).expect("rows fit in memory");
                    let place = b.addi(b.mulc(wide(b, b.addi(rows.first, row)), stride), wide(b, column));
                    b.store(value, b.gep(self.args.out, self.element(spec.out), place), size(spec.out));
                });
            }
        });
    }
}

/// How a load passes through the caches.
#[derive(Clone, Copy)]
enum Cache {
    /// Read once, and never written.
    Streamed,
    /// Read by many blocks, and written by the launch before.
    Shared,
}

/// 16 bytes of global memory; zero unless `exists`.
fn load<'c>(b: &Builder<'c>, cache: Cache, from: V<'c>, exists: Option<V<'c>>) -> Piece<'c> {
    let how = match cache {
        Cache::Streamed => "ld.global.nc.L1::no_allocate.L2::256B.v4.b32",
        Cache::Shared => "ld.global.v4.b32",
    };
    let result = "!llvm.struct<(i32, i32, i32, i32)>";
    let values = match exists {
        None => asm(b, &format!("{how} {{$0, $1, $2, $3}}, [$4];"), "=r,=r,=r,=r,l", &[from], result),
        Some(exists) => {
            let zeros = "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;";
            let text = format!("{{ .reg .pred p; setp.ne.b32 p, $5, 0; {zeros} @p {how} {{$0, $1, $2, $3}}, [$4]; }}");
            let exists = b.cast("arith.extui", exists, "i32");
            asm(b, &text, "=&r,=&r,=&r,=&r,l,r", &[from, exists], result)
        }
    };
    std::array::from_fn(|i| field(b, values, i, "i32"))
}

/// Adds the products of one step: pieces of pairs of weight rows, then the piece of the operand.
fn products<'c>(b: &Builder<'c>, sums: &[V<'c>], pieces: &[V<'c>]) -> Vec<V<'c>> {
    let (weights, x) = pieces.split_at(pieces.len() - 4);
    let mut sums = sums.to_vec();
    for (pair, sums) in weights.chunks(8).zip(sums.chunks_mut(4)) {
        for s in [0, 2] {
            let left = [pair[s], pair[4 + s], pair[s + 1], pair[5 + s]];
            sums.copy_from_slice(&mma(b, &left, &x[s..s + 2], sums));
        }
    }
    sums
}
