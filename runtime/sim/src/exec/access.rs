//! Loads and stores of threads: address resolution, checks and counts.

use super::run::Flow;
use super::seen::Seen;
use super::state::{At, Warp};
use super::{Cluster, PAGE_BYTES, lanes};
use crate::clock::{Epoch, Touch};
use crate::op::{Access, Addr, Order, Where};
use crate::order::{self, Conflict};
use crate::report::FindingKind;
use crate::shadow::{LINE, Note, Shadow};
use crate::space;
use crate::syntax::Ty;
use std::sync::{Mutex, PoisonError};

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spot {
    Global(usize, u64),
    Shared(usize, u64),
    Local(u64),
    Const(u64),
    Kernel(u64),
    Frame(u64),
}

/// Who touches memory, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Toucher {
    pub(super) at: At,
    pub(super) lane: usize,
    pub(super) pc: u32,
    pub(super) touch: Touch,
    /// Agent and its time, for asynchronous touches and those of an mbarrier.
    pub(super) agent: (u32, u32),
}

impl Cluster<'_> {
    /// The place of `bytes` bytes at `addr`; nothing, after a finding, when they are outside every object.
    #[expect(clippy::too_many_arguments, reason = "a finding needs the thread")]
    pub(super) fn resolve(
        &mut self,
        place: Where,
        addr: u64,
        bytes: u64,
        warp: &Warp,
        frame: u32,
        at: At,
        lane: usize,
        pc: u32,
    ) -> Option<Spot> {
        let (spot, what) = match place {
            Where::Global => (self.global_spot(addr, bytes), "global memory"),
            Where::Shared => (self.shared_spot(at.block, addr & 0xffff_ffff, bytes, false), "shared memory"),
            Where::SharedCluster => {
                (self.shared_spot(at.block, addr & 0xffff_ffff, bytes, true), "shared memory of the cluster")
            }
            Where::Local => {
                ((addr.saturating_add(bytes) <= warp.local_size).then_some(Spot::Local(addr)), "local memory")
            }
            Where::Const => (
                (addr.saturating_add(bytes) <= self.env.const_bank.len() as u64).then_some(Spot::Const(addr)),
                "constant memory",
            ),
            Where::KernelParam => (
                (addr.saturating_add(bytes) <= self.env.params.len() as u64).then_some(Spot::Kernel(addr)),
                "the parameters",
            ),
            Where::FrameParam => {
                let per = warp.frames[frame as usize].area.len() as u64 / 32;
                ((addr.saturating_add(bytes) <= per).then_some(Spot::Frame(addr)), "the parameters")
            }
            Where::Generic => {
                let inside = |w: u64| addr - w;
                return match space::window(addr) {
                    space::SHARED => {
                        self.resolve(Where::SharedCluster, inside(space::SHARED), bytes, warp, frame, at, lane, pc)
                    }
                    space::LOCAL => self.resolve(Where::Local, inside(space::LOCAL), bytes, warp, frame, at, lane, pc),
                    space::CONST => self.resolve(Where::Const, inside(space::CONST), bytes, warp, frame, at, lane, pc),
                    space::PARAM => {
                        self.resolve(Where::KernelParam, inside(space::PARAM), bytes, warp, frame, at, lane, pc)
                    }
                    _ => self.resolve(Where::Global, addr, bytes, warp, frame, at, lane, pc),
                };
            }
        };
        if spot.is_none() {
            self.effects += 1;
            self.report(
                FindingKind::OutOfBounds,
                pc,
                at,
                lane,
                Some(addr),
                format!("{bytes} bytes outside {what}"),
                None,
            );
        }
        spot
    }

    pub(super) fn global_spot(&mut self, addr: u64, bytes: u64) -> Option<Spot> {
        let m = self.env.memory;
        let fits = |i: usize| {
            m.allocs.get(i).filter(|a| addr >= a.base && addr - a.base < a.bytes).map(|a| (addr - a.base, a.bytes))
        };
        let (offset, size) = match fits(self.last_alloc) {
            Some(x) => x,
            None => {
                self.last_alloc = m.find(addr)?;
                fits(self.last_alloc)?
            }
        };
        (bytes <= size - offset).then_some(Spot::Global(self.last_alloc, offset))
    }

    /// A shared address to block and offset.
    pub(super) fn shared_spot(&self, own: usize, addr: u64, bytes: u64, cluster: bool) -> Option<Spot> {
        let rank = (addr >> space::RANK_SHIFT) as usize;
        let offset = addr & space::OFFSET_MASK;
        let block = if rank == 0 { own } else { rank - 1 };
        let inside = offset >= space::SHARED_BASE
            && offset + bytes <= self.env.shared_end
            && block < self.blocks.len()
            && (cluster || block == own);
        inside.then_some(Spot::Shared(block, offset))
    }

    /// Reports and corrects nothing: a misaligned access is dropped.
    fn aligned(&mut self, addr: u64, bytes: u64, at: At, lane: usize, pc: u32) -> bool {
        let ok = addr.is_multiple_of(bytes);
        if !ok {
            self.effects += 1;
            self.report(FindingKind::Misaligned, pc, at, lane, Some(addr), format!("not a multiple of {bytes}"), None);
        }
        ok
    }

    /// Registers an access with the race detector.
    pub(super) fn touch(&mut self, warp: &Warp, t: Toucher, spot: Spot, bytes: u32, write: bool, same: bool) -> bool {
        if !self.env.check {
            return true;
        }
        let me = self.component(t.at, t.lane);
        if let Spot::Shared(host, _) = spot
            && host != t.at.block
            && !self.visit(t, warp.views[t.lane].own, host, spot)
        {
            return false;
        }
        if let Spot::Global(i, offset) = spot
            && self.env.too_early(&warp.views[t.lane], i, offset, u64::from(bytes), write)
        {
            let addr = self.env.memory.allocs[i].base + offset;
            self.conflict(t, Conflict::Before, addr, write);
            return false;
        }
        let access = order::Access {
            view: &warp.views[t.lane],
            peers: None,
            cluster: self.id,
            me,
            warp: me - t.lane as u32,
            block_size: self.env.block_size(),
            touch: t.touch,
            agent: t.agent.0,
            agent_time: t.agent.1,
            pc: t.pc,
            memo: &order::Memo::default(),
            independent: self.env.independent,
            waited: &self.waited,
        };
        let (conflict, addr) = match spot {
            Spot::Global(i, offset) => {
                let (mut at, end, mut conflict) = (offset, offset + u64::from(bytes), None);
                while at < end {
                    let page = at / PAGE_BYTES;
                    let next = end.min((page + 1) * PAGE_BYTES);
                    let lock = self.env.shadow.pages[i][page as usize]
                        .get_or_init(|| Mutex::new(Shadow::new(PAGE_BYTES as usize)));
                    let mut shadow = lock.lock().unwrap_or_else(PoisonError::into_inner);
                    let found = touch_range(&mut shadow, at % PAGE_BYTES, next - at, write, &|| same, &access);
                    conflict = conflict.or(found);
                    at = next;
                }
                (conflict, self.env.memory.allocs[i].base + offset)
            }
            Spot::Shared(b, offset) => {
                let shadow = &mut self.blocks[b].shadow;
                let conflict = touch_range(shadow, offset, u64::from(bytes), write, &|| same, &access);
                (conflict, space::SHARED + ((b as u64 + 1) << space::RANK_SHIFT) + offset)
            }
            Spot::Local(_) | Spot::Const(_) | Spot::Kernel(_) | Spot::Frame(_) => return true,
        };
        match conflict {
            Some(c) => {
                self.conflict(t, c, addr, write);
                false
            }
            None => true,
        }
    }

    /// Registers the read of the same words of shared memory by several lanes: at once where they know the same and
    /// nothing is wrong, else lane by lane.
    pub(super) fn read_together(&mut self, warp: &Warp, lanes: u32, t: Toucher, place: (usize, u64), bytes: u32) {
        let mut rest = lanes;
        if self.quick_together(warp, rest, t, place, bytes) {
            return;
        }
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            self.touch(warp, Toucher { lane, ..t }, Spot::Shared(place.0, place.1), bytes, false, false);
            // The first one has made room for its warp among the readers.
            if lane == lanes.trailing_zeros() as usize && self.quick_together(warp, rest, t, place, bytes) {
                return;
            }
        }
    }

    fn quick_together(&mut self, warp: &Warp, lanes: u32, t: Toucher, place: (usize, u64), bytes: u32) -> bool {
        let (first, base) = (&warp.views[t.lane], self.component(t.at, 0));
        if !super::lanes(lanes).all(|l| warp.views[l].alike(first)) {
            return false;
        }
        let access = order::Access {
            view: first,
            peers: None,
            cluster: self.id,
            // None of them: what one lane did, the others need not know.
            me: u32::MAX,
            warp: base,
            block_size: self.env.block_size(),
            touch: t.touch,
            agent: 0,
            agent_time: 0,
            pc: t.pc,
            memo: &order::Memo::default(),
            independent: self.env.independent,
            waited: &self.waited,
        };
        let note = Note::Read(Epoch::new(t.touch, self.id, base, first.own), lanes);
        let mut words = (place.1 / 4) as usize..((place.1 + u64::from(bytes)) / 4) as usize;
        let shadow = &mut self.blocks[place.0].shadow;
        words.all(|word| shadow.quick_word(word, note, &mut &access, t.pc))
    }

    pub(super) fn conflict(&mut self, t: Toucher, c: Conflict, addr: u64, write: bool) {
        let verb = if write { "write" } else { "read" };
        let (kind, with, text) = match c {
            Conflict::Before => {
                let text =
                    format!("{verb} of bytes that a launch before may still use: no griddepcontrol.wait orders it");
                return self.report(FindingKind::Race, t.pc, t.at, t.lane, Some(addr), text, None);
            }
            Conflict::Race { with } => {
                (FindingKind::Race, with, format!("{verb} is not ordered with an access of another thread"))
            }
            Conflict::MissingWait { with, waited } => {
                // What is not awaited by this thread may be by another one, or be about to be overwritten: a race too.
                if waited || write {
                    let what = if waited {
                        "the thread that waited for the asynchronous operation"
                    } else {
                        "an asynchronous operation"
                    };
                    let text = format!("{verb} is not ordered with {what}");
                    self.report(FindingKind::Race, t.pc, t.at, t.lane, Some(addr), text, Some(with));
                }
                let text = format!("{verb} before the asynchronous operation on these bytes is known to be complete");
                (FindingKind::MissingWait, with, text)
            }
            Conflict::MissingFence { with } => (
                FindingKind::MissingFence,
                with,
                format!(
                    "{verb} by the async proxy of bytes written in the generic proxy, without fence.proxy.async between"
                ),
            ),
        };
        self.report(kind, t.pc, t.at, t.lane, Some(addr), text, Some(with));
    }

    /// Whether bytes were written; tells when not.
    pub(super) fn initialised(&mut self, t: Toucher, spot: Spot, bytes: u32, strict: bool) -> bool {
        if !self.env.check {
            return true;
        }
        let ok = match spot {
            Spot::Global(i, at) => self.env.memory.allocs[i].written(at, bytes, strict),
            Spot::Shared(b, at) => self.blocks[b].smem.written(at, bytes, strict),
            Spot::Local(_) | Spot::Const(_) | Spot::Kernel(_) | Spot::Frame(_) => true,
        };
        if !ok {
            self.unwritten(t, spot);
        }
        ok
    }

    pub(super) fn unwritten(&mut self, t: Toucher, spot: Spot) {
        let addr = self.address_of(spot);
        let text = "read of memory that nothing has written";
        // Bytes that a copy brought here from unwritten memory: the copy is named too.
        let copy = match spot {
            Spot::Shared(b, at) if self.blocks[b].smem.written(at / 4 * 4, 1, false) => {
                self.blocks[b].shadow.copied_by((at / 4) as usize)
            }
            _ => None,
        };
        self.report(FindingKind::Uninitialized, t.pc, t.at, t.lane, Some(addr), text, copy);
        if let Some(pc) = copy {
            self.report(
                FindingKind::Uninitialized,
                pc,
                t.at,
                t.lane,
                Some(addr),
                "copy of memory that nothing has written, which is then used",
                Some(t.pc),
            );
        }
    }

    /// The generic address of a place.
    pub(super) fn address_of(&self, spot: Spot) -> u64 {
        match spot {
            Spot::Global(i, at) => self.env.memory.allocs[i].base + at,
            Spot::Shared(b, at) => space::SHARED + ((b as u64 + 1) << space::RANK_SHIFT) + at,
            Spot::Local(at) => space::LOCAL + at,
            Spot::Const(at) => space::CONST + at,
            Spot::Kernel(at) | Spot::Frame(at) => space::PARAM + at,
        }
    }

    /// Reads an element of 1 to 8 bytes without checks.
    pub(super) fn peek(&self, warp: &Warp, frame: u32, lane: usize, spot: Spot, bytes: u32) -> u64 {
        match spot {
            Spot::Global(i, at) => self.env.memory.allocs[i].load(at, bytes),
            Spot::Shared(b, at) => self.blocks[b].smem.load(at, bytes),
            Spot::Local(at) => little(&warp.local, lane * warp.local_size as usize + at as usize, bytes),
            Spot::Const(at) => little(&self.env.const_bank, at as usize, bytes),
            Spot::Kernel(at) => little(&self.env.params, at as usize, bytes),
            Spot::Frame(at) => {
                let area = &warp.frames[frame as usize].area;
                little(area, lane * (area.len() / 32) + at as usize, bytes)
            }
        }
    }

    /// Writes an element of 1 to 8 bytes without checks.
    pub(super) fn poke(&mut self, warp: &mut Warp, frame: u32, lane: usize, spot: Spot, bytes: u32, v: u64) {
        let n = bytes as usize;
        match spot {
            Spot::Global(i, at) => self.env.memory.allocs[i].store(at, bytes, v),
            Spot::Shared(b, at) => self.blocks[b].smem.store(at, bytes, v),
            Spot::Local(at) => {
                let i = lane * warp.local_size as usize + at as usize;
                warp.local[i..i + n].copy_from_slice(&v.to_le_bytes()[..n]);
            }
            Spot::Frame(at) => {
                let area = &mut warp.frames[frame as usize].area;
                let i = lane * (area.len() / 32) + at as usize;
                area[i..i + n].copy_from_slice(&v.to_le_bytes()[..n]);
            }
            Spot::Const(_) | Spot::Kernel(_) => {}
        }
    }

    pub(super) fn load(&mut self, at: At, warp: &mut Warp, frame: u32, a: &Access, m: u32, pc: u32) -> Flow {
        if self.load_warp(at, warp, frame, a, m, pc) {
            return Flow::Next;
        }
        let size = a.ty.bytes();
        let total = u64::from(size) * a.regs.len() as u64;
        let addrs = addresses(warp, frame, a.addr);
        let mut seen = Seen::default();
        let mut answer = 0u64;
        for l in lanes(m) {
            let Some(spot) = self.resolve(a.place, addrs[l], total, warp, frame, at, l, pc) else {
                for r in &a.regs {
                    set(warp, frame, *r, l, 0);
                }
                continue;
            };
            if !self.aligned(addrs[l], total, at, l, pc) {
                continue;
            }
            seen.add(l, spot);
            let t = Toucher { at, lane: l, pc, touch: touch_of(a.order), agent: (0, 0) };
            let checked = matches!(spot, Spot::Global(..) | Spot::Shared(..));
            // Bytes of a copy in flight are unwritten too, but the missing wait is the cause.
            if checked && self.touch(warp, t, spot, total as u32, false, false) {
                let mut done = 0;
                while done < total {
                    let n = (total - done).min(8) as u32;
                    if !self.initialised(t, shifted(spot, done), n, true) {
                        break;
                    }
                    done += u64::from(n);
                }
            }
            for (i, r) in a.regs.iter().enumerate() {
                let v = self.peek(warp, frame, l, shifted(spot, i as u64 * u64::from(size)), size);
                answer = answer.wrapping_mul(31).wrapping_add(v);
                let v = if a.ty.signed() && a.reg_bits > a.ty.bits() { widen(v, a.ty, a.reg_bits) } else { v };
                set(warp, frame, *r, l, v);
            }
            if a.order.strong && self.env.check && checked {
                self.acquire_at(warp, t, spot, a.order, true);
            }
        }
        self.count(&seen, total as u32, false, false);
        if a.order.strong { self.note_spin(warp, pc, answer) } else { Flow::Next }
    }

    pub(super) fn store(&mut self, at: At, warp: &mut Warp, frame: u32, a: &Access, m: u32, pc: u32) -> Flow {
        if self.store_warp(at, warp, frame, a, m, pc) {
            return Flow::Next;
        }
        let size = a.ty.bytes();
        let total = u64::from(size) * a.regs.len() as u64;
        let addrs = addresses(warp, frame, a.addr);
        let mut seen = Seen::default();
        self.effects += 1;
        warp.spin.2 = 0;
        for l in lanes(m) {
            let Some(spot) = self.resolve(a.place, addrs[l], total, warp, frame, at, l, pc) else { continue };
            if !self.aligned(addrs[l], total, at, l, pc) {
                continue;
            }
            seen.add(l, spot);
            let t = Toucher { at, lane: l, pc, touch: touch_of(a.order), agent: (0, 0) };
            if matches!(spot, Spot::Global(..) | Spot::Shared(..)) && self.env.check {
                let same = a.regs.iter().enumerate().all(|(i, r)| {
                    let s = shifted(spot, i as u64 * u64::from(size));
                    self.peek(warp, frame, l, s, size) == get(warp, frame, *r, l) & ones(size)
                });
                self.touch(warp, t, spot, total as u32, true, same);
                if a.order.strong {
                    self.release_at(warp, t, spot, a.order, false);
                }
                if let Spot::Shared(b, at) = spot {
                    self.guard_mbarriers(t, b, at, total);
                }
            }
            for (i, r) in a.regs.iter().enumerate() {
                let v = get(warp, frame, *r, l);
                self.poke(warp, frame, l, shifted(spot, i as u64 * u64::from(size)), size, v);
            }
        }
        self.count(&seen, total as u32, true, false);
        Flow::Next
    }
}

