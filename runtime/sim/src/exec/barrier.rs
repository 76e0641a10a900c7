//! Barriers of the block, the cluster and the warp.

use super::run::{Flow, arrives_only, blend};
use super::state::{At, BarDone, Group, State, Warp};
use super::{Cluster, lanes, of};
use crate::clock::{Sync, View};
use crate::op::{BarKind, Collective, Inst, NONE, Op};
use crate::report::FindingKind;
use std::rc::Rc;
use std::sync::atomic::Ordering;

impl Cluster<'_> {
    pub(super) fn block_barrier(&mut self, at: At, warp: &mut Warp, gi: usize, inst: &Inst, m: u32) -> Flow {
        let Op::Bar { kind, id, count, p, negate, aligned, .. } = &inst.op else { return Flow::Next };
        let (pc, frame) = (warp.groups[gi].pc, warp.groups[gi].frame as usize);
        let first = m.trailing_zeros() as usize;
        if *aligned && m != warp.live {
            return Flow::Stay(State::Gather);
        }
        if *aligned && warp.live != warp.lanes && self.env.check {
            self.report(
                FindingKind::BarrierDivergence,
                pc,
                at,
                first,
                None,
                "threads of this warp have exited without coming to this aligned barrier",
                None,
            );
        }
        let number = warp.frames[frame].regs[*id as usize][first] as usize;
        let expected = if *count == NONE { None } else { Some(warp.frames[frame].regs[*count as usize][first] as u32) };
        if number >= 16 || expected.is_some_and(|e| e % 32 != 0 || e == 0) {
            self.report(
                FindingKind::Misuse,
                pc,
                at,
                first,
                None,
                format!("barrier {number} with {expected:?} threads; numbers end at 15 and counts are multiples of 32"),
                None,
            );
            return Flow::Next;
        }
        let preds = if *p == NONE {
            0
        } else {
            lanes(m)
                .filter(|l| (warp.frames[frame].regs[*p as usize][*l] & 1 == 1) != *negate)
                .fold(0, |x, l| x | 1 << l)
        };
        self.arrive(at, warp, number, expected, m, preds, pc);
        self.effects += 1;
        if arrives_only(*kind) {
            self.complete_barrier(at.block, number, Some((at.warp, warp.live)));
            return Flow::Next;
        }
        let generation = self.blocks[at.block].bars[number].generation;
        self.complete_barrier(at.block, number, Some((at.warp, warp.live)));
        Flow::Stay(State::Barrier { id: number, generation })
    }

    #[expect(clippy::too_many_arguments, reason = "an arrival is all of these")]
    fn arrive(&mut self, at: At, warp: &mut Warp, id: usize, expected: Option<u32>, m: u32, preds: u32, pc: u32) {
        let base = self.component(at, 0);
        let check = self.env.check;
        let bar = &mut self.blocks[at.block].bars[id];
        let arrived = bar.arrived.entry(at.warp).or_default();
        let twice = *arrived & m != 0;
        *arrived |= m;
        bar.line = pc;
        let mismatch = bar.expected.is_some() && expected.is_some() && bar.expected != expected;
        if expected.is_some() {
            bar.expected = expected;
        }
        bar.popc += preds.count_ones();
        bar.all &= preds == m;
        bar.any |= preds != 0;
        if check {
            for l in lanes(m) {
                warp.views[l].release_into(base + l as u32, &mut bar.sync);
            }
        }
        if twice {
            self.report(
                FindingKind::Misuse,
                pc,
                at,
                m.trailing_zeros() as usize,
                None,
                format!("threads arrive at barrier {id} twice in one of its phases"),
                None,
            );
        }
        if mismatch {
            self.report(
                FindingKind::Misuse,
                pc,
                at,
                m.trailing_zeros() as usize,
                None,
                format!("threads of barrier {id} do not agree on their number"),
                None,
            );
        }
    }

    /// Completes a barrier when all its threads have come. `running` is the warp that is not in its place now.
    pub(super) fn complete_barrier(&mut self, block: usize, id: usize, running: Option<(usize, u32)>) {
        let b = &mut self.blocks[block];
        let live = |w: usize, warps: &[Warp]| match running {
            Some((r, live)) if r == w => live,
            _ => warps[w].live,
        };
        let bar = &b.bars[id];
        if bar.arrived.is_empty() {
            return;
        }
        let full = match bar.expected {
            // Hardware counts a warp as 32 threads.
            Some(n) => {
                let warps = &b.warps;
                let come: u32 = bar
                    .arrived
                    .iter()
                    .map(|(w, m)| if *m & live(*w, warps) == live(*w, warps) { 32 } else { m.count_ones() })
                    .sum();
                come >= n
            }
            None => (0..b.warps.len()).all(|w| live(w, &b.warps) & !bar.arrived.get(&w).copied().unwrap_or(0) == 0),
        };
        if !full {
            return;
        }
        let bar = &mut b.bars[id];
        let (v, p) = bar.sync.share();
        bar.done.push_back(BarDone { generation: bar.generation, v, p, popc: bar.popc, all: bar.all, any: bar.any });
        if bar.done.len() > 64 {
            bar.done.pop_front();
        }
        bar.generation += 1;
        bar.arrived.clear();
        bar.expected = None;
        bar.sync = Sync::default();
        bar.popc = 0;
        bar.all = true;
        bar.any = false;
        self.effects += 1;
    }

    pub(super) fn leave_barrier(&mut self, at: At, warp: &mut Warp, gi: usize, id: usize, generation: u64) -> bool {
        let Some(done) = self.blocks[at.block].bars[id].done.iter().find(|d| d.generation == generation).cloned()
        else {
            return false;
        };
        let g = &mut warp.groups[gi];
        let (frame, mask) = (g.frame as usize, g.mask);
        let inst = &self.env.code.insts[g.pc as usize];
        g.pc += 1;
        g.state = State::Ready;
        if let Op::Bar { kind, d, .. } = &inst.op {
            let v = match kind {
                BarKind::RedPopc => u64::from(done.popc),
                BarKind::RedAnd => u64::from(done.all),
                BarKind::RedOr => u64::from(done.any),
                BarKind::Sync | BarKind::Arrive => 0,
            };
            blend(&mut warp.frames[frame].regs[*d as usize], &[v; 32], mask);
        }
        if self.env.check {
            View::acquire(of(&mut warp.views, mask), &mut self.memo, &done.v, &done.p);
        }
        true
    }

    /// A warp has ended: barriers that waited for it alone complete.
    pub(super) fn warp_ended(&mut self, at: At) {
        for id in 0..16 {
            if self.blocks[at.block].bars[id].expected.is_none() {
                self.complete_barrier(at.block, id, None);
            }
        }
        self.complete_cluster(None);
        if self.blocks[at.block].warps.iter().all(|w| w.live == 0) {
            self.blocks[at.block].exited = true;
            self.resized_apart(at.block);
            if self.blocks.len() > 1 && self.env.check {
                self.outlived(at.block);
            }
            // The end of a block lets the next launch start, too.
            if !self.blocks[at.block].awaited {
                self.env.hasty.store(true, Ordering::Relaxed);
            }
        }
    }

    /// A block has ended: the warps of each warpgroup should have executed the same `setmaxnreg`s.
    fn resized_apart(&mut self, block: usize) {
        let mut apart = Vec::new();
        for (group, warps) in self.blocks[block].warps.chunks(4).enumerate() {
            for (w, warp) in warps.iter().enumerate() {
                for (i, pc) in warp.resized.iter().enumerate() {
                    if warps.iter().any(|peer| peer.resized.get(i) != Some(pc)) {
                        apart.push((4 * group + w, *pc));
                    }
                }
            }
        }
        for (warp, pc) in apart {
            let text = "setmaxnreg that other warps of the warpgroup do not execute, or not in this order";
            self.report(FindingKind::Misuse, pc, At { block, warp }, 0, None, text, None);
        }
    }

    /// Lanes of a warp at different aligned barriers: reports them and lets them arrive one by one, as hardware does.
    pub(super) fn force_divergent(&mut self) -> bool {
        let env = self.env;
        let mut forced = false;
        for b in 0..self.blocks.len() {
            for w in 0..self.blocks[b].warps.len() {
                let mut warp = std::mem::take(&mut self.blocks[b].warps[w]);
                let at = At { block: b, warp: w };
                // A lane that waits for something else may still come.
                let may_come = |g: &Group| match g.state {
                    State::Ready | State::Spin | State::Mbar { .. } => true,
                    State::Gather | State::Barrier { .. } | State::Cluster { .. } | State::Wgmma => false,
                };
                let settled = !warp.groups.iter().any(may_come);
                for gi in 0..if settled { warp.groups.len() } else { 0 } {
                    let g = warp.groups[gi].clone();
                    if g.state != State::Gather {
                        continue;
                    }
                    let Op::Bar { kind, id, count, p, negate, .. } = &env.code.insts[g.pc as usize].op else {
                        continue;
                    };
                    let first = g.mask.trailing_zeros() as usize;
                    self.report(
                        FindingKind::BarrierDivergence,
                        g.pc,
                        at,
                        first,
                        None,
                        "threads of one warp are at different aligned barriers, or some are at none",
                        None,
                    );
                    let regs = &warp.frames[g.frame as usize].regs;
                    let number = (regs[*id as usize][first] as usize).min(15);
                    let expected = if *count == NONE { None } else { Some(regs[*count as usize][first] as u32) };
                    let preds = if *p == NONE {
                        0
                    } else {
                        lanes(g.mask).filter(|l| (regs[*p as usize][*l] & 1 == 1) != *negate).fold(0, |x, l| x | 1 << l)
                    };
                    self.arrive(at, &mut warp, number, expected, g.mask, preds, g.pc);
                    let generation = self.blocks[b].bars[number].generation;
                    if arrives_only(*kind) {
                        warp.groups[gi].pc += 1;
                        warp.groups[gi].state = State::Ready;
                    } else {
                        warp.groups[gi].state = State::Barrier { id: number, generation };
                    }
                    self.complete_barrier(b, number, Some((w, warp.live)));
                    forced = true;
                }
                self.blocks[b].warps[w] = warp;
            }
        }
        forced
    }

    pub(super) fn cluster_arrive(&mut self, at: At, warp: &mut Warp, gi: usize, release: bool, m: u32) -> Flow {
        let base = self.component(at, 0);
        let twice = warp.cluster_arrived & m != 0;
        if twice {
            let pc = warp.groups[gi].pc;
            self.report(
                FindingKind::Misuse,
                pc,
                at,
                m.trailing_zeros() as usize,
                None,
                "second arrival at the cluster barrier without a wait between",
                None,
            );
        }
        warp.cluster_arrived |= m;
        warp.cluster_generation = self.cluster_bar.generation;
        self.cluster_bar.arrived += m.count_ones();
        for l in lanes(m).filter(|_| self.env.check) {
            if release {
                warp.views[l].release_into(base + l as u32, &mut self.cluster_bar.sync);
            } else if let Some(f) = &warp.views[l].fenced {
                // A fence before a relaxed arrival releases through it.
                self.cluster_bar.sync.add_clock(&f.v, &f.p);
            }
        }
        self.effects += 1;
        self.complete_cluster(Some((at, warp)));
        Flow::Next
    }

    /// Completes the cluster barrier when every live thread has arrived in its present generation. `running` is the
    /// warp that is not in its place now.
    fn complete_cluster(&mut self, running: Option<(At, &Warp)>) {
        let now = self.cluster_bar.generation;
        let come = |w: &Warp| w.live == 0 || (w.cluster_generation == now && w.live & !w.cluster_arrived == 0);
        let mut all = self.cluster_bar.arrived > 0;
        for (b, block) in self.blocks.iter().enumerate() {
            for (w, warp) in block.warps.iter().enumerate() {
                all &= match running {
                    Some((at, warp)) if at.block == b && at.warp == w => come(warp),
                    _ => come(warp),
                };
            }
        }
        let c = &mut self.cluster_bar;
        if all {
            c.done = Some(c.sync.share());
            c.arrived = 0;
            c.generation += 1;
            c.sync = Sync::default();
            self.effects += 1;
        }
    }

    pub(super) fn cluster_wait(&mut self, at: At, warp: &mut Warp, gi: usize, acquire: bool, m: u32) -> Flow {
        if warp.cluster_arrived & m != m {
            let pc = warp.groups[gi].pc;
            self.report(
                FindingKind::Misuse,
                pc,
                at,
                m.trailing_zeros() as usize,
                None,
                "wait at the cluster barrier without an arrival before",
                None,
            );
            return Flow::Next;
        }
        // The wait is for the generation in which the lanes arrived, which may be over by now.
        let generation = warp.cluster_generation;
        Flow::Stay(State::Cluster { generation, acquire })
    }

    pub(super) fn leave_cluster(&mut self, warp: &mut Warp, gi: usize, generation: u64, acquire: bool) -> bool {
        let mask = warp.groups[gi].mask;
        if self.cluster_bar.generation <= generation {
            return false;
        }
        warp.cluster_arrived &= !mask;
        let g = &mut warp.groups[gi];
        g.pc += 1;
        g.state = State::Ready;
        if self.env.check
            && acquire
            && let Some((v, p)) = self.cluster_bar.done.clone()
        {
            View::acquire(of(&mut warp.views, mask), &mut self.memo, &v, &p);
        }
        true
    }

    /// `bar.warp.sync`, whose lanes may come from several places. Called when a group that waits is looked at.
    pub(super) fn warp_barrier_across(&mut self, at: At, warp: &mut Warp, gi: usize) -> bool {
        let env = self.env;
        let is_barrier = |pc: u32| match &env.code.insts[pc as usize].op {
            Op::Collective { op, mask } if matches!(**op, Collective::Barrier) => Some(*mask),
            _ => None,
        };
        let Some(reg) = is_barrier(warp.groups[gi].pc) else { return false };
        let first = warp.groups[gi].mask.trailing_zeros() as usize;
        let need = warp.frames[warp.groups[gi].frame as usize].regs[reg as usize][first] as u32 & warp.live;
        let here: Vec<usize> = (0..warp.groups.len())
            .filter(|j| warp.groups[*j].state == State::Gather && is_barrier(warp.groups[*j].pc).is_some())
            .collect();
        let come = here.iter().fold(0, |m, j| m | warp.groups[*j].mask);
        if need & !come != 0 {
            return false;
        }
        self.warp_sync(at, warp, come);
        for j in here {
            warp.groups[j].pc += 1;
            warp.groups[j].state = State::Ready;
        }
        true
    }

    /// Orders the memory accesses of lanes of one warp.
    pub(super) fn warp_sync(&mut self, at: At, warp: &mut Warp, m: u32) {
        if !self.env.check || m.count_ones() < 2 {
            return;
        }
        let base = self.component(at, 0);
        let mut sync = Sync::default();
        for l in lanes(m) {
            warp.views[l].release_into(base + l as u32, &mut sync);
        }
        let (v, p) = sync.share();
        let (v, p): (Rc<_>, Rc<_>) = (v, p);
        View::acquire(of(&mut warp.views, m), &mut self.memo, &v, &p);
    }
}
