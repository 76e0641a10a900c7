//! What is remembered of the accesses to one place, and the judgement of a new one.

use crate::clock::Epoch;
use crate::order::{Access, Conflict, Knows, Same};

/// The accesses to a line, a word or a byte.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cell {
    pub(super) w: Epoch,
    pub(super) r: Epoch,
    /// Lanes of the warp `r` that have read.
    pub(super) lanes: u32,
    pub(super) wpc: u32,
    pub(super) rpc: u32,
    pub(super) more: More,
}

/// What does not fit a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct More(u32);

impl More {
    /// At most one reader.
    pub(super) const NONE: More = More(0);
    /// Clusters that nothing orders have read, `r` first. Whoever writes after them is in conflict, so further readers
    /// need no mention.
    pub(super) const CROWD: More = More(1);
    const LISTS: u32 = 2;
    const PARTS: u32 = 1 << 31;

    /// The readers are this list.
    fn of_list(index: usize) -> More {
        More(More::LISTS + index as u32)
    }

    /// The place is tracked in these parts, and its own cell means nothing.
    pub(super) fn of_parts(index: usize) -> More {
        More(More::PARTS | index as u32)
    }

    pub(super) fn list(self) -> Option<usize> {
        (More::LISTS..More::PARTS).contains(&self.0).then(|| (self.0 - More::LISTS) as usize)
    }

    #[inline(always)]
    pub(super) fn parts(self) -> Option<usize> {
        (self.0 >= More::PARTS).then_some((self.0 & !More::PARTS) as usize)
    }
}

/// How many of the last readers of a place a new one is compared with. Those of other clusters stand before them, mostly
/// for good.
const RECENT: usize = 16;

#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    pub(super) e: Epoch,
    pub(super) lanes: u32,
    pub(super) pc: u32,
}

/// Things of one kind that are used again.
#[derive(Debug)]
pub(super) struct Pool<T> {
    pub(super) all: Vec<T>,
    free: Vec<usize>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { all: Vec::new(), free: Vec::new() }
    }
}

impl<T: Default> Pool<T> {
    /// A value that nobody uses, as its last user left it, and its index.
    pub(super) fn take(&mut self) -> (usize, &mut T) {
        let i = self.free.pop().unwrap_or_else(|| {
            self.all.push(T::default());
            self.all.len() - 1
        });
        (i, &mut self.all[i])
    }

    pub(super) fn give_back(&mut self, i: usize) {
        self.free.push(i);
    }
}

/// Readers of places that have several.
pub(super) type Lists = Pool<Vec<Reader>>;

/// What an access leaves in a cell: that these lanes have read, or who has written.
#[derive(Clone, Copy)]
pub(crate) enum Note {
    Read(Epoch, u32),
    Write(Epoch),
}

/// A copy of a cell with readers of its own.
pub(super) fn copy(lists: &mut Lists, c: Cell) -> Cell {
    let Some(list) = c.more.list() else { return c };
    let readers = std::mem::take(&mut lists.all[list]);
    let (i, place) = lists.take();
    place.clone_from(&readers);
    lists.all[list] = readers;
    Cell { more: More::of_list(i), ..c }
}

/// What [`judge`] does, where it finds nothing and makes no list: the last write is known, and so are the readers, or
/// they are there already.
#[inline(always)]
pub(super) fn quick(lists: &mut Lists, c: &mut Cell, note: Note, a: &mut impl Knows, pc: u32) -> bool {
    let known = c.w.is_none() || a.knows_write(c.w);
    match note {
        Note::Write(e) => {
            let free = known && c.more == More::NONE && (c.lanes == 0 || a.knows_readers(c.r, c.lanes));
            if free {
                *c = Cell { w: e, wpc: pc, ..Cell::default() };
            }
            free
        }
        Note::Read(e, lanes) => {
            if c.more == More::NONE {
                if c.lanes != 0 && c.r == e {
                    return add_lanes(&mut c.lanes, lanes, known);
                }
                let free = known && (c.lanes == 0 || a.knows_readers(c.r, c.lanes));
                if free {
                    (c.r, c.lanes, c.rpc) = (e, lanes, pc);
                }
                return free;
            }
            if c.more == More::CROWD {
                return known;
            }
            let Some(list) = c.more.list() else { return false };
            let last = lists.all[list].iter_mut().rev().take(RECENT);
            last.filter(|r| r.e == e).any(|r| add_lanes(&mut r.lanes, lanes, known))
        }
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

/// Registers an access to the place of a cell without parts, and tells what is wrong with it.
pub(super) fn judge(lists: &mut Lists, c: &mut Cell, write: bool, same: Same<'_>, a: &Access<'_>) -> Option<Conflict> {
    let mut found = a.after_write(c.w, c.wpc, same);
    if !write {
        add_reader(lists, c, a);
        return found;
    }
    if let Some(i) = c.more.list() {
        let list = &mut lists.all[i];
        found = found.or_else(|| list.iter().find_map(|r| a.after_read(r.e, r.lanes, r.pc)));
        list.clear();
        lists.give_back(i);
    } else if c.lanes != 0 {
        let with = c.rpc;
        found = found.or_else(|| match c.more {
            More::CROWD if c.r.touch().is_async() => Some(a.missing_wait(c.r, with)),
            More::CROWD => Some(Conflict::Race { with }),
            _ => a.after_read(c.r, c.lanes, with),
        });
    }
    *c = Cell { w: a.epoch(), wpc: a.pc, ..Cell::default() };
    found
}

fn add_reader(lists: &mut Lists, c: &mut Cell, a: &Access<'_>) {
    let (e, lanes) = a.reader();
    if c.more == More::CROWD {
        return;
    }
    if a.independent && (c.more != More::NONE || c.lanes != 0) {
        let r = match c.more.list() {
            None => Reader { e: c.r, lanes: c.lanes, pc: c.rpc },
            Some(list) => lists.all[list][0],
        };
        if r.e.cluster() != e.cluster() && !r.e.touch().is_strong() && !a.touch.is_strong() {
            if let Some(list) = c.more.list() {
                lists.give_back(list);
            }
            (c.more, c.r, c.lanes, c.rpc) = (More::CROWD, r.e, r.lanes, r.pc);
            return;
        }
    }
    let index = match c.more.list() {
        Some(list) => list,
        None => {
            if c.lanes == 0 || (c.r != e && a.all_ordered(c.r, c.lanes)) {
                (c.r, c.lanes, c.rpc) = (e, lanes, a.pc);
                return;
            }
            if c.r == e {
                c.lanes |= lanes;
                return;
            }
            let (i, list) = lists.take();
            list.clear();
            list.push(Reader { e: c.r, lanes: c.lanes, pc: c.rpc });
            (c.more, c.lanes) = (More::of_list(i), 0);
            i
        }
    };
    let list = &mut lists.all[index];
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
        lists.give_back(index);
        (c.more, c.r, c.lanes, c.rpc) = (More::NONE, e, lanes, a.pc);
    } else {
        list.push(Reader { e, lanes, pc: a.pc });
    }
}
