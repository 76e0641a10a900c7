//! Selection of experts in a row kernel.
//!
//! Scores become 64-bit keys whose order is the order of selection: falling score, then rising
//! id, NaN below every number, and -infinity last or never. A selection is a number of rounds of
//! "largest key, then strike it out", which beats sorting for the few experts that a row uses.

use super::{
    exec::{Exec, Scratch},
    value::{Choice, Row},
};
use crate::mlir::V;
use moec_ir::ops::SelectRule;

fn c(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// What a score of -infinity means to a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    /// It is never taken: rules that take the best.
    Never,
    /// It comes last: rules that fill places.
    Last,
}

/// The key of a score (f32) with id `id` (i64).
fn key<'c>(x: &Exec<'_, 'c>, score: V<'c>, id: V<'c>, closed: Closed) -> V<'c> {
    let b = x.b;
    // Adding zero makes -0 equal to +0.
    let score = b.addf(score, b.f32(0.0));
    let bits = b.bitcast(score, "i32");
    let order = b.xori(bits, b.andi(b.shrsi(bits, b.i32(31)), b.i32(i32::MAX)));
    let lowest = b.bitcast(b.f32(f32::NEG_INFINITY), "i32");
    let lowest = b.xori(lowest, b.i32(i32::MAX));
    let nan = b.cmpf("uno", score, score);
    let order = b.select(nan, b.addc(lowest, 1), order);
    let high = b.shli(b.cast("arith.extsi", order, "i64"), b.i64(32));
    let key = b.ori(high, b.subi(b.i64(0xffff_ffff), id));
    match closed {
        Closed::Never => b.select(b.cmpf("oeq", score, b.f32(f32::NEG_INFINITY)), b.i64(i64::MIN), key),
        Closed::Last => key,
    }
}

/// The id in a key.
fn id<'c>(x: &Exec<'_, 'c>, key: V<'c>) -> V<'c> {
    x.b.subi(x.b.i64(0xffff_ffff), x.b.andi(key, x.b.i64(0xffff_ffff)))
}

/// Keys of a row, to be struck out one by one.
#[derive(Clone, Copy)]
pub(crate) struct Keys {
    scratch: Scratch,
    closed: Closed,
}

impl Keys {
    /// Room for `n` keys.
    pub(crate) fn new(x: &Exec<'_, '_>, n: u64, closed: Closed) -> Self {
        Self { scratch: x.alloc(n * 8), closed }
    }

    fn place<'c>(self, x: &Exec<'_, 'c>, at: V<'c>) -> V<'c> {
        x.b.gep(x.at(self.scratch), "i64", at)
    }

    /// Sets keys `base..base + n` from scores; ids count from 0.
    pub(crate) fn fill<'c>(self, x: &Exec<'_, 'c>, base: V<'c>, n: u64, score: impl Fn(V<'c>) -> V<'c>) {
        self.fill_with_ids(x, base, n, score, |i| i);
    }

    /// Sets keys `base..base + n` from scores and ids.
    pub(crate) fn fill_with_ids<'c>(
        self,
        x: &Exec<'_, 'c>,
        base: V<'c>,
        n: u64,
        score: impl Fn(V<'c>) -> V<'c>,
        ids: impl Fn(V<'c>) -> V<'c>,
    ) {
        x.each(n, false, |ix| {
            let k = key(x, score(ix.at), ids(ix.at), self.closed);
            x.b.store(k, self.place(x, x.b.addi(base, ix.at)), 8);
        });
    }

    /// Takes the largest of keys `base..base + n`, where place `i` holds id `i`: its id (i64), or -1 if none is left.
    pub(crate) fn take<'c>(self, x: &Exec<'_, 'c>, base: V<'c>, n: u64) -> V<'c> {
        let b = x.b;
        let top = x.largest_key(n, |i| b.load(self.place(x, b.addi(base, i)), "i64", 8));
        let none = b.cmpi("eq", top, b.i64(i64::MIN));
        let winner = b.select(none, b.i64(0), id(x, top));
        x.single(|| b.store(b.i64(i64::MIN), self.place(x, b.addi(base, winner)), 8));
        b.select(none, b.i64(-1), winner)
    }

    /// Takes the largest of `n` keys with arbitrary distinct ids.
    pub(crate) fn take_any<'c>(self, x: &Exec<'_, 'c>, n: u64) -> V<'c> {
        let b = x.b;
        let top = x.largest_key(n, |i| b.load(self.place(x, i), "i64", 8));
        x.each(n, false, |ix| {
            let at = self.place(x, ix.at);
            let own = b.load(at, "i64", 8);
            b.store(b.select(b.cmpi("eq", own, top), b.i64(i64::MIN), own), at, 8);
        });
        b.select(b.cmpi("eq", top, b.i64(i64::MIN)), b.i64(-1), id(x, top))
    }

    /// Turns ids that count from 0 at `base` into ids of the whole row, where none is struck out.
    pub(crate) fn shift<'c>(self, x: &Exec<'_, 'c>, base: V<'c>, n: u64) {
        let b = x.b;
        x.each(n, false, |ix| {
            let at = self.place(x, b.addi(base, ix.at));
            let own = b.load(at, "i64", 8);
            // The low half holds 2^32 - 1 - id.
            b.store(b.subi(own, base), at, 8);
        });
    }
}

