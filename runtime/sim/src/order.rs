//! Whether an access is ordered with what touched its place before: the rules of races, waits and fences.

use crate::clock::{Clock, Epoch, Scope, Touch, View};
use std::cell::Cell as Place;
use std::rc::Rc;

/// One access, as the detector sees it.
pub(crate) struct Access<'a> {
    pub(crate) view: &'a View,
    /// The threads of the warp, where all of them do it together and know the same of others.
    pub(crate) peers: Option<&'a [View]>,
    /// Cluster, component, block in the cluster and threads of a block of the issuing thread.
    pub(crate) cluster: u32,
    pub(crate) me: u32,
    /// First component of the warp of the issuing thread.
    pub(crate) warp: u32,
    pub(crate) block_size: u32,
    pub(crate) touch: Touch,
    /// For asynchronous accesses: the agent and its time.
    pub(crate) agent: u32,
    pub(crate) agent_time: u32,
    pub(crate) pc: u32,
    pub(crate) memo: &'a Memo,
    /// Times of asynchronous components that some thread has waited for.
    pub(crate) waited: &'a [u32],
    /// Whether nothing can order accesses of different clusters.
    pub(crate) independent: bool,
}

/// Which lanes of a reader a clock knows of, for the last reader of each of eight warps: the lanes of a warp ask the
/// same. It lives no longer than the clocks.
#[derive(Debug, Default)]
pub(crate) struct Memo([Place<(usize, Epoch, u32)>; 8]);

/// Why two accesses are in conflict; `with` is the instruction of the earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conflict {
    Race {
        with: u32,
    },
    /// `waited`: another thread has waited for the operation, and nothing orders this one after it.
    MissingWait {
        with: u32,
        waited: bool,
    },
    /// With a launch before, which may not have ended.
    Before,
    MissingFence {
        with: u32,
    },
}

/// Who can tell by a look at the clock that most accesses are in order.
pub(crate) trait Knows {
    /// Whether a write is surely nothing to worry about: known by the clock alone, with the fence that it may need. Of
    /// several threads, they know the same.
    fn knows_write(&mut self, last: Epoch) -> bool;

    /// Whether readers in the own cluster are surely known.
    fn knows_readers(&mut self, e: Epoch, lanes: u32) -> bool;
}

impl Knows for &Access<'_> {
    #[inline(always)]
    fn knows_write(&mut self, last: Epoch) -> bool {
        let c = last.component();
        last.cluster() == self.cluster & 0x3f_ffff
            && (c == self.me || self.view.v.get(c) >= last.time())
            && (!self.touch.in_async_proxy() || last.touch().in_async_proxy() || self.view.p.get(c) >= last.time())
            || self.both_strong(last, 0)
    }

    #[inline(always)]
    fn knows_readers(&mut self, e: Epoch, lanes: u32) -> bool {
        e.cluster() == self.cluster & 0x3f_ffff
            && match e.touch().is_async() {
                true => self.view.v.get(e.component()) >= e.time(),
                false => lanes & !self.known_lanes(e) == 0,
            }
    }
}

/// Whether a write leaves the bytes as they are, which is no race of writes; asked only where it matters.
pub(crate) type Same<'a> = &'a dyn Fn() -> bool;

