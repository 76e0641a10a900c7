//! mbarriers: phases, transaction counts, and what their completion makes known.

use super::access::{Spot, Toucher, addresses, get, set};
use super::run::Flow;
use super::state::{At, Mbarrier, State, Warp};
use super::{Agent, Cluster, lanes, of};
use crate::clock::{Scope, Sync, Touch, View};
use crate::op::{Addr, Mbar, NONE, Where};
use crate::report::FindingKind;

/// Largest number of arrivals and of transaction bytes of a phase.
const MAX_COUNT: i64 = (1 << 20) - 1;

impl Cluster<'_> {
    pub(super) fn mbarrier(
        &mut self,
        at: At,
        warp: &mut Warp,
        gi: usize,
        place: (Where, Addr),
        op: &Mbar,
        m: u32,
    ) -> Flow {
        let (pc, frame) = (warp.groups[gi].pc, warp.groups[gi].frame);
        if let Mbar::PendingCount { d, state } = op {
            for l in lanes(m) {
                let s = get(warp, frame, *state, l);
                set(warp, frame, *d, l, s >> 1 & 0xf_ffff);
            }
            return Flow::Next;
        }
        let space = match place.0 {
            // A shared::cta address names the own block, but a rank in it is a rank all the same.
            Where::Shared => Where::SharedCluster,
            other => other,
        };
        let addrs = addresses(warp, frame, place.1);
        if let Mbar::Wait { .. } = op {
            return self.wait(at, warp, gi, space, &addrs, op, m);
        }
        self.effects += 1;
        warp.spin.2 = 0;
        for l in lanes(m) {
            let Some(spot) = self.resolve(space, addrs[l], 8, warp, frame, at, l, pc) else { continue };
            let Spot::Shared(b, offset) = spot else {
                self.report(
                    FindingKind::Mbarrier,
                    pc,
                    at,
                    l,
                    Some(addrs[l]),
                    "an mbarrier lies in shared memory",
                    None,
                );
                continue;
            };
            if !addrs[l].is_multiple_of(8) {
                self.report(FindingKind::Misaligned, pc, at, l, Some(addrs[l]), "an mbarrier is a multiple of 8", None);
                continue;
            }
            self.mbar_op(at, warp, frame, l, pc, (b, offset as u32), op);
        }
        Flow::Next
    }

    #[expect(clippy::too_many_arguments, reason = "one lane's operation")]
    fn mbar_op(&mut self, at: At, warp: &mut Warp, frame: u32, l: usize, pc: u32, key: (usize, u32), op: &Mbar) {
        let (b, offset) = key;
        let spot = Spot::Shared(b, u64::from(offset));
        let init = Toucher { at, lane: l, pc, touch: Touch::Plain, agent: (0, 0) };
        let strong = Toucher { touch: Touch::Strong(Scope::Cluster), ..init };
        match op {
            Mbar::Init { count } => {
                let n = i64::from(get(warp, frame, *count, l) as u32);
                if !(1..=MAX_COUNT).contains(&n) {
                    self.report(
                        FindingKind::Mbarrier,
                        pc,
                        at,
                        l,
                        Some(offset.into()),
                        format!("{n} arrivals are not in 1..={MAX_COUNT}"),
                        None,
                    );
                }
                self.touch(warp, init, spot, 8, true, false);
                self.blocks[b].smem.store(u64::from(offset), 8, (n as u64) << 32);
                let agent = self.agent(Agent::Mbarrier(b, offset)).0;
                // A barrier made anew at the same place goes on in the time of the old one.
                let old = self.blocks[b].mbars.remove(&offset);
                let time = old.as_ref().map_or(0, |o| o.time) + 1;
                let time = time.max(self.agents.get(&Agent::Mbarrier(b, offset)).map_or(1, |a| a.1));
                let done = (self.empty.clone(), self.empty.clone());
                self.blocks[b].mbars.insert(
                    offset,
                    Mbarrier { count: n as u32, pending: n, tx: 0, phase: 0, sync: Sync::default(), done, agent, time },
                );
            }
            Mbar::Inval => {
                // The last of the threads that count themselves down does it, for whole warps at a time.
                self.touch(warp, strong, spot, 8, true, false);
                match self.blocks[b].mbars.remove(&offset) {
                    Some(m) => {
                        if let Some(a) = self.agents.get_mut(&Agent::Mbarrier(b, offset)) {
                            a.1 = m.time + 1;
                        }
                    }
                    None => self.report(
                        FindingKind::Mbarrier,
                        pc,
                        at,
                        l,
                        Some(offset.into()),
                        "the mbarrier is not initialised",
                        None,
                    ),
                }
            }
            Mbar::Arrive { d, count, expect_tx, drop, order, .. } => {
                let Some(agent) = self.mbar_agent(at, l, pc, b, offset) else { return };
                self.touch(warp, Toucher { agent, ..strong }, spot, 8, true, false);
                let n = if *count == NONE { 1 } else { i64::from(get(warp, frame, *count, l) as u32) };
                let tx = if *expect_tx == NONE { 0 } else { i64::from(get(warp, frame, *expect_tx, l) as u32) };
                let me = self.component(at, l);
                let check = self.env.check;
                let Some(m) = self.blocks[b].mbars.get_mut(&offset) else { return };
                let state =
                    (m.phase & 1) << 63 | (m.pending.max(0) as u64 & 0xf_ffff) << 1 | (m.phase & 0xff_ffff) << 32;
                if check && order.release {
                    warp.views[l].release_into(me, &mut m.sync);
                } else if let Some(f) = &warp.views[l].fenced {
                    m.sync.add_clock(&f.v, &f.p);
                }
                m.tx += tx;
                if *drop {
                    m.count = m.count.saturating_sub(1);
                }
                set(warp, frame, *d, l, state);
                self.mbar_arrive(at, l, pc, key, n);
            }
            Mbar::ExpectTx { tx } | Mbar::CompleteTx { tx } => {
                let Some(agent) = self.mbar_agent(at, l, pc, b, offset) else { return };
                self.touch(warp, Toucher { agent, ..strong }, spot, 8, true, false);
                let n = i64::from(get(warp, frame, *tx, l) as u32);
                if matches!(op, Mbar::ExpectTx { .. }) {
                    self.mbar_tx(at, l, pc, key, n);
                } else {
                    self.mbar_tx(at, l, pc, key, -n);
                }
            }
            Mbar::AfterCopies { no_increment } => {
                let Some(agent) = self.mbar_agent(at, l, pc, b, offset) else { return };
                self.touch(warp, Toucher { agent, ..strong }, spot, 8, true, false);
                self.arrive_after_copies(at, warp, l, pc, key, *no_increment);
            }
            Mbar::Wait { .. } | Mbar::PendingCount { .. } => {}
        }
    }

    /// `n` arrivals; the clocks of the arriving thread are in already.
    pub(super) fn mbar_arrive(&mut self, at: At, lane: usize, pc: u32, key: (usize, u32), n: i64) {
        let Some(m) = self.blocks[key.0].mbars.get_mut(&key.1) else { return };
        m.pending -= n;
        let over = m.pending < 0;
        if over {
            m.pending = 0;
            self.report(
                FindingKind::Mbarrier,
                pc,
                at,
                lane,
                Some(key.1.into()),
                "more arrivals than the phase has left",
                None,
            );
        }
        self.mbar_check(key);
    }

    /// Changes the count of bytes that a phase waits for.
    pub(super) fn mbar_tx(&mut self, at: At, lane: usize, pc: u32, key: (usize, u32), bytes: i64) {
        let Some(m) = self.blocks[key.0].mbars.get_mut(&key.1) else {
            self.report(
                FindingKind::Mbarrier,
                pc,
                at,
                lane,
                Some(key.1.into()),
                "bytes for an mbarrier that is not initialised",
                None,
            );
            return;
        };
        m.tx += bytes;
        if m.tx.abs() > MAX_COUNT {
            m.tx = 0;
            self.report(
                FindingKind::Mbarrier,
                pc,
                at,
                lane,
                Some(key.1.into()),
                "the count of bytes leaves its range",
                None,
            );
        }
        self.mbar_check(key);
    }

    /// Completes the phase when nothing is pending.
    fn mbar_check(&mut self, key: (usize, u32)) {
        let Some(m) = self.blocks[key.0].mbars.get_mut(&key.1) else { return };
        if m.pending != 0 || m.tx != 0 {
            return;
        }
        let phase = (m.agent, m.time);
        // Copies that are still under way were not expected: the phase tells nothing of them.
        for f in self.flights.iter().filter(|_| self.env.check) {
            for (block, offset, bytes) in f.what.counted_by(key) {
                self.blocks[block].shadow.postpone(u64::from(offset), u64::from(bytes), phase.0, phase.1);
                let thread = self.component(At { block: f.block, warp: f.warp }, f.lane);
                self.blocks[block].guests.postpone(thread, phase);
            }
        }
        let Some(m) = self.blocks[key.0].mbars.get_mut(&key.1) else { return };
        m.phase += 1;
        m.pending = i64::from(m.count);
        // The copies of this phase are complete for those who see it, and what was known stays known.
        m.sync.v.raise(m.agent, m.time);
        m.sync.p.raise(m.agent, m.time);
        m.time += 1;
        m.done = m.sync.share();
        let key = Agent::Mbarrier(key.0, key.1);
        if let Some(a) = self.agents.get_mut(&key) {
            a.1 = m.time;
        }
        self.effects += 1;
    }

    #[expect(clippy::too_many_arguments, reason = "one wait of a warp")]
    fn wait(&mut self, at: At, warp: &mut Warp, gi: usize, space: Where, addrs: &[u64; 32], op: &Mbar, m: u32) -> Flow {
        let (pc, frame) = (warp.groups[gi].pc, warp.groups[gi].frame);
        let Mbar::Wait { d, state, parity, suspends, order } = op else { return Flow::Next };
        let mut results = [false; 32];
        let mut blocked = None;
        // Mostly all lanes ask the same.
        let mut last = None;
        for l in lanes(m) {
            let question = (addrs[l], get(warp, frame, *state, l));
            if let Some((_, answer)) = last.filter(|(q, _)| *q == question) {
                results[l] = answer;
                continue;
            }
            let Some(Spot::Shared(b, offset)) = self.resolve(space, addrs[l], 8, warp, frame, at, l, pc) else {
                continue;
            };
            if self.mbar_agent(at, l, pc, b, offset as u32).is_none() {
                // Going on keeps the run finite; the finding stands.
                results[l] = true;
                continue;
            }
            let s = question.1;
            let Some(bar) = self.blocks[b].mbars.get(&(offset as u32)) else { continue };
            let wanted = if *parity { s & 1 } else { s >> 63 };
            results[l] = bar.phase & 1 != wanted;
            if !results[l] {
                blocked = Some((b, offset as u32, bar.phase));
            }
            last = Some((question, results[l]));
        }
        let any = lanes(m).any(|l| results[l]);
        let gave_up = std::mem::take(&mut warp.groups[gi].give_up);
        let failed = blocked.filter(|_| !any);
        if let Some((block, offset, phase)) = failed {
            // The time limit of a try is for the system to choose: the first try always runs into it.
            let again = warp.groups[gi].tried == Some((block, offset, phase));
            if *suspends && again && !gave_up && (self.env.seed.is_multiple_of(4) || !self.random().is_multiple_of(4)) {
                return Flow::Stay(State::Mbar { block, offset, phase });
            }
        }
        lanes(m).for_each(|l| set(warp, frame, *d, l, u64::from(results[l])));
        let mut rest = m;
        while rest != 0 && self.env.check {
            let l = Self::first_lane(rest);
            let group = lanes(rest).filter(|k| addrs[*k] == addrs[l]).fold(0, |x, k| x | 1 << k);
            rest &= !group;
            let Some(Spot::Shared(b, offset)) = self.shared_of(space, addrs[l], at) else { continue };
            let strong = Toucher { at, lane: l, pc, touch: Touch::Strong(Scope::Cluster), agent: (0, 0) };
            self.read_together(warp, group, strong, (b, offset), 8);
            let through = lanes(group).filter(|k| results[*k]).fold(0, |x, k| x | 1 << k);
            if through != 0
                && order.acquire
                && let Some(bar) = self.blocks[b].mbars.get(&(offset as u32))
            {
                View::acquire(of(&mut warp.views, through), &mut self.memo, &bar.done.0, &bar.done.1);
                let (agent, time) = (bar.agent, bar.time - 1);
                self.has_waited(agent, time);
            }
        }
        if failed.is_some() {
            // A turn for the others, so that a loop around the wait goes round no more often than it must.
            warp.spin = (pc, 0, 0);
            let e = &mut self.executed[pc as usize];
            e.0 -= 1;
            e.1 -= u64::from(m.count_ones());
            let g = &mut warp.groups[gi];
            (g.tried, g.quiet, g.state) = (failed, true, State::Spin);
        }
        Flow::Next
    }

    fn shared_of(&self, space: Where, addr: u64, at: At) -> Option<Spot> {
        let addr = if space == Where::Generic { addr.checked_sub(crate::space::SHARED)? } else { addr };
        self.shared_spot(at.block, addr & 0xffff_ffff, 8, true)
    }

    /// Plain writes over a live mbarrier destroy it.
    pub(super) fn guard_mbarriers(&mut self, t: Toucher, block: usize, at: u64, bytes: u64) {
        let mbars = &self.blocks[block].mbars;
        if mbars.is_empty() {
            return;
        }
        let from = (at as u32).saturating_sub(7);
        if let Some((o, _)) = mbars.range(from..(at + bytes) as u32).next() {
            let o = *o;
            self.report(
                FindingKind::Mbarrier,
                t.pc,
                t.at,
                t.lane,
                Some(o.into()),
                "an ordinary write over a live mbarrier",
                None,
            );
        }
    }
}
