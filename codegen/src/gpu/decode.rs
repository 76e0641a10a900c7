//! Products of few rows: weights go from memory straight into fragments of `mma.sync`.
//!
//! A block takes up to six times 16 packed rows of one expert and all of `k`, which its warps share in turn: a lane
//! loads 16 neighbouring bytes of a weight row and of a row of the operand, and both count as fragments of a product
//! whose depth is permuted alike on both sides. So weights need no shared memory, no barrier and no other order. Their
//! loads run ahead of the products in registers. The sums of the warps are added in the order of the warps.
//!
//! Codes are decoded where they are multiplied. They are in the order of fragments, and the pieces of the operand follow
//! it: a lane loads pairs of neighbours.

use super::{
    Kernel, Schedule,
    coded::{Coded, LINE, PANEL},
    device::{asm, asm0, at, at_const, barrier, element, field, register, shuffle, vector, wide},
    epilogue::Values,
    fragments::mma,
    schedule::{Kind, MULTIPROCESSORS, Mode, Tile, packed_columns, packed_rows, size},
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
/// 16-row units of packed weights that a block may have. Each block reads the rows of its expert, so more is less to read.
const UNITS: [u32; 3] = [6, 4, 2];
/// Elements of `k` that a warp takes at a time, as values: 16 bytes of four lanes.
const CHUNK: u64 = 32;
/// Registers of a thread for steps that are loaded ahead.
const AHEAD: u32 = 84;
/// Bytes that are to be in flight on a multiprocessor.
const IN_FLIGHT: u64 = 64 << 10;
/// Most tokens for which these kernels are launched: the width of their only tile.
const TOKENS: u64 = 8;
/// Most packed rows of one matrix for all rows (a router) that is read again for every eight tokens, and most tokens
/// for which it is: the tiles of the other kernels would occupy a few multiprocessors alone.
const SMALL: (u64, u64) = (1024, 512);

/// The schedule for few tokens, and the most tokens that it is for; `None` where rows do not consist of 16-byte pieces.
pub fn decode(spec: &Grouped, target: Target) -> Option<(Schedule, u64)> {
    let whole = [spec.k, spec.a_stride].iter().all(|n| n.is_multiple_of(8));
    // All kernels of a product read the same order of codes: that of fragments, where the others do.
    let codes = spec.codes.is_none() || super::schedule::has_wgmma(spec, target);
    if spec.a != DType::Bf16 || spec.w != DType::Bf16 || !codes || !whole {
        return None;
    }
    let small = spec.rows == RowSource::Dense && packed_rows(spec) <= SMALL.0;
    let stages = |units| (AHEAD / step_words(spec, units)).clamp(1, 4);
    // Two steps fit in registers. Of more than the least, rows share addresses, and the blocks of one token have enough
    // in flight.
    let fits = |units: &u32| {
        let (packed, columns) = (packed_rows(spec), u64::from(16 * units));
        let blocks = packed / columns * spec.rows_per_token.min(spec.experts);
        let bytes = u64::from(WARPS * 32 * 4 * step_words(spec, *units) * stages(*units));
        let many = packed.is_multiple_of(columns) && blocks * bytes >= MULTIPROCESSORS * IN_FLIGHT;
        2 * step_words(spec, *units) <= AHEAD && (many || *units == 2)
    };
    let units = if small { 1 } else { UNITS.into_iter().find(fits).unwrap_or(1) };
    let (steps, stages) = (steps(spec), stages(units));
    // Rounds are of equal length.
    let tile = Tile { rows: 8, depth: chunk(spec) as u32, stages: steps.div_ceil(steps.div_ceil(stages)), down: 1 };
    let modes = vec![Mode { limit: None, columns: 16 * units, share: 1, tiles: vec![tile] }];
    let dependent = super::starts_early(target);
    Some((
        Schedule { kind: Kind::Decode, warps: WARPS, blocks: 2, modes, dependent, walk: None },
        if small { SMALL.1 } else { TOKENS },
    ))
}

/// Elements of `k` that a warp takes at a time.
const fn chunk(spec: &Grouped) -> u64 {
    if spec.codes.is_some() { LINE } else { CHUNK }
}

/// Chunks of a row.
fn chunks(spec: &Grouped) -> u64 {
    packed_columns(spec) * spec.codes.map_or(1, |codes| codes.per_byte()) / chunk(spec)
}

/// Chunks of one warp.
fn steps(spec: &Grouped) -> u32 {
    let chunks = chunks(spec);
    u32::try_from(chunks.div_ceil(u64::from(WARPS))).expect("rows have fewer than 2^37 elements")
}

/// Bytes of the sums of all warps.
const SUMS_BYTES: u32 = WARPS * UNITS[0] * 32 * 16;
/// Bytes of shared memory: the sums, and which rows the block has.
pub(super) const SHARED_BYTES: u32 = SUMS_BYTES + 16;

/// A step of a warp: in every round the warps take so many chunks each, which follow each other.
#[derive(Clone, Copy)]
struct Step<'c> {
    /// The round (i32).
    round: V<'c>,
    /// Which step of the round.
    of: u32,
}

