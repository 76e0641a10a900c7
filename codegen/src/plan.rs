//! The plan kernel: a route becomes counts, offsets and a gather map, without padding.
//!
//! Rows are sorted by expert, then by token and slot. The sort is stable, so results do not
//! depend on scheduling. On a GPU every block counts all routes for itself and then places the
//! rows of its own experts, one warp an expert: one launch, no exchange between blocks.

use crate::{
    Target,
    mlir::{Builder, FuncKind, V},
};
use moec_abi::{CpuGrid, Expr, GpuGrid, Grid};

/// Warps of a block on a GPU; each places the rows of one expert.
const WARPS: u64 = 8;

/// A plan kernel.
///
/// # Arguments
/// `idx` (i32 `[rows][slots]`), `w` (f32, if `scale`), then the results `offsets` (i32 `[experts + 1]`),
/// `map` (i32: token of each sorted row), `positions` (i32 `[tokens][slots]`: sorted row of each slot, or -1),
/// `scale` (f32: weight of each sorted row, if `scale`), and the number of route rows (value).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanKernel {
    /// Symbol of the kernel.
    pub symbol: String,
    /// First expert that has rows.
    pub first: u64,
    /// One past the last expert that has rows; slots of other experts get no row.
    pub end: u64,
    /// Experts between them that have no rows.
    pub holes: Vec<[u64; 2]>,
    /// Slots of a row.
    pub slots: u64,
    /// Consecutive tokens that a route row covers.
    pub repeat: u64,
    /// Whether the weights are brought into sorted order too.
    pub scale: bool,
}

struct Args<'c> {
    idx: V<'c>,
    w: Option<V<'c>>,
    offsets: V<'c>,
    map: V<'c>,
    positions: V<'c>,
    scale: Option<V<'c>>,
    rows: V<'c>,
}