impl Access<'_> {
    fn known(&self, clock: &Clock, own: u32, copied: u32, e: Epoch, lane: u32) -> bool {
        let c = e.component() + lane;
        if e.cluster() != self.cluster & 0x3f_ffff {
            return clock.foreign.get(&e.cluster()).is_some_and(|f| f.get(c as usize).is_some_and(|t| *t >= e.time()));
        }
        if c == self.me {
            return e.time() <= own.max(clock.get(c));
        }
        if c == self.me + self.view.threads {
            // Its own wait, or an mbarrier that its copies arrive at.
            return e.time() <= copied.max(clock.get(c));
        }
        clock.get(c) >= e.time()
    }

    /// The view of a thread of the own warp, where all of them take part, by its component or that of its `cp.async`.
    fn peer(&self, e: Epoch, lane: u32) -> Option<(&View, bool)> {
        let (peers, c) = (self.peers?, e.component() + lane);
        if e.cluster() != self.cluster & 0x3f_ffff {
            return None;
        }
        let of = |first: u32| c.checked_sub(first).and_then(|l| peers.get(l as usize));
        of(self.warp).map(|v| (v, false)).or_else(|| Some((of(self.warp + self.view.threads)?, true)))
    }

    fn ordered(&self, e: Epoch, lane: u32) -> bool {
        if let Some((view, copies)) = self.peer(e, lane) {
            return !copies || e.time() <= view.copied.max(self.view.v.get(e.component() + lane));
        }
        self.known(&self.view.v, u32::MAX, self.view.copied, e, lane)
    }

    fn fenced(&self, e: Epoch) -> bool {
        if let Some((view, copies)) = self.peer(e, 0) {
            let own = if copies { view.p_copied } else { view.p_own };
            return e.time() <= own.max(self.view.p.get(e.component()));
        }
        self.known(&self.view.p, self.view.p_own, self.view.p_copied, e, 0)
    }

    /// The lanes of a reader that are known to have read before.
    fn known_lanes(&self, e: Epoch) -> u32 {
        if e.touch().is_async() {
            return u32::from(self.ordered(e, 0));
        }
        let clock = &self.view.v;
        let own = e.cluster() == self.cluster & 0x3f_ffff;
        let key = Rc::as_ptr(clock) as usize;
        let memo = &self.memo.0[e.component() as usize / 32 % 8];
        let last = memo.get();
        let mut known = last.2;
        if (last.0, last.1) != (key, e) {
            let times = if own { &clock.dense[..] } else { clock.foreign.get(&e.cluster()).map_or(&[][..], |f| f) };
            let lanes = times.iter().skip(e.component() as usize).take(32);
            known = lanes.enumerate().fold(0, |x, (l, t)| x | u32::from(*t >= e.time()) << l);
            memo.set((key, e, known));
        }
        match self.me.wrapping_sub(e.component()) {
            l @ 0..32 if own => known | 1 << l,
            _ => known,
        }
    }

    pub(crate) fn all_ordered(&self, e: Epoch, lanes: u32) -> bool {
        // Most readers that are not known are not known from their first lane on.
        self.ordered(e, lanes.trailing_zeros()) && lanes & !self.known_lanes(e) == 0
    }

    #[inline(always)]
    pub(crate) fn epoch(&self) -> Epoch {
        if self.touch.is_async() {
            Epoch::new(self.touch, self.cluster, self.agent, self.agent_time)
        } else {
            Epoch::new(self.touch, self.cluster, self.me, self.view.own)
        }
    }

    /// As whom it is noted as a reader.
    pub(crate) fn reader(&self) -> (Epoch, u32) {
        if self.touch.is_async() {
            (Epoch::new(self.touch, self.cluster, self.agent, self.agent_time), 1)
        } else {
            (Epoch::new(self.touch, self.cluster, self.warp, self.view.own), 1 << (self.me - self.warp))
        }
    }

    /// Two strong accesses do not race when the scope of each takes in the other thread.
    fn both_strong(&self, e: Epoch, lane: u32) -> bool {
        let (Touch::Strong(a), Touch::Strong(b)) = (self.touch, e.touch()) else { return false };
        match a.min(b) {
            Scope::Gpu => true,
            Scope::Cluster => e.cluster() == self.cluster & 0x3f_ffff,
            Scope::Cta => {
                e.cluster() == self.cluster & 0x3f_ffff
                    && (e.component() + lane) / self.block_size == self.me / self.block_size
            }
        }
    }

    pub(crate) fn missing_wait(&self, e: Epoch, with: u32) -> Conflict {
        let time = self.waited.get(e.component() as usize).copied().unwrap_or(0);
        Conflict::MissingWait { with, waited: e.cluster() == self.cluster & 0x3f_ffff && time >= e.time() }
    }

    /// Whether the last write of a place, by the instruction `with`, is in the way of this access.
    pub(crate) fn after_write(&self, last: Epoch, with: u32, same: Same<'_>) -> Option<Conflict> {
        if last.is_none() {
            return None;
        }
        if !self.ordered(last, 0) {
            if (self.touch, last.touch()) == (Touch::Reduce, Touch::Reduce) {
                return None;
            }
            if last.touch().is_async() {
                return Some(self.missing_wait(last, with));
            }
            return (!self.both_strong(last, 0) && !same()).then_some(Conflict::Race { with });
        }
        let needs_fence = self.touch.in_async_proxy() && !last.touch().in_async_proxy();
        (needs_fence && !self.fenced(last)).then_some(Conflict::MissingFence { with })
    }

    /// Whether lanes that have read a place are in the way of this write.
    pub(crate) fn after_read(&self, e: Epoch, lanes: u32, with: u32) -> Option<Conflict> {
        let mut rest = lanes & !self.known_lanes(e);
        while rest != 0 {
            let l = rest.trailing_zeros();
            rest &= rest - 1;
            if e.touch().is_async() {
                return Some(self.missing_wait(e, with));
            }
            if !self.both_strong(e, l) {
                return Some(Conflict::Race { with });
            }
        }
        None
    }
}
