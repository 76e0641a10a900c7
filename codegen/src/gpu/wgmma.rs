//! Products on Hopper: a warpgroup that copies, and warpgroups that multiply with `wgmma`.
//!
//! Weights are the left operand of `wgmma`, 64 packed rows a warpgroup, and tokens the right one, from 16 to 256 rows
//! as the expert has them: few rows waste little of the tensor cores, many fill them. As many blocks as there are
//! multiprocessors walk through the tiles, and the ring of stages in shared memory runs on from one tile to the next,
//! so that copies for a tile are in flight while the one before is stored. The modes of the schedule differ in the
//! geometry of the ring alone, so one body serves them all, and one epilogue all widths of `wgmma`.
//!
//! Each stage has two barriers. `full` completes when the weights (a tensor copy that thread 0 of the copying
//! warpgroup issues) and the rows of the operand (16-byte copies of all its threads, since rows are gathered) have
//! landed; `empty` when every multiplying warp is done with the stage. Where the rows of the first tile are known
//! before the predecessor ends, its weights are already asked for then.

use super::{
    Kernel, Schedule,
    device::{
        asm, at, at_const, barrier, barrier_of, commit, fence_async, field, number, register, shuffle, vector,
        wait_copies, wide,
    },
    epilogue::{Part, Place, Values},
    pipeline::Loader,
    schedule::{COPIERS, Mode, Tile, packed_columns, packed_rows, size},
    tile::{Height, Rows, int},
};
use crate::{
    grouped::{Grouped, RowSource},
    mlir::{Builder, V},
};
use moec_abi::{DType, Expr, TensorMap};
use std::ops::Deref;

/// Most stages of a ring; the header has room for their barriers.
const STAGES: u32 = 16;
/// Registers of a thread after the warpgroups have split them: copying, and multiplying.
const REGISTERS: [u32; 2] = [80, 208];
/// Packed weight rows of a warpgroup: the height of `wgmma`.
const GROUP_COLUMNS: u32 = 64;
/// Bytes of barriers, the last of which nobody waits for; the table of offsets follows.
const BARRIERS: u32 = STAGES * 16 + 16;
/// Most experts whose offsets are kept in shared memory.
const TABLE: u64 = 2048;

/// Bytes of shared memory before the ring: barriers and offsets.
pub(super) fn header(spec: &Grouped) -> u32 {
    let table = if has_table(spec) { u32::try_from((spec.experts + 1) * 4).unwrap_or(0) } else { 0 };
    (BARRIERS + table).next_multiple_of(1024)
}

fn has_table(spec: &Grouped) -> bool {
    spec.rows != RowSource::Dense && spec.experts <= TABLE
}

/// Rows of the result that a warpgroup stores at a time.
fn part_rows(spec: &Grouped, rows: u32) -> u32 {
    rows.min(128 / size(spec.out))
}

/// Bytes in which a warpgroup brings part of a tile into the order of the result.
pub(super) fn part_bytes(spec: &Grouped, rows: u32) -> u32 {
    part_rows(spec, rows) * GROUP_COLUMNS / super::matrices(spec) * size(spec.out)
}

impl Schedule {
    /// The tensor map over the packed weights in `buffer`: columns, rows of one expert, experts.
    pub fn weight_map(&self, spec: &Grouped, buffer: usize) -> TensorMap {
        let (columns, rows) = (packed_columns(spec), packed_rows(spec));
        let bytes = columns * spec.w.bytes();
        TensorMap {
            buffer,
            dtype: spec.w,
            dims: vec![columns.into(), rows.into(), spec.experts.into()],
            strides: vec![Expr::Const(bytes), Expr::Const(bytes * rows)],
            box_dims: vec![128 / size(spec.w), self.box_rows(), 1],
            swizzle: 128,
        }
    }

    /// Weight rows of one tensor copy.
    fn box_rows(&self) -> u32 {
        self.modes.iter().map(|m| m.columns).min().unwrap_or(64)
    }
}

/// Position in the ring: stage, and parity of its use (i32).
#[derive(Clone, Copy)]
struct Position<'c> {
    stage: V<'c>,
    parity: V<'c>,
}

