//! Happens-before race detection on one piece of memory.
//!
//! A cell holds the last write of a place and the reads since (FastTrack, Flanagan and Freund 2009, with the lanes of a
//! warp that read at one time as one reader). Every line of sixteen bytes has one, as long as it is touched as a whole;
//! a line that is touched in parts gets a cell for each word, and a word one for each byte. A write of the whole joins
//! the parts again. Asynchronous operations are components of the clock like threads are; touching what one of them has
//! written, or is still reading, without knowing of its completion is a missing wait rather than a race.

mod cell;
#[cfg(test)]
mod tests;

use crate::clock::Epoch;
use crate::memory::{READ, WRITTEN};
use crate::order::{Access, Conflict, Knows, Same};
pub(crate) use cell::Note;
use cell::{Cell, Lists, More, Pool, copy, judge, quick};

/// The parts of a line or of a word.
type Parts = [Cell; 4];

/// The cells of a piece of memory.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    lines: Vec<Cell>,
    parts: Pool<Parts>,
    lists: Lists,
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
        self.lines.clear();
        self.lines.resize(bytes.div_ceil(LINE as usize), Cell::default());
        (self.parts, self.lists) = (Pool::default(), Pool::default());
    }

    /// Registers an access to a whole line where nothing is wrong with it and one cell tells so, as with most accesses;
    /// says whether it did.
    #[inline(always)]
    pub(crate) fn quick_line(&mut self, line: usize, note: Note, a: &mut impl Knows, pc: u32) -> bool {
        quick(&mut self.lists, &mut self.lines[line], note, a, pc)
    }

    /// As [`Self::quick_line`], for a word.
    #[inline(always)]
    pub(crate) fn quick_word(&mut self, word: usize, note: Note, a: &mut impl Knows, pc: u32) -> bool {
        let Some(parts) = self.lines[word / 4].more.parts() else { return false };
        quick(&mut self.lists, &mut self.parts.all[parts][word % 4], note, a, pc)
    }

    /// Whether a reader has read the line at this time already, so that nothing new can be found.
    pub(crate) fn has_read_line(&self, line: usize, e: Epoch, lanes: u32) -> bool {
        let c = &self.lines[line];
        match c.more {
            More::NONE => c.r == e && c.lanes & lanes != 0,
            More::CROWD => c.w.is_none(),
            more => more.list().is_some_and(|i| self.lists.all[i].iter().any(|r| r.e == e && r.lanes & lanes != 0)),
        }
    }

    /// Calls `f` for each cell that means something, with the index of its word and whether it stands for a whole line.
    fn cells(&self, mut f: impl FnMut(usize, bool, &Cell)) {
        for (line, c) in self.lines.iter().enumerate() {
            let Some(words) = c.more.parts() else {
                f(line * 4, true, c);
                continue;
            };
            for (w, c) in self.parts.all[words].iter().enumerate() {
                match c.more.parts() {
                    None => f(line * 4 + w, false, c),
                    Some(bytes) => self.parts.all[bytes].iter().for_each(|c| f(line * 4 + w, false, c)),
                }
            }
        }
    }

    /// Every access that is remembered: who made it, the lanes of a reader, and the instruction.
    pub(crate) fn accesses(&self, mut tell: impl FnMut(Epoch, u32, u32)) {
        self.cells(|_, _, c| {
            if !c.w.is_none() {
                tell(c.w, 1, c.wpc);
            }
            if let Some(list) = c.more.list() {
                self.lists.all[list].iter().for_each(|r| tell(r.e, r.lanes, r.pc));
            } else if c.more == More::NONE && c.lanes != 0 {
                tell(c.r, c.lanes, c.rpc);
            }
        });
    }

    /// Which words have been read and written, as [`READ`] and [`WRITTEN`]: runs of words that were touched.
    pub(crate) fn marks(&self, mut tell: impl FnMut(usize, usize, u8)) {
        self.cells(|word, whole, c| {
            let read = if c.lanes != 0 || c.more != More::NONE { READ } else { 0 };
            let mark = read | if c.w.is_none() { 0 } else { WRITTEN };
            if mark != 0 {
                tell(word, if whole { 4 } else { 1 }, mark);
            }
        });
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
            let Some(words) = self.lines[line].more.parts() else { continue };
            for word in 0..4 {
                let c = &mut self.parts.all[words][word];
                late(c);
                if let Some(bytes) = c.more.parts() {
                    self.parts.all[bytes].iter_mut().for_each(late);
                }
            }
        }
    }

    /// The last write to a word, which is none where there was none, and its instruction.
    pub(crate) fn last_write(&self, word: usize) -> (Epoch, u32) {
        let mut c = &self.lines[word / 4];
        if let Some(words) = c.more.parts() {
            c = &self.parts.all[words][word % 4];
        }
        if let Some(bytes) = c.more.parts() {
            c = &self.parts.all[bytes][0];
        }
        (c.w, c.wpc)
    }

    /// The instruction of the last write to a word, when an asynchronous copy made it.
    pub(crate) fn copied_by(&self, word: usize) -> Option<u32> {
        let (e, pc) = self.last_write(word);
        (!e.is_none() && e.touch().is_async()).then_some(pc)
    }

    /// Registers an access to a whole line and tells what is wrong with it.
    pub(crate) fn touch_line(&mut self, line: usize, write: bool, same: Same<'_>, a: &Access<'_>) -> Option<Conflict> {
        let Some(words) = self.lines[line].more.parts() else {
            return judge(&mut self.lists, &mut self.lines[line], write, same, a);
        };
        let mut found = None;
        for w in 0..4 {
            found = self.touch_word(words, w, 0xf, write, same, a).or(found);
        }
        if write {
            // All words have been written together: they are one again.
            self.lines[line] = self.parts.all[words][0];
            self.parts.give_back(words);
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
        let line = word / 4;
        let words = match self.lines[line].more.parts() {
            Some(words) => words,
            None => {
                let words = self.divide(self.lines[line]);
                self.lines[line].more = More::of_parts(words);
                words
            }
        };
        self.touch_word(words, word % 4, mask, write, same, a)
    }

    fn touch_word(
        &mut self,
        words: usize,
        w: usize,
        mask: u8,
        write: bool,
        same: Same<'_>,
        a: &Access<'_>,
    ) -> Option<Conflict> {
        let c = self.parts.all[words][w];
        let bytes = match c.more.parts() {
            Some(bytes) => bytes,
            None if mask == 0xf => return judge(&mut self.lists, &mut self.parts.all[words][w], write, same, a),
            None => {
                let bytes = self.divide(c);
                self.parts.all[words][w].more = More::of_parts(bytes);
                bytes
            }
        };
        let mut found = None;
        for b in (0..4).filter(|b| mask >> b & 1 == 1) {
            found = judge(&mut self.lists, &mut self.parts.all[bytes][b], write, same, a).or(found);
        }
        if write && mask == 0xf {
            self.parts.all[words][w] = self.parts.all[bytes][0];
            self.parts.give_back(bytes);
        }
        found
    }

    /// Parts that know what a cell knows, which itself goes on as the first of them.
    fn divide(&mut self, c: Cell) -> usize {
        let copies = [c, copy(&mut self.lists, c), copy(&mut self.lists, c), copy(&mut self.lists, c)];
        let (i, place) = self.parts.take();
        *place = copies;
        i
    }
}
