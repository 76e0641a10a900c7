//! The state of a running cluster: blocks, warps, groups of lanes, frames and barriers.

use super::guests::Guests;
use crate::clock::{Clock, Snapshot, Sync};
use crate::memory::Plain;
use crate::op::{Rmw, V};
use crate::shadow::Shadow;
use crate::syntax::Ty;
use crate::tensormap::TensorMapDesc;
use crate::together::Views;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// A thread: block in the cluster, warp in the block, lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) block: usize,
    pub(crate) warp: usize,
}

/// Why a group does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// At an instruction that needs lanes which are elsewhere.
    Gather,
    /// At a barrier of the block, in this generation of it.
    Barrier {
        id: usize,
        generation: u64,
    },
    /// At the wait of the cluster barrier.
    Cluster {
        generation: u64,
        acquire: bool,
    },
    /// At a failed wait for an mbarrier (block, offset, phases completed then).
    Mbar {
        block: usize,
        offset: u32,
        phase: u64,
    },
    /// At `wgmma.wait_group`, for warps of the warpgroup that are behind.
    Wgmma,
    /// In a loop that reads the same value again and again.
    Spin,
}

/// Lanes that execute together.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) pc: u32,
    pub(crate) frame: u32,
    pub(crate) depth: u32,
    pub(crate) mask: u32,
    pub(crate) state: State,
    /// A wait that is to fail once, since nothing else can happen.
    pub(crate) give_up: bool,
    /// The phase of an mbarrier (block, offset, phases completed) for which a wait has failed already.
    pub(crate) tried: Option<(usize, u32, u64)>,
    /// On the way back to a wait that has failed: how often that happens depends on the schedule, so it does not count.
    pub(crate) quiet: bool,
}

impl Group {
    /// Lanes that can go on at `pc`.
    pub(crate) fn new(pc: u32, frame: u32, depth: u32, mask: u32) -> Group {
        Group { pc, frame, depth, mask, state: State::Ready, give_up: false, tried: None, quiet: false }
    }
}

/// An activation of a function by some lanes of a warp.
#[derive(Debug, Default)]
pub(crate) struct Frame {
    pub(crate) func: usize,
    pub(crate) regs: Vec<V>,
    pub(crate) parent: u32,
    /// The call that made it; execution goes on behind it.
    pub(crate) call_pc: u32,
    pub(crate) local_base: u64,
    /// Parameters, lane after lane.
    pub(crate) area: Vec<u8>,
    pub(crate) lanes: u32,
}

/// The groups that the `cp.async` of one thread form.
#[derive(Debug, Default)]
pub(crate) struct CopyGroups {
    pub(crate) committed: u32,
    /// Groups that it has waited for.
    pub(crate) completed: u32,
    /// Time of the last copy of each group from then on.
    pub(crate) times: VecDeque<u32>,
    /// Time of the thread's copies; it goes on at each commit and at each arrival that follows copies.
    pub(crate) time: u32,
}

impl CopyGroups {
    /// The copies up to now are a group.
    pub(crate) fn commit(&mut self) {
        self.time += 1;
        self.times.push_back(self.time);
        self.committed += 1;
    }

    /// Waits for the first so many groups; gives the time of the last of them, unless an earlier wait did.
    pub(crate) fn complete(&mut self, groups: u32) -> Option<u32> {
        let new = groups.checked_sub(self.completed).filter(|n| *n > 0)?;
        self.completed = groups;
        self.times.drain(..new as usize).next_back()
    }

    /// Waits for all copies, which is no group of its own; gives their time.
    pub(crate) fn complete_all(&mut self) -> u32 {
        self.time += 1;
        self.completed = self.committed;
        self.times.clear();
        self.time
    }
}

/// A `cp.async` of lanes that are at the same group, as far as it has not landed.
#[derive(Clone, Debug)]
pub(crate) struct CpAsync {
    pub(crate) lanes: u32,
    pub(crate) group: u32,
    pub(crate) size: u32,
    pub(crate) dst: [u64; 32],
    pub(crate) src: [u64; 32],
    pub(crate) valid: [u32; 32],
}

