//! Release and acquire through memory, fences, and scopes.

use super::access::{Spot, Toucher};
use super::state::{At, Warp};
use super::{Cluster, lanes};
use crate::clock::{Scope, Snapshot};
use crate::op::Order;
use std::rc::Rc;

impl Cluster<'_> {
    /// What thread `lane` knows now, ready to be released; its time goes on.
    fn snapshot(&self, at: At, warp: &mut Warp, lane: usize, scope: Scope) -> Snapshot {
        let me = self.component(at, lane);
        let view = &mut warp.views[lane];
        let (v, p) = view.whole(me);
        view.own += 1;
        Snapshot { cluster: self.id, block: at.block as u32, scope, v, p }
    }

    /// A fence: what relaxed reads have seen is acquired, and later relaxed writes release what is known now.
    pub(super) fn fence(&mut self, at: At, warp: &mut Warp, scope: Scope, m: u32) {
        for l in lanes(m) {
            if let Some(seen) = warp.views[l].seen.take() {
                self.join(at, warp, l, &seen, scope);
            }
            let s = self.snapshot(at, warp, l, scope);
            warp.views[l].fenced = Some(Rc::new(s));
        }
    }

    fn join(&mut self, at: At, warp: &mut Warp, lane: usize, s: &Snapshot, scope: Scope) {
        let usable = match s.scope.min(scope) {
            Scope::Gpu => true,
            Scope::Cluster => s.cluster == self.id,
            Scope::Cta => s.cluster == self.id && s.block == at.block as u32,
        };
        if !usable {
            return;
        }
        let view = &mut warp.views[lane];
        let mut v = (*view.v).clone();
        v.join_from(self.id, s.cluster, &s.v);
        view.v = Rc::new(v);
        let mut p = (*view.p).clone();
        p.join_from(self.id, s.cluster, &s.p);
        view.p = Rc::new(p);
    }

    fn location(&self, spot: Spot) -> Option<Rc<Snapshot>> {
        match spot {
            Spot::Global(i, at) => self.sync.borrow().get(&((i as u64) << 44 | at)).cloned(),
            Spot::Shared(b, at) => self.blocks[b].sync.get(&at).cloned(),
            Spot::Local(_) | Spot::Const(_) | Spot::Kernel(_) | Spot::Frame(_) => None,
        }
    }

    fn set_location(&mut self, spot: Spot, s: Option<Rc<Snapshot>>) {
        let put = |m: &mut std::collections::BTreeMap<u64, Rc<Snapshot>>, key: u64| match s {
            Some(s) => {
                m.insert(key, s);
            }
            None => {
                m.remove(&key);
            }
        };
        match spot {
            Spot::Global(i, at) => put(&mut self.sync.borrow_mut(), (i as u64) << 44 | at),
            Spot::Shared(b, at) => put(&mut self.blocks[b].sync, at),
            Spot::Local(_) | Spot::Const(_) | Spot::Kernel(_) | Spot::Frame(_) => {}
        }
    }

    /// A strong read: acquires what was released at the place, or remembers it for a fence.
    pub(super) fn acquire_at(&mut self, warp: &mut Warp, t: Toucher, spot: Spot, order: Order, _read: bool) {
        let Some(s) = self.location(spot) else { return };
        if order.acquire {
            self.join(t.at, warp, t.lane, &s, order.scope);
            return;
        }
        let view = &mut warp.views[t.lane];
        let merged = match view.seen.take() {
            None => s,
            Some(old) if Rc::ptr_eq(&old, &s) => old,
            Some(old) => Rc::new(merge(&old, &s)),
        };
        view.seen = Some(merged);
    }

    /// A strong write: releases what this thread knows, or what a fence has prepared. A read-modify-write keeps what
    /// was released at the place before; a plain write of a relaxed value ends it.
    pub(super) fn release_at(&mut self, warp: &mut Warp, t: Toucher, spot: Spot, order: Order, rmw: bool) {
        let new = if order.release {
            Some(Rc::new(self.snapshot(t.at, warp, t.lane, order.scope)))
        } else {
            warp.views[t.lane].fenced.clone()
        };
        let old = if rmw { self.location(spot) } else { None };
        let both = match (old, new) {
            (Some(a), Some(b)) => Some(Rc::new(merge(&a, &b))),
            (a, b) => a.or(b),
        };
        if rmw && both.is_none() {
            return;
        }
        self.set_location(spot, both);
    }
}

/// Both of two releases at one place; the scope is the wider one, since scopes only ever matter for programs that mix
/// them on one flag.
fn merge(a: &Snapshot, b: &Snapshot) -> Snapshot {
    let mut out = b.clone();
    out.v.join_from(b.cluster, a.cluster, &a.v);
    out.p.join_from(b.cluster, a.cluster, &a.p);
    out.scope = a.scope.max(b.scope);
    out
}
