//! Products on Hopper: a warpgroup that copies, and warpgroups that multiply with `wgmma`.
//!
//! Weights are the left operand of `wgmma`, 64 packed rows a warpgroup, and tokens the right one, from 16 to 256 rows
//! as the expert has them: few rows waste little of the tensor cores, many fill them. As many blocks as there are
//! multiprocessors walk through the tiles, and the ring of stages in shared memory runs on from one tile to the next,
//! so that copies for a tile are in flight while the one before is stored.
//!
//! Each stage has two barriers. `full` completes when the weights (a tensor copy that thread 0 of the copying
//! warpgroup issues) and the rows of the operand (16-byte copies of all its threads, since rows are gathered) have
//! landed; `empty` when every multiplying warp is done with the stage. Where the rows of the first tile are known
//! before the predecessor ends, its weights are already asked for then.

use super::{
    Kernel, Schedule,
    device::{at, at_const, barrier, barrier_of, commit, fence_async, field, number, register, wait_copies, wide},
    epilogue::{Part, Place},
    schedule::{COPIERS, Tile, packed_columns, packed_rows, size},
    tile::{Rows, int},
};
use crate::{
    grouped::{Grouped, RowSource},
    mlir::V,
};
use moec_abi::{Expr, TensorMap};

/// Most stages of a ring; the header has room for their barriers.
const STAGES: u32 = 16;
/// Registers of a thread after the warpgroups have split them: copying, and multiplying.
const REGISTERS: [u32; 2] = [88, 208];
/// Packed weight rows of a warpgroup: the height of `wgmma`.
const GROUP_COLUMNS: u32 = 64;
/// Bytes of barriers; the table of offsets follows.
const BARRIERS: u32 = STAGES * 16;
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
            b.op0("nvvm.fence.mbarrier.init", &[], &[]);
        });
        // Which rows there are is what the launch before found out, unless rows are sorted already.
        if self.spec.rows == RowSource::Gathered {
            self.wait_for_predecessor();
        }
        let table = has_table(self.spec).then(|| self.copy_offsets());
        barrier(b);
        let kernel = Kernel { table, ..*self };
        let copies = b.cmpi("ult", self.warp, b.i32(4));
        let registers = |count: u32, action: &str| {
            b.intrinsic0(&format!("llvm.nvvm.setmaxnreg.{action}.sync.aligned.u32"), &[number(b, count)]);
        };
        self.either(
            copies,
            || {
                registers(REGISTERS[0], "dec");
                let copier = Kernel { threads: COPIERS, ..kernel };
                copier.modes(&self.schedule.modes, &|kernel: &Kernel<'_, 'c>| kernel.copy_all());
            },
            || {
                registers(REGISTERS[1], "inc");
                // Each warpgroup is on its own from here on.
                let multiplier = Kernel {
                    threads: 128,
                    thread: b.andi(self.thread, b.i32(127)),
                    warp: b.addc(self.warp, -4),
                    ..kernel
                };
                multiplier.modes(&self.schedule.modes, &|kernel: &Kernel<'_, 'c>| kernel.multiply_all());
            },
        );
    }

    /// Copies the offsets to shared memory.
    fn copy_offsets(&self) -> V<'c> {
        let b = self.b;
        let table = at_const(b, self.full(b.i32(0)), u64::from(BARRIERS));
        let from = self.args.offsets.expect("grouped products have offsets");
        let count = b.i32(int(i64::try_from(self.spec.experts + 1).expect("experts fit in 32 bits")));
        b.for_(self.thread, count, number(b, self.threads), &[], |i, _| {
            b.store(b.load(b.gep(from, "i32", i), "i32", 4), b.gep(table, "i32", i), 4);
            Vec::new()
        });
        table
    }

    /// Walks through the tiles of this block; `tile` gives what is carried on.
    fn walk(
        &self,
        pairs: V<'c>,
        carried: &[V<'c>],
        tile: &dyn Fn(&Tile, Rows<'c>, V<'c>, &[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let b = self.b;
        b.for_(register(b, "ctaid.x"), pairs, register(b, "nctaid.x"), carried, |id, carried| {
            let (row_tile, column_tile) = self.pair(id, pairs);
            let rows = self.rows(row_tile);
            self.choose(&self.mode.tiles, rows, carried.len(), &|t| tile(t, rows, column_tile, carried))
        })
    }

    /// Takes the lowest of `tiles` that holds the rows, for its `values` numbers.
    fn choose(&self, tiles: &[Tile], rows: Rows<'c>, values: usize, body: &dyn Fn(&Tile) -> Vec<V<'c>>) -> Vec<V<'c>> {
        let b = self.b;
        let [tile, higher @ ..] = tiles else { unreachable!("a mode has tiles") };
        if higher.is_empty() {
            return body(tile);
        }
        let low = b.cmpi("sle", rows.count, b.i32(int(i64::from(tile.rows))));
        b.if_else(low, &vec!["i32"; values], || body(tile), || self.choose(higher, rows, values, body))
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

    fn wait(&self, mbarrier: V<'c>, parity: V<'c>) {
        let ticks = self.b.i32(10_000_000);
        self.b.op0("nvvm.mbarrier.try_wait.parity", &[mbarrier, parity, ticks], &[]);
    }

    fn arrive(&self, mbarrier: V<'c>) {
        self.b.op("nvvm.mbarrier.arrive", &[mbarrier], "i64", &[]);
    }

    fn stages(&self) -> u32 {
        self.mode.tiles[0].stages
    }

    fn after(&self, stage: V<'c>) -> V<'c> {
        let b = self.b;
        let next = b.addc(stage, 1);
        b.select(b.cmpi("eq", next, number(b, self.stages())), b.i32(0), next)
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
        at(self.b, self.shared, self.b.mulc(stage, i64::from(self.mode.stage_stride(self.spec))))
    }

    /// The copying warpgroup: fills the ring with all steps of all tiles.
    fn copy_all(&self) {
        let b = self.b;
        let pairs = self.filled_pairs();
        let zero = b.i32(0);
        let mut ahead = zero;
        if self.spec.rows != RowSource::Gathered {
            ahead = self.weights_ahead(pairs);
            self.wait_for_predecessor();
        }
        let start = Copying { next: Position { stage: zero, parity: zero }, behind: zero, flying: zero, ahead };
        let end = self.walk(pairs, &start.values(), &|tile, rows, column_tile, carried| {
            self.copy(tile, rows, column_tile, Copying::of(carried)).values()
        });
        let end = Copying::of(&end);
        wait_copies(b, 0);
        fence_async(b);
        b.for_(b.i32(0), end.flying, b.i32(1), &[end.behind], |_, behind| {
            self.arrive(self.full(behind[0]));
            vec![self.after(behind[0])]
        });
    }

    /// Asks for the weights of the first stages; gives their number.
    fn weights_ahead(&self, pairs: V<'c>) -> V<'c> {
        let b = self.b;
        let id = register(b, "ctaid.x");
        let some = b.cmpi("ult", id, pairs);
        let steps = int(i64::from(self.stages())).min(self.steps());
        b.if_(some, || {
            let (row_tile, column_tile) = self.pair(id, pairs);
            let rows = self.rows(row_tile);
            b.if_(b.cmpi("eq", self.thread, b.i32(0)), || {
                b.each(b.i32(0), b.i32(steps), |step| self.copy_weights(step, step, rows, column_tile));
            });
        });
        b.select(some, b.i32(steps), b.i32(0))
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
    fn copy(&self, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>, start: Copying<'c>) -> Copying<'c> {
        let b = self.b;
        let operand = self.operand(tile, rows);
        // So many steps are in flight before the first must have landed; the rest of the ring is the products' lead.
        let lag = self.stages() / 2;
        let leader = b.cmpi("eq", self.thread, b.i32(0));
        let end = b.for_(b.i32(0), b.i32(self.steps()), b.i32(1), &start.values(), |step, carried| {
            let Copying { next, behind, flying, ahead } = Copying::of(carried);
            self.wait(self.empty(next.stage), b.xori(next.parity, b.i32(1)));
            let due = b.cmpi("eq", ahead, b.i32(0));
            b.if_(b.andi(leader, due), || self.copy_weights(next.stage, step, rows, column_tile));
            let to = at_const(b, self.stage_at(next.stage), u64::from(self.weight_bytes()));
            self.issue(&operand, to, step);
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

    /// A multiplying warpgroup: its 64 packed rows of all tiles.
    fn multiply_all(&self) {
        let b = self.b;
        let pairs = self.filled_pairs();
        let group = b.shrui(self.warp, b.i32(2));
        let multiplier = Kernel { warp: b.andi(self.warp, b.i32(3)), ..*self };
        multiplier.walk(pairs, &[b.i32(0), b.i32(0)], &|tile, rows, column_tile, carried| {
            let start = Position { stage: carried[0], parity: carried[1] };
            let end = multiplier.multiply(tile, rows, column_tile, group, start);
            vec![end.stage, end.parity]
        });
    }

    /// The products of one tile, and their results.
    fn multiply(
        &self,
        tile: &Tile,
        rows: Rows<'c>,
        column_tile: V<'c>,
        group: V<'c>,
        start: Position<'c>,
    ) -> Position<'c> {
        let b = self.b;
        let stage_stride = i64::from(self.mode.stage_stride(self.spec));
        let base = b.op("llvm.ptrtoint", &[self.shared], "i32", &[]);
        // Descriptors: the address in units of 16 bytes, groups of eight rows 1024 bytes apart, 128-byte swizzle.
        let layout = b.i64(0x4000_0040_0001_0000);
        let descriptor = |address: V<'c>| b.ori(wide(b, b.shrui(address, b.i32(4))), layout);
        let w = descriptor(b.addi(base, b.mulc(group, i64::from(GROUP_COLUMNS) * 128)));
        let a = descriptor(b.addc(base, i64::from(self.weight_bytes())));
        let leads = b.cmpi("eq", self.lane, b.i32(0));
        let sum = Sum::new(tile.rows);
        let carried = [b.zero(&sum.ty), start.stage, start.parity, start.stage];
        let end = b.for_(b.i32(0), b.i32(self.steps()), b.i32(1), &carried, |step, carried| {
            let position = Position { stage: carried[1], parity: carried[2] };
            self.wait(self.full(position.stage), position.parity);
            let along = wide(b, b.mulc(position.stage, stage_stride / 16));
            let (w, a) = (b.addi(w, along), b.addi(a, along));
            b.op0("nvvm.wgmma.fence.aligned", &[], &[]);
            let mut sums = carried[0];
            for part in 0..tile.depth / 16 {
                // 16 elements are 32 bytes inside the swizzled line.
                let along = i64::from(part) * 2;
                sums = sum.wgmma(self, sums, b.addc(w, along), b.addc(a, along));
            }
            b.op0("nvvm.wgmma.commit.group.sync.aligned", &[], &[]);
            // The step before is done now, and with it the use of its stage.
            b.op0("nvvm.wgmma.wait.group.sync.aligned", &[], &[("group", "1 : i64")]);
            let frees = b.andi(leads, b.cmpi("ne", step, b.i32(0)));
            b.if_(frees, || self.arrive(self.empty(carried[3])));
            let next = self.advance(position);
            vec![sums, next.stage, next.parity, position.stage]
        });
        b.op0("nvvm.wgmma.wait.group.sync.aligned", &[], &[("group", "0 : i64")]);
        b.if_(leads, || self.arrive(self.empty(end[3])));
        self.store_group(tile, rows, column_tile, group, end[0]);
        Position { stage: end[1], parity: end[2] }
    }

    /// Stores the sums of a warpgroup, some rows at a time. In every lane `l` with `g = l / 4` and `t = l % 4`, sums
    /// `4j..4j + 4` are packed rows `g` (tokens `8j + 2t` and the next) and `g + 8` of the warp's sixteen.
    fn store_group(&self, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>, group: V<'c>, sums: V<'c>) {
        let (b, spec) = (self.b, self.spec);
        let each = super::matrices(spec);
        let height = part_rows(spec, tile.rows);
        let columns = GROUP_COLUMNS / each;
        let staging = self.schedule.staging(spec);
        let bytes = part_bytes(spec, self.schedule.most_rows());
        let base = at_const(b, at(b, self.shared, b.mulc(group, i64::from(bytes))), u64::from(staging));
        let tile_columns = b.mulc(column_tile, i64::from(self.mode.out_columns(spec)));
        let first_column = b.addi(tile_columns, b.mulc(group, i64::from(columns)));
        let column = b.addi(b.mulc(self.warp, i64::from(16 / each)), b.shrui(self.lane, b.i32(2)));
        let origin = [b.shli(b.andi(self.lane, b.i32(3)), b.i32(1)), column];
        for first_row in (0..tile.rows).step_by(height as usize) {
            let part = Part { base, first_row, rows: height, first_column, columns, swizzled: true };
            let (mut places, mut values) = (Vec::new(), Vec::new());
            for j in first_row / 8..(first_row + height) / 8 {
                for c in 0..2u32 {
                    let at = |half: u32| field(b, sums, (4 * j + 2 * half + c) as usize, "f32");
                    let row = 8 * j - first_row + c;
                    let start = values.len();
                    values.extend([at(0), at(1)]);
                    if each == 2 {
                        places.push(Place { row, column: 0, columns: vec![vec![start, start + 1]] });
                    } else {
                        places.push(Place { row, column: 0, columns: vec![vec![start]] });
                        places.push(Place { row, column: 8, columns: vec![vec![start + 1]] });
                    }
                }
            }
            let store = || {
                self.store(rows, &part, origin, &places, &values);
                // The memory is written again.
                self.meet();
            };
            if first_row == 0 {
                store();
            } else {
                b.if_(b.cmpi("sgt", rows.count, number(b, first_row)), store);
            }
        }
    }

    /// The threads of a multiplying warpgroup meet.
    pub(super) fn meet_group(&self) {
        let b = self.b;
        // Barrier 0 is that of the block; warpgroup 0 copies.
        let group = b.shrui(register(b, "tid.x"), b.i32(7));
        barrier_of(b, group, 128);
    }
}

/// Sums of a warpgroup: 64 packed rows of so many tokens.
struct Sum {
    rows: u32,
    ty: String,
}

impl Sum {
    fn new(rows: u32) -> Self {
        let fields = vec!["f32"; (rows / 2) as usize].join(", ");
        Self { rows, ty: format!("!llvm.struct<({fields})>") }
    }

    /// Adds the product of 64x16 and 16 x rows elements.
    fn wgmma<'c>(&self, kernel: &Kernel<'_, 'c>, sums: V<'c>, w: V<'c>, a: V<'c>) -> V<'c> {
        let shape = format!("#nvvm.shape<m = 64, n = {}, k = 16>", self.rows);
        let attributes = [
            ("shape", shape.as_str()),
            ("typeA", "#nvvm.wgmma_type<bf16>"),
            ("typeB", "#nvvm.wgmma_type<bf16>"),
            ("typeD", "#nvvm.wgmma_type<f32>"),
            ("scaleD", "#nvvm.wgmma_scale_out<one>"),
            ("scaleA", "#nvvm.wgmma_scale_in<one>"),
            ("scaleB", "#nvvm.wgmma_scale_in<one>"),
            ("layoutA", "#nvvm.mma_layout<row>"),
            ("layoutB", "#nvvm.mma_layout<col>"),
        ];
        kernel.b.op("nvvm.wgmma.mma_async", &[sums, w, a], &self.ty, &attributes)
    }
}
