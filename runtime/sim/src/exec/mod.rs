//! Runs one cluster of blocks.
//!
//! A warp is a list of groups of lanes that execute together; the group with the lowest position runs first, deepest
//! call first, and groups that meet at one position merge. Warps take turns in an order that the seed decides. A failed
//! wait gives the turn to others. Asynchronous copies land when nothing else can happen (or earlier, by the seed), so
//! a kernel that does not wait for them reads what was there before.

#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "an arm for each operation that matters here; the rest was dispatched elsewhere"
)]

mod access;
mod atomics;
mod barrier;
mod call;
mod collective;
mod copies;
mod fast;
mod flight;
mod guests;
mod maps;
mod matrix;
mod mbar;
mod operand;
mod product;
mod run;
mod schedule;
mod seen;
mod setup;
pub(crate) mod state;
mod sync;
mod wgmma;
mod wmma;

use crate::clock::{BEFORE, Clock, Epoch, Memo, Snapshot, View};
use crate::launch::Lanes;
use crate::memory::{Memory, Plain, READ, WRITTEN};
use crate::op::{Code, V};
use crate::report::{Counts, Finding, FindingKind, Findings};
use crate::shadow::Shadow;
use state::{At, Block, Flight};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// Bytes of a page of the global shadow.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Shadow cells of global memory for one launch, made as pages are touched.
#[derive(Debug, Default)]
pub(crate) struct GlobalShadow {
    pub(crate) pages: Vec<Vec<OnceLock<Mutex<Shadow>>>>,
}

/// What all clusters of a launch share.
pub(crate) struct Env<'a> {
    pub(crate) code: &'a Code,
    pub(crate) entry: usize,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) cluster: [u32; 3],
    pub(crate) params: Vec<u8>,
    pub(crate) memory: &'a Memory,
    pub(crate) shadow: GlobalShadow,
    /// Address of each module variable in its space.
    pub(crate) var_addr: Vec<u64>,
    pub(crate) const_bank: Vec<u8>,
    /// End of the shared memory of a block.
    pub(crate) shared_end: u64,
    pub(crate) dynamic_shared: u32,
    /// Address of the words at which the blocks of a cooperative launch meet; zero when none asks for it.
    pub(crate) workspace: u64,
    pub(crate) check: bool,
    /// Blocks cannot learn of each other before the end of the launch.
    pub(crate) independent: bool,
    /// What launches have read and written that may still be under way, by the index of the allocation and the word;
    /// empty when there are none.
    pub(crate) before: Vec<Option<&'a [u8]>>,
    /// The same of launches that a wait does not cover.
    pub(crate) beyond: Vec<Option<&'a [u8]>>,
    /// A thread has waited for the launches before.
    pub(crate) waited: AtomicBool,
    /// A block lets the next launch start without having waited for those before.
    pub(crate) hasty: AtomicBool,
    pub(crate) seed: u64,
    pub(crate) lanes: Lanes,
    /// The first cluster with a finding, when the launch ends there.
    pub(crate) found: Option<AtomicU32>,
    pub(crate) max_instructions: u64,
    pub(crate) executed: AtomicU64,
}

impl Env<'_> {
    pub(crate) fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// Components of the clock that a block takes.
    pub(crate) fn block_size(&self) -> u32 {
        self.threads().next_multiple_of(32)
    }

    /// Whether a launch that may not have ended has written these bytes, or has read what would be written.
    pub(crate) fn too_early(&self, view: &View, alloc: usize, offset: u64, bytes: u64, write: bool) -> bool {
        let wrong = if write { READ | WRITTEN } else { WRITTEN };
        let used = |marks: &[Option<&[u8]>]| {
            let words = (offset / 4) as usize..(offset + bytes).div_ceil(4) as usize;
            marks.get(alloc).is_some_and(|m| m.is_some_and(|m| m[words].iter().any(|m| m & wrong != 0)))
        };
        (!self.before.is_empty() && !view.v.foreign.contains_key(&BEFORE) && used(&self.before))
            || (!self.beyond.is_empty() && used(&self.beyond))
    }

    pub(crate) fn cluster_size(&self) -> u32 {
        self.cluster.iter().product()
    }
}

/// Release clocks of global locations.
pub(crate) type GlobalSync = Rc<RefCell<BTreeMap<u64, Rc<Snapshot>>>>;

/// Asynchronous components of the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Agent {
    Mbarrier(usize, u32),
    /// Reads of shared memory by the bulk groups of a thread, and their writes to global memory.
    BulkRead(u32),
    BulkWrite(u32),
    /// Matrix operations of a warpgroup.
    Mma(usize, usize),
}

/// What became of a cluster after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Done,
    /// It has work left and did some.
    Worked,
    /// Every thread waits.
    Idle,
}

