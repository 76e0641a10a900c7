//! Happens-before race detection on one piece of memory.
//!
//! A cell holds the last write of a place and the reads since (FastTrack, Flanagan and Freund 2009, with the lanes of a
//! warp that read at one time as one reader). Every line of sixteen bytes has one, as long as it is touched as a whole;
//! a line that is touched in parts gets a cell for each word, and a word one for each byte. A write of the whole joins
//! the parts again. Asynchronous operations are components of the clock like threads are; touching what one of them has
//! written, or is still reading, without knowing of its completion is a missing wait rather than a race.

use crate::clock::Epoch;
use crate::memory::{READ, WRITTEN};
use crate::order::{Access, Conflict, Same};

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    w: Epoch,
    r: Epoch,
    /// Lanes of the warp `r` that have read; zero with a reader present means `r` is in `lists[list - 1]`.
    lanes: u32,
    wpc: u32,
    rpc: u32,
    list: u32,
}

/// In the place of a list: clusters that nothing orders have read, `r` first. Whoever writes after them is in conflict,
/// so further readers need no mention.
const CROWD: u32 = u32::MAX;

/// How many of the last readers of a place a new one is compared with. Those of other clusters stand before them, mostly
/// for good.
const RECENT: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Reader {
    e: Epoch,
    lanes: u32,
    pc: u32,
}

/// The parts of a line or of a word: four cells, and for those that have parts themselves the index of these plus one.
#[derive(Clone, Copy, Debug, Default)]
struct Parts {
    cells: [Cell; 4],
    split: [u32; 4],
}

/// Things of one kind that are used again.
#[derive(Debug)]
struct Pool<T> {
    all: Vec<T>,
    free: Vec<u32>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { all: Vec::new(), free: Vec::new() }
    }
}

impl<T: Default> Pool<T> {
    /// A value that nobody uses, as its last user left it, and its index plus one.
    fn take(&mut self) -> (u32, &mut T) {
        let i = self.free.pop().unwrap_or_else(|| {
            self.all.push(T::default());
            self.all.len() as u32
        });
        (i, &mut self.all[i as usize - 1])
    }
}

/// The cells of a piece of memory.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    lines: Vec<Cell>,
    /// Index into `parts` plus one for lines whose words are tracked singly.
    split: Vec<u32>,
    parts: Pool<Parts>,
    lists: Pool<Vec<Reader>>,
}

/// What an access leaves in a cell: that these lanes have read, or who has written.
#[derive(Clone, Copy)]
pub(crate) enum Note {
    Read(Epoch, u32),
    Write(Epoch),
}

/// Bytes of a line.
pub(crate) const LINE: u64 = 16;

impl Shadow {
    /// Cells for `bytes` bytes.
    pub(crate) fn new(bytes: usize) -> Shadow {
        let mut new = Shadow::default();
        new.clear(bytes);
        new
    }

    /// As new, in the memory that it has.
    pub(crate) fn clear(&mut self, bytes: usize) {
        let lines = bytes.div_ceil(LINE as usize);
        self.lines.clear();
        self.lines.resize(lines, Cell::default());
        self.split.clear();
        self.split.resize(lines, 0);
        (self.parts, self.lists) = (Pool::default(), Pool::default());
    }

    /// Registers an access to a whole line where nothing is wrong with it and one cell tells so, as with most accesses;
    /// says whether it did.
    #[inline(always)]
    pub(crate) fn quick_line(&mut self, line: usize, note: Note, a: &Access<'_>) -> bool {
        self.split[line] == 0 && quick(&mut self.lists, &mut self.lines[line], note, a)
    }

    /// As [`Self::quick_line`], for a word.
    #[inline(always)]
    pub(crate) fn quick_word(&mut self, word: usize, note: Note, a: &Access<'_>) -> bool {
        let Some(parts) = self.split[word / 4].checked_sub(1) else { return false };
        let p = &mut self.parts.all[parts as usize];
        p.split[word % 4] == 0 && quick(&mut self.lists, &mut p.cells[word % 4], note, a)
    }

    /// Whether a reader has read the line at this time already, so that nothing new can be found.
    pub(crate) fn has_read_line(&self, line: usize, e: Epoch, lanes: u32) -> bool {
        if self.split[line] != 0 {
            return false;
        }
        let c = &self.lines[line];
        match c.list {
            0 => c.r == e && c.lanes & lanes != 0,
            CROWD => c.w.is_none(),
            list => self.lists.all[list as usize - 1].iter().any(|r| r.e == e && r.lanes & lanes != 0),
        }
    }