/// Slots under construction.
struct Slots {
    scratch: Scratch,
    n: u64,
}

impl Slots {
    fn new(x: &Exec<'_, '_>, n: u64) -> Self {
        Self { scratch: x.alloc(n * 4), n }
    }
    fn set<'c>(&self, x: &Exec<'_, 'c>, slot: V<'c>, id: V<'c>) {
        let b = x.b;
        let id = b.cast("arith.trunci", id, "i32");
        x.single(|| b.store(id, b.gep(x.at(self.scratch), "i32", slot), 4));
    }
    fn get<'c>(&self, x: &Exec<'_, 'c>, slot: V<'c>) -> V<'c> {
        let raw = x.b.load(x.b.gep(x.at(self.scratch), "i32", slot), "i32", 4);
        x.b.cast("arith.extsi", raw, "i64")
    }
    fn choice<'c>(&self, experts: u64) -> Choice<'c> {
        Choice { slots: self.n, experts, idx: Row::from_scratch_ints(self.scratch, vec![self.n]), w: None }
    }
}

/// The `n` best ids of a row in falling order, -1 where none is left.
fn order<'c>(x: &Exec<'_, 'c>, scores: &Row<'c>, n: u64, closed: Closed) -> Slots {
    let experts = scores.len();
    let (keys, slots) = (Keys::new(x, experts, closed), Slots::new(x, n));
    x.each_row(|| {
        keys.fill(x, x.b.i64(0), experts, |i| scores.scalar(x, i));
        x.repeat(n, |slot| {
            let best = keys.take(x, x.b.i64(0), experts);
            slots.set(x, slot, best);
        });
    });
    slots
}

/// The score of id `id` (i64), or `otherwise` when the id is -1.
fn score_or<'c>(x: &Exec<'_, 'c>, scores: &Row<'c>, id: V<'c>, otherwise: f32) -> V<'c> {
    let b = x.b;
    let value = scores.scalar(x, b.maxsi(id, b.i64(0)));
    b.select(b.cmpi("slt", id, b.i64(0)), b.f32(otherwise), value)
}