/// Where the copying warpgroup is in the ring (i32).
#[derive(Clone, Copy)]
struct Copying<'c> {
    next: Position<'c>,
    /// The stage that is announced next, and steps that are issued but not announced.
    behind: V<'c>,
    flying: V<'c>,
    /// Steps whose weights are asked for already.
    ahead: V<'c>,
}

impl<'c> Copying<'c> {
    fn values(self) -> Vec<V<'c>> {
        vec![self.next.stage, self.next.parity, self.behind, self.flying, self.ahead]
    }

    fn of(values: &[V<'c>]) -> Self {
        let next = Position { stage: values[0], parity: values[1] };
        Self { next, behind: values[2], flying: values[3], ahead: values[4] }
    }
}

/// Threads that work on the same tiles, and the ring that they fill or empty: number of stages, and bytes between
/// them (i32).
struct Team<'b, 'c> {
    kernel: Kernel<'b, 'c>,
    stages: V<'c>,
    stride: V<'c>,
}

impl<'b, 'c> Deref for Team<'b, 'c> {
    type Target = Kernel<'b, 'c>;

    fn deref(&self) -> &Self::Target {
        &self.kernel
    }
}

impl<'c> Kernel<'_, 'c> {
    /// The body of a kernel whose warpgroups have different work.
    pub(super) fn specialised(&self) {
        let b = self.b;
        let leader = b.cmpi("eq", self.thread, b.i32(0));
        b.if_(leader, || {
            for stage in 0..STAGES {
                let stage = b.i32(stage.cast_signed());
                // All copying threads, and one more arrival for the tensor copy.
                let copiers = b.i32(int(i64::from(COPIERS) + 1));
                b.op0("nvvm.mbarrier.init", &[self.full(stage), copiers], &[]);
                let warps = b.i32(int(i64::from(self.schedule.warps)));
                b.op0("nvvm.mbarrier.init", &[self.empty(stage), warps], &[]);
            }
            b.op0("nvvm.mbarrier.init", &[self.empty(self.nobody()), b.i32(1)], &[]);
            b.op0("nvvm.fence.mbarrier.init", &[], &[]);
        });
        // Which rows there are is what the launch before found out, unless rows are sorted already.
        if self.spec.follows() {
            self.wait_for_predecessor();
        }
        let table = has_table(self.spec).then(|| self.copy_offsets());
        barrier(b);
        let copies = b.cmpi("ult", self.warp, b.i32(4));
        let registers = |count: u32, action: &str| {
            b.intrinsic0(&format!("llvm.nvvm.setmaxnreg.{action}.sync.aligned.u32"), &[number(b, count)]);
        };
        self.either(
            copies,
            || {
                registers(REGISTERS[0], "dec");
                self.team(Kernel { table, threads: COPIERS, ..*self }).copy_all();
            },
            || {
                registers(REGISTERS[1], "inc");
                // Each warpgroup is on its own from here on.
                let warp = b.addc(self.warp, -4);
                let kernel = Kernel {
                    table,
                    threads: 128,
                    thread: b.andi(self.thread, b.i32(127)),
                    warp: b.andi(warp, b.i32(3)),
                    ..*self
                };
                // The same in all lanes, which the assembler can't know otherwise.
                let group = shuffle(b, b.shrui(warp, b.i32(2)), b.i32(0));
                self.team(kernel).multiply_all(group);
            },
        );
    }

    /// Copies the offsets to shared memory.
    fn copy_offsets(&self) -> V<'c> {
        let b = self.b;
        let table = at_const(b, self.full(b.i32(0)), u64::from(BARRIERS));
        let from = self.args.offsets.expect("grouped products have offsets");
        let count = b.i32(int(i64::try_from(self.spec.experts + 1).expect("experts fit in 32 bits")));
        b.rolled(self.thread, count, number(b, self.threads), &[], |i, _| {
            b.store(b.load(b.gep(from, "i32", i), "i32", 4), b.gep(table, "i32", i), 4);
            Vec::new()
        });
        table
    }

    /// The threads of `kernel` with the geometry of the first mode whose limit holds the rows of the launch. The last
    /// mode has the tiles of all.
    fn team<'k>(&self, kernel: Kernel<'k, 'c>) -> Team<'k, 'c> {
        let schedule = kernel.schedule;
        let b = self.b;
        let geometry = |mode: &Mode| {
            let height = Height::new(b, mode);
            [height.rows, height.bits, number(b, mode.tiles[0].stages), number(b, mode.stage_stride(self.spec))]
        };
        let [last, before @ ..] = &schedule.modes.iter().rev().collect::<Vec<_>>()[..] else {
            unreachable!("a schedule has modes")
        };
        let chosen = before.iter().fold(geometry(last), |others, mode| {
            let limit = b.i32(int(i64::try_from(mode.limit.unwrap_or(0)).expect("limits are small")));
            let few = b.cmpi("sle", self.launch_rows(), limit);
            let own = geometry(mode);
            std::array::from_fn(|i| b.select(few, own[i], others[i]))
        });
        let [rows, bits, stages, stride] = chosen;
        Team { kernel: Kernel { mode: last, height: Height { rows, bits }, ..kernel }, stages, stride }
    }

    /// Barrier of a stage: its data has landed.
    fn full(&self, stage: V<'c>) -> V<'c> {
        let header = self.b.gepc(self.shared, "i8", -int(i64::from(self.schedule.header(self.spec))));
        at(self.b, header, self.b.mulc(stage, 8))
    }

    /// Barrier of a stage: nobody reads it.
    fn empty(&self, stage: V<'c>) -> V<'c> {
        at_const(self.b, self.full(stage), u64::from(STAGES) * 8)
    }

    /// A stage that does not exist: nobody waits until it is empty.
    fn nobody(&self) -> V<'c> {
        number(self.b, STAGES)
    }
}