    /// Every access that is remembered: who made it, the lanes of a reader, and the instruction.
    pub(crate) fn accesses(&self, mut tell: impl FnMut(Epoch, u32, u32)) {
        let mut cell = |c: &Cell| {
            if !c.w.is_none() {
                tell(c.w, 1, c.wpc);
            }
            match c.list {
                0 if c.lanes != 0 => tell(c.r, c.lanes, c.rpc),
                0 | CROWD => {}
                list => self.lists.all[list as usize - 1].iter().for_each(|r| tell(r.e, r.lanes, r.pc)),
            }
        };
        for (line, c) in self.lines.iter().enumerate() {
            let Some(parts) = self.split[line].checked_sub(1) else {
                cell(c);
                continue;
            };
            let p = &self.parts.all[parts as usize];
            for word in 0..4 {
                match p.split[word].checked_sub(1) {
                    None => cell(&p.cells[word]),
                    Some(bytes) => self.parts.all[bytes as usize].cells.iter().for_each(&mut cell),
                }
            }
        }
    }

    /// Which words have been read and written, as [`READ`] and [`WRITTEN`]: those of each line that was touched.
    pub(crate) fn marks(&self, mut tell: impl FnMut(usize, [u8; 4])) {
        let of = |c: &Cell| {
            let read = if c.lanes != 0 || c.list != 0 { READ } else { 0 };
            read | if c.w.is_none() { 0 } else { WRITTEN }
        };
        for (line, c) in self.lines.iter().enumerate() {
            let marks = match self.split[line].checked_sub(1).map(|p| &self.parts.all[p as usize]) {
                None => [of(c); 4],
                Some(p) => std::array::from_fn(|w| match p.split[w].checked_sub(1) {
                    None => of(&p.cells[w]),
                    Some(b) => self.parts.all[b as usize].cells.iter().map(of).fold(0, |x, y| x | y),
                }),
            };
            if marks != [0; 4] {
                tell(line * 4, marks);
            }
        }
    }

    /// Bytes written by an agent at `time` count as written at its next time: what completed was not their copy.
    pub(crate) fn postpone(&mut self, from: u64, bytes: u64, agent: u32, time: u32) {
        let late = |c: &mut Cell| {
            if c.w.touch().is_async() && (c.w.component(), c.w.time()) == (agent, time) {
                c.w = c.w.later();
            }
        };
        for line in (from / LINE) as usize..(from + bytes).div_ceil(LINE) as usize {
            late(&mut self.lines[line]);
            let Some(parts) = self.split[line].checked_sub(1) else { continue };
            for word in 0..4 {
                let part = &mut self.parts.all[parts as usize];
                late(&mut part.cells[word]);
                if let Some(bytes) = part.split[word].checked_sub(1) {
                    self.parts.all[bytes as usize].cells.iter_mut().for_each(late);
                }
            }
        }
    }

    /// The instruction of the last write to a word, when an asynchronous copy made it.
    pub(crate) fn copied_by(&self, word: usize) -> Option<u32> {
        let c = match self.split[word / 4] {
            0 => &self.lines[word / 4],
            parts => {
                let p = &self.parts.all[parts as usize - 1];
                match p.split[word % 4] {
                    0 => &p.cells[word % 4],
                    bytes => &self.parts.all[bytes as usize - 1].cells[0],
                }
            }
        };
        (!c.w.is_none() && c.w.touch().is_async()).then_some(c.wpc)
    }

    /// Registers an access to a whole line and tells what is wrong with it.
    pub(crate) fn touch_line(&mut self, line: usize, write: bool, same: Same<'_>, a: &Access<'_>) -> Option<Conflict> {
        let parts = self.split[line];
        if parts == 0 {
            return cell(&mut self.lists, &mut self.lines[line], write, same, a);
        }
        let mut found = None;
        for w in 0..4 {
            found = self.touch_word(parts as usize - 1, w, 0xf, write, same, a).or(found);
        }
        if write {
            // All words have been written together: they are one again.
            self.lines[line] = self.parts.all[parts as usize - 1].cells[0];
            self.split[line] = 0;
            self.parts.free.push(parts);
        }
        found
    }

    /// Registers an access to the bytes of `mask` (four bits) of a word and tells what is wrong with it.
    pub(crate) fn touch(
        &mut self,
        word: usize,
        mask: u8,
        write: bool,
        same: Same<'_>,
        a: &Access<'_>,
    ) -> Option<Conflict> {
        let parts = match self.split[word / 4] {
            0 => {
                let parts = self.divide(self.lines[word / 4]);
                self.split[word / 4] = parts;
                parts
            }
            parts => parts,
        };
        self.touch_word(parts as usize - 1, word % 4, mask, write, same, a)
    }

