//! Products on Hopper: a warpgroup that copies, and warpgroups that multiply with `wgmma`.
//!
//! Weights are the left operand of `wgmma`, one to three times 64 packed rows a warpgroup, and tokens the right one, from
//! 16 to 128 rows as the expert has them: few rows waste little of the tensor cores, many fill them. As many blocks as
//! there are multiprocessors walk through the tiles, and the ring of stages in shared memory runs on from one tile to the
//! next, so that copies for a tile are in flight while the one before is stored.
//!
//! Where experts have many rows, the blocks of a cluster share them and the tile of weights: each multiplies its part of
//! the rows, and copies its part of the weights to all.
//!
//! Each stage has two barriers. `full` completes when the weights (a tensor copy that thread 0 of the copying
//! warpgroup issues) and the rows of the operand (16-byte copies of all its threads, since rows are gathered) have
//! landed; `empty` when every multiplying warp of the cluster is done with the stage. Where the rows of the first tile are
//! known before the predecessor ends, its weights are already asked for then.

use super::{
    Kernel, Schedule,
    coded::{Coded, PANEL},
    device::{
        asm0, at, at_const, barrier, commit, copy_async, fence_async, number, register, shuffle, wait_copies, wide,
    },
    pipeline::Loader,
    schedule::{COPIERS, Mode, Tile, packed_columns, packed_rows, size},
    tile::{Rows, Table, int},
};
use crate::{
    grouped::{Grouped, RowSource},
    mlir::V,
};
use moec_abi::{DType, Expr, TensorMap};
use std::ops::Deref;

/// Most stages of a ring; the header has room for their barriers.
pub(super) const STAGES: u32 = 16;
/// Registers of a thread after the warpgroups have split them: copying, and multiplying.
const REGISTERS: [u32; 2] = [80, 208];
/// Packed weight rows of a warpgroup: the height of `wgmma`.
pub(super) const GROUP_COLUMNS: u32 = 64;
/// Bytes of barriers, the last of which nobody waits for; the table of tiles follows.
const BARRIERS: u32 = STAGES * 16 + 16;
/// Most experts whose tiles are kept in shared memory.
const TABLE: u64 = 2048;

/// Bytes of shared memory before the ring: barriers and the table of tiles.
pub(super) fn header(spec: &Grouped) -> u32 {
    let table = if has_table(spec) { u32::try_from(Table::bytes(spec.experts)).unwrap_or(0) } else { 0 };
    (BARRIERS + table).next_multiple_of(1024)
}

fn has_table(spec: &Grouped) -> bool {
    spec.rows != RowSource::Dense && spec.experts <= TABLE
}

/// Rows of the result that a warpgroup stores at a time.
pub(super) fn part_rows(spec: &Grouped, rows: u32) -> u32 {
    rows.min(128 / size(spec.out))
}

/// Bytes in which a warpgroup brings part of a tile into the order of the result.
pub(super) fn part_bytes(spec: &Grouped, rows: u32) -> u32 {
    part_rows(spec, rows) * GROUP_COLUMNS / super::matrices(spec) * size(spec.out)
}

/// Bytes of a stage before the rows of the operand: weights, or codes and their factors.
pub(super) fn weight_bytes(spec: &Grouped, columns: u32, depth: u32) -> u32 {
    match Coded::new(spec) {
        None => columns * depth * size(spec.w),
        Some(coded) => {
            let factors: u32 = coded.sizes().map(|size| factor_bytes(&coded, columns, size)).sum();
            // Rows of the operand are mixed in blocks of 1024 bytes.
            (columns * coded.line_bytes() + factors).next_multiple_of(1024)
        }
    }
}

/// Bytes of the scales, or zeros, of a stage.
fn factor_bytes(coded: &Coded, columns: u32, size: u32) -> u32 {
    columns * coded.each * size
}

/// What a tensor copy counts: elements of a step, and rows of `columns` packed rows. Of codes it takes whole panels, as
/// words.
fn map_unit(spec: &Grouped, columns: u32, depth: u32) -> [u32; 2] {
    match Coded::new(spec) {
        None => [depth, columns],
        Some(coded) => [coded.line_bytes() * PANEL / 4, columns / PANEL],
    }
}

