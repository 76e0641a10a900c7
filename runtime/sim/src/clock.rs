//! Vector clocks: what each thread may rely on having happened.
//!
//! A component of a clock is a thread or an asynchronous agent (the copies of one mbarrier, the bulk groups of one
//! thread, ..). Threads of a cluster and their agents are dense; components of other clusters appear only after an
//! acquire of something they released. Every thread has two clocks: `v` orders ordinary accesses, and `p` is the part
//! of `v` that a proxy fence has shown to the async proxy.
//!
//! Clocks are shared between lanes by reference count, since after a barrier all threads know the same.

use std::collections::BTreeMap;
use std::rc::Rc;

/// Largest number of components of a cluster: the bits of an [`Epoch`].
pub(crate) const MAX_COMPONENTS: u32 = 1 << 17;

/// In the place of a cluster: the launches that may not have ended when this one starts.
pub(crate) const BEFORE: u32 = u32::MAX;

/// A set of components with the time up to which each is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    pub(crate) dense: Vec<u32>,
    pub(crate) foreign: BTreeMap<u32, Rc<Vec<u32>>>,
}

fn max_into(into: &mut Vec<u32>, from: &[u32]) {
    if into.len() < from.len() {
        into.resize(from.len(), 0);
    }
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

impl Clock {
    /// Takes over everything that `from` knows; both belong to the same cluster.
    pub(crate) fn join(&mut self, from: &Clock) {
        max_into(&mut self.dense, &from.dense);
        for (cluster, known) in &from.foreign {
            self.join_foreign(*cluster, known);
        }
    }

    fn join_foreign(&mut self, cluster: u32, known: &Rc<Vec<u32>>) {
        match self.foreign.get_mut(&cluster) {
            Some(mine) if Rc::ptr_eq(mine, known) => {}
            Some(mine) => max_into(Rc::make_mut(mine), known),
            None => {
                self.foreign.insert(cluster, known.clone());
            }
        }
    }

    /// Takes over what a clock of another cluster knows.
    pub(crate) fn join_from(&mut self, own: u32, from_cluster: u32, from: &Clock) {
        if own == from_cluster {
            return self.join(from);
        }
        self.join_foreign(from_cluster, &Rc::new(from.dense.clone()));
        for (cluster, known) in &from.foreign {
            if *cluster == own {
                max_into(&mut self.dense, known);
            } else {
                self.join_foreign(*cluster, known);
            }
        }
    }

    /// Knows that the launches before have ended.
    pub(crate) fn after_launches() -> Clock {
        Clock { dense: Vec::new(), foreign: BTreeMap::from([(BEFORE, Rc::new(Vec::new()))]) }
    }

    pub(crate) fn get(&self, component: u32) -> u32 {
        self.dense.get(component as usize).copied().unwrap_or(0)
    }

    pub(crate) fn raise(&mut self, component: u32, time: u32) {
        let i = component as usize;
        if self.dense.len() <= i {
            self.dense.resize(i + 1, 0);
        }
        self.dense[i] = self.dense[i].max(time);
    }
}

/// What one thread knows.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) v: Rc<Clock>,
    pub(crate) p: Rc<Clock>,
    /// The thread's own time; its accesses carry it.
    pub(crate) own: u32,
    /// The thread's own time at its last proxy fence.
    pub(crate) p_own: u32,
    /// Threads of the cluster; the `cp.async` of a thread is the component that many after its own.
    pub(crate) threads: u32,
    /// Time up to which the thread's own `cp.async` are complete, for it and as of its last proxy fence.
    pub(crate) copied: u32,
    pub(crate) p_copied: u32,
    /// What a fence with release semantics has made ready to be released by a later relaxed write.
    pub(crate) fenced: Option<Rc<Snapshot>>,
    /// What relaxed reads have seen, to be acquired by a later fence.
    pub(crate) seen: Option<Rc<Snapshot>>,
}

/// What was known at a release.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) cluster: u32,
    /// Block in the cluster and scope of the release; an acquire of another block needs a wider one.
    pub(crate) block: u32,
    pub(crate) scope: Scope,
    pub(crate) v: Clock,
    pub(crate) p: Clock,
}

/// How far an operation reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    Cta,
    Cluster,
    Gpu,
}

impl View {
    pub(crate) fn new(empty: &Rc<Clock>, threads: u32) -> View {
        View {
            v: empty.clone(),
            p: empty.clone(),
            own: 1,
            p_own: 0,
            threads,
            copied: 0,
            p_copied: 0,
            fenced: None,
            seen: None,
        }
    }

