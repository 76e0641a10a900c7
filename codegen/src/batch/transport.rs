//! Transport plans, by one team: every step needs all rows, then all columns.

use super::cx::{Cx, narrow};
use crate::{CodegenError, math, mlir::V, rows::OutputPart};
use moec_ir::{Dim, Op, ops::Transport};

/// Arrays that the iteration needs: a factor for each row and one for each column.
pub(super) fn scratch(op: &Transport, shape: &[Dim]) -> Vec<Dim> {
    let one = Dim::Const(1);
    let (rows, columns) = (shape.first().unwrap_or(&one).clone(), shape.last().unwrap_or(&one).clone());
    match op {
        Transport::Sinkhorn { .. } => vec![rows, columns],
        Transport::Sparse { .. } => vec![rows],
    }
}

/// The plan and the scores with their sizes.
struct Plan<'a, 'b, 'c> {
    cx: &'a Cx<'b, 'c>,
    scores: super::cx::Array<'c>,
    out: V<'c>,
    rows: V<'c>,
    columns: V<'c>,
}

impl<'c> Plan<'_, '_, 'c> {
    fn at(&self, row: V<'c>, column: V<'c>) -> V<'c> {
        self.cx.b.addi(self.cx.b.muli(row, self.columns), column)
    }

    fn get(&self, array: V<'c>, at: V<'c>) -> V<'c> {
        self.cx.b.load(self.cx.b.gep(array, "f32", at), "f32", 4)
    }

    fn set(&self, array: V<'c>, at: V<'c>, value: V<'c>) {
        self.cx.b.store(value, self.cx.b.gep(array, "f32", at), 4);
    }

    /// Sum of `n` values.
    fn sum(&self, n: V<'c>, value: impl FnOnce(V<'c>) -> V<'c>) -> V<'c> {
        let b = self.cx.b;
        b.for_(b.i64(0), n, b.i64(1), &[b.f32(0.0)], |i, sum| vec![b.addf(sum[0], value(i))])[0]
    }

    fn ratio(&self, over: V<'c>, under: V<'c>) -> V<'c> {
        let b = self.cx.b;
        b.divf(b.cast("arith.sitofp", over, "f32"), b.cast("arith.sitofp", under, "f32"))
    }
}

pub(super) fn emit(cx: &Cx<'_, '_>) -> Result<(), CodegenError> {
    let Op::Transport(op) = &cx.body.node(cx.node).op else { return cx.fail("the op has units") };
    let scores = cx.array(0)?;
    let ([rows, columns], None) = (&scores.shape[..], cx.body.node(cx.node).round) else {
        return cx.fail("scores are [rows, experts], and the plan is not rounded");
    };
    let (rows, columns) = (cx.size(rows), cx.size(columns));
    let out = cx.output(OutputPart::Data)?;
    let plan = Plan { cx, scores, out, rows, columns };
    match op {
        Transport::Sinkhorn { xi, iters } => sinkhorn(&plan, narrow(*xi), *iters),
        Transport::Sparse { capacity, gamma, steps, eta } => {
            sparse(&plan, *capacity, [narrow(*gamma), narrow(*eta)], *steps);
        }
    }
    Ok(())
}

/// Row sums 1 and column sums `rows / columns`, in turns.
fn sinkhorn(plan: &Plan<'_, '_, '_>, xi: f32, iters: u64) {
    let (cx, b) = (plan.cx, plan.cx.b);
    let (u, v) = (cx.scratch[0], cx.scratch[1]);
    let bottom = b.f32(f32::NEG_INFINITY);
    cx.each(plan.columns, |j| {
        let top = b.for_(b.i64(0), plan.rows, b.i64(1), &[bottom], |i, top| {
            vec![b.maximumf(top[0], cx.float(&plan.scores, plan.at(i, j)))]
        });
        plan.set(v, j, top[0]);
    });
    let top = b.for_(b.i64(0), plan.columns, b.i64(1), &[bottom], |j, top| vec![b.maximumf(top[0], plan.get(v, j))])[0];
    cx.each(plan.rows, |i| plan.set(u, i, b.f32(1.0)));
    cx.each(b.muli(plan.rows, plan.columns), |at| {
        let d = b.divf(b.subf(cx.float(&plan.scores, at), top), b.f32(xi));
        plan.set(plan.out, at, math::exp(b, d));
    });
    b.each(b.i64(0), b.i64(super::cx::c(iters)), |_| {
        cx.each(plan.columns, |j| {
            let sum = plan.sum(plan.rows, |i| b.mulf(plan.get(plan.out, plan.at(i, j)), plan.get(u, i)));
            plan.set(v, j, b.divf(plan.ratio(plan.rows, plan.columns), sum));
        });
        cx.each(plan.rows, |i| {
            let sum = plan.sum(plan.columns, |j| b.mulf(plan.get(plan.out, plan.at(i, j)), plan.get(v, j)));
            plan.set(u, i, b.divf(b.f32(1.0), sum));
        });
    });
    if iters == 0 {
        cx.each(plan.columns, |j| plan.set(v, j, b.f32(1.0)));
    }
    cx.each(plan.rows, |i| {
        b.each(b.i64(0), plan.columns, |j| {
            let at = plan.at(i, j);
            plan.set(plan.out, at, b.mulf(b.mulf(plan.get(u, i), plan.get(plan.out, at)), plan.get(v, j)));
        });
    });
}

