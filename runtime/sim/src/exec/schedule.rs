//! The turns of warps, the choice of a group of lanes, and the end of waits.

use super::state::{At, Group, State, Warp};
use super::{Cluster, Turn, lanes};
use crate::Error;
use crate::launch::Lanes;
use crate::op::{Collective, Op};
use crate::report::FindingKind;
use std::sync::atomic::Ordering::Relaxed;

/// Rounds without any effect after which a cluster counts as stuck.
const IDLE_ROUNDS: u32 = 6;

impl Cluster<'_> {
    /// Runs up to `rounds` rounds of all warps.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] past the instruction limit of the launch.
    pub(crate) fn run(&mut self, rounds: u32) -> Result<Turn, Error> {
        let mut any = false;
        for _ in 0..rounds {
            let over = self.env.found.as_ref().is_some_and(|f| f.load(Relaxed) <= self.id);
            if over || self.finished() {
                return Ok(Turn::Done);
            }
            let before = self.effects;
            let worked = self.round();
            let total = self.env.executed.fetch_add(self.steps, Relaxed) + self.steps;
            self.steps = 0;
            if total > self.env.max_instructions {
                let entry = self.env.code.funcs[self.env.entry].name.clone();
                return Err(Error::Limit { entry, max: self.env.max_instructions });
            }
            let worked = worked || self.effects != before;
            if worked {
                any = true;
                self.idle = 0;
                continue;
            }
            // Nothing can go on: the copies that are due latest land now.
            self.idle += 1;
            if self.land_one() || (self.idle == 3 && self.force_divergent()) {
                any = true;
                self.idle = 0;
                continue;
            }
            self.wake();
            if self.idle > IDLE_ROUNDS {
                return Ok(if any { Turn::Worked } else { Turn::Idle });
            }
        }
        Ok(if self.finished() { Turn::Done } else { Turn::Worked })
    }

    fn finished(&mut self) -> bool {
        if self.blocks.iter().any(|b| b.warps.iter().any(|w| w.live != 0)) {
            return false;
        }
        while self.land_one() {}
        true
    }

    /// Gives every warp a turn; says whether any of them could go on.
    fn round(&mut self) -> bool {
        let n = self.order.len();
        for i in (1..n).rev() {
            let j = self.random() as usize % (i + 1);
            self.order.swap(i, j);
        }
        let mut worked = false;
        for i in 0..n {
            let (b, w) = self.order[i];
            if self.blocks[b].warps[w].live == 0 {
                continue;
            }
            let quantum = 200 + (self.random() % 800) as u32;
            let mut warp = std::mem::take(&mut self.blocks[b].warps[w]);
            let at = At { block: b, warp: w };
            worked |= self.slice(at, &mut warp, quantum);
            let ended = warp.live == 0;
            self.blocks[b].warps[w] = warp;
            if ended {
                self.warp_ended(at);
            }
            if !self.env.seed.is_multiple_of(4) && !self.flights.is_empty() && self.random().is_multiple_of(4) {
                self.land_any();
            }
        }
        worked
    }

    fn slice(&mut self, at: At, warp: &mut Warp, quantum: u32) -> bool {
        let mut left = quantum;
        let mut spun = false;
        let before = self.effects;
        let start = self.steps;
        for g in &mut warp.groups {
            if g.state == State::Spin {
                g.state = State::Ready;
            }
        }
        while left > 0 {
            let Some(g) = self.pick(at, warp) else { break };
            spun |= self.run_group(at, warp, g, &mut left);
        }
        self.effects != before || (self.steps != start && !spun && left < quantum && self.runnable(warp))
    }

    /// Whether the warp stopped for its quantum and not because it waits.
    fn runnable(&self, warp: &Warp) -> bool {
        warp.live == 0
            || warp.groups.iter().any(|g| g.state == State::Ready)
            || warp.groups.iter().all(|g| g.state != State::Spin)
    }

    /// Lets waits fail once and spinning loops go round, since nothing else can happen.
    fn wake(&mut self) {
        for b in &mut self.blocks {
            for g in b.warps.iter_mut().flat_map(|w| &mut w.groups) {
                match g.state {
                    State::Mbar { .. } => g.give_up = true,
                    State::Spin => g.state = State::Ready,
                    State::Ready | State::Gather | State::Barrier { .. } | State::Cluster { .. } | State::Wgmma => {}
                }
            }
        }
    }

    /// The group to run next, with those that wait looked at again.
    fn pick(&mut self, at: At, warp: &mut Warp) -> Option<usize> {
        let order = self.env.lanes;
        if warp.groups.len() > 1 {
            merge(warp, order);
        }
        let mut best: Option<usize> = None;
        for i in 0..warp.groups.len() {
            if warp.groups[i].state != State::Ready && !self.ready(at, warp, i) {
                continue;
            }
            // A warp barrier may have released other groups and a completed wait may have moved this one.
            let g = &warp.groups[i];
            if g.state != State::Ready {
                continue;
            }
            let better = match best {
                None => true,
                Some(b) => {
                    let best = &warp.groups[b];
                    match order {
                        Lanes::Together => {
                            (best.depth, std::cmp::Reverse(best.pc)) < (g.depth, std::cmp::Reverse(g.pc))
                        }
                        Lanes::Ascending => g.mask.trailing_zeros() < best.mask.trailing_zeros(),
                        Lanes::Descending => g.mask.leading_zeros() < best.mask.leading_zeros(),
                    }
                }
            };
            if better {
                best = Some(i);
            }
        }
        best
    }

    /// Whether a waiting group can go on; does what the end of the wait means.
    fn ready(&mut self, at: At, warp: &mut Warp, i: usize) -> bool {
        let g = &warp.groups[i];
        let yes = match g.state {
            State::Ready => true,
            State::Spin => false,
            State::Gather => return self.gathered(at, warp, i),
            State::Barrier { id, generation } => return self.leave_barrier(at, warp, i, id, generation),
            State::Cluster { generation, acquire } => return self.leave_cluster(warp, i, generation, acquire),
            State::Mbar { block, offset, phase } => {
                g.give_up || self.blocks[block].mbars.get(&offset).is_none_or(|m| m.phase != phase)
            }
            State::Wgmma => true,
        };
        if yes {
            warp.groups[i].state = State::Ready;
        }
        yes
    }

    /// Whether the lanes a group waits for have come.
    fn gathered(&mut self, at: At, warp: &mut Warp, i: usize) -> bool {
        let env = self.env;
        let g = &warp.groups[i];
        let inst = &env.code.insts[g.pc as usize];
        if let Op::Collective { op, mask } = &inst.op {
            if matches!(**op, Collective::Barrier) {
                return self.warp_barrier_across(at, warp, i);
            }
            let need = warp.frames[g.frame as usize].regs[*mask as usize];
            let all = lanes(g.mask).all(|l| need[l] as u32 & warp.live & !g.mask == 0);
            if all {
                warp.groups[i].state = State::Ready;
            }
            return all;
        }
        let all = g.mask == warp.live;
        if all {
            warp.groups[i].state = State::Ready;
        }
        all
    }

    /// The state of every group that waits, for the report of a deadlock.
    pub(crate) fn report_deadlock(&mut self) {
        let mut stuck = Vec::new();
        for (b, block) in self.blocks.iter().enumerate() {
            for (w, warp) in block.warps.iter().enumerate() {
                for g in &warp.groups {
                    stuck.push((At { block: b, warp: w }, g.clone()));
                }
            }
        }
        for (at, g) in stuck {
            let pc = self.waiting_pc(at, &g);
            let phase = "waits for a phase of an mbarrier that never completes";
            let what = match g.state {
                State::Barrier { id, .. } => format!("waits at barrier {id} of the block for threads that never come"),
                State::Cluster { .. } => "waits at the barrier of the cluster for threads that never come".into(),
                State::Mbar { .. } => phase.into(),
                State::Ready | State::Spin if matches!(self.env.code.insts[pc as usize].op, Op::Mbar { .. }) => {
                    phase.into()
                }
                State::Gather => "waits for lanes of its warp that never come".into(),
                State::Wgmma => "waits for warps of its warpgroup that never come".into(),
                State::Ready | State::Spin => "loops for a value that nobody writes".into(),
            };
            self.report(FindingKind::Deadlock, pc, at, g.mask.trailing_zeros() as usize, None, what, None);
        }
    }

    /// The wait a group is in: a loop may be anywhere between its branches when it is stopped.
    fn waiting_pc(&self, at: At, g: &Group) -> u32 {
        let spin = self.blocks[at.block].warps[at.warp].spin.0;
        if matches!(g.state, State::Ready | State::Spin) && spin != 0 { spin } else { g.pc }
    }
}

/// Joins groups that stand at the same place; lanes that go apart are joined only where they must meet.
fn merge(warp: &mut Warp, order: Lanes) {
    let free = |g: &Group| g.state == State::Gather || (g.state == State::Ready && order == Lanes::Together);
    let mut i = 0;
    while i < warp.groups.len() {
        let mut j = i + 1;
        while j < warp.groups.len() {
            let (a, b) = (&warp.groups[i], &warp.groups[j]);
            if a.pc == b.pc && a.frame == b.frame && a.depth == b.depth && free(a) && free(b) {
                let b = warp.groups.swap_remove(j);
                warp.groups[i].mask |= b.mask;
                warp.groups[i].quiet &= b.quiet;
                warp.groups[i].state = State::Ready;
            } else {
                j += 1;
            }
        }
        i += 1;
    }
}