/// Emits a selection by a rule that looks at one row only.
///
/// # Errors
/// The name of the rule, if it needs the whole batch.
pub(crate) fn select<'c>(
    x: &Exec<'_, 'c>,
    scores: &Row<'c>,
    rule: &SelectRule,
    bound: Option<&Row<'c>>,
) -> Result<Choice<'c>, &'static str> {
    let experts = scores.len();
    // Selection reads scores many times.
    let scores = if matches!(rule, SelectRule::Given { .. }) { scores.clone() } else { scores.clone().stored(x) };
    Ok(match rule {
        SelectRule::Topk { k } => {
            let slots = order(x, &scores, *k, Closed::Never);
            if let Some(bound) = bound {
                first_slots(x, &slots, bound);
            }
            slots.choice(experts)
        }
        SelectRule::Rank { ranks } => {
            let depth = ranks.iter().max().map_or(0, |r| r + 1);
            let ordered = order(x, &scores, depth, Closed::Last);
            let slots = Slots::new(x, ranks.len() as u64);
            x.each_row(|| {
                for (slot, rank) in ranks.iter().enumerate() {
                    slots.set(x, x.b.i64(c(slot as u64)), ordered.get(x, x.b.i64(c(*rank))));
                }
            });
            slots.choice(experts)
        }
        SelectRule::All => all(x, &scores),
        SelectRule::Topp { p, strict, max_k } => {
            let n = max_k.unwrap_or(experts).min(experts);
            prefix_by_mass(x, &scores, n, (*p, bound), *strict)
        }
        SelectRule::Threshold { tau, quantile, strict, max_k, min_k } => {
            let n = max_k.unwrap_or(experts).min(experts);
            above(x, &scores, n, *tau, *quantile, *strict, min_k.unwrap_or(0) > 0)
        }
        SelectRule::GroupTopk { groups, k } => in_groups(x, &scores, *groups, *k),
        SelectRule::GroupLimited { groups, group_top, keep_groups, k, dropped } => {
            group_limited(x, &scores, [*groups, *group_top, *keep_groups, *k], *dropped)
        }
        SelectRule::Given { experts } => {
            let slots = Slots::new(x, scores.len());
            x.each_row(|| {
                scores.prepare(x);
                x.each(scores.len(), false, |ix| {
                    let id = scores.get(x, ix);
                    x.b.store(id, x.b.gep(x.at(slots.scratch), "i32", ix.at), 4);
                });
            });
            slots.choice(*experts)
        }
        SelectRule::ExpertChoice { .. } => return Err("expert_choice"),
    })
}

/// Empties the slots from a bound on, which is known when the kernel runs.
fn first_slots<'c>(x: &Exec<'_, 'c>, slots: &Slots, bound: &Row<'c>) {
    x.each_row(|| {
        let b = x.b;
        x.repeat(slots.n, |slot| {
            let place = b.cast("arith.uitofp", slot, "f32");
            let open = b.cmpf("olt", place, bound.scalar(x, b.i64(0)));
            slots.set(x, slot, b.select(open, slots.get(x, slot), b.i64(-1)));
        });
    });
}

/// Every expert that is not -infinity, by rising id.
fn all<'c>(x: &Exec<'_, 'c>, scores: &Row<'c>) -> Choice<'c> {
    let experts = scores.len();
    let slots = Slots::new(x, experts);
    x.each_row(|| {
        let b = x.b;
        x.each(experts, false, |ix| b.store(b.i32(-1), b.gep(x.at(slots.scratch), "i32", ix.at), 4));
        x.single(|| {
            b.for_(b.i64(0), b.i64(c(experts)), b.i64(1), &[b.i64(0)], |id, filled| {
                let closed = b.cmpf("oeq", scores.scalar(x, id), b.f32(f32::NEG_INFINITY));
                b.if_(b.xori(closed, b.bool(true)), || {
                    let id = b.cast("arith.trunci", id, "i32");
                    b.store(id, b.gep(x.at(slots.scratch), "i32", filled[0]), 4);
                });
                vec![b.addi(filled[0], b.select(closed, b.i64(0), b.i64(1)))]
            });
        });
    });
    slots.choice(experts)
}

