//! Weights of the selected slots in a row kernel.

use super::{
    exec::{Exec, Fold, Ix},
    tensor,
    value::{Choice, Row},
};
use crate::{math, mlir::V};
use moec_ir::ops::{UnaryFn, Weigh, WeighFn, WeighNorm};

#[expect(clippy::cast_possible_truncation, reason = "weights are f32 in the kernel")]
const fn narrow(value: f64) -> f32 {
    value as f32
}

/// Whether slot `at` is filled (i1).
fn filled<'c>(x: &Exec<'_, 'c>, idx: &Row<'c>, at: V<'c>) -> V<'c> {
    x.b.cmpi("sge", idx.scalar(x, at), x.b.i32(0))
}

/// Applies `weigh`: the steps come in the order of its attributes.
///
/// `drop_rows` and `keep_rows` are the first columns of one-column routes, `expert_scale` a table.
pub(crate) fn weigh<'c>(
    x: &Exec<'_, 'c>,
    op: &Weigh,
    choice: &Choice<'c>,
    scores: Option<&Row<'c>>,
    drop_rows: Option<&Row<'c>>,
    keep_rows: Option<&Row<'c>>,
    expert_scale: Option<&Row<'c>>,
) -> Choice<'c> {
    let slots = choice.slots;
    let mut idx = choice.idx.clone();
    let gathered = gather(x, op, choice, scores);
    // Which slots count: filled, and not null experts.
    let (ids, real) = (idx.clone(), op.real);
    let counts = move |x: &Exec<'_, 'c>, at: V<'c>| {
        let b = x.b;
        let some = filled(x, &ids, at);
        match real {
            None => some,
            Some(n) => {
                let limit = b.i32(i32::try_from(n).unwrap_or(i32::MAX));
                b.andi(some, b.cmpi("slt", ids.scalar(x, at), limit))
            }
        }
    };
    let mut w = apply(x, op.function, &gathered, slots, counts);
    if let Some(share) = op.drop_below {
        let (kept_w, kept_idx) = drop_below(x, &w, &idx, slots, narrow(share), drop_rows, keep_rows);
        w = kept_w;
        idx = kept_idx;
    }
    if let Some(norm) = op.norm {
        w = normalised(x, &w, norm, narrow(op.eps), narrow(op.floor));
    }
    if let Some(table) = expert_scale {
        let (inner, ids, table) = (w.clone(), idx.clone(), table.clone());
        w = Row::new(vec![slots], false, move |x, ix| {
            let b = x.b;
            let id = b.cast("arith.extsi", ids.get(x, ix), "i64");
            let scale = table.scalar(x, b.maxsi(id, b.i64(0)));
            let zero = b.f32(0.0);
            b.mulf(inner.get(x, ix), b.select(b.cmpi("slt", id, b.i64(0)), zero, scale))
        });
    }
    if op.scale.to_bits() != 1f64.to_bits() {
        w = tensor::binary(&w, &tensor::constant(narrow(op.scale)), moec_ir::ops::BinaryFn::Mul);
    }
    Choice { slots, experts: choice.experts, idx, w: Some(w.stored(x)) }
}

/// Scores of the slots: 1, the given scores, or the route's own.
fn gather<'c>(x: &Exec<'_, 'c>, op: &Weigh, choice: &Choice<'c>, scores: Option<&Row<'c>>) -> Row<'c> {
    if op.constant {
        return tensor::constant(1.0).reshaped(Vec::new());
    }
    match (scores, &choice.w) {
        (Some(scores), _) => {
            let (scores, ids) = (scores.clone().stored(x), choice.idx.clone());
            Row::new(vec![choice.slots], false, move |x, ix| {
                let b = x.b;
                let id = b.cast("arith.extsi", ids.get(x, ix), "i64");
                let value = scores.scalar(x, b.maxsi(id, b.i64(0)));
                b.select(b.cmpi("slt", id, b.i64(0)), b.f32(0.0), value)
            })
            .stored(x)
        }
        (None, Some(own)) => own.clone(),
        (None, None) => tensor::constant(1.0),
    }
}