impl Schedule {
    /// The tensor map over the packed weights in `buffer`: columns, rows of one expert, experts. Codes are words, and
    /// what follows each other of eight rows is a row.
    pub fn weight_map(&self, spec: &Grouped, buffer: usize) -> TensorMap {
        let bytes = packed_columns(spec) * spec.packed().bytes();
        let (dtype, panel, swizzle) =
            if spec.codes.is_some() { (DType::I32, u64::from(PANEL), 0) } else { (spec.w, 1, 128) };
        let (bytes, rows) = (bytes * panel, packed_rows(spec) / panel);
        let [width, height] = map_unit(spec, self.box_rows(), 128 / size(spec.w));
        TensorMap {
            buffer,
            dtype,
            dims: vec![(bytes / dtype.bytes()).into(), rows.into(), spec.experts.into()],
            strides: vec![Expr::Const(bytes), Expr::Const(bytes * rows)],
            box_dims: vec![width, height, 1],
            swizzle,
        }
    }

    /// Weight rows of one tensor copy: those of a block, in two copies if they are too many for one.
    fn box_rows(&self) -> u32 {
        let own = self.modes[0].columns / self.modes[0].share;
        if own > 256 { own / 2 } else { own }
    }
}

/// Position in the ring: stage, and parity of its use (i32).
#[derive(Clone, Copy)]
pub(super) struct Position<'c> {
    pub(super) stage: V<'c>,
    pub(super) parity: V<'c>,
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

/// Threads that work on the same tiles.
#[derive(Clone, Copy)]
pub(super) struct Team<'b, 'c> {
    kernel: Kernel<'b, 'c>,
    /// How weights are stored, if as codes.
    pub(super) coded: Option<Coded>,
    /// Number of the block in its cluster (i32).
    rank: V<'c>,
}

impl<'b, 'c> Deref for Team<'b, 'c> {
    type Target = Kernel<'b, 'c>;

    fn deref(&self) -> &Self::Target {
        &self.kernel
    }
}

impl<'b, 'c> Kernel<'b, 'c> {
    /// The body of a kernel whose warpgroups have different work.
    pub(super) fn specialised(&self) {
        let b = self.b;
        // A thread for each stage, and one for the stage that nobody waits for.
        let init = |mbarrier, arrivals| b.op0("nvvm.mbarrier.init", &[mbarrier, number(b, arrivals)], &[]);
        b.if_(b.cmpi("ule", self.thread, self.nobody()), || {
            b.if_(b.cmpi("ult", self.thread, self.nobody()), || {
                // All copying threads, and one more arrival for the tensor copy.
                init(self.full(self.thread), COPIERS + 1);
            });
            init(self.empty(self.thread), self.schedule.warps * self.mode.share);
            b.op0("nvvm.fence.mbarrier.init", &[], &[]);
        });
        // Which rows there are is what the launch before found out, unless rows are sorted already.
        if self.spec.follows() {
            self.wait_for_predecessor();
        }
        let rank = if self.mode.share > 1 { register(b, "cluster.ctarank") } else { b.i32(0) };
        let mut team = Team { kernel: *self, coded: Coded::new(self.spec), rank };
        if has_table(self.spec) {
            team.kernel.table = Some(team.fill_table(at_const(b, self.full(b.i32(0)), u64::from(BARRIERS))));
        }
        // All blocks of the cluster have barriers.
        team.meet_all();
        let copies = b.cmpi("ult", self.warp, b.i32(4));
        let registers = |count: u32, action: &str| {
            b.intrinsic0(&format!("llvm.nvvm.setmaxnreg.{action}.sync.aligned.u32"), &[number(b, count)]);
        };
        self.either(
            copies,
            || {
                registers(REGISTERS[0], "dec");
                Team { kernel: Kernel { threads: COPIERS, ..team.kernel }, ..team }.copy_all();
            },
            || {
                registers(REGISTERS[1], "inc");
                // Each warpgroup is on its own from here on.
                let warp = b.addc(self.warp, -4);
                let kernel = Kernel {
                    threads: 128,
                    thread: b.andi(self.thread, b.i32(127)),
                    warp: b.andi(warp, b.i32(3)),
                    ..team.kernel
                };
                // The same in all lanes, which the assembler can't know otherwise.
                let group = shuffle(b, b.shrui(warp, b.i32(2)), b.i32(0));
                Team { kernel, ..team }.multiply_all(group);
            },
        );
        // No block ends while others copy to it or arrive at its barriers.
        if self.mode.share > 1 {
            team.meet_all();
        }
    }

