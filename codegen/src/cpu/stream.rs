//! The order in which weights are asked for while they are read from memory for the first time.
//!
//! A processor fetches ahead inside of pages, each on its own, and one page at a time does not keep memory busy: two
//! threads of an Intel server processor read 20 GB/s from one page each, 25 from four each and 28 from eight. The
//! weights of an item lie in the order of reading. So while a block of some pages is read, the next block is asked
//! for, a line of each of its pages in turn.

use super::{Kernel, tile::Level};
use crate::mlir::V;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes of a cache line.
const LINE: u64 = 64;
/// Most pages of a block.
const PAGES: u64 = 8;
/// Bytes of a panel that the matrix unit reads in a step.
const STEP: u64 = 1024;

/// How steps of a loop and pages of a block go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pages {
    /// Lines that are asked for at a time, each of another page.
    lines: u64,
    /// Steps that read them.
    steps: u64,
    /// Times until all pages of the block had their turn; a power of two.
    turn: u64,
}

/// What a loop reads: the weights of an item.
#[derive(Clone, Copy)]
pub(super) struct Stream<'c> {
    /// Where they start.
    pub(super) base: V<'c>,
    /// Steps of the item before the loop.
    pub(super) before: V<'c>,
    /// Steps of the item.
    pub(super) steps: V<'c>,
}

impl Pages {
    /// For steps of so many bytes; `None` where lines and steps do not go together.
    pub(super) fn new(step_bytes: u64) -> Option<Self> {
        let (lines, steps) = match step_bytes {
            0 => return None,
            bytes if bytes.is_multiple_of(LINE) => (bytes / LINE, 1),
            bytes if LINE.is_multiple_of(bytes) => (1, LINE / bytes),
            _ => return None,
        };
        let turn = (PAGES / lines).max(1);
        Some(Self { lines, steps, turn: 1 << turn.ilog2() })
    }

    /// Times of asking for a block.
    const fn times(self) -> u64 {
        self.turn * (PAGE / LINE)
    }

    const fn block_bytes(self) -> u64 {
        self.lines * self.turn * PAGE
    }
}

impl<'c> Kernel<'_, 'c> {
    /// Asks for the lines of the next block that belong to step `step` of the loop.
    pub(super) fn fetch_ahead(&self, pages: Pages, stream: Stream<'c>, step: V<'c>) {
        let b = self.b;
        let bits = |value: u64| self.c(u64::from(value.ilog2()));
        let block_of = |time: V<'c>| b.shrui(time, bits(pages.times()));
        let time = b.shrui(b.addi(stream.before, step), bits(pages.steps));
        // In the last block lines are asked for that are here already.
        let last = block_of(b.shrui(b.addc(stream.steps, -1), bits(pages.steps)));
        let block = b.minsi(b.addc(block_of(time), 1), last);
        let inside = b.andi(time, self.c(pages.times() - 1));
        let page = b.mulc(b.andi(inside, self.c(pages.turn - 1)), (pages.lines * PAGE).cast_signed());
        let line = b.mulc(b.shrui(inside, bits(pages.turn)), LINE.cast_signed());
        let from = b.gep(stream.base, "i8", b.mulc(block, pages.block_bytes().cast_signed()));
        let from = b.gep(from, "i8", b.addi(page, line));
        for line in 0..pages.lines {
            self.fetch(self.at(from, line * PAGE), Level::Second);
        }
    }

    /// The same for the matrix unit, which reads two panels side by side, a kilobyte of each in a step; `next` are the
    /// panels of the next unit of the item, or these again.
    pub(super) fn fetch_panels(&self, panels: [V<'c>; 2], next: [V<'c>; 2], step: V<'c>, steps: V<'c>) {
        let b = self.b;
        // Half of the pages in each panel, less where a panel is no whole number of blocks.
        let all = self.schedule.k_block.min(self.schedule.padded_k(self.spec)) / self.schedule.k_step();
        let pages = if all.is_multiple_of(PAGES / 2 * PAGE / STEP) { PAGES / 2 } else { PAGES / 4 };
        let block = pages * PAGE / STEP;
        let each = STEP / LINE / pages;
        let start = b.mulc(b.addc(b.divui(step, self.c(block)), 1), block.cast_signed());
        let inside = b.mulc(b.andi(step, self.c(block - 1)), (each * LINE).cast_signed());
        let over = b.cmpi("sge", start, steps);
        let from = b.addi(b.select(over, self.c(0), b.mulc(start, STEP.cast_signed())), inside);
        for (this, next) in panels.into_iter().zip(next) {
            let from = b.gep(b.select(over, next, this), "i8", from);
            for (line, page) in (0..each).flat_map(|line| (0..pages).map(move |page| (line, page))) {
                self.fetch(self.at(from, page * PAGE + line * LINE), Level::Second);
            }
        }
    }
}