impl<'c> Team<'_, 'c> {
    /// Walks through the tiles of this block; `tile` gives what is carried on.
    fn walk(
        &self,
        pairs: V<'c>,
        carried: &[V<'c>],
        tile: impl Fn(Rows<'c>, V<'c>, &[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let b = self.b;
        b.rolled(register(b, "ctaid.x"), pairs, register(b, "nctaid.x"), carried, |id, carried| {
            let (row_tile, column_tile) = self.pair(id, pairs);
            tile(self.rows(row_tile), column_tile, carried)
        })
    }

    /// Takes the lowest of `tiles` that holds the rows, for values of types `results`.
    fn choose(
        &self,
        tiles: &[Tile],
        rows: Rows<'c>,
        results: &[&str],
        body: &dyn Fn(&Tile) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let [tile, higher @ ..] = tiles else { unreachable!("a mode has tiles") };
        if higher.is_empty() {
            return body(tile);
        }
        let low = self.holds(tile, rows);
        self.b.if_else(low, results, || body(tile), || self.choose(higher, rows, results, body))
    }

    fn holds(&self, tile: &Tile, rows: Rows<'c>) -> V<'c> {
        self.b.cmpi("sle", rows.count, number(self.b, tile.rows))
    }

    fn wait(&self, mbarrier: V<'c>, parity: V<'c>) {
        let ticks = self.b.i32(10_000_000);
        self.b.op0("nvvm.mbarrier.try_wait.parity", &[mbarrier, parity, ticks], &[]);
    }

    fn arrive(&self, mbarrier: V<'c>) {
        self.b.op("nvvm.mbarrier.arrive", &[mbarrier], "i64", &[]);
    }

    fn after(&self, stage: V<'c>) -> V<'c> {
        let b = self.b;
        let next = b.addc(stage, 1);
        b.select(b.cmpi("eq", next, self.stages), b.i32(0), next)
    }

    fn advance(&self, position: Position<'c>) -> Position<'c> {
        let b = self.b;
        let stage = self.after(position.stage);
        let wraps = b.cmpi("eq", stage, b.i32(0));
        let flipped = b.xori(position.parity, b.i32(1));
        Position { stage, parity: b.select(wraps, flipped, position.parity) }
    }

    fn steps(&self) -> i32 {
        let depth = u64::from(self.mode.tiles[0].depth);
        int(i64::try_from(self.spec.k.div_ceil(depth)).expect("steps fit in 32 bits"))
    }

    /// Bytes of the weights of a stage; the rows of the operand follow.
    fn weight_bytes(&self) -> u32 {
        self.mode.columns * self.mode.tiles[0].depth * size(self.spec.w)
    }

    fn stage_at(&self, stage: V<'c>) -> V<'c> {
        at(self.b, self.shared, self.b.muli(stage, self.stride))
    }

    /// The copying warpgroup: fills the ring with all steps of all tiles.
    fn copy_all(&self) {
        let b = self.b;
        let pairs = self.filled_pairs();
        let zero = b.i32(0);
        let mut ahead = zero;
        if !self.spec.follows() {
            ahead = self.weights_ahead(pairs);
            self.wait_for_predecessor();
        }
        let start = Copying { next: Position { stage: zero, parity: zero }, behind: zero, flying: zero, ahead };
        let end = self.walk(pairs, &start.values(), |rows, column_tile, carried| {
            self.copy(rows, column_tile, Copying::of(carried)).values()
        });
        let end = Copying::of(&end);
        wait_copies(b, 0);
        fence_async(b);
        b.rolled(b.i32(0), end.flying, b.i32(1), &[end.behind], |_, behind| {
            self.arrive(self.full(behind[0]));
            vec![self.after(behind[0])]
        });
    }

    /// Asks for the weights of the first stages; gives their number.
    fn weights_ahead(&self, pairs: V<'c>) -> V<'c> {
        let b = self.b;
        let id = register(b, "ctaid.x");
        let some = b.cmpi("ult", id, pairs);
        let steps = b.minsi(self.stages, b.i32(self.steps()));
        b.if_(some, || {
            let (row_tile, column_tile) = self.pair(id, pairs);
            let rows = self.rows(row_tile);
            b.if_(b.cmpi("eq", self.thread, b.i32(0)), || {
                b.each(b.i32(0), steps, |step| self.copy_weights(step, step, rows, column_tile));
            });
        });
        b.select(some, steps, b.i32(0))
    }

    /// Asks for the weights of a step. One thread does.
    fn copy_weights(&self, stage: V<'c>, step: V<'c>, rows: Rows<'c>, column_tile: V<'c>) {
        let b = self.b;
        let (full, to) = (self.full(stage), self.stage_at(stage));
        b.op0("nvvm.mbarrier.arrive.expect_tx", &[full, number(b, self.weight_bytes())], &[]);
        let column = b.mulc(step, i64::from(self.mode.tiles[0].depth));
        let first_row = b.mulc(column_tile, i64::from(self.mode.columns));
        let height = self.schedule.box_rows();
        for part in 0..self.mode.columns / height {
            let row = b.addc(first_row, i64::from(part * height));
            let to = at_const(b, to, u64::from(part) * u64::from(height) * 128);
            let operands = [to, self.args.w, column, row, rows.expert, full];
            let segments = [("operandSegmentSizes", "array<i32: 1, 1, 3, 1, 0, 0, 0, 0>"), ("isCTAOnly", "true")];
            b.op0("nvvm.cp.async.bulk.tensor.shared.cluster.global", &operands, &segments);
        }
    }

    /// All steps of one tile.
    fn copy(&self, rows: Rows<'c>, column_tile: V<'c>, start: Copying<'c>) -> Copying<'c> {
        let b = self.b;
        let tiles = &self.mode.tiles;
        let operand = self.operand(&tiles[tiles.len() - 1], rows);
        // So many steps are in flight before the first must have landed; the rest of the ring is the products' lead.
        let lag = b.shrui(self.stages, b.i32(1));
        let leader = b.cmpi("eq", self.thread, b.i32(0));
        let end = b.rolled(b.i32(0), b.i32(self.steps()), b.i32(1), &start.values(), |step, carried| {
            let Copying { next, behind, flying, ahead } = Copying::of(carried);
            self.wait(self.empty(next.stage), b.xori(next.parity, b.i32(1)));
            let due = b.cmpi("eq", ahead, b.i32(0));
            b.if_(b.andi(leader, due), || self.copy_weights(next.stage, step, rows, column_tile));
            let to = at_const(b, self.stage_at(next.stage), u64::from(self.weight_bytes()));
            self.issue_rows(&operand, 0, tiles, rows, [to, step]);
            commit(b);
            // The step that has landed by now is announced. Ordinary writes must be fenced before `wgmma` reads them.
            let announces = b.cmpi("eq", flying, lag);
            b.if_(announces, || {
                self.wait_half(&self.schedule.modes);
                fence_async(b);
                self.arrive(self.full(behind));
            });
            let behind = b.select(announces, self.after(behind), behind);
            let flying = b.select(announces, flying, b.addc(flying, 1));
            let ahead = b.select(due, ahead, b.addc(ahead, -1));
            Copying { next: self.advance(next), behind, flying, ahead }.values()
        });
        Copying::of(&end)
    }

    /// Waits until at most half of the stages are in flight.
    fn wait_half(&self, modes: &[Mode]) {
        let b = self.b;
        let [mode, others @ ..] = modes else { return };
        let stages = mode.tiles[0].stages;
        if others.is_empty() {
            return wait_copies(b, stages / 2);
        }
        let own = b.cmpi("eq", self.stages, number(b, stages));
        self.either(own, || wait_copies(b, stages / 2), || self.wait_half(others));
    }

    /// Copies the rows of the lowest of `tiles` that holds them, from the piece `first` of each thread on.
    fn issue_rows(&self, operand: &Loader<'c>, first: usize, tiles: &[Tile], rows: Rows<'c>, [to, step]: [V<'c>; 2]) {
        let [tile, higher @ ..] = tiles else { return };
        let end = operand.pieces_of(tile.rows);
        self.issue(operand, first..end, to, step);
        if !higher.is_empty() {
            let more = self.b.cmpi("sgt", rows.count, number(self.b, tile.rows));
            self.b.if_(more, || self.issue_rows(operand, end, higher, rows, [to, step]));
        }
    }

    /// The multiplying warpgroup number `group`: its 64 packed rows of all tiles.
    fn multiply_all(&self, group: V<'c>) {
        let b = self.b;
        let pairs = self.filled_pairs();
        let leads = b.cmpi("eq", self.lane, b.i32(0));
        let results = [vec!["i32"; 3], vec!["f32"; sums(self.schedule.most_rows())]].concat();
        self.walk(pairs, &[b.i32(0), b.i32(0)], |rows, column_tile, carried| {
            let start = Position { stage: carried[0], parity: carried[1] };
            let end = self.choose(&self.mode.tiles, rows, &results, &|tile| self.multiply(tile, group, leads, start));
            let sums = landed(b, &end[3..]);
            b.if_(leads, || self.arrive(self.empty(end[2])));
            self.store_group(rows, column_tile, group, &sums);
            end[..2].to_vec()
        });
    }

    /// The products of one tile. Gives the position after it, the last stage, and sums, of which the highest tile has
    /// the most; some of them are still on their way.
    fn multiply(&self, tile: &Tile, group: V<'c>, leads: V<'c>, start: Position<'c>) -> Vec<V<'c>> {
        let b = self.b;
        let base = b.op("llvm.ptrtoint", &[self.shared], "i32", &[]);
        // Descriptors: the address in units of 16 bytes, groups of eight rows 1024 bytes apart, 128-byte swizzle.
        let layout = b.i64(0x4000_0040_0001_0000);
        let descriptor = |address: V<'c>| b.ori(wide(b, b.shrui(address, b.i32(4))), layout);
        let w = descriptor(b.addi(base, b.mulc(group, i64::from(GROUP_COLUMNS) * 128)));
        let a = descriptor(b.addc(base, i64::from(self.weight_bytes())));
        let units = b.shrui(self.stride, b.i32(4));
        let nothing = b.op("llvm.mlir.poison", &[], "f32", &[]);
        // There is no step before the first whose stage could be freed, and no sums: the first products set them.
        let carried = [vec![start.stage, start.parity, self.nobody()], vec![nothing; sums(tile.rows)]].concat();
        let mut end = b.rolled(b.i32(0), b.i32(self.steps()), b.i32(1), &carried, |step, carried| {
            let position = Position { stage: carried[0], parity: carried[1] };
            self.wait(self.full(position.stage), position.parity);
            let along = wide(b, b.muli(position.stage, units));
            b.op0("nvvm.wgmma.fence.aligned", &[], &[]);
            let sums = products(b, tile, step, [b.addi(w, along), b.addi(a, along)], &carried[3..]);
            b.op0("nvvm.wgmma.commit.group.sync.aligned", &[], &[]);
            // The step before is done now, and with it the use of its stage.
            b.op0("nvvm.wgmma.wait.group.sync.aligned", &[], &[("group", "1 : i64")]);
            b.if_(leads, || self.arrive(self.empty(carried[2])));
            let next = self.advance(position);
            [vec![next.stage, next.parity, position.stage], sums].concat()
        });
        end.resize(3 + sums(self.schedule.most_rows()), nothing);
        end
    }

    /// Stores the sums of a warpgroup, some rows at a time. In every lane `l` with `g = l / 4` and `t = l % 4`, sums
    /// `4j..4j + 4` are packed rows `g` (tokens `8j + 2t` and the next) and `g + 8` of the warp's sixteen.
    fn store_group(&self, rows: Rows<'c>, column_tile: V<'c>, group: V<'c>, sums: &[V<'c>]) {
        let (b, spec) = (self.b, self.spec);
        let each = super::matrices(spec);
        let (least, most) = (self.mode.tiles[0].rows, self.schedule.most_rows());
        let height = part_rows(spec, most);
        let columns = GROUP_COLUMNS / each;
        let base = at(b, self.shared, b.mulc(group, i64::from(part_bytes(spec, most))));
        let base = at_const(b, base, u64::from(self.schedule.staging(spec)));
        let tile_columns = b.mulc(column_tile, i64::from(self.mode.out_columns(spec)));
        let first_column = b.addi(tile_columns, b.mulc(group, i64::from(columns)));
        let column = b.addi(b.mulc(self.warp, i64::from(16 / each)), b.shrui(self.lane, b.i32(2)));
        let origin = [b.shli(b.andi(self.lane, b.i32(3)), b.i32(1)), column];
        // The rows of the lowest tile are a part of their own.
        let ends = [least.min(height)].into_iter().chain((height..=most).step_by(height as usize));
        let mut first_row = 0;
        for end in ends {
            let part = Part { base, first_row, rows: end - first_row, first_column, columns, swizzled: true };
            b.if_(b.cmpi("sgt", rows.count, number(b, first_row)), || {
                self.store(rows, &part, origin, |values| {
                    let sums = &sums[self::sums(first_row)..self::sums(end)];
                    if spec.out == DType::Bf16 {
                        self.turn(&part, sums, values)
                    } else {
                        self.spread(&part, sums, values)
                    }
                });
                // The memory is written again.
                self.meet();
            });
            first_row = end;
        }
    }

    /// Writes bf16 results: `stmatrix` turns blocks of eight columns of eight tokens around.
    fn turn(&self, part: &Part<'c>, sums: &[V<'c>], values: &mut Values<'_, '_, 'c>) {
        let b = self.b;
        let each = super::matrices(self.spec);
        // Blocks of a warp with the same tokens.
        let beside = (2 / each) as usize;
        let blocks: Vec<_> = (0..sums.len() / 4 * beside)
            .map(|i| {
                let (j, half) = (i / beside, i % beside);
                let results = [0, 1].map(|c| {
                    let all: Vec<_> = (half..2 / beside + half).map(|h| sums[4 * j + 2 * h + c]).collect();
                    values.value((8 * j + c) as u32, 8 * half as u32, &all)
                });
                b.bitcast(b.cast("arith.truncf", vector(b, &results), "vector<2xbf16>"), "i32")
            })
            .collect();
        // Lanes 0-7 name the rows of the first block, lanes 8-15 those of the second, and so on.
        let (block, row) = (b.shrui(self.lane, b.i32(3)), b.andi(self.lane, b.i32(7)));
        let (j, half) = (b.divui(block, number(b, 2 / each)), b.remui(block, number(b, 2 / each)));
        let piece = b.addi(b.mulc(self.warp, i64::from(2 / each)), half);
        let to = part.address(b, b.addi(b.mulc(j, 8), row), b.mulc(piece, 16), 2);
        let mut first = 0;
        while first < blocks.len() {
            let count = [4, 2, 1].into_iter().find(|n| first + n <= blocks.len()).unwrap_or(1);
            let rows = 8 * (first / beside) as u32;
            let operands =
                [&[at_const(b, to, u64::from(rows * part.columns * 2))], &blocks[first..first + count]].concat();
            b.intrinsic0(&format!("llvm.nvvm.stmatrix.sync.aligned.m8n8.x{count}.trans.b16.p3"), &operands);
            first += count;
        }
    }

    /// Writes f32 results one by one.
    fn spread(&self, part: &Part<'c>, sums: &[V<'c>], values: &mut Values<'_, '_, 'c>) {
        let each = super::matrices(self.spec) as usize;
        let mut places = Vec::new();
        for (j, c) in (0..sums.len() / 4).flat_map(|j| [(j, 0), (j, 1)]) {
            let row = (8 * j + c) as u32;
            let of = [0, 1].map(|half| 4 * j + 2 * half + c);
            places.extend(of.chunks(each).zip([0, 8]).map(|(of, column)| Place {
                row,
                column,
                columns: vec![of.to_vec()],
            }));
        }
        self.write(part, &places, sums, values);
    }
}

impl Kernel<'_, '_> {
    /// The threads of a multiplying warpgroup meet.
    pub(super) fn meet_group(&self) {
        let b = self.b;
        // Barrier 0 is that of the block; warpgroup 0 copies.
        let group = b.shrui(register(b, "tid.x"), b.i32(7));
        barrier_of(b, group, 128);
    }
}

/// Sums of a lane: those of a warpgroup are 64 packed rows of so many tokens.
fn sums(rows: u32) -> usize {
    (rows / 2) as usize
}

/// Adds the products of a step, from the descriptors of its weights and of its rows. One piece of assembly holds them
/// all: its operands are the sums, and the compiler's time goes by how often so many are named.
fn products<'c>(b: &Builder<'c>, tile: &Tile, step: V<'c>, [w, a]: [V<'c>; 2], sums: &[V<'c>]) -> Vec<V<'c>> {
    let registers = (0..sums.len()).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
    let mut operands = vec![step];
    // Operands are numbered after the results and the sums.
    let number = |operands: &[V<'c>]| 2 * sums.len() + operands.len() - 1;
    let mut text = format!("{{ .reg .pred add; setp.ne.b32 add, ${}, 0;", number(&operands));
    for part in 0..tile.depth / 16 {
        // 16 elements are 32 bytes inside the swizzled line.
        let along = i64::from(part) * 2;
        operands.push(b.addc(w, along));
        let left = number(&operands);
        operands.push(b.addc(a, along));
        let right = number(&operands);
        let add = if part == 0 { "add" } else { "1" };
        text += &format!(
            " wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16 {{{registers}}}, ${left}, ${right}, {add}, 1, 1, 0, 0;",
            tile.rows,
        );
    }
    on_sums(b, &format!("{text} }}"), sums, &operands, &["r", "l", "l", "l", "l", "l", "l", "l", "l"])
}

/// The sums when all products are done. They pass through the wait, so that no use can move before it.
fn landed<'c>(b: &Builder<'c>, sums: &[V<'c>]) -> Vec<V<'c>> {
    on_sums(b, "wgmma.wait_group.sync.aligned 0;", sums, &[], &[])
}

/// Assembly that reads and writes sums, with operands besides.
fn on_sums<'c>(b: &Builder<'c>, text: &str, sums: &[V<'c>], operands: &[V<'c>], kinds: &[&str]) -> Vec<V<'c>> {
    let each = |of: &dyn Fn(usize) -> String| (0..sums.len()).map(of).collect::<Vec<_>>();
    let kinds = kinds.iter().map(|k| (*k).to_owned()).collect();
    let constraints = [each(&|_| "=f".into()), each(&|i| i.to_string()), kinds].concat().join(",");
    let ty = format!("!llvm.struct<({})>", each(&|_| "f32".into()).join(", "));
    let result = asm(b, text, &constraints, &[sums, operands].concat(), &ty);
    (0..sums.len()).map(|i| field(b, result, i, "f32")).collect()
}