/// A running cluster.
pub(crate) struct Cluster<'e> {
    env: &'e Env<'e>,
    pub(crate) id: u32,
    pub(crate) blocks: Vec<Block>,
    flights: Vec<Flight>,
    rng: u64,
    memo: Memo,
    agents: BTreeMap<Agent, (u32, u32)>,
    next_component: u32,
    /// Times of asynchronous components that some thread has waited for.
    waited: Vec<u32>,
    sync: GlobalSync,
    cluster_bar: ClusterBar,
    /// By the global place of a tensor map that a thread here has acquired for copies: whose write, and when.
    acquired_maps: BTreeMap<(usize, u64), Vec<(Epoch, Epoch)>>,
    pub(crate) findings: Findings,
    pub(crate) counts: Counts,
    /// Executions of each instruction by warps and by lanes.
    pub(crate) executed: Vec<(u64, u64)>,
    /// Grows with everything another thread could wait for.
    effects: u64,
    last_alloc: usize,
    steps: u64,
    order: Vec<(usize, usize)>,
    idle: u32,
    empty: Rc<Clock>,
    /// The end of the launches before.
    before: Rc<Clock>,
    /// Slots of frames that have ended, with their function.
    registers: Vec<(usize, Vec<V>)>,
}

/// Memory of blocks that have ended, for those that come after them.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    shared: Vec<(Plain, Shadow)>,
    registers: Vec<(usize, Vec<V>)>,
}

/// The barrier of the cluster.
#[derive(Debug, Default)]
struct ClusterBar {
    generation: u64,
    arrived: u32,
    sync: crate::clock::Sync,
    done: Option<(Rc<Clock>, Rc<Clock>)>,
}

impl<'e> Cluster<'e> {
    /// The code that runs.
    pub(crate) fn code(&self) -> &'e Code {
        self.env.code
    }

    /// Next pseudo-random number (xorshift64*).
    fn random(&mut self) -> u64 {
        self.rng ^= self.rng >> 12;
        self.rng ^= self.rng << 25;
        self.rng ^= self.rng >> 27;
        self.rng.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Component of a thread.
    fn component(&self, at: At, lane: usize) -> u32 {
        at.block as u32 * self.env.block_size() + at.warp as u32 * 32 + lane as u32
    }

    /// Component of an agent, made on first use, and its current time.
    fn agent(&mut self, a: Agent) -> (u32, u32) {
        if let Some(x) = self.agents.get(&a) {
            return *x;
        }
        let c = self.next_component;
        self.next_component = (c + 1).min(crate::clock::MAX_COMPONENTS - 1);
        self.agents.insert(a, (c, 1));
        (c, 1)
    }

    /// Some thread has waited for the operations of a component up to a time.
    fn has_waited(&mut self, component: u32, time: u32) {
        let i = component as usize;
        if self.waited.len() <= i {
            self.waited.resize(i + 1, 0);
        }
        self.waited[i] = self.waited[i].max(time);
    }

    /// Lanes let the next launch start; they should know that those before have ended.
    fn starts_next(&self, warp: &state::Warp, m: u32) {
        if lanes(m).any(|l| !warp.views[l].v.foreign.contains_key(&BEFORE)) {
            self.env.hasty.store(true, Ordering::Relaxed);
        }
    }

    fn thread_index(&self, at: At, lane: usize) -> [u32; 3] {
        let t = at.warp as u32 * 32 + lane as u32;
        let [x, y, _] = self.env.block;
        [t % x, t / x % y, t / x / y]
    }

    #[expect(clippy::too_many_arguments, reason = "a finding names all of these")]
    fn report(
        &mut self,
        kind: FindingKind,
        pc: u32,
        at: At,
        lane: usize,
        address: Option<u64>,
        message: impl Into<String>,
        with: Option<u32>,
    ) {
        let env = self.env;
        let inst = &env.code.insts[pc as usize];
        if let Some(found) = &env.found {
            found.fetch_min(self.id, Ordering::Relaxed);
        }
        self.findings.add(Finding {
            kind,
            kernel: env.code.funcs[env.entry].name.clone(),
            line: inst.line,
            other_line: with.map(|w| env.code.insts[w as usize].line),
            block: self.blocks[at.block].ctaid,
            thread: self.thread_index(at, lane),
            address,
            message: message.into(),
            times: 1,
        });
    }
}

/// What belongs to the lanes of a mask.
pub(crate) fn of<T>(all: &mut [T], mask: u32) -> impl Iterator<Item = &mut T> {
    all.iter_mut().enumerate().filter(move |(l, _)| mask >> l & 1 == 1).map(|(_, x)| x)
}

/// The set lanes of a mask, in order.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let l = rest.trailing_zeros();
        rest &= rest - 1;
        Some(l as usize)
    })
}