/// Registers an access to a range, line by line where it covers lines; keeps the first answer.
fn touch_range(
    shadow: &mut Shadow,
    offset: u64,
    bytes: u64,
    write: bool,
    same: order::Same<'_>,
    access: &order::Access<'_>,
) -> Option<Conflict> {
    let mut found = None;
    let (mut at, end) = (offset, offset + bytes);
    let (reader, lanes) = access.reader();
    let note = if write { Note::Write(access.epoch()) } else { Note::Read(reader, lanes) };
    while at < end {
        let (conflict, next) = if at % LINE == 0 && end - at >= LINE {
            let line = (at / LINE) as usize;
            let quick = shadow.quick_line(line, note, &mut &*access, access.pc);
            (if quick { None } else { shadow.touch_line(line, write, same, access) }, at + LINE)
        } else {
            let next = (at / 4 * 4 + 4).min(end);
            let mask = ((1u32 << (next - at)) - 1) << (at % 4);
            (shadow.touch((at / 4) as usize, mask as u8, write, same, access), next)
        };
        found = found.or(conflict);
        at = next;
    }
    found
}

pub(super) fn touch_of(o: Order) -> Touch {
    if o.strong { Touch::Strong(o.scope) } else { Touch::Plain }
}

/// The addresses of all lanes.
pub(super) fn addresses(warp: &Warp, frame: u32, a: Addr) -> [u64; 32] {
    warp.frames[frame as usize].regs[a.base as usize].map(|b| b.wrapping_add(a.offset as u64))
}