    /// Adds what this thread knows to `v` and `p` and starts a new time, so that later accesses are not included.
    pub(crate) fn release_into(&mut self, me: u32, into: &mut Sync) {
        into.add(me, self);
        self.own += 1;
    }

    /// The threads of these views take over `v` and `p` wholly. Threads of a warp mostly know the same, so that what one
    /// of them knows afterwards the next one does too.
    pub(crate) fn acquire<'a>(
        views: impl Iterator<Item = &'a mut View>,
        memo: &mut Memo,
        v: &Rc<Clock>,
        p: &Rc<Clock>,
    ) {
        let mut last: Option<[Rc<Clock>; 4]> = None;
        for view in views {
            let [old_v, old_p, new_v, new_p] = match last {
                Some(known) if Rc::ptr_eq(&known[0], &view.v) && Rc::ptr_eq(&known[1], &view.p) => known,
                _ => [view.v.clone(), view.p.clone(), memo.join(&view.v, v), memo.join(&view.p, p)],
            };
            (view.v, view.p) = (new_v.clone(), new_p.clone());
            last = Some([old_v, old_p, new_v, new_p]);
        }
    }

    /// Whether the thread, component `me` of `cluster`, knows of an access of a thread, or has made it.
    pub(crate) fn knows(&self, cluster: u32, me: u32, e: Epoch) -> bool {
        let c = e.component();
        if e.cluster() != cluster & 0x3f_ffff {
            let foreign = self.v.foreign.get(&e.cluster());
            return foreign.is_some_and(|f| f.get(c as usize).is_some_and(|t| *t >= e.time()));
        }
        c == me || self.v.get(c) >= e.time()
    }

    /// Whether two threads know the same and are at the same time.
    pub(crate) fn alike(&self, other: &View) -> bool {
        self.own == other.own && Rc::ptr_eq(&self.v, &other.v) && Rc::ptr_eq(&self.p, &other.p)
    }

    /// Shows everything this thread knows to the async proxy.
    pub(crate) fn proxy_fence(&mut self, memo: &mut Memo) {
        self.p = memo.join(&self.p, &self.v.clone());
        self.p_own = self.own;
        self.p_copied = self.copied;
    }

    /// Copies of both clocks with the thread's own times in them.
    pub(crate) fn whole(&self, me: u32) -> (Clock, Clock) {
        let (mut v, mut p) = ((*self.v).clone(), (*self.p).clone());
        self.raise_own(me, &mut v, &mut p);
        (v, p)
    }

    fn raise_own(&self, me: u32, v: &mut Clock, p: &mut Clock) {
        v.raise(me, self.own);
        if self.p_own > 0 {
            p.raise(me, self.p_own);
        }
        if self.copied > 0 {
            v.raise(self.threads + me, self.copied);
        }
        if self.p_copied > 0 {
            p.raise(self.threads + me, self.p_copied);
        }
    }

    /// Learns that an agent has completed its operations up to a time.
    pub(crate) fn learn(&mut self, agent: u32, time: u32) {
        for clock in [&mut self.v, &mut self.p] {
            if clock.get(agent) < time {
                let mut c = (**clock).clone();
                c.raise(agent, time);
                *clock = Rc::new(c);
            }
        }
    }
}

/// A clock under construction: the meeting point of several releases.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sync {
    pub(crate) v: Clock,
    pub(crate) p: Clock,
    last_v: Option<Rc<Clock>>,
    last_p: Option<Rc<Clock>>,
}

impl Sync {
    /// Adds what a thread knows, whose time stays as it is.
    pub(crate) fn add(&mut self, me: u32, view: &View) {
        // Threads that met before share their clock; joining it once is enough.
        if !self.last_v.as_ref().is_some_and(|l| Rc::ptr_eq(l, &view.v)) {
            self.v.join(&view.v);
            self.last_v = Some(view.v.clone());
        }
        if !self.last_p.as_ref().is_some_and(|l| Rc::ptr_eq(l, &view.p)) {
            self.p.join(&view.p);
            self.last_p = Some(view.p.clone());
        }
        view.raise_own(me, &mut self.v, &mut self.p);
    }

    pub(crate) fn add_clock(&mut self, v: &Clock, p: &Clock) {
        self.v.join(v);
        self.p.join(p);
    }

    /// The clocks, ready to be shared.
    pub(crate) fn share(&self) -> (Rc<Clock>, Rc<Clock>) {
        (Rc::new(self.v.clone()), Rc::new(self.p.clone()))
    }
}

/// Remembers the last few joins, since the lanes of a warp ask for the same one in turn.
#[derive(Debug, Default)]
pub(crate) struct Memo {
    last: Vec<(Rc<Clock>, Rc<Clock>, Rc<Clock>)>,
}