    fn touch_word(
        &mut self,
        parts: usize,
        w: usize,
        mask: u8,
        write: bool,
        same: Same<'_>,
        a: &Access<'_>,
    ) -> Option<Conflict> {
        let bytes = match self.parts.all[parts].split[w] {
            0 if mask == 0xf => return cell(&mut self.lists, &mut self.parts.all[parts].cells[w], write, same, a),
            0 => {
                let bytes = self.divide(self.parts.all[parts].cells[w]);
                self.parts.all[parts].split[w] = bytes;
                bytes
            }
            bytes => bytes,
        };
        let mut found = None;
        for b in (0..4).filter(|b| mask >> b & 1 == 1) {
            let c = &mut self.parts.all[bytes as usize - 1].cells[b];
            found = cell(&mut self.lists, c, write, same, a).or(found);
        }
        if write && mask == 0xf {
            self.parts.all[parts].cells[w] = self.parts.all[bytes as usize - 1].cells[0];
            self.parts.all[parts].split[w] = 0;
            self.parts.free.push(bytes);
        }
        found
    }

    /// Four cells with what one knew.
    fn divide(&mut self, c: Cell) -> u32 {
        let mut parts = Parts { cells: [c; 4], split: [0; 4] };
        if c.list != 0 && c.list != CROWD {
            let list = std::mem::take(&mut self.lists.all[c.list as usize - 1]);
            for part in &mut parts.cells[1..] {
                let copy = self.lists.take();
                copy.1.clone_from(&list);
                part.list = copy.0;
            }
            self.lists.all[c.list as usize - 1] = list;
        }
        let (i, place) = self.parts.take();
        *place = parts;
        i
    }
}

/// What [`cell`] does, where it finds nothing and makes no list: the last write is known, and so are the readers, or they
/// are there already.
#[inline(always)]
fn quick(lists: &mut Pool<Vec<Reader>>, c: &mut Cell, note: Note, a: &Access<'_>) -> bool {
    let known = c.w.is_none() || a.knows_write(c.w);
    match note {
        Note::Write(e) => {
            let free = known && c.list == 0 && (c.lanes == 0 || a.knows_readers(c.r, c.lanes));
            if free {
                *c = Cell { w: e, wpc: a.pc, ..Cell::default() };
            }
            free
        }
        Note::Read(e, lanes) => match c.list {
            0 if c.lanes != 0 && c.r == e => add_lanes(&mut c.lanes, lanes, known),
            0 if known && (c.lanes == 0 || a.knows_readers(c.r, c.lanes)) => {
                (c.r, c.lanes, c.rpc) = (e, lanes, a.pc);
                true
            }
            0 => false,
            CROWD => known,
            list => {
                let list = &mut lists.all[list as usize - 1];
                list.iter_mut().rev().take(RECENT).any(|r| r.e == e && add_lanes(&mut r.lanes, lanes, known))
            }
        },
    }
}

/// Adds lanes to a reader when what they read is known; nothing new can be found where they are there already.
#[inline(always)]
fn add_lanes(to: &mut u32, lanes: u32, known: bool) -> bool {
    let fine = known || *to & lanes == lanes;
    if fine {
        *to |= lanes;
    }
    fine
}

fn cell(lists: &mut Pool<Vec<Reader>>, c: &mut Cell, write: bool, same: Same<'_>, a: &Access<'_>) -> Option<Conflict> {
    let mut found = a.after_write(c.w, c.wpc, same);
    if !write {
        add_reader(lists, c, a);
        return found;
    }
    if c.list != 0 && c.list != CROWD {
        let list = &mut lists.all[c.list as usize - 1];
        found = found.or_else(|| list.iter().find_map(|r| a.after_read(r.e, r.lanes, r.pc)));
        list.clear();
        lists.free.push(c.list);
    } else if c.lanes != 0 {
        let with = c.rpc;
        found = found.or_else(|| match c.list {
            CROWD if c.r.touch().is_async() => Some(a.missing_wait(c.r, with)),
            CROWD => Some(Conflict::Race { with }),
            _ => a.after_read(c.r, c.lanes, with),
        });
    }
    *c = Cell { w: a.epoch(), wpc: a.pc, ..Cell::default() };
    found
}