pub(super) fn shifted(s: Spot, by: u64) -> Spot {
    match s {
        Spot::Global(i, at) => Spot::Global(i, at + by),
        Spot::Shared(b, at) => Spot::Shared(b, at + by),
        Spot::Local(at) => Spot::Local(at + by),
        Spot::Const(at) => Spot::Const(at + by),
        Spot::Kernel(at) => Spot::Kernel(at + by),
        Spot::Frame(at) => Spot::Frame(at + by),
    }
}

pub(super) fn get(warp: &Warp, frame: u32, r: u32, lane: usize) -> u64 {
    warp.frames[frame as usize].regs[r as usize][lane]
}

pub(super) fn set(warp: &mut Warp, frame: u32, r: u32, lane: usize, v: u64) {
    warp.frames[frame as usize].regs[r as usize][lane] = v;
}

pub(super) fn ones(bytes: u32) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (bytes * 8)) - 1 }
}

fn widen(v: u64, ty: Ty, bits: u32) -> u64 {
    let s = 64 - ty.bits();
    (((v << s) as i64 >> s) as u64) & if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

fn little(bytes: &[u8], at: usize, n: u32) -> u64 {
    let mut b = [0; 8];
    b[..n as usize].copy_from_slice(&bytes[at..at + n as usize]);
    u64::from_le_bytes(b)
}
