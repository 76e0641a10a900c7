//! What the threads of a warp know together.
//!
//! After a barrier all threads of a warp know the same, and most of what they touch was touched by the threads of one
//! warp. So the clock is asked once which of those threads it knows of, and the answer serves all lanes until one of
//! them learns more.

use crate::clock::{Clock, Epoch, View};
use crate::order::Knows;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

/// What each thread of a warp knows, and what they know together as long as no view changes.
#[derive(Debug, Default)]
pub(crate) struct Views {
    all: Vec<View>,
    common: Option<Common>,
}

impl Deref for Views {
    type Target = [View];

    fn deref(&self) -> &[View] {
        &self.all
    }
}

impl DerefMut for Views {
    fn deref_mut(&mut self) -> &mut [View] {
        self.common = None;
        &mut self.all
    }
}

impl FromIterator<View> for Views {
    fn from_iter<I: IntoIterator<Item = View>>(views: I) -> Views {
        Views { all: views.into_iter().collect(), common: None }
    }
}

impl Views {
    /// The views, and what those alike know together: most of these lanes, which are not none. The warp starts at
    /// component `base` of its cluster.
    pub(crate) fn together(&mut self, lanes: u32, cluster: u32, base: u32) -> (&[View], &mut Common) {
        let all = &self.all;
        let common = match self.common.take() {
            Some(c) if c.lanes & lanes != 0 => c,
            _ => {
                let like = |one: &View| {
                    all.iter().enumerate().filter(|(_, v)| v.alike(one)).fold(0u32, |x, (l, _)| x | 1 << l)
                };
                // A single lane that has learned something is mostly the first one.
                let ends = [31 - lanes.leading_zeros(), lanes.trailing_zeros()];
                let [last, first] = ends.map(|l| &all[l as usize]);
                let (of_last, of_first) = (like(last), like(first));
                let most = (of_last & lanes).count_ones() > (of_first & lanes).count_ones();
                let (one, lanes) = if most { (last, of_last) } else { (first, of_first) };
                Common {
                    lanes,
                    clock: Rc::clone(&one.v),
                    cluster: cluster & 0x3f_ffff,
                    base,
                    known: [(Epoch::default(), 0); 8],
                }
            }
        };
        (all, self.common.insert(common))
    }
}

/// What lanes that know the same know, and are at the same time.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) lanes: u32,
    clock: Rc<Clock>,
    cluster: u32,
    base: u32,
    /// For the last warp of each of eight groups of them, which of its threads the clock knows of.
    known: [(Epoch, u32); 8],
}

impl Common {
    /// Which of the 32 components from that of `first` on are known to have come to its time.
    #[inline(always)]
    fn known(&mut self, first: Epoch) -> u32 {
        let memo = &mut self.known[first.component() as usize / 32 % 8];
        if memo.0 != first {
            let times = self.clock.dense.iter().skip(first.component() as usize).take(32);
            *memo = (first, times.enumerate().fold(0, |x, (l, t)| x | u32::from(*t >= first.time()) << l));
        }
        memo.1
    }

    /// One of these lanes on its own, for ordinary accesses and `cp.async`.
    pub(crate) fn lane(&mut self, lane: usize) -> Lane<'_> {
        Lane { common: self, lane: lane as u32 }
    }
}

/// A lane of those that know the same.
pub(crate) struct Lane<'a> {
    common: &'a mut Common,
    lane: u32,
}

impl Lane<'_> {
    /// Lanes that the thread knows of: those of the clock, and itself.
    #[inline(always)]
    fn known(&mut self, first: Epoch) -> u32 {
        let own = u32::from(first.component() == self.common.base) << self.lane;
        self.common.known(first) | own
    }
}

impl Knows for Lane<'_> {
    #[inline(always)]
    fn knows_write(&mut self, last: Epoch) -> bool {
        let (first, lane) = last.of_warp();
        last.cluster() == self.common.cluster && self.known(first) >> lane & 1 == 1
    }

    #[inline(always)]
    fn knows_readers(&mut self, e: Epoch, lanes: u32) -> bool {
        // Readers count from the first thread of their warp, or are one agent.
        let (first, lane) = e.of_warp();
        e.cluster() == self.common.cluster && lanes << lane & !self.known(first) == 0
    }
}