/// Matrix operations of a warp that have not run.
#[derive(Debug, Default)]
pub(crate) struct WgmmaQueue {
    pub(crate) queue: VecDeque<PendingWgmma>,
    pub(crate) committed: u32,
    pub(crate) completed: u32,
    /// A `wgmma.fence` stands between the registers' last other use and the next operation.
    pub(crate) fenced: bool,
    /// Last group that writes (or, for A, reads) a register, by frame and register.
    pub(crate) acc: InFlight,
    pub(crate) a_regs: InFlight,
}

/// For the registers of each frame, one more than the last group of matrix operations that uses them and has not been
/// awaited; zero for the others.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    groups: Vec<Vec<u32>>,
    /// Frame and register of those that are not zero.
    used: Vec<(u32, u32)>,
}

impl InFlight {
    pub(crate) fn is_empty(&self) -> bool {
        self.used.is_empty()
    }

    pub(crate) fn insert(&mut self, frame: u32, registers: &[u32], group: u32) {
        let Some(last) = registers.iter().max() else { return };
        if self.groups.len() <= frame as usize {
            self.groups.resize(frame as usize + 1, Vec::new());
        }
        let groups = &mut self.groups[frame as usize];
        if groups.len() <= *last as usize {
            groups.resize(*last as usize + 1, 0);
        }
        for r in registers {
            if std::mem::replace(&mut groups[*r as usize], group + 1) == 0 {
                self.used.push((frame, *r));
            }
        }
    }

    pub(crate) fn contains(&self, frame: u32, register: u32) -> bool {
        let groups = self.groups.get(frame as usize);
        groups.is_some_and(|groups| groups.get(register as usize).is_some_and(|g| *g != 0))
    }

    /// The first so many groups have been awaited.
    pub(crate) fn complete(&mut self, awaited: u32) {
        self.used.retain(|(frame, register)| {
            let group = &mut self.groups[*frame as usize][*register as usize];
            *group = if *group > awaited { *group } else { 0 };
            *group != 0
        });
    }
}

/// A `wgmma` as issued.
#[derive(Clone, Debug)]
pub(crate) struct PendingWgmma {
    pub(crate) group: u32,
    pub(crate) frame: u32,
    /// The instruction.
    pub(crate) pc: u32,
    pub(crate) a_desc: u64,
    pub(crate) b_desc: u64,
    pub(crate) scale_d: bool,
}

/// A warp.
#[derive(Debug, Default)]
pub(crate) struct Warp {
    pub(crate) groups: Vec<Group>,
    /// Lanes that exist, and those that have not exited.
    pub(crate) lanes: u32,
    pub(crate) live: u32,
    pub(crate) views: Views,
    pub(crate) frames: Vec<Frame>,
    pub(crate) free_frames: Vec<u32>,
    /// Local memory, lane after lane, and its size for one lane.
    pub(crate) local: Vec<u8>,
    pub(crate) local_size: u64,
    pub(crate) copies: Vec<CopyGroups>,
    pub(crate) in_flight: VecDeque<CpAsync>,
    pub(crate) wgmma: WgmmaQueue,
    /// Each `setmaxnreg` that it has executed.
    pub(crate) resized: Vec<u32>,
    /// Bulk groups committed by each lane, and the groups it has waited for.
    pub(crate) bulk: BTreeMap<u32, BulkGroups>,
    /// For the detection of spinning: last strong read and how often it gave the same.
    pub(crate) spin: (u32, u64, u32),
    /// Cluster barrier: lanes that have arrived and not waited.
    pub(crate) cluster_arrived: u32,
    pub(crate) cluster_generation: u64,
}

/// Bulk groups of one thread.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BulkGroups {
    pub(crate) committed: u32,
}