/// The function over the slots that count; the others become 0.
fn apply<'c>(
    x: &Exec<'_, 'c>,
    function: WeighFn,
    scores: &Row<'c>,
    slots: u64,
    counts: impl Fn(&Exec<'_, 'c>, V<'c>) -> V<'c> + Clone + 'c,
) -> Row<'c> {
    let value = scores.clone();
    let masked = move |otherwise: f32, function: Option<UnaryFn>| {
        let (value, counts) = (value.clone(), counts.clone());
        Row::new(vec![slots], false, move |x: &Exec<'_, 'c>, ix: Ix<'c>| {
            let b = x.b;
            let score = if value.len() == 1 { value.scalar(x, b.i64(0)) } else { value.get(x, ix) };
            let score = function.map_or(score, |f| math::unary(b, f, score));
            b.select(counts(x, ix.at), score, b.f32(otherwise))
        })
    };
    match function {
        WeighFn::None => masked(0.0, None).stored(x),
        WeighFn::Sigmoid => masked(0.0, Some(UnaryFn::Sigmoid)).stored(x),
        WeighFn::Softmax => {
            let logits = masked(f32::NEG_INFINITY, None).stored(x);
            let w = tensor::softmax(x, &logits, 1.0);
            // A row without slots has no softmax: its weights are 0, not NaN.
            Row::new(vec![slots], false, move |x, ix| {
                let b = x.b;
                let closed = b.cmpf("oeq", logits.get(x, ix), b.f32(f32::NEG_INFINITY));
                b.select(closed, b.f32(0.0), w.get(x, ix))
            })
            .stored(x)
        }
    }
}

/// Drops slots after the first whose weight is below a share of the first.
fn drop_below<'c>(
    x: &Exec<'_, 'c>,
    w: &Row<'c>,
    idx: &Row<'c>,
    slots: u64,
    share: f32,
    drop_rows: Option<&Row<'c>>,
    keep_rows: Option<&Row<'c>>,
) -> (Row<'c>, Row<'c>) {
    let (new_w, new_idx) = (x.alloc(slots * 4), x.alloc(slots * 4));
    x.each_row(|| {
        let b = x.b;
        let first = b.mulf(w.scalar(x, b.i64(0)), b.f32(share));
        let listed = |row: &Row<'c>| b.cmpi("sge", row.scalar(x, b.i64(0)), b.i32(0));
        x.each(slots, false, |ix| {
            let own = w.get(x, ix);
            let low = b.cmpf("olt", own, first);
            let mut keep = b.ori(b.xori(low, b.bool(true)), b.cmpi("eq", ix.at, b.i64(0)));
            if let Some(rows) = drop_rows {
                keep = b.andi(keep, b.xori(listed(rows), b.bool(true)));
            }
            if let Some(rows) = keep_rows {
                keep = b.ori(keep, listed(rows));
            }
            let id = idx.get(x, ix);
            b.store(b.select(keep, own, b.f32(0.0)), b.gep(x.at(new_w), "f32", ix.at), 4);
            b.store(b.select(keep, id, b.i32(-1)), b.gep(x.at(new_idx), "i32", ix.at), 4);
        });
    });
    (Row::from_scratch(new_w, vec![slots]), Row::from_scratch_ints(new_idx, vec![slots]))
}

/// Weights divided by their norm; a row of zeros stays as it is, a row with NaN becomes NaN.
fn normalised<'c>(x: &Exec<'_, 'c>, w: &Row<'c>, norm: WeighNorm, eps: f32, floor: f32) -> Row<'c> {
    let (slots, inner) = (w.len(), w.clone());
    let total = tensor::once(move |x| {
        let b = x.b;
        let sum = x.fold(slots, false, Fold::Sum, |ix| {
            let v = inner.get(x, ix);
            match norm {
                WeighNorm::Sum => v,
                WeighNorm::L1 => math::abs(b, v),
                WeighNorm::L2 => b.mulf(v, v),
            }
        });
        if norm == WeighNorm::L2 { math::sqrt(b, sum) } else { sum }
    });
    let inner = w.clone();
    let sum = total.clone();
    Row::new(vec![slots], false, move |x, ix| {
        let b = x.b;
        let (own, sum) = (inner.get(x, ix), sum.scalar(x, b.i64(0)));
        let empty = b.cmpf("ole", sum, b.f32(0.0));
        let divisor = b.addf(sum, b.f32(eps));
        let divisor = b.select(b.cmpf("olt", divisor, b.f32(floor)), b.f32(floor), divisor);
        b.select(empty, b.f32(0.0), b.divf(own, divisor))
    })
    .after(&[&total])
    .stored(x)
}