fn add_reader(lists: &mut Pool<Vec<Reader>>, c: &mut Cell, a: &Access<'_>) {
    let (e, lanes) = a.reader();
    if c.list == CROWD {
        return;
    }
    if a.independent && (c.list != 0 || c.lanes != 0) {
        let r = match c.list {
            0 => Reader { e: c.r, lanes: c.lanes, pc: c.rpc },
            list => lists.all[list as usize - 1][0],
        };
        if r.e.cluster() != e.cluster() && !r.e.touch().is_strong() && !a.touch.is_strong() {
            if c.list != 0 {
                lists.free.push(c.list);
            }
            (c.list, c.r, c.lanes, c.rpc) = (CROWD, r.e, r.lanes, r.pc);
            return;
        }
    }
    if c.list == 0 {
        if c.lanes == 0 || (c.r != e && a.all_ordered(c.r, c.lanes)) {
            c.r = e;
            c.lanes = lanes;
            c.rpc = a.pc;
            return;
        }
        if c.r == e {
            c.lanes |= lanes;
            return;
        }
        let (i, list) = lists.take();
        list.clear();
        list.push(Reader { e: c.r, lanes: c.lanes, pc: c.rpc });
        c.list = i;
        c.lanes = 0;
    }
    let list = &mut lists.all[c.list as usize - 1];
    let mut at = list.len().saturating_sub(RECENT);
    if let Some(r) = list[at..].iter_mut().find(|r| r.e == e) {
        r.lanes |= lanes;
        return;
    }
    while let Some(r) = list.get(at) {
        if a.all_ordered(r.e, r.lanes) {
            list.remove(at);
        } else {
            at += 1;
        }
    }
    if list.is_empty() {
        // One reader is enough again.
        lists.free.push(c.list);
        (c.list, c.r, c.lanes, c.rpc) = (0, e, lanes, a.pc);
    } else {
        list.push(Reader { e, lanes, pc: a.pc });
    }
}

#[cfg(test)]
#[allow(clippy::needless_range_loop, reason = "the index is the thread")]
mod tests {
    use super::*;
    use crate::clock::{Clock, Memo, Scope, Sync, Touch, View};
    use std::rc::Rc;