/// Addresses of a lane.
struct Source<'c> {
    /// Its weight rows, eight rows apart.
    weights: Vec<V<'c>>,
    /// Its row of the operand, and whether that exists.
    operand: (V<'c>, V<'c>),
    /// The scale and, if there is one, the zero of the first group, with their sizes, of one in four of the weight rows
    /// that four lanes share.
    factors: Vec<(V<'c>, u32)>,
    /// Their values, if rows have one group.
    known: Option<Vec<V<'c>>>,
}

/// Words of a step of a lane: weights of the rows of `units` times 16 packed rows, the operand, and factors.
fn step_words(spec: &Grouped, units: u32) -> u32 {
    let Some(coded) = Coded::new(spec) else { return 2 * units * 4 + 4 };
    let factors = if coded.is_single() { 0 } else { coded.each * factor_words(&coded, units) };
    2 * units * coded.share() + factors + OPERAND_WORDS
}

/// Words of a lane for the factors of a group: it has those of one of its rows in four.
fn factor_words(coded: &Coded, units: u32) -> u32 {
    (2 * units).div_ceil(4) * coded.sizes().count() as u32
}

/// Words of a lane's row of the operand in a line: a pair for each piece.
const OPERAND_WORDS: u32 = 8;

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
        let depth = self.in_round();
        let rounds = steps(self.spec).div_ceil(depth);
        if self.schedule.dependent && !self.spec.follows() {
            self.fetch_weights(rows, column_tile);
            self.wait_for_predecessor();
        }
        let source = self.source(rows, column_tile);
        let step = |round, of| self.step_values(&source, Step { round, of });
        let steps: Vec<_> = (0..depth).map(|of| step(b.i32(0), of)).collect();
        let lengths: Vec<_> = steps.iter().map(Vec::len).collect();
        let own = self.units() as usize * 4;
        let carried = [vec![b.f32(0.0); own], steps.concat()].concat();
        let last = b.i32(int(i64::from(rounds)));
        // Each step is multiplied, and its registers are filled with the step of the next round, if there is one.
        let carried = b.rolled(b.i32(0), last, b.i32(1), &carried, |round, carried| {
            let (sums, mut ring) = carried.split_at(own);
            let (mut sums, mut next, mut factors) = (sums.to_vec(), Vec::new(), Vec::new());
            let after = b.addc(round, 1);
            let more = b.cmpi("slt", after, last);
            for (of, length) in (0..).zip(&lengths) {
                let (values, rest) = ring.split_at(*length);
                ring = rest;
                sums = self.step_products(&source, &sums, values, &mut factors);
                next.extend(b.if_else(more, &vec!["i32"; *length], || step(after, of), || values.to_vec()));
            }
            sums.extend(next);
            sums
        });
        self.reduce(rows, column_tile, &carried[..own]);
    }

    fn source(&self, rows: Rows<'c>, column_tile: V<'c>) -> Source<'c> {
        let operand = self.operand_row(rows);
        let Some(coded) = Coded::new(self.spec) else {
            return Source { weights: self.weight_rows(rows, column_tile), operand, factors: Vec::new(), known: None };
        };
        let b = self.b;
        let (row, t) = (b.shrui(self.lane, b.i32(2)), b.andi(self.lane, b.i32(3)));
        let panels = self.panels();
        let stride = i64::try_from(packed_columns(self.spec)).expect("weights fit in memory") * i64::from(PANEL);
        let line = b.addi(b.mulc(self.warp, i64::from(self.in_round() * PANEL)), row);
        let inside =
            wide(b, b.addi(b.mulc(line, i64::from(coded.line_bytes())), b.mulc(t, i64::from(coded.share() * 4))));
        let panel = |i: V<'c>| {
            let first = b.mulc(column_tile, i64::from(self.mode.columns / PANEL));
            // Panels past the last one repeat it; their results are not stored.
            let panel = b.minsi(b.addi(first, i), b.i32(int(panels - 1)));
            b.addi(b.mulc(wide(b, rows.expert), panels), wide(b, panel))
        };
        let line = |i| at(b, self.args.w, b.addi(b.mulc(panel(b.i32(i)), stride), inside));
        let weights = 0..int(i64::from(2 * self.units()));
        let weights = if self.whole_tiles() {
            let first = line(0);
            weights.map(|i| at_const(b, first, u64::from(i.unsigned_abs()) * stride.unsigned_abs())).collect()
        } else {
            weights.map(line).collect()
        };
        // Each of the lanes of a row has the factors of every fourth of their rows.
        let groups = i64::try_from(coded.groups).expect("groups fit in memory");
        let last = b.i32(int(i64::from(2 * self.units() - 1)));
        let of_row = |i: u32| {
            let mine = panel(b.minsi(b.addc(t, i.into()), last));
            let first = b.addi(b.mulc(mine, groups * i64::from(PANEL)), wide(b, row));
            self.factor_args().zip(coded.sizes()).map(move |(of, size)| (at(b, of, b.mulc(first, size.into())), size))
        };
        let factors: Vec<_> = (0..2 * self.units()).step_by(4).flat_map(of_row).collect();
        let known = coded.is_single().then(|| self.factor_values(&factors, b.i32(0), None));
        Source { weights, operand, factors, known }
    }

    /// The scales, and the zeros, of group `group` (i32), as words; zero unless `exists`.
    fn factor_values(&self, factors: &[(V<'c>, u32)], group: V<'c>, exists: Option<V<'c>>) -> Vec<V<'c>> {
        let b = self.b;
        let value = |(of, size): &(V<'c>, u32)| {
            let from = at(b, *of, wide(b, b.mulc(group, i64::from(PANEL * size))));
            load(b, if *size == 1 { Words::Byte } else { Words::Streamed(1) }, from, exists)[0]
        };
        factors.iter().map(value).collect()
    }

    /// Steps of a round.
    fn in_round(&self) -> u32 {
        self.mode.tiles[0].stages
    }

    /// The chunk of this warp (i32).
    fn chunk(&self, step: Step<'c>) -> V<'c> {
        let b = self.b;
        let turn = b.addi(b.mulc(step.round, i64::from(WARPS)), self.warp);
        b.addc(b.mulc(turn, i64::from(self.in_round())), i64::from(step.of))
    }

    /// What is loaded for a step, as words; factors last, unless they are those of the step before.
    fn step_values(&self, source: &Source<'c>, step: Step<'c>) -> Vec<V<'c>> {
        let Some(coded) = Coded::new(self.spec) else {
            return [self.weight_pieces(source, step), self.operand_pieces(source, step, &[0], 4)].concat();
        };
        let b = self.b;
        let exists = self.chunk_exists(step);
        let along = wide(b, self.along(step, PANEL * coded.line_bytes()));
        let codes = |row: &V<'c>| load(b, Words::Streamed(coded.share()), at(b, *row, along), exists);
        let mut values: Vec<_> = source.weights.iter().flat_map(codes).collect();
        values.extend(self.operand_pieces(source, step, &[0, 16, 32, 48, 64, 80, 96, 112], 1));
        if source.known.is_none() && !coded.follows(step.of, self.in_round()) {
            let first = coded.group(b, self.chunk(step));
            for i in 0..coded.each {
                // Inputs of groups past the last one are zero.
                let last = int(i64::try_from(coded.groups).expect("groups fit in memory") - 1);
                let group = b.minsi(b.addc(first, i64::from(i)), b.i32(last));
                values.extend(self.factor_values(&source.factors, group, exists));
            }
        }
        values
    }

    /// Adds the products of one step. `factors` are those of the step before.
    fn step_products(
        &self,
        source: &Source<'c>,
        sums: &[V<'c>],
        values: &[V<'c>],
        factors: &mut Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let b = self.b;
        let Some(coded) = Coded::new(self.spec) else { return products(b, sums, values) };
        let t = b.andi(self.lane, b.i32(3));
        let (words, rest) = values.split_at((2 * self.units() * coded.share()) as usize);
        let (operand, loaded) = rest.split_at(OPERAND_WORDS as usize);
        // Lanes whose codes share bytes have loaded them together.
        let together = |words: &[V<'c>]| match words {
            [mine] => [0, 1].map(|i| shuffle(b, *mine, b.addc(b.andi(self.lane, b.i32(-2)), i))).to_vec(),
            all => all.to_vec(),
        };
        let own = |words: &[V<'c>]| coded.own(b, t, &together(words));
        let codes: Vec<_> = words.chunks(coded.share() as usize).map(own).collect();
        if !loaded.is_empty() {
            *factors = loaded.to_vec();
        }
        let all = source.known.as_deref().unwrap_or(factors);
        let row = b.andi(self.lane, b.i32(-4));
        let kinds = coded.sizes().count();
        let of_row = |group: &[V<'c>], i: usize| {
            let lane = b.addc(row, (i % 4) as i64);
            let mine = &group[i / 4 * kinds..][..kinds];
            let raw: Vec<_> = mine.iter().map(|mine| shuffle(b, *mine, lane)).collect();
            coded.factor(b, &raw)
        };
        let mut sums = sums.to_vec();
        for (unit, sums) in sums.chunks_mut(4).enumerate() {
            let rows = [2 * unit, 2 * unit + 1];
            let (mut known, mut of_rows) = (None, Vec::new());
            for block in 0..4 {
                let group = coded.group_of(block);
                if known != Some(group) {
                    let mine = &all[group * source.factors.len()..][..source.factors.len()];
                    of_rows = rows.map(|row| of_row(mine, row)).to_vec();
                    known = Some(group);
                }
                let pair = |i: usize, half: u32| coded.pair(b, &codes[rows[i]], 2 * block + half, of_rows[i]);
                let left = [pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1)];
                sums.copy_from_slice(&mma(b, &left, &operand[2 * block as usize..][..2], sums));
            }
        }
        sums
    }

    /// Asks for all weights of the block, so that they are on their way while the predecessor still runs. (Loads into
    /// registers would do that too, but the assembler moves them behind the wait.)
    fn fetch_weights(&self, rows: Rows<'c>, column_tile: V<'c>) {
        let (b, spec) = (self.b, self.spec);
        let packed = i64::try_from(packed_rows(spec)).expect("weights fit in memory");
        let stride = i64::try_from(packed_columns(spec) * spec.packed().bytes()).expect("weights fit in memory");
        let columns = i64::from(self.mode.columns);
        b.if_(b.cmpi("eq", self.thread, b.i32(0)), || {
            let expert = at(b, self.args.w, b.mulc(wide(b, rows.expert), packed * stride));
            let first = b.mulc(column_tile, columns);
            let count = b.minsi(b.i32(int(columns)), b.subi(b.i32(int(packed)), first));
            let from = at(b, expert, b.mulc(wide(b, first), stride));
            asm0(b, "cp.async.bulk.prefetch.L2.global [$0], $1;", "l,r", &[from, b.mulc(count, stride)]);
        });
    }

    /// Byte of a row of values, or of the operand, at which this lane starts.
    fn lane_start(&self) -> V<'c> {
        let b = self.b;
        let piece = if self.spec.codes.is_some() { 4 } else { 16 };
        let t = b.andi(self.lane, b.i32(3));
        let first = b.mulc(self.warp, i64::from(self.in_round()) * chunk(self.spec).cast_signed() * 2);
        b.addi(first, b.mulc(t, piece))
    }

    /// Rows past the last one repeat it; their results are not stored.
    fn weight_rows(&self, rows: Rows<'c>, column_tile: V<'c>) -> Vec<V<'c>> {
        let (b, spec) = (self.b, self.spec);
        let packed = i64::try_from(packed_rows(spec)).expect("weights fit in memory");
        let stride = i64::try_from(packed_columns(spec) * spec.w.bytes()).expect("weights fit in memory");
        let expert = at(b, self.args.w, b.mulc(wide(b, rows.expert), packed * stride));
        let first = b.addi(b.mulc(column_tile, i64::from(self.mode.columns)), b.shrui(self.lane, b.i32(2)));
        let start = wide(b, self.lane_start());
        let row = |row| at(b, at(b, expert, b.mulc(wide(b, row), stride)), start);
        let rows = 0..2 * self.units();
        if self.whole_tiles() {
            let first = row(first);
            return rows.map(|i| at_const(b, first, u64::from(i * 8) * stride.unsigned_abs())).collect();
        }
        rows.map(|i| row(b.minsi(b.addc(first, i64::from(i * 8)), b.i32(int(packed - 1))))).collect()
    }

    /// Whether every tile has all its packed rows.
    fn whole_tiles(&self) -> bool {
        packed_rows(self.spec).is_multiple_of(u64::from(self.mode.columns))
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

    /// Distance of a step from the lane's start, where chunks are so many bytes apart.
    fn along(&self, step: Step<'c>, bytes: u32) -> V<'c> {
        let b = self.b;
        let turn = b.mulc(step.round, i64::from(WARPS * self.in_round() * bytes));
        b.addc(turn, i64::from(step.of * bytes))
    }

    /// Whether a warp has a chunk in a step, where some have none.
    fn chunk_exists(&self, step: Step<'c>) -> Option<V<'c>> {
        let b = self.b;
        let chunks = chunks(self.spec);
        let even = chunks.is_multiple_of(u64::from(WARPS * self.in_round()));
        (!even).then(|| {
            let last = b.i32(int(i64::try_from(chunks).expect("chunks fit in 32 bits")));
            b.cmpi("ult", self.chunk(step), last)
        })
    }

    /// This lane's words of its weight rows. Chunks past the end of a row are zero.
    fn weight_pieces(&self, source: &Source<'c>, step: Step<'c>) -> Vec<V<'c>> {
        let b = self.b;
        let (exists, along) = (self.chunk_exists(step), wide(b, self.along(step, CHUNK as u32 * 2)));
        source.weights.iter().flat_map(|row| load(b, Words::Streamed(4), at(b, *row, along), exists)).collect()
    }

    /// This lane's words of its row of the operand, `words` at each of some distances in bytes; zero where there is none.
    fn operand_pieces(&self, source: &Source<'c>, step: Step<'c>, distances: &[u64], words: u32) -> Vec<V<'c>> {
        let (b, spec) = (self.b, self.spec);
        let (row, exists) = source.operand;
        let along = self.along(step, chunk(spec) as u32 * 2);
        let start = b.addi(along, self.lane_start());
        let end = b.i32(int(i64::try_from(spec.k * spec.a.bytes()).expect("rows fit in 32 bits")));
        let from = at(b, row, wide(b, along));
        let inside = |distance: u64| b.andi(exists, b.cmpi("ult", b.addc(start, distance.cast_signed()), end));
        // Where rows end with a chunk, so do all pieces.
        let whole = spec.k.is_multiple_of(chunk(spec)).then(|| inside(0));
        let piece = |distance: &u64| {
            let exists = whole.unwrap_or_else(|| inside(*distance));
            load(b, Words::Shared(words), at_const(b, from, *distance), Some(exists))
        };
        distances.iter().flat_map(piece).collect()
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

/// What a load gives, and how it passes through the caches.
#[derive(Clone, Copy)]
enum Words {
    /// Words that are read once, and never written.
    Streamed(u32),
    /// Words that are read by many blocks, and written by the launch before.
    Shared(u32),
    /// A byte, as a word, that is never written.
    Byte,
}

/// Words of global memory; zero unless `exists`.
fn load<'c>(b: &Builder<'c>, words: Words, from: V<'c>, exists: Option<V<'c>>) -> Vec<V<'c>> {
    let (how, count) = match words {
        Words::Streamed(4) => ("ld.global.nc.L1::no_allocate.L2::256B.v4.b32", 4),
        Words::Streamed(2) => ("ld.global.nc.L1::no_allocate.L2::256B.v2.b32", 2),
        Words::Streamed(_) => ("ld.global.nc.b32", 1),
        Words::Shared(4) => ("ld.global.v4.b32", 4),
        Words::Shared(_) => ("ld.global.b32", 1),
        Words::Byte => ("ld.global.nc.u8", 1),
    };
    let list = |of: &dyn Fn(usize) -> String, between: &str| (0..count).map(of).collect::<Vec<_>>().join(between);
    let to = list(&|i| format!("${i}"), ", ");
    let result = list(&|_| "i32".into(), ", ");
    let (to, result) =
        if count == 1 { (to, result) } else { (format!("{{{to}}}"), format!("!llvm.struct<({result})>")) };
    let values = match exists {
        None => {
            let constraints = format!("{},l", list(&|_| "=r".into(), ","));
            asm(b, &format!("{how} {to}, [${count}];"), &constraints, &[from], &result)
        }
        Some(exists) => {
            let zeros = list(&|i| format!("mov.b32 ${i}, 0;"), " ");
            let flag = count + 1;
            let text = format!("{{ .reg .pred p; setp.ne.b32 p, ${flag}, 0; {zeros} @p {how} {to}, [${count}]; }}");
            let constraints = format!("{},l,r", list(&|_| "=&r".into(), ","));
            let exists = b.cast("arith.extui", exists, "i32");
            asm(b, &text, &constraints, &[from, exists], &result)
        }
    };
    if count == 1 { vec![values] } else { (0..count).map(|i| field(b, values, i, "i32")).collect() }
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