/// The shortest prefix of the falling order whose sum passes `p`.
fn prefix_by_mass<'c>(
    x: &Exec<'_, 'c>,
    scores: &Row<'c>,
    n: u64,
    (p, bound): (f64, Option<&Row<'c>>),
    strict: bool,
) -> Choice<'c> {
    let slots = order(x, scores, n, Closed::Last);
    x.each_row(|| {
        let b = x.b;
        #[expect(clippy::cast_possible_truncation, reason = "thresholds are f32 in the kernel")]
        let mass = b.f32(p as f32);
        let mass = bound.map_or(mass, |bound| {
            let own = bound.scalar(x, b.i64(0));
            b.select(b.cmpf("olt", own, mass), own, mass)
        });
        b.for_(b.i64(0), b.i64(c(n)), b.i64(1), &[b.f32(0.0), b.bool(true)], |slot, state| {
            let (sum, open) = (state[0], state[1]);
            let id = slots.get(x, slot);
            slots.set(x, slot, b.select(open, id, b.i64(-1)));
            let sum = b.addf(sum, scores.scalar(x, id));
            let passed = b.cmpf(if strict { "ogt" } else { "oge" }, sum, mass);
            vec![sum, b.andi(open, b.xori(passed, b.bool(true)))]
        });
    });
    slots.choice(scores.len())
}

/// Scores above a number or a quantile of the row.
fn above<'c>(
    x: &Exec<'_, 'c>,
    scores: &Row<'c>,
    n: u64,
    tau: Option<f64>,
    quantile: Option<f64>,
    strict: bool,
    at_least_one: bool,
) -> Choice<'c> {
    let experts = scores.len();
    // A quantile needs the order down to its place.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the number of experts is below 2^24 and quantiles lie in 0..=1"
    )]
    let place = quantile.map(|q| {
        let exact = q.clamp(0.0, 1.0) * (experts.saturating_sub(1)) as f64;
        let low = exact.floor() as u64;
        (low, (low + 1).min(experts - 1), (exact - exact.floor()) as f32)
    });
    let depth = place.map_or(n, |(low, _, _)| n.max(experts - low));
    let ordered = order(x, scores, depth, Closed::Last);
    let slots = Slots::new(x, n);
    x.each_row(|| {
        let b = x.b;
        let threshold = match place {
            Some((low, high, fraction)) => {
                let at = |rising: u64| scores.scalar(x, ordered.get(x, b.i64(c(experts - 1 - rising))));
                let (low, high) = (at(low), at(high));
                // Counted from the nearer neighbour, which counts where the other one is infinite.
                let span = b.subf(high, low);
                if fraction < 0.5 {
                    b.fma(span, b.f32(fraction), low)
                } else {
                    b.subf(high, b.mulf(span, b.f32(1.0 - fraction)))
                }
            }
            #[expect(clippy::cast_possible_truncation, reason = "thresholds are f32 in the kernel")]
            None => b.f32(tau.unwrap_or(f64::NEG_INFINITY) as f32),
        };
        x.repeat(n, |slot| {
            let id = ordered.get(x, slot);
            let score = scores.scalar(x, id);
            let mut passes = b.cmpf(if strict { "ogt" } else { "oge" }, score, threshold);
            if at_least_one {
                passes = b.ori(passes, b.cmpi("eq", slot, b.i64(0)));
            }
            slots.set(x, slot, b.select(passes, id, b.i64(-1)));
        });
    });
    slots.choice(experts)
}

/// `k` in every group, group by group.
fn in_groups<'c>(x: &Exec<'_, 'c>, scores: &Row<'c>, groups: u64, k: u64) -> Choice<'c> {
    let experts = scores.len();
    let size = experts / groups.max(1);
    let (keys, slots) = (Keys::new(x, experts, Closed::Last), Slots::new(x, groups * k));
    x.each_row(|| {
        let b = x.b;
        x.repeat(groups, |group| {
            let base = b.mulc(group, c(size));
            keys.fill(x, base, size, |i| scores.scalar(x, b.addi(base, i)));
            x.repeat(k, |j| {
                let best = keys.take(x, base, size);
                slots.set(x, b.addi(b.mulc(group, c(k)), j), b.addi(best, base));
            });
        });
    });
    slots.choice(experts)
}