impl Memo {
    pub(crate) fn join(&mut self, a: &Rc<Clock>, b: &Rc<Clock>) -> Rc<Clock> {
        if Rc::ptr_eq(a, b) || (b.dense.is_empty() && b.foreign.is_empty()) {
            return a.clone();
        }
        if a.dense.is_empty() && a.foreign.is_empty() {
            return b.clone();
        }
        if let Some((_, _, r)) = self.last.iter().find(|(x, y, _)| Rc::ptr_eq(x, a) && Rc::ptr_eq(y, b)) {
            return r.clone();
        }
        let same =
            |(cluster, known): (&u32, &Rc<Vec<u32>>)| a.foreign.get(cluster).is_some_and(|k| Rc::ptr_eq(k, known));
        let covered = b.foreign.iter().all(same) && b.dense.iter().enumerate().all(|(i, t)| *t <= a.get(i as u32));
        let r = if covered {
            a.clone()
        } else {
            let mut c = (**a).clone();
            c.join(b);
            Rc::new(c)
        };
        if self.last.len() >= 4 {
            self.last.remove(0);
        }
        self.last.push((a.clone(), b.clone(), r.clone()));
        r
    }
}

/// How memory was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    Plain,
    /// An atomic, volatile or relaxed access: such accesses do not race with each other inside their scope.
    Strong(Scope),
    /// `cp.async` and `st.async`: asynchronous, in the generic proxy.
    Copy,
    /// `red.async`: as those, but such accesses do not race with each other.
    Reduce,
    /// Bulk and tensor copies: asynchronous, in the async proxy.
    Bulk,
    /// Operands of wgmma: asynchronous reads of the async proxy.
    Mma,
}

impl Touch {
    pub(crate) fn is_async(self) -> bool {
        match self {
            Touch::Plain | Touch::Strong(_) => false,
            Touch::Copy | Touch::Reduce | Touch::Bulk | Touch::Mma => true,
        }
    }

    /// Whether such accesses do not race with each other.
    pub(crate) fn is_strong(self) -> bool {
        matches!(self, Touch::Strong(_))
    }

    /// Whether the access goes through the async proxy.
    pub(crate) fn in_async_proxy(self) -> bool {
        match self {
            Touch::Plain | Touch::Strong(_) | Touch::Copy | Touch::Reduce => false,
            Touch::Bulk | Touch::Mma => true,
        }
    }
}

/// Who touched a place and when, in 64 bits: touch 3, cluster 22, component 17, time 22. Zero is "nobody".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Epoch(u64);

impl Epoch {
    pub(crate) fn new(touch: Touch, cluster: u32, component: u32, time: u32) -> Epoch {
        let code = match touch {
            Touch::Plain => 0,
            Touch::Strong(Scope::Cta) => 1,
            Touch::Strong(Scope::Cluster) => 2,
            Touch::Strong(Scope::Gpu) => 3,
            Touch::Copy => 4,
            Touch::Bulk => 5,
            Touch::Mma => 6,
            Touch::Reduce => 7,
        };
        Epoch(
            code << 61
                | u64::from(cluster & 0x3f_ffff) << 39
                | u64::from(component & (MAX_COMPONENTS - 1)) << 22
                | u64::from(time.min(0x3f_ffff)),
        )
    }

    pub(crate) fn touch(self) -> Touch {
        match self.0 >> 61 {
            0 => Touch::Plain,
            1 => Touch::Strong(Scope::Cta),
            2 => Touch::Strong(Scope::Cluster),
            3 => Touch::Strong(Scope::Gpu),
            4 => Touch::Copy,
            5 => Touch::Bulk,
            6 => Touch::Mma,
            _ => Touch::Reduce,
        }
    }

    /// The same of the first thread of its warp, and the place of the thread in the warp.
    #[inline(always)]
    pub(crate) fn of_warp(self) -> (Epoch, u32) {
        (Epoch(self.0 & !(31 << 22)), (self.0 >> 22) as u32 & 31)
    }

    /// The same at the next time.
    pub(crate) fn later(self) -> Epoch {
        Epoch::new(self.touch(), self.cluster(), self.component(), self.time() + 1)
    }

    pub(crate) fn cluster(self) -> u32 {
        (self.0 >> 39) as u32 & 0x3f_ffff
    }

    pub(crate) fn component(self) -> u32 {
        (self.0 >> 22) as u32 & (MAX_COMPONENTS - 1)
    }

    pub(crate) fn time(self) -> u32 {
        self.0 as u32 & 0x3f_ffff
    }

    pub(crate) fn is_none(self) -> bool {
        self.0 == 0
    }
}