fn c(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl PlanKernel {
    /// Number of experts that have rows.
    pub const fn experts(&self) -> u64 {
        self.end - self.first
    }

    /// Number of arguments before the number of rows.
    const fn pointers(&self) -> usize {
        if self.scale { 6 } else { 4 }
    }

    /// Extent of the launch.
    pub fn grid(&self, target: Target) -> Grid {
        if target.is_gpu() {
            Grid::Gpu(GpuGrid {
                blocks: [Expr::Const(self.experts().div_ceil(WARPS).max(1)), 1.into(), 1.into()],
                threads: [u32::try_from(WARPS * 32).unwrap_or(32), 1, 1],
                cluster: [1, 1, 1],
                shared: u32::try_from((self.experts() + 1) * 4).unwrap_or(u32::MAX),
                dependent: crate::gpu::starts_early(target),
                tokens: moec_abi::ANY_TOKENS,
            })
        } else {
            Grid::Cpu(CpuGrid { items: 1.into(), grain: 1, scratch: (self.experts() + 1) * 4 })
        }
    }

    fn args<'c>(&self, a: &[V<'c>]) -> Args<'c> {
        let mut rest = a.iter().copied();
        let mut next = || rest.next().unwrap_or_else(|| unreachable!("the kernel declares all arguments"));
        let idx = next();
        let w = self.scale.then(&mut next);
        let (offsets, map, positions) = (next(), next(), next());
        let scale = self.scale.then(&mut next);
        Args { idx, w, offsets, map, positions, scale, rows: next() }
    }

    /// Appends the kernel to the module.
    pub fn emit(&self, b: &Builder<'_>, target: Target) {
        let n = self.pointers();
        if target.is_gpu() {
            let threads = u32::try_from(WARPS * 32).unwrap_or(32);
            let kind = FuncKind::Kernel { threads, blocks: 1, cluster: 1 };
            let parameters: Vec<(&str, &str)> = (0..n).map(|_| ("!llvm.ptr<1>", "{}")).chain([("i64", "{}")]).collect();
            b.func(&self.symbol, kind, &parameters, |a| {
                if crate::gpu::starts_early(target) {
                    crate::gpu::wait_for_predecessor(b);
                }
                self.gpu(b, &self.args(a));
            });
        } else {
            let parameters = [("!llvm.ptr", "{}"), ("i64", "{}"), ("i64", "{}"), ("!llvm.ptr", "{}")];
            b.func(&self.symbol, FuncKind::Plain, &parameters, |a| {
                let word = |i: usize| b.load(b.gepc(a[0], "i64", i32::try_from(i).unwrap_or(i32::MAX)), "i64", 8);
                let values: Vec<V<'_>> = (0..=n)
                    .map(|i| if i < n { b.cast("llvm.inttoptr", word(i), "!llvm.ptr") } else { word(i) })
                    .collect();
                self.cpu(b, &self.args(&values), a[3]);
            });
        }
    }

    /// Expert of route `r` counted from `first`, and whether it has rows.
    fn expert<'c>(&self, b: &Builder<'c>, args: &Args<'c>, r: V<'c>) -> (V<'c>, V<'c>) {
        let slots = b.i64(c(self.slots));
        let source = if self.repeat == 1 {
            r
        } else {
            let row = b.divui(b.divui(r, slots), b.i64(c(self.repeat)));
            b.addi(b.muli(row, slots), b.remui(r, slots))
        };
        let id = b.cast("arith.extsi", b.load(b.gep(args.idx, "i32", source), "i32", 4), "i64");
        let within = |low: u64, high: u64| b.andi(b.cmpi("sge", id, b.i64(c(low))), b.cmpi("slt", id, b.i64(c(high))));
        let on = self.holes.iter().fold(within(self.first, self.end), |on, [low, high]| {
            b.andi(on, b.xori(within(*low, *high), b.bool(true)))
        });
        (b.select(on, b.addc(id, -c(self.first)), b.i64(0)), on)
    }

    /// Writes everything about route `r`, which is sorted row `p`.
    fn place<'c>(&self, b: &Builder<'c>, args: &Args<'c>, r: V<'c>, p: V<'c>) {
        let slots = b.i64(c(self.slots));
        let token = b.divui(r, slots);
        b.store(b.cast("arith.trunci", token, "i32"), b.gep(args.map, "i32", p), 4);
        b.store(b.cast("arith.trunci", p, "i32"), b.gep(args.positions, "i32", r), 4);
        if let (Some(w), Some(scale)) = (args.w, args.scale) {
            let row = b.divui(token, b.i64(c(self.repeat)));
            let source = b.addi(b.muli(row, slots), b.remui(r, slots));
            b.store(b.load(b.gep(w, "f32", source), "f32", 4), b.gep(scale, "f32", p), 4);
        }
    }

    fn routes<'c>(&self, b: &Builder<'c>, args: &Args<'c>) -> V<'c> {
        b.mulc(args.rows, c(self.slots * self.repeat))
    }

    fn cpu<'c>(&self, b: &Builder<'c>, args: &Args<'c>, cursors: V<'c>) {
        let (zero, one) = (b.i64(0), b.i64(1));
        let experts = b.i64(c(self.experts()));
        let cursor = |e: V<'c>| b.gep(cursors, "i32", e);
        b.each(zero, b.addc(experts, 1), |e| b.store(b.i32(0), cursor(e), 4));
        let routes = self.routes(b, args);
        b.each(zero, routes, |r| {
            let (e, on) = self.expert(b, args, r);
            b.if_(on, || b.store(b.addc(b.load(cursor(e), "i32", 4), 1), cursor(e), 4));
        });
        // Counts become first rows, which then move on with every row that is placed.
        let total = b.for_(zero, experts, one, &[b.i32(0)], |e, sum| {
            let count = b.load(cursor(e), "i32", 4);
            b.store(sum[0], cursor(e), 4);
            b.store(sum[0], b.gep(args.offsets, "i32", e), 4);
            vec![b.addi(sum[0], count)]
        })[0];
        b.store(total, b.gep(args.offsets, "i32", experts), 4);
        b.each(zero, routes, |r| {
            let (e, on) = self.expert(b, args, r);
            b.if_else(
                on,
                &[],
                || {
                    let p = b.load(cursor(e), "i32", 4);
                    b.store(b.addc(p, 1), cursor(e), 4);
                    self.place(b, args, r, b.cast("arith.extsi", p, "i64"));
                    Vec::new()
                },
                || {
                    b.store(b.i32(-1), b.gep(args.positions, "i32", r), 4);
                    Vec::new()
                },
            );
        });
    }

    fn gpu<'c>(&self, b: &Builder<'c>, args: &Args<'c>) {
        let special = |name: &str| {
            let raw = b.op(&format!("nvvm.read.ptx.sreg.{name}"), &[], "i32", &[]);
            b.cast("arith.extui", raw, "i64")
        };
        let (thread, block) = (special("tid.x"), special("ctaid.x"));
        let threads = b.i64(c(WARPS * 32));
        let (warp, lane) = (b.shrui(thread, b.i64(5)), b.andi(thread, b.i64(31)));
        let experts = b.i64(c(self.experts()));
        let counts = b.address_of(crate::SHARED, "!llvm.ptr<3>");
        let count = |e: V<'c>| b.gep(counts, "i32", e);
        let strided = |end: V<'c>, body: &dyn Fn(V<'c>)| {
            b.for_(thread, end, threads, &[], |i, _| {
                body(i);
                Vec::new()
            });
        };
        let barrier = || b.op0("nvvm.barrier0", &[], &[]);
        strided(b.addc(experts, 1), &|e| b.store(b.i32(0), count(e), 4));
        barrier();
        let routes = self.routes(b, args);
        strided(routes, &|r| {
            let (e, on) = self.expert(b, args, r);
            b.if_(on, || {
                let attributes = [("bin_op", "1 : i64"), ("ordering", "2 : i64")];
                b.op("llvm.atomicrmw", &[count(e), b.i32(1)], "i32", &attributes);
            });
        });
        barrier();
        // The first warp turns counts into offsets, each lane a run of experts.
        b.if_(b.cmpi("eq", warp, b.i64(0)), || self.scan(b, lane, &count));
        barrier();
        b.if_(b.cmpi("eq", block, b.i64(0)), || {
            strided(b.addc(experts, 1), &|e| b.store(b.load(count(e), "i32", 4), b.gep(args.offsets, "i32", e), 4));
            strided(routes, &|r| {
                let (_, on) = self.expert(b, args, r);
                b.if_(b.xori(on, b.bool(true)), || b.store(b.i32(-1), b.gep(args.positions, "i32", r), 4));
            });
        });
        let own = b.addi(b.mulc(block, c(WARPS)), warp);
        b.if_(b.cmpi("slt", own, experts), || {
            let start = b.cast("arith.extsi", b.load(count(own), "i32", 4), "i64");
            let below = b.addc(b.shli(b.i32(1), b.cast("arith.trunci", lane, "i32")), -1);
            b.for_(b.i64(0), routes, b.i64(32), &[start], |from, next| {
                let r = b.addi(from, lane);
                let inside = b.cmpi("slt", r, routes);
                let safe = b.select(inside, r, b.i64(0));
                let (e, on) = self.expert(b, args, safe);
                let mine = b.andi(b.andi(inside, on), b.cmpi("eq", e, own));
                let votes = b.intrinsic("llvm.nvvm.vote.ballot.sync", &[b.i32(-1), mine], "i32");
                let population = |v: V<'c>| b.cast("arith.extui", b.op("llvm.intr.ctpop", &[v], "i32", &[]), "i64");
                b.if_(mine, || self.place(b, args, r, b.addi(next[0], population(b.andi(votes, below)))));
                vec![b.addi(next[0], population(votes))]
            });
        });
    }

    /// Exclusive prefix sums of the counts by one warp; the total goes behind the last.
    fn scan<'c>(&self, b: &Builder<'c>, lane: V<'c>, count: &dyn Fn(V<'c>) -> V<'c>) {
        let run = c(self.experts().div_ceil(32));
        let experts = b.i64(c(self.experts()));
        let first = b.minsi(b.mulc(lane, run), experts);
        let last = b.minsi(b.addc(first, run), experts);
        let own =
            b.for_(first, last, b.i64(1), &[b.i32(0)], |e, sum| vec![b.addi(sum[0], b.load(count(e), "i32", 4))])[0];
        let lane32 = b.cast("arith.trunci", lane, "i32");
        let inclusive = [1, 2, 4, 8, 16].into_iter().fold(own, |sum, distance| {
            let other = b.intrinsic("llvm.nvvm.shfl.sync.up.i32", &[b.i32(-1), sum, b.i32(distance), b.i32(0)], "i32");
            let reaches = b.cmpi("sge", lane32, b.i32(distance));
            b.addi(sum, b.select(reaches, other, b.i32(0)))
        });
        let start = b.subi(inclusive, own);
        b.for_(first, last, b.i64(1), &[start], |e, sum| {
            let n = b.load(count(e), "i32", 4);
            b.store(sum[0], count(e), 4);
            vec![b.addi(sum[0], n)]
        });
        b.if_(b.cmpi("eq", lane, b.i64(31)), || b.store(inclusive, count(experts), 4));
    }
}