    /// Barrier of a stage: its data has landed.
    pub(super) fn full(&self, stage: V<'c>) -> V<'c> {
        let header = self.b.gepc(self.shared, "i8", -int(i64::from(self.schedule.header(self.spec))));
        at(self.b, header, self.b.mulc(stage, 8))
    }

    /// Barrier of a stage: nobody reads it.
    pub(super) fn empty(&self, stage: V<'c>) -> V<'c> {
        at_const(self.b, self.full(stage), u64::from(STAGES) * 8)
    }

    /// A stage that does not exist: nobody waits until it is empty.
    pub(super) fn nobody(&self) -> V<'c> {
        number(self.b, STAGES)
    }
}

impl<'c> Team<'_, 'c> {
    /// Walks through the tiles of this block; `tile` gives what is carried on.
    pub(super) fn walk(
        &self,
        pairs: V<'c>,
        carried: &[V<'c>],
        tile: impl Fn(Rows<'c>, V<'c>, &[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let b = self.b;
        let clusters = |blocks| b.divui(register(b, blocks), number(b, self.mode.share));
        b.rolled(clusters("ctaid.x"), pairs, clusters("nctaid.x"), carried, |id, carried| {
            let (row_tile, column_tile) = self.pair(id, pairs);
            tile(self.part(self.rows(row_tile)), column_tile, carried)
        })
    }

    /// This block's part of the rows of its cluster: none, maybe.
    fn part(&self, rows: Rows<'c>) -> Rows<'c> {
        let (b, share) = (self.b, self.mode.share);
        if share == 1 {
            return rows;
        }
        let each = b.divui(b.addc(rows.count, i64::from(share) - 1), number(b, share));
        let before = b.muli(self.rank, each);
        let count = b.maxsi(b.minsi(b.subi(rows.count, before), each), b.i32(0));
        Rows { first: b.addi(rows.first, before), count, ..rows }
    }

    /// All threads of the cluster meet.
    fn meet_all(&self) {
        if self.mode.share > 1 {
            asm0(self.b, "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", "", &[]);
        } else {
            barrier(self.b);
        }
    }

    /// Takes the lowest of `tiles` that holds the rows, for values of types `results`.
    pub(super) fn choose(
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

    pub(super) fn wait(&self, mbarrier: V<'c>, parity: V<'c>) {
        let ticks = self.b.i32(10_000_000);
        self.b.op0("nvvm.mbarrier.try_wait.parity", &[mbarrier, parity, ticks], &[]);
    }

    /// As [`Self::wait`], for what other blocks of the cluster did too.
    fn wait_cluster(&self, mbarrier: V<'c>, parity: V<'c>) {
        if self.mode.share == 1 {
            return self.wait(mbarrier, parity);
        }
        let text = "{\\n .reg .pred done;\\n WAIT:\\n \
            mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], $1, 10000000;\\n \
            @!done bra.uni WAIT;\\n }";
        asm0(self.b, text, "r,r", &[mbarrier, parity]);
    }

    fn arrive(&self, mbarrier: V<'c>) {
        self.b.op("nvvm.mbarrier.arrive", &[mbarrier], "i64", &[]);
    }

    /// One warp is done with a stage: each of its first lanes tells a block of the cluster.
    pub(super) fn arrive_empty(&self, stage: V<'c>) {
        let (b, share) = (self.b, self.mode.share);
        let empty = self.empty(stage);
        b.if_(b.cmpi("ult", self.lane, number(b, share)), || {
            if share == 1 {
                return self.arrive(empty);
            }
            let text = "{\\n .reg .b32 there;\\n mapa.shared::cluster.u32 there, $0, $1;\\n \
                mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\\n }";
            asm0(b, text, "r,r", &[empty, self.lane]);
        });
    }

    fn stages(&self) -> u32 {
        self.mode.tiles[0].stages
    }

    fn after(&self, stage: V<'c>) -> V<'c> {
        let b = self.b;
        let next = b.addc(stage, 1);
        b.select(b.cmpi("eq", next, number(b, self.stages())), b.i32(0), next)
    }

    pub(super) fn advance(&self, position: Position<'c>) -> Position<'c> {
        let b = self.b;
        let stage = self.after(position.stage);
        let wraps = b.cmpi("eq", stage, b.i32(0));
        let flipped = b.xori(position.parity, b.i32(1));
        Position { stage, parity: b.select(wraps, flipped, position.parity) }
    }

    pub(super) fn steps(&self) -> i32 {
        let depth = u64::from(self.mode.tiles[0].depth);
        int(i64::try_from(self.spec.k.div_ceil(depth)).expect("steps fit in 32 bits"))
    }

    /// Bytes of the weights of a stage; the rows of the operand follow.
    pub(super) fn weight_bytes(&self) -> u32 {
        weight_bytes(self.spec, self.mode.columns, self.mode.tiles[0].depth)
    }

    /// Bytes of the codes of a stage; their factors follow.
    pub(super) fn code_bytes(&self) -> u32 {
        self.coded.map_or(0, |coded| self.mode.columns * coded.line_bytes())
    }

    /// Bytes of the scales, or zeros, of a stage.
    pub(super) fn factor_bytes(&self, coded: &Coded, size: u32) -> u32 {
        factor_bytes(coded, self.mode.columns, size)
    }

    /// Bytes between stages.
    pub(super) fn stride(&self) -> u32 {
        self.mode.stage_stride(self.spec)
    }

    fn stage_at(&self, stage: V<'c>) -> V<'c> {
        at(self.b, self.shared, self.b.mulc(stage, i64::from(self.stride())))
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
        let id = b.divui(register(b, "ctaid.x"), number(b, self.mode.share));
        let some = b.cmpi("ult", id, pairs);
        let steps = b.minsi(number(b, self.stages()), b.i32(self.steps()));
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
        let Mode { columns, share, .. } = *self.mode;
        let (own, height) = (columns / share, self.schedule.box_rows());
        let bytes = if self.coded.is_some() { self.code_bytes() } else { self.weight_bytes() };
        b.op0("nvvm.mbarrier.arrive.expect_tx", &[full, number(b, bytes)], &[]);
        let unit = |columns: u32| map_unit(self.spec, columns, self.mode.tiles[0].depth).map(i64::from);
        let column = b.mulc(step, unit(columns)[0]);
        let before = b.mulc(self.rank, unit(own)[1]);
        let first_row = b.addi(b.mulc(column_tile, unit(columns)[1]), before);
        let to = at(b, to, b.mulc(self.rank, i64::from(bytes / share)));
        for part in 0..own / height {
            let row = b.addc(first_row, unit(part * height)[1]);
            let to = at_const(b, to, u64::from(part * height) * u64::from(bytes / columns));
            let operands = [to, self.args.w, column, row, rows.expert, full];
            if share == 1 {
                let segments = [("operandSegmentSizes", "array<i32: 1, 1, 3, 1, 0, 0, 0, 0>"), ("isCTAOnly", "true")];
                b.op0("nvvm.cp.async.bulk.tensor.shared.cluster.global", &operands, &segments);
            } else {
                // To the same place in all blocks, and for their barriers.
                let text = format!(
                    "{{ .reg .b16 all; mov.b16 all, {}; cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier\
                     ::complete_tx::bytes.multicast::cluster [$0], [$1, {{$2, $3, $4}}], [$5], all; }}",
                    (1 << share) - 1
                );
                asm0(b, &text, "r,l,r,r,r,r", &operands);
            }
        }
    }

    /// Starts the copies of the factors of line `step` to the stage at `stage`, if none before it has the same.
    fn copy_factors(&self, coded: &Coded, [stage, step]: [V<'c>; 2], rows: Rows<'c>, column_tile: V<'c>) {
        let b = self.b;
        let tile_panels = self.mode.columns / PANEL;
        let copy = || {
            let mut to = self.code_bytes();
            for (of, size) in self.factor_args().zip(coded.sizes()) {
                // The factors of a panel and a group are this many bytes.
                let group_bytes = PANEL * size;
                let unit = group_bytes.min(16);
                let per_panel = coded.each * group_bytes / unit;
                let count = tile_panels * per_panel;
                let copy = |index: V<'c>| {
                    let (panel, piece) = (b.divui(index, number(b, per_panel)), b.remui(index, number(b, per_panel)));
                    let place = at_const(b, at(b, stage, b.mulc(index, i64::from(unit))), u64::from(to));
                    // Panels past the last one repeat it; groups past the last one are zero.
                    let first = b.mulc(column_tile, i64::from(tile_panels));
                    let panel = b.minsi(b.addi(first, panel), b.i32(int(self.panels() - 1)));
                    let panel = b.addi(b.mulc(wide(b, rows.expert), self.panels()), wide(b, panel));
                    let groups = int(i64::try_from(coded.groups).expect("groups fit in memory"));
                    let piece = b.mulc(piece, i64::from(unit));
                    let group = coded.group(b, step);
                    let inside = b.addi(b.mulc(group, i64::from(group_bytes)), piece);
                    let row = i64::from(groups) * i64::from(group_bytes);
                    let from = at(b, at(b, of, b.mulc(panel, row)), wide(b, inside));
                    let whole = coded.groups.is_multiple_of(u64::from(coded.each));
                    let bytes = (!whole).then(|| {
                        let exists = b.cmpi("slt", inside, b.i32(int(row)));
                        b.select(exists, number(b, unit), b.i32(0))
                    });
                    copy_async(b, place, from, unit, bytes);
                };
                for first in (0..count).step_by(COPIERS as usize) {
                    let index = b.addc(self.thread, i64::from(first));
                    if first + COPIERS <= count {
                        copy(index);
                    } else {
                        b.if_(b.cmpi("ult", index, number(b, count)), || copy(index));
                    }
                }
                to += self.factor_bytes(coded, size);
            }
        };
        if coded.lasts() { b.if_(coded.is_first(b, step), copy) } else { copy() }
    }

    /// All steps of one tile.
    fn copy(&self, rows: Rows<'c>, column_tile: V<'c>, start: Copying<'c>) -> Copying<'c> {
        let b = self.b;
        let tiles = &self.mode.tiles;
        let operand = self.operand(&tiles[tiles.len() - 1], rows);
        // So many steps are in flight before the first must have landed; the rest of the ring is the products' lead.
        let lag = self.stages() / 2;
        let leader = b.cmpi("eq", self.thread, b.i32(0));
        let end = b.rolled(b.i32(0), b.i32(self.steps()), b.i32(1), &start.values(), |step, carried| {
            let Copying { next, behind, flying, ahead } = Copying::of(carried);
            self.wait_cluster(self.empty(next.stage), b.xori(next.parity, b.i32(1)));
            let due = b.cmpi("eq", ahead, b.i32(0));
            b.if_(b.andi(leader, due), || self.copy_weights(next.stage, step, rows, column_tile));
            let stage = self.stage_at(next.stage);
            if let Some(coded) = &self.coded {
                self.copy_factors(coded, [stage, step], rows, column_tile);
            }
            let to = at_const(b, stage, u64::from(self.weight_bytes()));
            self.issue_rows(&operand, 0, tiles, rows, [to, step]);
            commit(b);
            // The step that has landed by now is announced. Ordinary writes must be fenced before `wgmma` reads them.
            let announces = b.cmpi("eq", flying, number(b, lag));
            b.if_(announces, || {
                wait_copies(b, lag);
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
}