/// `k` among the groups with the largest sums of their best scores.
fn group_limited<'c>(
    x: &Exec<'_, 'c>,
    scores: &Row<'c>,
    [groups, top, keep, k]: [u64; 4],
    dropped: Option<f64>,
) -> Choice<'c> {
    let experts = scores.len();
    let size = experts / groups.max(1);
    let (keys, group_keys) = (Keys::new(x, experts, Closed::Last), Keys::new(x, groups, Closed::Last));
    let (sums, kept) = (x.alloc(groups * 4), x.alloc(groups * 4));
    let slots = Slots::new(x, k);
    x.each_row(|| {
        let b = x.b;
        x.repeat(groups, |group| {
            let base = b.mulc(group, c(size));
            let refill = || keys.fill(x, base, size, |i| scores.scalar(x, b.addi(base, i)));
            refill();
            let sum = b.for_(b.i64(0), b.i64(c(top.min(size))), b.i64(1), &[b.f32(0.0)], |_, sum| {
                let best = keys.take(x, base, size);
                vec![b.addf(sum[0], scores.scalar(x, b.addi(base, best)))]
            })[0];
            refill();
            x.single(|| {
                b.store(sum, b.gep(x.at(sums), "f32", group), 4);
                b.store(b.i32(0), b.gep(x.at(kept), "i32", group), 4);
            });
        });
        let sum_of = |group: V<'c>| b.load(b.gep(x.at(sums), "f32", group), "f32", 4);
        group_keys.fill(x, b.i64(0), groups, sum_of);
        x.repeat(keep, |_| {
            let best = group_keys.take(x, b.i64(0), groups);
            x.single(|| b.store(b.i32(1), b.gep(x.at(kept), "i32", best), 4));
        });
        x.repeat(groups, |group| {
            let out = b.cmpi("eq", b.load(b.gep(x.at(kept), "i32", group), "i32", 4), b.i32(0));
            b.if_(out, || {
                let base = b.mulc(group, c(size));
                #[expect(clippy::cast_possible_truncation, reason = "scores are f32 in the kernel")]
                let score = dropped.unwrap_or(f64::NEG_INFINITY) as f32;
                keys.fill(x, base, size, |_| b.f32(score));
            });
        });
        // Ids inside groups become ids of the row.
        x.repeat(groups, |group| {
            let base = b.mulc(group, c(size));
            keys.shift(x, base, size);
        });
        x.repeat(k, |slot| {
            let best = keys.take(x, b.i64(0), experts);
            slots.set(x, slot, best);
        });
    });
    slots.choice(experts)
}

/// Choice among `n * m` pairs by the sum of two scores: only pairs of the `k` best of both sides compete.
pub(crate) fn product_key<'c>(x: &Exec<'_, 'c>, left: &Row<'c>, right: &Row<'c>, k: u64) -> Choice<'c> {
    let (left, right) = (left.clone().stored(x), right.clone().stored(x));
    let sum = |first: V<'c>, second: V<'c>| {
        let bottom = f32::NEG_INFINITY;
        x.b.addf(score_or(x, &left, first, bottom), score_or(x, &right, second, bottom))
    };
    pairs(x, &left, &right, k, &sum)
}

/// One side of a product key in Tucker form: query `[c]`, keys `[n, c, r]` and factor `[r]`.
pub(crate) struct Side<'c> {
    /// The row's query.
    pub(crate) query: Row<'c>,
    /// Keys, the same for all rows.
    pub(crate) keys: Row<'c>,
    /// Factor of the rank-one score.
    pub(crate) factor: Row<'c>,
    /// `n`, `c` and `r`.
    pub(crate) sizes: [u64; 3],
}

