//! Products that several experts of a token share: which there are, and where their results lie.
//!
//! Experts of a group have a factor in common, whose product with a token is computed once for all of them. Groups are
//! routed like experts: [`Step::Pick`] makes their route, a plan kernel sorts it, and [`Step::Join`] says for each row
//! in the order of experts which row in the order of groups it uses.

use super::{THREADS, cx::c, function, units};
use crate::{
    Target,
    mlir::{Builder, V},
};
use moec_abi::{Expr, Grid};

/// Which of the two kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Arguments: `idx` (i32 `[rows][slots]`), `groups` (i32 `[rows][slots]`, written: the group of each slot, -1 where
    /// an earlier slot has it), and the number of rows of the route (value).
    Pick,
    /// Arguments: `idx`, `positions` (i32 `[tokens][slots]`: the row of each slot in the order of experts), the same
    /// in the order of groups, `map` (i32, written: row in the order of groups by row in the order of experts), and
    /// the number of tokens (value).
    Join,
}

/// A kernel of shared products.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Symbol of the kernel.
    pub symbol: String,
    /// Which of the two kernels.
    pub step: Step,
    /// First expert of each run of experts of one group, and the group; by rising experts.
    pub runs: Vec<(u64, u64)>,
    /// One past the last expert.
    pub end: u64,
    /// Slots of a row.
    pub slots: u64,
    /// Consecutive tokens that a row of the route covers.
    pub repeat: u64,
}

impl Share {
    /// Extent of the launch for `rows` rows (pick) or tokens (join).
    pub fn grid(&self, target: Target, rows: Expr) -> Grid {
        units(target, rows, 16)
    }

    /// Appends the kernel to the module.
    pub fn emit(&self, b: &Builder<'_>, target: Target) {
        let pointers = match self.step {
            Step::Pick => vec![true; 2],
            Step::Join => vec![true; 4],
        };
        function(b, target, &self.symbol, &pointers, THREADS, |place, values| {
            place.each_unit(b, |row| match (self.step, values) {
                (Step::Pick, [idx, out]) => self.pick(b, *idx, *out, row),
                (Step::Join, [idx, positions, shared, map]) => self.join(b, *idx, [*positions, *shared, *map], row),
                (Step::Pick | Step::Join, _) => unreachable!("the kernel declares all arguments"),
            });
        });
    }

    /// Group of the expert in a slot (i32); -1 if it has none.
    fn group<'c>(&self, b: &Builder<'c>, idx: V<'c>, row: V<'c>, slot: V<'c>) -> V<'c> {
        let number = |n: u64| b.i32(i32::try_from(n).unwrap_or(i32::MAX));
        let id = b.load(b.gep(idx, "i32", b.addi(b.mulc(row, c(self.slots)), slot)), "i32", 4);
        let group = self
            .runs
            .iter()
            .fold(b.i32(-1), |group, (first, of)| b.select(b.cmpi("sge", id, number(*first)), number(*of), group));
        b.select(b.cmpi("slt", id, number(self.end)), group, b.i32(-1))
    }

    /// The first slot of a row with this group.
    fn leader<'c>(&self, b: &Builder<'c>, idx: V<'c>, row: V<'c>, slot: V<'c>, group: V<'c>) -> V<'c> {
        b.for_(b.i64(0), slot, b.i64(1), &[slot], |earlier, found| {
            let same = b.cmpi("eq", self.group(b, idx, row, earlier), group);
            let first = b.cmpi("eq", found[0], slot);
            vec![b.select(b.andi(same, first), earlier, found[0])]
        })[0]
    }

    fn pick<'c>(&self, b: &Builder<'c>, idx: V<'c>, out: V<'c>, row: V<'c>) {
        b.each(b.i64(0), b.i64(c(self.slots)), |slot| {
            let group = self.group(b, idx, row, slot);
            let leads = b.cmpi("eq", self.leader(b, idx, row, slot, group), slot);
            let place = b.addi(b.mulc(row, c(self.slots)), slot);
            b.store(b.select(leads, group, b.i32(-1)), b.gep(out, "i32", place), 4);
        });
    }

    fn join<'c>(&self, b: &Builder<'c>, idx: V<'c>, [positions, shared, map]: [V<'c>; 3], token: V<'c>) {
        let row = b.divui(token, b.i64(c(self.repeat)));
        let first = b.mulc(token, c(self.slots));
        b.each(b.i64(0), b.i64(c(self.slots)), |slot| {
            let group = self.group(b, idx, row, slot);
            b.if_(b.cmpi("sge", group, b.i32(0)), || {
                let leader = self.leader(b, idx, row, slot, group);
                let p = b.load(b.gep(positions, "i32", b.addi(first, slot)), "i32", 4);
                let q = b.load(b.gep(shared, "i32", b.addi(first, leader)), "i32", 4);
                b.store(q, b.gep(map, "i32", p), 4);
            });
        });
    }
}
