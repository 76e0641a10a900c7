//! Issue of asynchronous copies, and the waits for them.

use super::access::{Spot, Toucher, addresses, get};
use super::run::Flow;
use super::state::{At, CpAsync, Flight, FlightKind, Source, Warp};
use super::{Agent, Cluster, lanes};
use crate::clock::{Scope, Touch};
use crate::op::{Bulk, BulkKind, Inst, NONE, Op, Where};
use crate::report::FindingKind;
use crate::syntax::Ty;

impl Cluster<'_> {
    pub(super) fn copy_async(&mut self, at: At, warp: &mut Warp, frame: u32, inst: &Inst, m: u32, pc: u32) -> Flow {
        match &inst.op {
            Op::CpAsync { dst, src, size, src_size, ignore, .. } => {
                let (to, from) = (addresses(warp, frame, *dst), addresses(warp, frame, *src));
                let mut valid = [*size; 32];
                for l in lanes(m) {
                    if *src_size != NONE {
                        valid[l] = (get(warp, frame, *src_size, l) as u32).min(*size);
                    }
                    if *ignore != NONE && get(warp, frame, *ignore, l) & 1 == 1 {
                        valid[l] = 0;
                    }
                }
                if let Some(dst) = self.copy_warp(at, warp, pc, m, (&to, &from), *size, &valid) {
                    self.in_flight(at, warp, CpAsync { lanes: m, group: 0, size: *size, dst, src: from, valid });
                    return Flow::Next;
                }
                let (mut wrote, mut read) = (super::seen::Seen::default(), super::seen::Seen::default());
                for l in lanes(m) {
                    self.issue_copy(at, warp, frame, l, pc, (to[l], from[l]), *size, valid[l], &mut wrote, &mut read);
                }
                self.count(&wrote, *size, true, false);
                self.count(&read, *size, false, false);
            }
            Op::CpAsyncCommit => {
                for l in lanes(m) {
                    warp.copies[l].commit();
                }
            }
            Op::CpAsyncWait { pending, all } => {
                let groups = |l: usize| warp.copies[l].committed;
                let complete = |l| if *all { groups(l) + 1 } else { groups(l).saturating_sub(*pending) };
                let complete = std::array::from_fn(complete);
                self.land_copies(warp, at, m, &complete);
                for l in lanes(m) {
                    let c = &mut warp.copies[l];
                    let time = if *all { Some(c.complete_all()) } else { c.complete(complete[l]) };
                    if let Some(time) = time {
                        let view = &mut warp.views[l];
                        view.copied = view.copied.max(time);
                        let own = view.threads + self.component(at, l);
                        self.has_waited(own, time);
                    }
                }
            }
            _ => {}
        }
        Flow::Next
    }

    #[expect(clippy::too_many_arguments, reason = "one lane's copy")]
    fn issue_copy(
        &mut self,
        at: At,
        warp: &mut Warp,
        frame: u32,
        l: usize,
        pc: u32,
        (to, from): (u64, u64),
        size: u32,
        valid: u32,
        wrote: &mut super::seen::Seen,
        read: &mut super::seen::Seen,
    ) {
        let Some(dst) = self.resolve(Where::Shared, to, u64::from(size), warp, frame, at, l, pc) else { return };
        let Spot::Shared(_, offset) = dst else { return };
        if to % u64::from(size) != 0 || (valid > 0 && from % u64::from(size) != 0) {
            self.report(
                FindingKind::Misaligned,
                pc,
                at,
                l,
                Some(if to % u64::from(size) == 0 { from } else { to }),
                format!("not a multiple of {size}"),
                None,
            );
            return;
        }
        wrote.add(l, dst);
        if valid > 0 {
            let Some(src) = self.resolve(Where::Global, from, u64::from(valid), warp, frame, at, l, pc) else { return };
            read.add(l, src);
            let t = Toucher { at, lane: l, pc, touch: Touch::Plain, agent: (0, 0) };
            self.touch(warp, t, src, valid, false, false);
        }
        let me = self.component(at, l);
        let agent = (warp.views[l].threads + me, warp.copies[l].time + 1);
        let t = Toucher { at, lane: l, pc, touch: Touch::Copy, agent };
        self.touch(warp, t, dst, size, true, false);
        self.guard_mbarriers(t, at.block, offset, u64::from(size));
        let copy = CpAsync { lanes: 1 << l, group: 0, size, dst: [offset; 32], src: [from; 32], valid: [valid; 32] };
        self.in_flight(at, warp, copy);
    }

    /// Keeps a copy until its group is awaited. Lanes may be at different groups.
    fn in_flight(&mut self, at: At, warp: &mut Warp, mut copy: CpAsync) {
        let m = copy.lanes;
        let mut rest = m;
        while rest != 0 {
            copy.group = warp.copies[rest.trailing_zeros() as usize].committed;
            let others = lanes(rest).filter(|l| warp.copies[*l].committed != copy.group).fold(0, |x, l| x | 1 << l);
            copy.lanes = rest & !others;
            warp.in_flight.push_back(copy.clone());
            rest = others;
        }
        if self.env.seed % 4 == 1 {
            for l in lanes(m) {
                if self.random().is_multiple_of(8) {
                    let all = [warp.copies[l].committed + 1; 32];
                    self.land_copies(warp, at, 1 << l, &all);
                }
            }
        }
    }

    /// Lands the copies of these lanes whose group is below that of the lane in `complete`.
    pub(super) fn land_copies(&mut self, warp: &mut Warp, at: At, m: u32, complete: &[u32; 32]) {
        for c in &mut warp.in_flight {
            for l in lanes(c.lanes & m).filter(|l| c.group < complete[*l]) {
                self.land_copy(at, c, l);
                c.lanes &= !(1 << l);
            }
        }
        while warp.in_flight.front().is_some_and(|c| c.lanes == 0) {
            warp.in_flight.pop_front();
        }
    }

    fn land_copy(&mut self, at: At, c: &CpAsync, l: usize) {
        self.effects += 1;
        let (dst, valid) = (c.dst[l], c.valid[l]);
        let src = self.global_spot(c.src[l], u64::from(valid.max(1)));
        let smem = &mut self.blocks[at.block].smem;
        if let Some(Spot::Global(i, o)) = src
            && (c.size, valid) == (16, 16)
            && self.env.memory.allocs[i].written_all(o, 16, true)
        {
            smem.set_line(dst, self.env.memory.allocs[i].line(o));
            return;
        }
        let mut done = 0;
        while done < c.size {
            let to = dst + u64::from(done);
            match src {
                Some(Spot::Global(i, o)) if done < valid => {
                    let a = &self.env.memory.allocs[i];
                    let n = if valid - done >= 4 { 4 } else { 1 };
                    let o = o + u64::from(done);
                    smem.store(to, n, a.load(o, n));
                    if !a.written(o, n, true) {
                        (0..u64::from(n)).filter(|k| !a.written(o + k, 1, true)).for_each(|k| smem.taint(to + k));
                    }
                    done += n;
                }
                _ => {
                    let n = if done % 4 == 0 { 4 } else { 1 };
                    smem.store(to, n, 0);
                    done += n;
                }
            }
        }
    }

    /// `cp.async.mbarrier.arrive`: an arrival that follows the copies of the thread.
    pub(super) fn arrive_after_copies(
        &mut self,
        at: At,
        warp: &mut Warp,
        l: usize,
        pc: u32,
        key: (usize, u32),
        no_increment: bool,
    ) {
        let all = [warp.copies[l].committed + 1; 32];
        self.land_copies(warp, at, 1 << l, &all);
        let me = self.component(at, l);
        let time = warp.copies[l].time + 1;
        warp.copies[l].time = time;
        let check = self.env.check;
        let threads = warp.views[l].threads;
        if let Some(m) = self.blocks[key.0].mbars.get_mut(&key.1) {
            if check {
                // The arrival tells of the copies alone: what the thread itself did before is not released.
                m.sync.v.raise(threads + me, time);
            }
            if !no_increment {
                m.pending += 1;
            }
        }
        self.mbar_arrive(at, l, pc, key, 1);
    }

    pub(super) fn bulk(&mut self, at: At, warp: &mut Warp, frame: u32, b: &Bulk, m: u32, pc: u32) -> Flow {
        self.effects += 1;
        // Lanes that store the same bytes to the same place change nothing for each other: one of them does it.
        let mut stored: Vec<Vec<u64>> = Vec::new();
        for l in lanes(m) {
            match b.kind {
                BulkKind::Prefetch => {}
                BulkKind::Load => self.bulk_load(at, warp, frame, b, l, pc),
                BulkKind::Store if b.reduce.is_some() => self.bulk_store(at, warp, frame, b, l, pc),
                BulkKind::Store => {
                    let fixed = [b.shared.base, b.global.base, b.size];
                    let operands = fixed.iter().chain(&b.coords).filter(|r| **r != NONE);
                    let values = operands.map(|r| get(warp, frame, *r, l)).collect();
                    if !stored.contains(&values) {
                        self.bulk_store(at, warp, frame, b, l, pc);
                        stored.push(values);
                    }
                }
                BulkKind::Exchange => self.bulk_exchange(at, warp, frame, b, l, pc),
            }
        }
        Flow::Next
    }

    /// The global side and the size of a copy.
    fn side(&mut self, at: At, warp: &Warp, frame: u32, b: &Bulk, l: usize, pc: u32) -> Option<(Source, u32)> {
        if !b.coords.is_empty() {
            let (map, coords) = self.tensor(at, warp, frame, b, l, pc)?;
            let bytes = map.box_bytes() as u32;
            return Some((Source::Tensor(Box::new(map), coords), bytes));
        }
        let addr = addresses(warp, frame, b.global)[l];
        let bytes = get(warp, frame, b.size, l) as u32;
        if !addr.is_multiple_of(16) || !bytes.is_multiple_of(16) {
            self.report(
                FindingKind::Misaligned,
                pc,
                at,
                l,
                Some(addr),
                format!("a bulk copy of {bytes} bytes; address and size are multiples of 16"),
                None,
            );
            return None;
        }
        Some((Source::Linear(addr), bytes))
    }

    /// Registers an access to the global side, run by run.
    fn touch_global(&mut self, warp: &Warp, t: Toucher, source: &Source, bytes: u32, write: bool) -> bool {
        let runs = match source {
            Source::Linear(a) => vec![(*a, u64::from(bytes))],
            Source::Tensor(map, coords) => map.stretches(coords),
        };
        let mut moved = 0;
        for (addr, len) in runs.into_iter().filter(|r| r.1 > 0) {
            let Some(spot) = self.global_spot(addr, len) else {
                self.report(
                    FindingKind::OutOfBounds,
                    t.pc,
                    t.at,
                    t.lane,
                    Some(addr),
                    format!("{len} bytes of a bulk copy outside global memory"),
                    None,
                );
                return false;
            };
            moved += len;
            self.touch(warp, t, spot, len as u32, write, false);
        }
        if write {
            self.counts.global_bytes_written += moved;
        } else {
            self.counts.global_bytes_read += moved;
        }
        true
    }

    #[expect(clippy::too_many_arguments, reason = "a finding needs the thread")]
    fn shared_side(
        &mut self,
        at: At,
        warp: &Warp,
        frame: u32,
        addr: u64,
        l: usize,
        pc: u32,
        place: Where,
        bytes: u32,
        align: u64,
    ) -> Option<(usize, u32)> {
        let Some(Spot::Shared(block, offset)) = self.resolve(place, addr, u64::from(bytes), warp, frame, at, l, pc)
        else {
            return None;
        };
        if offset % align != 0 {
            self.report(
                FindingKind::Misaligned,
                pc,
                at,
                l,
                Some(addr),
                format!("the shared address of this copy is a multiple of {align}"),
                None,
            );
            return None;
        }
        Some((block, offset as u32))
    }

    fn bulk_load(&mut self, at: At, warp: &mut Warp, frame: u32, b: &Bulk, l: usize, pc: u32) {
        let Some((source, bytes)) = self.side(at, warp, frame, b, l, pc) else { return };
        let align = if b.coords.is_empty() { 16 } else { 128 };
        let dst = addresses(warp, frame, b.shared)[l];
        let Some(first) = self.shared_side(at, warp, frame, dst, l, pc, b.shared_place, bytes, align) else { return };
        let Some(mbar) = b.mbar else { return };
        let bar = addresses(warp, frame, mbar)[l];
        let Some((mb, mo)) = self.shared_side(at, warp, frame, bar, l, pc, Where::SharedCluster, 8, 8) else { return };
        let (targets, bars): (Vec<_>, Vec<_>) = if b.mask == NONE {
            (vec![first], vec![(mb, mo)])
        } else {
            let mask = get(warp, frame, b.mask, l) as u16;
            let ranks: Vec<usize> = (0..16).filter(|r| mask >> r & 1 == 1).collect();
            if ranks.iter().any(|r| *r >= self.blocks.len()) {
                self.report(
                    FindingKind::OutOfBounds,
                    pc,
                    at,
                    l,
                    Some(u64::from(mask)),
                    "the multicast mask names blocks outside the cluster",
                    None,
                );
                return;
            }
            (ranks.iter().map(|r| (*r, first.1)).collect(), ranks.iter().map(|r| (*r, mo)).collect())
        };
        for (i, ((tb, to), (mb, mo))) in targets.iter().zip(&bars).enumerate() {
            let Some(agent) = self.mbar_agent(at, l, pc, *mb, *mo) else { return };
            let strong = Toucher { at, lane: l, pc, touch: Touch::Strong(Scope::Cluster), agent };
            self.touch(warp, strong, Spot::Shared(*mb, u64::from(*mo)), 8, false, false);
            let t = Toucher { at, lane: l, pc, touch: Touch::Bulk, agent };
            if i == 0 && !self.touch_global(warp, t, &source, bytes, false) {
                return;
            }
            self.touch(warp, t, Spot::Shared(*tb, u64::from(*to)), bytes, true, false);
            self.guard_mbarriers(t, *tb, u64::from(*to), u64::from(bytes));
            self.counts.shared_bytes_written += u64::from(bytes);
        }
        let what = FlightKind::Load { source, targets, mbar: bars, bytes };
        self.flights.push(Flight { block: at.block, warp: at.warp, lane: l, pc, what });
    }

    fn bulk_store(&mut self, at: At, warp: &mut Warp, frame: u32, b: &Bulk, l: usize, pc: u32) {
        let Some((dest, bytes)) = self.side(at, warp, frame, b, l, pc) else { return };
        let align = if b.coords.is_empty() { 16 } else { 128 };
        let src = addresses(warp, frame, b.shared)[l];
        let Some(from) = self.shared_side(at, warp, frame, src, l, pc, Where::Shared, bytes, align) else { return };
        let me = self.component(at, l);
        let group = warp.bulk.get(&(l as u32)).map_or(0, |g| g.committed);
        let (reads, writes) = (self.thread_agent(Agent::BulkRead(me)), self.thread_agent(Agent::BulkWrite(me)));
        let read = Toucher { at, lane: l, pc, touch: Touch::Bulk, agent: (reads, group + 1) };
        let fine = self.touch_source(warp, read, from, &dest, bytes);
        let touch = if b.reduce.is_some() { Touch::Strong(Scope::Gpu) } else { Touch::Bulk };
        let write = Toucher { at, lane: l, pc, touch, agent: (writes, group + 1) };
        if !self.touch_global(warp, write, &dest, bytes, true) {
            return;
        }
        let _ = fine;
        self.counts.shared_bytes_read += u64::from(bytes);
        let reduce = b.reduce.map(|(op, ty)| {
            let of_map = match &dest {
                Source::Tensor(map, _) => map.dtype.ty(),
                Source::Linear(_) => Ty::U32,
            };
            (op, ty.filter(|_| b.coords.is_empty()).unwrap_or(of_map))
        });
        let what = FlightKind::Store { from, dest, bytes, group, reduce, data: None };
        self.flights.push(Flight { block: at.block, warp: at.warp, lane: l, pc, what });
    }

    /// The shared bytes of a store that reach memory: those of elements out of range are not looked at.
    fn touch_source(&mut self, warp: &Warp, t: Toucher, from: (usize, u32), dest: &Source, bytes: u32) -> bool {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        match dest {
            Source::Linear(_) => runs.push((u64::from(from.1), u64::from(bytes))),
            Source::Tensor(map, coords) => {
                map.each(coords, |o, n, a| {
                    if a.is_some() {
                        let s = map.swizzle.apply(u64::from(from.1) + o);
                        match runs.last_mut() {
                            Some((start, len)) if *start + *len == s => *len += n,
                            _ => runs.push((s, n)),
                        }
                    }
                });
            }
        }
        let mut fine = true;
        for (o, len) in runs {
            let spot = Spot::Shared(from.0, o);
            if self.touch(warp, t, spot, len as u32, false, false) {
                let (mut at, end) = (o, o + len);
                while at < end {
                    let n = if at % 4 == 0 && end - at >= 4 { 4 } else { 1 };
                    if !self.initialised(t, Spot::Shared(from.0, at), n, false) {
                        fine = false;
                        break;
                    }
                    at += u64::from(n);
                }
            } else {
                fine = false;
            }
        }
        fine
    }

    fn bulk_exchange(&mut self, at: At, warp: &mut Warp, frame: u32, b: &Bulk, l: usize, pc: u32) {
        let bytes = get(warp, frame, b.size, l) as u32;
        let (dst, src) = (addresses(warp, frame, b.global)[l], addresses(warp, frame, b.shared)[l]);
        let Some(to) = self.shared_side(at, warp, frame, dst, l, pc, Where::SharedCluster, bytes, 16) else { return };
        let Some(from) = self.shared_side(at, warp, frame, src, l, pc, Where::Shared, bytes, 16) else { return };
        let Some(mbar) = b.mbar else { return };
        let bar = addresses(warp, frame, mbar)[l];
        let Some(mbar) = self.shared_side(at, warp, frame, bar, l, pc, Where::SharedCluster, 8, 8) else { return };
        let Some(agent) = self.mbar_agent(at, l, pc, mbar.0, mbar.1) else { return };
        let t = Toucher { at, lane: l, pc, touch: Touch::Bulk, agent };
        self.touch(warp, t, Spot::Shared(from.0, u64::from(from.1)), bytes, false, false);
        self.touch(warp, t, Spot::Shared(to.0, u64::from(to.1)), bytes, true, false);
        let what = FlightKind::Exchange { from, to, mbar, bytes };
        self.flights.push(Flight { block: at.block, warp: at.warp, lane: l, pc, what });
    }

    pub(super) fn bulk_wait(&mut self, at: At, warp: &mut Warp, pending: u32, read: bool, m: u32) -> Flow {
        for l in lanes(m) {
            let committed = warp.bulk.get(&(l as u32)).map_or(0, |g| g.committed);
            let complete = committed.saturating_sub(pending);
            if complete == 0 {
                continue;
            }
            self.land_stores(at, l, complete, read);
            if self.env.check {
                let me = self.component(at, l);
                let reads = self.thread_agent(Agent::BulkRead(me));
                warp.views[l].learn(reads, complete);
                self.has_waited(reads, complete);
                if !read {
                    let writes = self.thread_agent(Agent::BulkWrite(me));
                    warp.views[l].learn(writes, complete);
                    self.has_waited(writes, complete);
                }
            }
        }
        Flow::Next
    }
}