impl<'c> Side<'c> {
    /// `[n, r]` products of query and keys, and the `n` scores by the factor.
    fn project(&self, x: &Exec<'_, 'c>) -> (Row<'c>, Row<'c>) {
        let [n, width, r] = self.sizes;
        let (query, keys) = (self.query.clone(), self.keys.clone());
        let projected = Row::new(vec![n, r], false, move |x, ix| {
            let b = x.b;
            let (i, s) = (b.divui(ix.at, b.i64(c(r))), b.remui(ix.at, b.i64(c(r))));
            b.for_(b.i64(0), b.i64(c(width)), b.i64(1), &[b.f32(0.0)], |j, sum| {
                let at = b.addi(b.mulc(b.addi(b.mulc(i, c(width)), j), c(r)), s);
                vec![b.fma(query.scalar(x, j), keys.scalar(x, at), sum[0])]
            })[0]
        })
        .after(&[&self.query])
        .stored(x);
        let (inner, factor) = (projected.clone(), self.factor.clone());
        let scores = Row::new(vec![n], false, move |x, ix| {
            let b = x.b;
            b.for_(b.i64(0), b.i64(c(r)), b.i64(1), &[b.f32(0.0)], |s, sum| {
                let value = inner.scalar(x, b.addi(b.mulc(ix.at, c(r)), s));
                vec![b.fma(value, factor.scalar(x, s), sum[0])]
            })[0]
        })
        .stored(x);
        (projected, scores)
    }
}

/// Product keys in Tucker form: candidates by a rank-one score, then `s1' core s2` of their pairs.
pub(crate) fn tucker<'c>(x: &Exec<'_, 'c>, left: Side<'c>, right: Side<'c>, core: &Row<'c>, k: u64) -> Choice<'c> {
    let ((a, first), (d, second)) = (left.project(x), right.project(x));
    let (r, s) = (left.sizes[2], right.sizes[2]);
    let score = |i: V<'c>, j: V<'c>| {
        let b = x.b;
        let (row, column) = (b.mulc(b.maxsi(i, b.i64(0)), c(r)), b.mulc(b.maxsi(j, b.i64(0)), c(s)));
        let total = b.for_(b.i64(0), b.i64(c(r)), b.i64(1), &[b.f32(0.0)], |p, sum| {
            let part = b.for_(b.i64(0), b.i64(c(s)), b.i64(1), &[b.f32(0.0)], |q, sum| {
                let weight = core.scalar(x, b.addi(b.mulc(p, c(s)), q));
                vec![b.fma(weight, d.scalar(x, b.addi(column, q)), sum[0])]
            })[0];
            vec![b.fma(a.scalar(x, b.addi(row, p)), part, sum[0])]
        })[0];
        let empty = b.ori(b.cmpi("slt", i, b.i64(0)), b.cmpi("slt", j, b.i64(0)));
        b.select(empty, b.f32(f32::NEG_INFINITY), total)
    };
    pairs(x, &first, &second, k, &score)
}

/// The `k` best pairs of the `k` best of both sides.
fn pairs<'c>(
    x: &Exec<'_, 'c>,
    left: &Row<'c>,
    right: &Row<'c>,
    k: u64,
    score: &dyn Fn(V<'c>, V<'c>) -> V<'c>,
) -> Choice<'c> {
    let (n, m) = (left.len(), right.len());
    let (a, d) = (k.min(n), k.min(m));
    let (firsts, seconds) = (order(x, left, a, Closed::Never), order(x, right, d, Closed::Never));
    let (keys, slots) = (Keys::new(x, a * d, Closed::Never), Slots::new(x, k));
    let scores = x.alloc(k * 4);
    x.each_row(|| {
        let b = x.b;
        let pair = |i: V<'c>| {
            let first = firsts.get(x, b.divui(i, b.i64(c(d))));
            let second = seconds.get(x, b.remui(i, b.i64(c(d))));
            (first, second)
        };
        keys.fill_with_ids(
            x,
            b.i64(0),
            a * d,
            |i| {
                let (first, second) = pair(i);
                score(first, second)
            },
            |i| {
                let (first, second) = pair(i);
                b.addi(b.mulc(first, c(m)), second)
            },
        );
        x.repeat(k, |slot| {
            let best = keys.take_any(x, a * d);
            slots.set(x, slot, best);
            let some = b.maxsi(best, b.i64(0));
            let sum = score(b.divui(some, b.i64(c(m))), b.remui(some, b.i64(c(m))));
            x.single(|| b.store(sum, b.gep(x.at(scores), "f32", slot), 4));
        });
    });
    let mut choice = slots.choice(n * m);
    choice.w = Some(Row::from_scratch(scores, vec![k]));
    choice
}
