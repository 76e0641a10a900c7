//! Loads and stores of whole warps where nothing is wrong with them.
//!
//! Ordinary accesses to shared memory of the own block and to one allocation of global memory are most of what kernels
//! do. Here their addresses are checked together and the detector is asked word by word without further dispatch. An
//! access that is out of bounds, misaligned or strong is left to [`super::access`], lane by lane.

use super::access::{Spot, Toucher, addresses, ones};
use super::seen::Seen;
use super::state::{At, Block, Warp};
use super::{Cluster, PAGE_BYTES, lanes};
use crate::clock::{Epoch, Touch};
use crate::op::{Access, Where};
use crate::order::{self, Conflict};
use crate::shadow::{LINE, Note, Shadow};
use crate::space;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Where all lanes of an access go.
#[derive(Clone, Copy)]
enum Target {
    Shared,
    Global(usize),
}

/// What an access does.
#[derive(Clone, Copy)]
enum Use<'a> {
    Load,
    /// Rows of matrices.
    Rows,
    /// Of these registers of a frame, so many bytes each.
    Store(&'a [u32], u32, u32),
    /// `cp.async`.
    CopyFrom,
    CopyTo,
}

/// The cells of what a warp touches.
enum Cells<'a> {
    Own(&'a mut Shadow),
    /// Pages of global memory, of which one at a time is held.
    Pages(&'a [OnceLock<Mutex<Shadow>>], Option<(u64, MutexGuard<'a, Shadow>)>),
}

impl Cells<'_> {
    /// The cells that have an offset, and what it is in them.
    #[inline(always)]
    fn at(&mut self, offset: u64) -> (&mut Shadow, u64) {
        match self {
            Cells::Own(shadow) => (shadow, offset),
            Cells::Pages(pages, held) => {
                let page = offset / PAGE_BYTES;
                let guard = match held.take() {
                    Some((p, guard)) if p == page => guard,
                    other => {
                        drop(other);
                        let lock = pages[page as usize].get_or_init(|| Mutex::new(Shadow::new(PAGE_BYTES as usize)));
                        lock.lock().unwrap_or_else(PoisonError::into_inner)
                    }
                };
                (&mut held.insert((page, guard)).1, offset % PAGE_BYTES)
            }
        }
    }
}

/// Something to report: lane, offset, and the conflict (or an unwritten word).
type Fault = (usize, u64, Option<Conflict>);