/// Columns are points of the simplex with few nonzeros; a potential for each row moves with its sum.
fn sparse(plan: &Plan<'_, '_, '_>, capacity: u64, [gamma, eta]: [f32; 2], steps: u64) {
    let (cx, b) = (plan.cx, plan.cx.b);
    let alpha = cx.scratch[0];
    cx.each(plan.rows, |i| plan.set(alpha, i, b.f32(0.0)));
    b.each(b.i64(0), b.i64(super::cx::c(steps)), |_| {
        cx.each(plan.columns, |j| column(plan, capacity, gamma, j));
        cx.each(plan.rows, |i| {
            let sum = plan.sum(plan.columns, |j| plan.get(plan.out, plan.at(i, j)));
            let missing = b.subf(plan.ratio(plan.columns, plan.rows), sum);
            plan.set(alpha, i, b.fma(b.f32(eta), missing, plan.get(alpha, i)));
        });
    });
    cx.each(plan.columns, |j| column(plan, capacity, gamma, j));
}

/// One column: its `capacity` largest values, scaled and projected onto the simplex.
///
/// The largest values are visited in falling order until one lies below the shift that the sum
/// of those before it needs; the values behind it become 0.
fn column<'c>(plan: &Plan<'_, '_, 'c>, capacity: u64, gamma: f32, j: V<'c>) {
    let (cx, b) = (plan.cx, plan.cx.b);
    let alpha = cx.scratch[0];
    let value = |i: V<'c>| b.addf(plan.get(alpha, i), cx.float(&plan.scores, plan.at(i, j)));
    let most = b.minsi(b.i64(super::cx::c(capacity)), plan.rows);
    // Values seen, the last one and its row, sum, shift, and whether to go on.
    let init = [b.i64(0), b.f32(f32::INFINITY), b.i64(-1), b.f32(0.0), b.f32(0.0), b.bool(true)];
    let state = b.while_(
        &init,
        |s| b.andi(s[5], b.cmpi("slt", s[0], most)),
        |s| {
            let (last, row) = (s[1], s[2]);
            // The first after the last one in falling order, equal values by position.
            let next = b.for_(b.i64(0), plan.rows, b.i64(1), &[b.f32(f32::NEG_INFINITY), b.i64(-1)], |i, best| {
                let x = value(i);
                let behind = b.andi(b.cmpf("oeq", x, last), b.cmpi("sgt", i, row));
                let left = b.ori(b.cmpf("olt", x, last), behind);
                let better = b.ori(b.cmpf("ogt", x, best[0]), b.cmpi("slt", best[1], b.i64(0)));
                let take = b.andi(left, better);
                vec![b.select(take, x, best[0]), b.select(take, i, best[1])]
            });
            let scaled = b.divf(next[0], b.f32(gamma));
            let (count, sum) = (b.addc(s[0], 1), b.addf(s[3], scaled));
            let excess = b.divf(b.subf(sum, b.f32(1.0)), b.cast("arith.sitofp", count, "f32"));
            let inside = b.cmpf("ogt", scaled, excess);
            vec![
                b.select(inside, count, s[0]),
                b.select(inside, next[0], s[1]),
                b.select(inside, next[1], s[2]),
                sum,
                b.select(inside, excess, s[4]),
                inside,
            ]
        },
    );
    let (last, row, shift) = (state[1], state[2], state[4]);
    b.each(b.i64(0), plan.rows, |i| {
        let x = value(i);
        let level = b.andi(b.cmpf("oeq", x, last), b.cmpi("sle", i, row));
        let kept = b.ori(b.cmpf("ogt", x, last), level);
        let share = b.subf(b.divf(x, b.f32(gamma)), shift);
        plan.set(plan.out, plan.at(i, j), b.select(kept, b.maximumf(share, b.f32(0.0)), b.f32(0.0)));
    });
}
