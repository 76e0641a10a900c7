//! Products on Hopper: a warpgroup that copies, and warpgroups that multiply with `wgmma`.
//!
//! Each stage of the ring has two barriers. `full` completes when the weights (a tensor copy that thread 0 of the
//! copying warpgroup issues) and the rows of the operand (16-byte copies of all its threads, since rows are
//! gathered) have landed; `empty` when every multiplying warp is done with the stage. A tile of 64 rows has its
//! columns split between the warpgroups, a tile of 128 rows its rows, so the ring looks the same to both.

use super::{
    Kernel, Schedule,
    device::{at, at_const, barrier, commit, fence_async, field, number, register, wait_copies, wide},
    fragments::Mma,
    schedule::{COPIERS, Tile, packed_columns, packed_rows, size},
    tile::{Rows, int},
};
use crate::{grouped::Grouped, mlir::V};
use moec_abi::{Expr, TensorMap};

/// Most stages of a ring; the header has room for their barriers.
const STAGES: u32 = 16;
/// Registers of a thread after the warpgroups have split them: copying, and multiplying.
const REGISTERS: [u32; 2] = [72, 216];

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
        barrier(b);
        // What the launch before wrote is visible from here on.
        self.wait_for_predecessor();
        let copies = b.cmpi("ult", self.warp, b.i32(4));
        let registers = |count: u32, action: &str| {
            b.intrinsic0(&format!("llvm.nvvm.setmaxnreg.{action}.sync.aligned.u32"), &[number(b, count)]);
        };
        self.either(
            copies,
            || {
                registers(REGISTERS[0], "dec");
                let copier = Kernel { threads: COPIERS, ..*self };
                copier.roles(&|kernel, tile, rows, column_tile| kernel.copy(tile, rows, column_tile));
            },
            || {
                registers(REGISTERS[1], "inc");
                let multiplier = Kernel {
                    threads: self.threads - COPIERS,
                    thread: b.addc(self.thread, -i64::from(COPIERS)),
                    warp: b.addc(self.warp, -4),
                    ..*self
                };
                multiplier.roles(&|kernel, tile, rows, column_tile| kernel.multiply(tile, rows, column_tile));
            },
        );
    }

    fn roles(&self, role: &dyn Fn(&Kernel<'_, 'c>, &Tile, Rows<'c>, V<'c>)) {
        let b = self.b;
        self.modes(&self.schedule.modes, &|kernel: &Kernel<'_, 'c>| {
            let pairs = kernel.pairs();
            let id = register(b, "ctaid.x");
            b.if_(b.cmpi("ult", id, pairs), || {
                kernel.with_pair(id, pairs, |rows, column_tile| {
                    kernel.ways(&kernel.mode.tiles, rows, &|tile| role(kernel, tile, rows, column_tile));
                });
            });
        });
    }

    /// Barrier of a stage: its data has landed.
    fn full(&self, stage: V<'c>) -> V<'c> {
        let header = self.b.gepc(self.shared, "i8", -int(i64::from(self.schedule.header())));
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

    fn advance(&self, tile: &Tile, position: Position<'c>) -> Position<'c> {
        let b = self.b;
        let next = b.addc(position.stage, 1);
        let wraps = b.cmpi("eq", next, b.i32(tile.stages.cast_signed()));
        let flipped = b.xori(position.parity, b.i32(1));
        Position { stage: b.select(wraps, b.i32(0), next), parity: b.select(wraps, flipped, position.parity) }
    }

    fn steps(&self, tile: &Tile) -> i32 {
        int(i64::try_from(self.spec.k.div_ceil(u64::from(tile.depth))).expect("steps fit in 32 bits"))
    }

    /// The copying warpgroup: fills the ring with all steps of one tile.
    fn copy(&self, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>) {
        let (b, spec) = (self.b, self.spec);
        let operand = self.operand(tile, rows);
        let stage_bytes = i64::from(self.mode.stage_bytes(spec, tile));
        let a_bytes = tile.rows * tile.depth * size(spec.a);
        let steps = self.steps(tile);
        // Copies of so many steps are in flight before the first must have landed.
        let lag = int(i64::from(tile.stages)) - 2;
        let leader = b.cmpi("eq", self.thread, b.i32(0));
        let first_row = b.mulc(column_tile, i64::from(self.mode.columns));
        let start = Position { stage: b.i32(0), parity: b.i32(0) };
        let carried = [start.stage, start.parity, start.stage];
        let end = b.for_(b.i32(0), b.i32(steps), b.i32(1), &carried, |step, carried| {
            let position = Position { stage: carried[0], parity: carried[1] };
            self.wait(self.empty(position.stage), b.xori(position.parity, b.i32(1)));
            let to = at(b, self.shared, b.mulc(position.stage, stage_bytes));
            let full = self.full(position.stage);
            b.if_(leader, || {
                let bytes = self.mode.columns * tile.depth * size(spec.w);
                b.op0("nvvm.mbarrier.arrive.expect_tx", &[full, b.i32(bytes.cast_signed())], &[]);
                let column = b.mulc(step, i64::from(tile.depth));
                for part in 0..self.mode.columns / self.schedule.box_rows() {
                    let row = b.addc(first_row, i64::from(part * self.schedule.box_rows()));
                    let part = part * self.schedule.box_rows() * tile.depth * size(spec.w);
                    let to = at_const(b, to, u64::from(a_bytes + part));
                    self.tensor_copy(to, full, [column, row, rows.expert]);
                }
            });
            self.issue(&operand, to, step);
            commit(b);
            // The step that has landed by now is announced. Ordinary writes must be fenced before `wgmma` reads them.
            let announces = b.cmpi("sge", step, b.i32(lag));
            b.if_(announces, || {
                wait_copies(b, lag.cast_unsigned());
                fence_async(b);
                self.arrive(self.full(carried[2]));
            });
            let next = self.advance(tile, position);
            let wrapped = b.addc(carried[2], 1);
            let wrapped = b.select(b.cmpi("eq", wrapped, b.i32(tile.stages.cast_signed())), b.i32(0), wrapped);
            vec![next.stage, next.parity, b.select(announces, wrapped, carried[2])]
        });
        wait_copies(b, 0);
        fence_async(b);
        let mut stage = end[2];
        for _ in 0..lag.min(steps) {
            self.arrive(self.full(stage));
            let next = b.addc(stage, 1);
            stage = b.select(b.cmpi("eq", next, b.i32(tile.stages.cast_signed())), b.i32(0), next);
        }
    }

    fn tensor_copy(&self, to: V<'c>, full: V<'c>, place: [V<'c>; 3]) {
        let operands = [to, self.args.w, place[0], place[1], place[2], full];
        let segments = [("operandSegmentSizes", "array<i32: 1, 1, 3, 1, 0, 0, 0, 0>"), ("isCTAOnly", "true")];
        self.b.op0("nvvm.cp.async.bulk.tensor.shared.cluster.global", &operands, &segments);
    }

    /// A multiplying warpgroup: its part of one tile.
    fn multiply(&self, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>) {
        let (b, spec) = (self.b, self.spec);
        let group = b.shrui(self.warp, b.i32(2));
        let across = self.schedule.warps / 4 / tile.down;
        let columns = self.mode.columns / across;
        let first_row = b.mulc(b.remui(group, number(b, tile.down)), i64::from(tile.rows / tile.down));
        let first_column = b.mulc(b.divui(group, number(b, tile.down)), i64::from(columns));
        let stage_bytes = i64::from(self.mode.stage_bytes(spec, tile));
        let a_bytes = tile.rows * tile.depth * size(spec.a);
        let row_bytes = i64::from(tile.depth * size(spec.a));
        let base = b.op("llvm.ptrtoint", &[self.shared], "i32", &[]);
        // Descriptors: the address in units of 16 bytes, groups of eight rows 1024 bytes apart, 128-byte swizzle.
        let layout = b.i64(0x4000_0040_0001_0000);
        let descriptor = |address: V<'c>| b.ori(wide(b, b.shrui(address, b.i32(4))), layout);
        let a = descriptor(b.addi(base, b.mulc(first_row, row_bytes)));
        let w = descriptor(b.addi(b.addc(base, i64::from(a_bytes)), b.mulc(first_column, row_bytes)));
        let lane_leads = b.cmpi("eq", self.lane, b.i32(0));
        let sum = Sum::new(columns);
        let carried = [b.zero(&sum.ty), b.i32(0), b.i32(0)];
        let end = b.for_(b.i32(0), b.i32(self.steps(tile)), b.i32(1), &carried, |step, carried| {
            let position = Position { stage: carried[1], parity: carried[2] };
            self.wait(self.full(position.stage), position.parity);
            let along = wide(b, b.mulc(position.stage, stage_bytes / 16));
            let (a, w) = (b.addi(a, along), b.addi(w, along));
            b.op0("nvvm.wgmma.fence.aligned", &[], &[]);
            let mut sums = carried[0];
            for part in 0..tile.depth / 16 {
                // 16 elements are 32 bytes inside the swizzled line.
                let along = i64::from(part) * 2;
                sums = sum.wgmma(self, sums, b.addc(a, along), b.addc(w, along));
            }
            b.op0("nvvm.wgmma.commit.group.sync.aligned", &[], &[]);
            // The step before is done now, and with it the use of its stage.
            b.op0("nvvm.wgmma.wait.group.sync.aligned", &[], &[("group", "1 : i64")]);
            let frees = b.andi(lane_leads, b.cmpi("ne", step, b.i32(0)));
            b.if_(frees, || {
                let before = b.addc(position.stage, -1);
                let last = b.i32(int(i64::from(tile.stages) - 1));
                let before = b.select(b.cmpi("eq", position.stage, b.i32(0)), last, before);
                self.arrive(self.empty(before));
            });
            let next = self.advance(tile, position);
            vec![sums, next.stage, next.parity]
        });
        b.op0("nvvm.wgmma.wait.group.sync.aligned", &[], &[("group", "0 : i64")]);
        // Both warpgroups are past their last read: the ring may hold the result.
        self.meet();
        let warp_row = b.mulc(b.andi(self.warp, b.i32(3)), 16);
        let part = Mma::part(1, columns / 8, [b.addi(first_row, warp_row), first_column]);
        let sums: Vec<_> = (0..part.sums()).map(|i| field(b, end[0], i, "f32")).collect();
        self.store(rows, column_tile, part.lane_origin(self), &part.places(spec.matrices), &sums);
    }
}

/// Sums of a warpgroup: 64 rows of so many columns.
struct Sum {
    columns: u32,
    ty: String,
}

impl Sum {
    fn new(columns: u32) -> Self {
        let fields = vec!["f32"; (columns / 2) as usize].join(", ");
        Self { columns, ty: format!("!llvm.struct<({fields})>") }
    }

    /// Adds the product of 64x16 and 16 x columns elements.
    fn wgmma<'c>(&self, kernel: &Kernel<'_, 'c>, sums: V<'c>, a: V<'c>, w: V<'c>) -> V<'c> {
        let shape = format!("#nvvm.shape<m = 64, n = {}, k = 16>", self.columns);
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
        kernel.b.op("nvvm.wgmma.mma_async", &[sums, a, w], &self.ty, &attributes)
    }
}