impl Cluster<'_> {
    /// Offsets of all lanes, when they are in bounds and aligned in one object.
    fn target(&mut self, warp: &Warp, frame: u32, a: &Access, m: u32, total: u64) -> Option<(Target, [u64; 32])> {
        if a.order.strong {
            return None;
        }
        let mut offsets = addresses(warp, frame, a.addr);
        let (target, base, from, end) = match a.place {
            Where::Shared => (Target::Shared, 0, space::SHARED_BASE, self.env.shared_end),
            Where::Global => {
                let first = offsets[m.trailing_zeros() as usize];
                let Some(Spot::Global(i, _)) = self.global_spot(first, total) else { return None };
                let alloc = &self.env.memory.allocs[i];
                (Target::Global(i), alloc.base, 0, alloc.bytes)
            }
            Where::Generic
            | Where::SharedCluster
            | Where::Local
            | Where::Const
            | Where::KernelParam
            | Where::FrameParam => return None,
        };
        for l in lanes(m) {
            let at = if base == 0 { offsets[l] & 0xffff_ffff } else { offsets[l].wrapping_sub(base) };
            // Bases are multiples of sixteen, so the offset is aligned as the address is.
            if at < from || at >= end || at + total > end || at & (total - 1) != 0 {
                return None;
            }
            offsets[l] = at;
        }
        Some((target, offsets))
    }

    /// Asks the detector about one access of each lane.
    #[expect(clippy::too_many_arguments, reason = "one access of a warp")]
    fn touch_warp(
        &mut self,
        at: At,
        warp: &mut Warp,
        m: u32,
        pc: u32,
        target: Target,
        offsets: &[u64; 32],
        total: u64,
        access: Use<'_>,
    ) -> Vec<Fault> {
        let (write, stored) = match access {
            Use::Load | Use::Rows | Use::CopyFrom => (false, None),
            Use::Store(registers, frame, size) => (true, Some((registers, frame, size))),
            Use::CopyTo => (true, None),
        };
        let touch = if matches!(access, Use::CopyTo) { Touch::Copy } else { Touch::Plain };
        let base = self.component(at, 0);
        let (cluster, block_size, env) = (self.id, self.env.block_size(), self.env);
        let Block { smem, shadow: own, .. } = &mut self.blocks[at.block];
        let smem = &*smem;
        let Warp { views, copies, frames, .. } = warp;
        let (views, common) = views.together(m, cluster, base);
        let mut cells = match target {
            Target::Shared => Cells::Own(own),
            Target::Global(i) => Cells::Pages(&env.shadow.pages[i], None),
        };
        // A read for a copy carries the mark of unwritten bytes along, and so may rows whose use nobody knows.
        let written = |at: u64, bytes: u64| {
            let strict = match access {
                Use::Load => true,
                Use::Rows => false,
                Use::Store(..) | Use::CopyFrom | Use::CopyTo => return true,
            };
            match target {
                Target::Shared => smem.written_all(at, bytes, strict),
                Target::Global(i) => env.memory.allocs[i].written_all(at, bytes, strict),
            }
        };
        let early = matches!(target, Target::Global(_)) && !(env.before.is_empty() && env.beyond.is_empty());
        // A line at a time where accesses cover lines, else a word.
        let unit = if total.is_multiple_of(LINE) { LINE } else { 4 };
        let note = |l: usize| {
            let (me, own) = (base + l as u32, views[l].own);
            match touch {
                // Of the thread's own copies, up to the next commit.
                Touch::Copy => Note::Write(Epoch::new(touch, cluster, views[l].threads + me, copies[l].time + 1)),
                _ if write => Note::Write(Epoch::new(Touch::Plain, cluster, me, own)),
                _ => Note::Read(Epoch::new(Touch::Plain, cluster, base, own), 1 << l),
            }
        };
        // Most accesses are judged by one look at a cell each.
        let mut left = m;
        if !early && total >= 4 {
            for l in lanes(m & common.lanes) {
                let (note, mut knows, end) = (note(l), common.lane(l), offsets[l] + total);
                let mut at = offsets[l];
                while at < end {
                    let (shadow, offset) = cells.at(at);
                    let fine = match unit {
                        LINE => shadow.quick_line((offset / LINE) as usize, note, &mut knows, pc),
                        _ => shadow.quick_word((offset / 4) as usize, note, &mut knows, pc),
                    };
                    if !(fine && written(at, unit)) {
                        break;
                    }
                    at += unit;
                }
                left &= !(u32::from(at >= end) << l);
            }
        }
        // Lanes that write the same value to the same place change nothing for each other.
        let again = |l: usize| {
            stored.is_some_and(|(list, frame, size)| {
                let regs = &frames[frame as usize].regs;
                let value = |r: u32, l: usize| regs[r as usize][l] & ones(size);
                let before = lanes(m).filter(|k| *k < l || left >> k & 1 == 0);
                let mut alike = before.filter(|k| offsets[*k] == offsets[l]);
                alike.any(|k| list.iter().all(|r| value(*r, k) == value(*r, l)))
            })
        };
        let memo = order::Memo::default();
        let mut faults = Vec::new();
        for l in lanes(left) {
            let (view, me, o) = (&views[l], base + l as u32, offsets[l]);
            if let Target::Global(i) = target
                && early
                && env.too_early(view, i, o, total, write)
            {
                faults.push((l, o, Some(Conflict::Before)));
                continue;
            }
            let access = order::Access {
                view,
                peers: None,
                cluster,
                me,
                warp: base,
                block_size,
                touch,
                agent: view.threads + me,
                agent_time: copies[l].time + 1,
                pc,
                memo: &memo,
                independent: env.independent,
                waited: &self.waited,
            };
            // Whether the write changes nothing: asked only where it would be a race.
            let same = || {
                stored.is_some_and(|(regs, frame, size)| {
                    regs.iter().enumerate().all(|(i, r)| {
                        let at = o + i as u64 * u64::from(size);
                        let old = match target {
                            Target::Shared => smem.load(at, size),
                            Target::Global(g) => env.memory.allocs[g].load(at, size),
                        };
                        old == frames[frame as usize].regs[*r as usize][l] & ones(size)
                    })
                })
            };
            for at in (o..o + total).step_by(unit as usize) {
                let (shadow, offset) = cells.at(at);
                let (line, word) = ((offset / LINE) as usize, (offset / 4) as usize);
                let mask = if total >= 4 { 0xf } else { ((1u8 << total) - 1) << (o % 4) };
                let quick = match unit {
                    LINE => shadow.quick_line(line, note(l), &mut &access, pc),
                    _ => mask == 0xf && shadow.quick_word(word, note(l), &mut &access, pc),
                };
                let conflict = match unit {
                    _ if quick => None,
                    LINE => shadow.touch_line(line, write, &same, &access),
                    _ => shadow.touch(word, mask, write, &same, &access),
                };
                if matches!(conflict, Some(Conflict::Race { .. })) && again(l) {
                    break;
                }
                if conflict.is_some() || !written(at, unit.min(total)) {
                    faults.push((l, o, conflict));
                    break;
                }
            }
        }
        faults
    }

    fn report_faults(&mut self, at: At, pc: u32, target: Target, faults: Vec<Fault>, write: bool) {
        for (lane, o, conflict) in faults {
            let t = Toucher { at, lane, pc, touch: Touch::Plain, agent: (0, 0) };
            let spot = match target {
                Target::Shared => Spot::Shared(at.block, o),
                Target::Global(i) => Spot::Global(i, o),
            };
            match conflict {
                Some(c) => {
                    let address = self.address_of(spot);
                    self.conflict(t, c, address, write);
                }
                None => self.unwritten(t, spot),
            }
        }
    }

    /// Does a load when all of it is ordinary; says whether it did.
    pub(super) fn load_warp(&mut self, at: At, warp: &mut Warp, frame: u32, a: &Access, m: u32, pc: u32) -> bool {
        let size = a.ty.bytes();
        let total = u64::from(size) * a.regs.len() as u64;
        let Some((target, offsets)) = self.target(warp, frame, a, m, total) else { return false };
        if self.env.check {
            let faults = self.touch_warp(at, warp, m, pc, target, &offsets, total, Use::Load);
            if !faults.is_empty() {
                self.report_faults(at, pc, target, faults, false);
            }
        }
        let extend = a.ty.signed() && a.reg_bits > a.ty.bits();
        let keep = if a.reg_bits >= 64 { u64::MAX } else { (1 << a.reg_bits) - 1 };
        let shift = 64 - a.ty.bits();
        for (i, r) in a.regs.iter().enumerate() {
            let out = &mut warp.frames[frame as usize].regs[*r as usize];
            let by = i as u64 * u64::from(size);
            match target {
                Target::Shared => {
                    let smem = &self.blocks[at.block].smem;
                    lanes(m).for_each(|l| out[l] = smem.load(offsets[l] + by, size));
                }
                Target::Global(g) => {
                    let alloc = &self.env.memory.allocs[g];
                    lanes(m).for_each(|l| out[l] = alloc.load(offsets[l] + by, size));
                }
            }
            if extend {
                lanes(m).for_each(|l| out[l] = ((out[l] << shift) as i64 >> shift) as u64 & keep);
            }
        }
        let seen = seen(target, offsets, m);
        self.count(&seen, total as u32, false, false);
        true
    }

    /// Offsets of `count` rows of 16 bytes, one for each of the first lanes, when reading them is ordinary.
    pub(super) fn load_rows(
        &mut self,
        at: At,
        warp: &mut Warp,
        pc: u32,
        addrs: &[u64; 32],
        place: Where,
        count: usize,
    ) -> Option<[u64; 32]> {
        let m = if count >= 32 { u32::MAX } else { (1 << count) - 1 };
        let offsets = self.in_shared(addrs, place, m, 16)?;
        if self.env.check {
            let faults = self.touch_warp(at, warp, m, pc, Target::Shared, &offsets, 16, Use::Rows);
            self.report_faults(at, pc, Target::Shared, faults, false);
        }
        self.count(&seen(Target::Shared, offsets, m), 16, false, false);
        Some(offsets)
    }

    /// Offsets in the own block's shared memory, when all lanes stay in it and are aligned.
    fn in_shared(&self, addrs: &[u64; 32], place: Where, m: u32, total: u64) -> Option<[u64; 32]> {
        if place != Where::Shared {
            return None;
        }
        let offsets = addrs.map(|a| a & 0xffff_ffff);
        let (from, end) = (space::SHARED_BASE, self.env.shared_end);
        lanes(m)
            .all(|l| offsets[l] >= from && offsets[l] + total <= end && offsets[l] & (total - 1) == 0)
            .then_some(offsets)
    }

    /// Registers the copies of a warp when all of them are whole and ordinary; gives where they go.
    pub(super) fn copy_warp(
        &mut self,
        at: At,
        warp: &mut Warp,
        pc: u32,
        m: u32,
        (to, from): (&[u64; 32], &[u64; 32]),
        size: u32,
        valid: &[u32; 32],
    ) -> Option<[u64; 32]> {
        let total = u64::from(size);
        let copied = lanes(m).filter(|l| valid[*l] > 0).fold(0u32, |x, l| x | 1 << l);
        if lanes(copied).any(|l| valid[l] != size) {
            return None;
        }
        let offsets = self.in_shared(to, Where::Shared, m, total)?;
        let mut source = None;
        if copied != 0 {
            let first = from[copied.trailing_zeros() as usize];
            let Some(Spot::Global(i, _)) = self.global_spot(first, total) else { return None };
            let alloc = &self.env.memory.allocs[i];
            let places = from.map(|a| a.wrapping_sub(alloc.base));
            let inside = |l: usize| places[l] < alloc.bytes && places[l] + total <= alloc.bytes;
            if !lanes(copied).all(|l| inside(l) && places[l] & (total - 1) == 0) {
                return None;
            }
            source = Some((Target::Global(i), places));
        }
        if self.env.check {
            if let Some((target, places)) = source {
                let faults = self.touch_warp(at, warp, copied, pc, target, &places, total, Use::CopyFrom);
                self.report_faults(at, pc, target, faults, false);
            }
            let faults = self.touch_warp(at, warp, m, pc, Target::Shared, &offsets, total, Use::CopyTo);
            self.report_faults(at, pc, Target::Shared, faults, true);
            if !self.blocks[at.block].mbars.is_empty() {
                for l in lanes(m) {
                    let t = Toucher { at, lane: l, pc, touch: Touch::Copy, agent: (0, 0) };
                    self.guard_mbarriers(t, at.block, offsets[l], total);
                }
            }
        }
        self.count(&seen(Target::Shared, offsets, m), size, true, false);
        if let Some((target, places)) = source {
            self.count(&seen(target, places, copied), size, false, false);
        }
        Some(offsets)
    }

    /// Does a store when all of it is ordinary; says whether it did.
    pub(super) fn store_warp(&mut self, at: At, warp: &mut Warp, frame: u32, a: &Access, m: u32, pc: u32) -> bool {
        let size = a.ty.bytes();
        let total = u64::from(size) * a.regs.len() as u64;
        let Some((target, offsets)) = self.target(warp, frame, a, m, total) else { return false };
        if self.env.check {
            let stored = Use::Store(&a.regs, frame, size);
            let faults = self.touch_warp(at, warp, m, pc, target, &offsets, total, stored);
            if !faults.is_empty() {
                self.report_faults(at, pc, target, faults, true);
            }
            if matches!(target, Target::Shared) && !self.blocks[at.block].mbars.is_empty() {
                for l in lanes(m) {
                    self.guard_mbarriers(
                        Toucher { at, lane: l, pc, touch: Touch::Plain, agent: (0, 0) },
                        at.block,
                        offsets[l],
                        total,
                    );
                }
            }
        }
        for (i, r) in a.regs.iter().enumerate() {
            let v = &warp.frames[frame as usize].regs[*r as usize];
            let by = i as u64 * u64::from(size);
            match target {
                Target::Shared => {
                    let smem = &mut self.blocks[at.block].smem;
                    lanes(m).for_each(|l| smem.store(offsets[l] + by, size, v[l]));
                }
                Target::Global(g) => {
                    let alloc = &self.env.memory.allocs[g];
                    lanes(m).for_each(|l| alloc.store(offsets[l] + by, size, v[l]));
                }
            }
        }
        let seen = seen(target, offsets, m);
        self.count(&seen, total as u32, true, false);
        self.effects += 1;
        warp.spin.2 = 0;
        true
    }
}

fn seen(target: Target, addr: [u64; 32], mask: u32) -> Seen {
    let global = matches!(target, Target::Global(_));
    Seen { mask, global, shared: !global, addr }
}