/// A named barrier of a block.
#[derive(Debug, Default)]
pub(crate) struct Bar {
    pub(crate) generation: u64,
    /// Lanes that have arrived, by warp.
    pub(crate) arrived: BTreeMap<usize, u32>,
    pub(crate) expected: Option<u32>,
    pub(crate) sync: Sync,
    pub(crate) popc: u32,
    pub(crate) all: bool,
    pub(crate) any: bool,
    pub(crate) done: VecDeque<BarDone>,
    pub(crate) line: u32,
}

/// What a completed generation of a barrier leaves to its waiters.
#[derive(Clone, Debug)]
pub(crate) struct BarDone {
    pub(crate) generation: u64,
    pub(crate) v: Rc<Clock>,
    pub(crate) p: Rc<Clock>,
    pub(crate) popc: u32,
    pub(crate) all: bool,
    pub(crate) any: bool,
}

/// An mbarrier object.
#[derive(Debug)]
pub(crate) struct Mbarrier {
    pub(crate) count: u32,
    pub(crate) pending: i64,
    pub(crate) tx: i64,
    pub(crate) phase: u64,
    /// Arrivals of the current phase.
    pub(crate) sync: Sync,
    /// What completed phases have made known.
    pub(crate) done: (Rc<Clock>, Rc<Clock>),
    /// Component of its copies, and the time of the current phase in it.
    pub(crate) agent: u32,
    pub(crate) time: u32,
}

/// A block.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) ctaid: [u32; 3],
    pub(crate) smem: Plain,
    pub(crate) shadow: Shadow,
    pub(crate) guests: Guests,
    pub(crate) warps: Vec<Warp>,
    pub(crate) bars: Vec<Bar>,
    pub(crate) mbars: BTreeMap<u32, Mbarrier>,
    /// Release clocks of shared locations.
    pub(crate) sync: BTreeMap<u64, Rc<Snapshot>>,
    pub(crate) exited: bool,
    /// A thread has waited for the launches before.
    pub(crate) awaited: bool,
}

/// A copy in flight.
#[derive(Clone, Debug)]
pub(crate) struct Flight {
    pub(crate) block: usize,
    pub(crate) warp: usize,
    pub(crate) lane: usize,
    pub(crate) pc: u32,
    pub(crate) what: FlightKind,
}

/// What a copy in flight will do.
#[derive(Clone, Debug)]
pub(crate) enum FlightKind {
    /// Global to shared memory of the blocks of `targets` (block, offset); each has its mbarrier at `mbar`.
    Load { source: Source, targets: Vec<(usize, u32)>, mbar: Vec<(usize, u32)>, bytes: u32 },
    /// Shared to shared memory of the cluster.
    Exchange { from: (usize, u32), to: (usize, u32), mbar: (usize, u32), bytes: u32 },
    /// Shared to global memory, in a bulk group of the thread. `data` is there once the source has been read.
    Store { from: (usize, u32), dest: Source, bytes: u32, group: u32, reduce: Option<(Rmw, Ty)>, data: Option<Vec<u8>> },
    /// `st.async` and `red.async`.
    Remote { to: (usize, u32), values: Vec<u64>, ty: Ty, op: Rmw, mbar: (usize, u32) },
}

impl FlightKind {
    /// Block, offset and bytes of what it writes to shared memory and an mbarrier (block, offset) counts.
    pub(crate) fn counted_by(&self, key: (usize, u32)) -> Vec<(usize, u32, u32)> {
        match self {
            FlightKind::Load { targets, mbar, bytes, .. } => {
                let counted = targets.iter().zip(mbar).filter(|(_, m)| **m == key);
                counted.map(|((block, offset), _)| (*block, *offset, *bytes)).collect()
            }
            FlightKind::Exchange { to, mbar, bytes, .. } if *mbar == key => vec![(to.0, to.1, *bytes)],
            FlightKind::Remote { to, values, ty, mbar, .. } if *mbar == key => {
                vec![(to.0, to.1, values.len() as u32 * ty.bytes())]
            }
            FlightKind::Exchange { .. } | FlightKind::Remote { .. } | FlightKind::Store { .. } => Vec::new(),
        }
    }
}

/// The global side of a copy.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Linear(u64),
    Tensor(Box<TensorMapDesc>, Vec<i64>),
}
