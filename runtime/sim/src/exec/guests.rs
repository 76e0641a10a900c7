//! What blocks do in the shared memory of another block of their cluster, which must not have ended by then.

use super::access::{Spot, Toucher};
use super::state::At;
use super::{Cluster, lanes};
use crate::clock::{Clock, Touch};
use crate::report::FindingKind;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Of an access to the memory of another block.
const OUTLIVED: &str = "access to shared memory of a block that may have ended: nothing orders it before that end";

/// Who accesses the memory of another block: component of the thread, that of the mbarrier which counts the access
/// (none: zero), and whether it is asynchronous.
type Who = (u32, u32, bool);

/// The last of the accesses that need not be ordered with each other. Of the others, the shadow keeps the last.
#[derive(Debug, Default)]
pub(crate) struct Guests(BTreeMap<Who, Visit>);

/// An access: time of its thread, phase of its mbarrier (none: zero), and instruction.
#[derive(Debug)]
struct Visit {
    time: u32,
    phase: u32,
    pc: u32,
}

impl Guests {
    /// What a copy of a thread was counted by goes on without it: the next phase tells of it.
    pub(super) fn postpone(&mut self, thread: u32, agent: (u32, u32)) {
        let visit = self.0.get_mut(&(thread, agent.0, true)).filter(|v| v.phase == agent.1);
        visit.into_iter().for_each(|v| v.phase += 1);
    }
}

impl Cluster<'_> {
    /// Notes an access at time `time` of a thread to `spot` in another block, `host`; says whether that is there still.
    pub(super) fn visit(&mut self, t: Toucher, time: u32, host: usize, spot: Spot) -> bool {
        if self.blocks[host].exited {
            let address = Some(self.address_of(spot));
            self.report(FindingKind::Race, t.pc, t.at, t.lane, address, OUTLIVED, None);
            return false;
        }
        if t.touch != Touch::Plain {
            let who = (self.component(t.at, t.lane), t.agent.0, t.touch.is_async());
            self.blocks[host].guests.0.insert(who, Visit { time, phase: t.agent.1, pc: t.pc });
        }
        true
    }

    /// A block has ended: reports what others of its cluster did in its memory without an order before that end.
    pub(super) fn outlived(&mut self, block: usize) {
        let mut known = Clock::default();
        let mut last: Option<&Rc<Clock>> = None;
        for view in self.blocks[block].warps.iter().flat_map(|w| w.views.iter()) {
            if !last.is_some_and(|l| Rc::ptr_eq(l, &view.v)) {
                known.join(&view.v);
                last = Some(&view.v);
            }
        }
        let size = self.env.block_size();
        let threads = size * self.blocks.len() as u32;
        let mut late = BTreeMap::new();
        self.blocks[block].shadow.accesses(|e, mask, pc| {
            let other = e.component() < threads && e.component() / size != block as u32;
            if e.touch() == Touch::Plain && other {
                for l in lanes(mask).filter(|l| known.get(e.component() + *l as u32) < e.time()) {
                    late.entry(pc).or_insert(e.component() + l as u32);
                }
            }
        });
        for ((thread, agent, is_async), v) in &self.blocks[block].guests.0 {
            // A completed phase tells of all that it counts; the thread tells of what it does not leave to others.
            let counted = v.phase > 0 && known.get(*agent) >= v.phase;
            if !counted && (*is_async || known.get(*thread) < v.time) {
                late.entry(v.pc).or_insert(*thread);
            }
        }
        for (pc, thread) in late {
            let at = At { block: (thread / size) as usize, warp: (thread % size / 32) as usize };
            self.report(FindingKind::Race, pc, at, (thread % 32) as usize, None, OUTLIVED, None);
        }
    }
}