    fn access(view: &View, me: u32, touch: Touch) -> Access<'_> {
        // Views change between accesses of a test: nothing may be remembered.
        let memo = Box::leak(Box::default());
        Access {
            memo,
            view,
            peers: None,
            cluster: 0,
            me,
            warp: me & !31,
            block_size: 64,
            independent: false,
            waited: &[],
            touch,
            agent: 140,
            agent_time: 1,
            pc: me,
        }
    }

    fn views() -> Vec<View> {
        let empty = Rc::new(Clock::default());
        (0..64).map(|_| View::new(&empty, 64)).collect()
    }

    fn barrier(views: &mut [View]) {
        let mut s = Sync::default();
        for (i, v) in views.iter_mut().enumerate() {
            v.release_into(i as u32, &mut s);
        }
        let (v, p) = s.share();
        let mut memo = Memo::default();
        for w in views {
            View::acquire(std::iter::once(w), &mut memo, &v, &p);
        }
    }

    #[test]
    fn unordered_read_after_write_races_and_a_barrier_orders_it() {
        let mut views = views();
        let mut s = Shadow::new(16);
        assert_eq!(s.touch(0, 15, true, &|| false, &access(&views[0], 0, Touch::Plain)), None);
        assert_eq!(
            s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)),
            Some(Conflict::Race { with: 0 })
        );
        barrier(&mut views);
        assert_eq!(s.touch(0, 15, false, &|| false, &access(&views[2], 2, Touch::Plain)), None);
    }

    #[test]
    fn write_after_reads_of_many_threads_races_with_the_unordered_one() {
        let mut views = views();
        let mut s = Shadow::new(16);
        for i in 0..64 {
            assert_eq!(s.touch(1, 15, false, &|| false, &access(&views[i], i as u32, Touch::Plain)), None);
        }
        assert!(s.touch(1, 15, true, &|| false, &access(&views[0], 0, Touch::Plain)).is_some());
        for i in 0..64 {
            s.touch(2, 15, false, &|| false, &access(&views[i], i as u32, Touch::Plain));
        }
        barrier(&mut views);
        assert_eq!(s.touch(2, 15, true, &|| false, &access(&views[0], 0, Touch::Plain)), None);
    }

    #[test]
    fn readers_of_two_clusters_stand_for_all() {
        let mut views = views();
        let mut s = Shadow::new(16);
        for cluster in [0, 1, 1, 2] {
            let a = Access { cluster, independent: true, ..access(&views[0], 0, Touch::Plain) };
            assert_eq!(s.touch_line(0, false, &|| false, &a), None);
        }
        assert_eq!((s.lines[0].list, s.lists.all.len()), (CROWD, 0));
        barrier(&mut views);
        for cluster in [0, 3] {
            let mut s = Shadow { lines: s.lines.clone(), split: vec![0], ..Shadow::default() };
            let a = Access { cluster, independent: true, ..access(&views[0], 0, Touch::Plain) };
            assert_eq!(s.touch(1, 15, true, &|| false, &a), Some(Conflict::Race { with: 0 }));
            assert_eq!(s.touch(1, 15, true, &|| false, &a), None);
        }
    }

    #[test]
    fn neighbouring_bytes_do_not_race() {
        let views = views();
        let mut s = Shadow::new(16);
        for i in 0..4 {
            assert_eq!(s.touch(0, 1 << i, true, &|| false, &access(&views[i], i as u32, Touch::Plain)), None);
        }
        assert!(s.touch(0, 1, true, &|| false, &access(&views[5], 5, Touch::Plain)).is_some());
    }

    #[test]
    fn lines_part_and_join_again() {
        let mut views = views();
        let mut s = Shadow::new(32);
        assert_eq!(s.touch_line(1, true, &|| false, &access(&views[0], 0, Touch::Plain)), None);
        // The line's write is each word's, and a word's reader is not the line's.
        assert!(s.touch(6, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)).is_some());
        barrier(&mut views);
        assert_eq!(s.touch(6, 1, true, &|| false, &access(&views[2], 2, Touch::Plain)), None);
        assert_eq!(s.touch(5, 15, true, &|| false, &access(&views[3], 3, Touch::Plain)), None);
        assert_eq!(s.touch(6, 2, true, &|| false, &access(&views[4], 4, Touch::Plain)), None);
        let all = s.touch_line(1, false, &|| false, &access(&views[3], 3, Touch::Plain));
        assert_eq!(all, Some(Conflict::Race { with: 4 }));
        barrier(&mut views);
        assert_eq!(s.touch_line(1, true, &|| false, &access(&views[5], 5, Touch::Plain)), None);
        assert_eq!(s.split, [0, 0]);
        assert_eq!(
            s.touch_line(1, false, &|| false, &access(&views[6], 6, Touch::Plain)),
            Some(Conflict::Race { with: 5 })
        );
    }

    #[test]
    fn atomics_do_not_race_inside_their_scope() {
        let views = views();
        let mut s = Shadow::new(16);
        let strong = Touch::Strong(Scope::Gpu);
        assert_eq!(s.touch(0, 15, true, &|| false, &access(&views[0], 0, strong)), None);
        assert_eq!(s.touch(0, 15, true, &|| false, &access(&views[1], 1, strong)), None);
        assert!(s.touch(0, 15, false, &|| false, &access(&views[2], 2, Touch::Plain)).is_some());
    }

    #[test]
    fn async_proxy_needs_a_fence_that_precedes_the_barrier_or_follows_it() {
        let mut views = views();
        let mut s = Shadow::new(16);
        let mut memo = Memo::default();
        s.touch(0, 15, true, &|| false, &access(&views[3], 3, Touch::Plain));
        s.touch(1, 15, true, &|| false, &access(&views[4], 4, Touch::Plain));
        views[4].proxy_fence(&mut memo);
        barrier(&mut views);
        assert_eq!(
            s.touch(0, 15, false, &|| false, &access(&views[0], 0, Touch::Bulk)),
            Some(Conflict::MissingFence { with: 3 })
        );
        assert_eq!(s.touch(1, 15, false, &|| false, &access(&views[0], 0, Touch::Bulk)), None);
        views[1].proxy_fence(&mut memo);
        assert_eq!(s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Bulk)), None);
    }

    #[test]
    fn data_of_a_copy_in_flight_is_a_missing_wait() {
        let mut views = views();
        let mut s = Shadow::new(16);
        s.touch(0, 15, true, &|| false, &access(&views[0], 0, Touch::Bulk));
        barrier(&mut views);
        assert_eq!(
            s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)),
            Some(Conflict::MissingWait { with: 0, waited: false })
        );
        let mut done = Clock::default();
        done.raise(140, 1);
        views[1].v = Memo::default().join(&views[1].v.clone(), &Rc::new(done));
        assert_eq!(s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)), None);
    }
}
