//! Ops on routes: weights, capacity, fixed experts, counts.

use super::{
    Array, Failure, RouteValue, Step, Value,
    select::order,
    special::sigmoid,
    tensor::softmax,
    value::{last_axis, route, size, tensor},
    weights::Fetch,
};
use crate::ops::{Limit, Override, Priority, Weigh, WeighFn, WeighNorm};

pub(super) fn weigh(op: &Weigh, operands: &[&Value], w: &Fetch<'_>) -> Step<Value> {
    let mut r = route(operands, 0)?.clone();
    let mut weights = gathered(op, operands, &r)?;
    for row in 0..r.rows {
        let slots = row * r.slots..(row + 1) * r.slots;
        let on: Vec<bool> = r.ids[slots.clone()]
            .iter()
            .map(|id| u64::try_from(*id).is_ok_and(|e| op.real.is_none_or(|real| e < real)))
            .collect();
        apply_function(op.function, &mut weights[slots], &on);
    }
    if let Some(share) = op.drop_below {
        drop_small(op, operands, share, &mut r, &mut weights)?;
    }
    if let Some(norm) = op.norm {
        for row in 0..r.rows {
            divide(norm, op.eps, op.floor, &mut weights[row * r.slots..(row + 1) * r.slots]);
        }
    }
    let factors = op.expert_scale.as_ref().map(|name| w.matrix(name)).transpose()?;
    for (weight, id) in weights.iter_mut().zip(&r.ids) {
        if let Some(factors) = &factors {
            *weight *= usize::try_from(*id).ok().and_then(|e| factors.data.get(e).copied()).unwrap_or(0.0);
        }
        *weight *= op.scale;
    }
    r.weights = Some(weights);
    Ok(Value::Route(r))
}

/// Scores of the slots before any function: 1, the scores operand, or the route's own.
fn gathered(op: &Weigh, operands: &[&Value], r: &RouteValue) -> Step<Vec<f64>> {
    if op.constant {
        return Ok(vec![1.0; r.ids.len()]);
    }
    if !op.has_scores(operands.len()) {
        return r.weights.clone().ok_or_else(|| Failure("the route has no scores of its own".to_owned()));
    }
    let scores = last_axis(operands, 1)?;
    let score = |(at, id): (usize, &i64)| usize::try_from(*id).map_or(0.0, |e| scores.at(at / r.slots)[e]);
    Ok(r.ids.iter().enumerate().map(score).collect())
}

/// The function over the slots that are on; the others get 0.
fn apply_function(function: WeighFn, weights: &mut [f64], on: &[bool]) {
    let masked: Vec<f64> = weights.iter().zip(on).map(|(w, on)| if *on { *w } else { f64::NEG_INFINITY }).collect();
    let values = match function {
        WeighFn::None => masked,
        WeighFn::Softmax => softmax(&masked),
        WeighFn::Sigmoid => masked.into_iter().map(sigmoid).collect(),
    };
    for ((weight, value), on) in weights.iter_mut().zip(values).zip(on) {
        *weight = if *on { value } else { 0.0 };
    }
}

/// Slots after the first go when they are small; then the row sets decide.
fn drop_small(op: &Weigh, operands: &[&Value], share: f64, r: &mut RouteValue, weights: &mut [f64]) -> Step<()> {
    let last = operands.len() - 1;
    let drop = if op.drop_rows { Some(route(operands, last - usize::from(op.keep_rows))?) } else { None };
    let keep = if op.keep_rows { Some(route(operands, last)?) } else { None };
    let listed = |set: Option<&RouteValue>, row: usize| set.is_some_and(|s| s.expert(row, 0).is_some());
    for row in 0..r.rows {
        let first = weights.get(row * r.slots).copied().unwrap_or(0.0);
        for slot in 0..r.slots {
            let at = row * r.slots + slot;
            let small = weights[at] < share * first;
            let mut stays = slot == 0 || !small;
            stays &= !listed(drop, row);
            stays |= listed(keep, row);
            if !stays {
                weights[at] = 0.0;
                r.ids[at] = -1;
            }
        }
    }
    Ok(())
}

/// Divides a row by its norm; a row without weight becomes 0, a row with NaN becomes NaN.
fn divide(norm: WeighNorm, eps: f64, floor: f64, row: &mut [f64]) {
    let total: f64 = match norm {
        WeighNorm::Sum => row.iter().sum(),
        WeighNorm::L1 => row.iter().map(|w| w.abs()).sum(),
        WeighNorm::L2 => row.iter().map(|w| w * w).sum::<f64>().sqrt(),
    };
    // `max` would take the floor for NaN.
    let divisor = if total.is_nan() { total } else { (total + eps).max(floor) };
    for weight in row {
        *weight = if total <= 0.0 { 0.0 } else { *weight / divisor };
    }
}

/// Slot 0 of all rows first, then slot 1, and so on.
pub(super) fn limit(op: &Limit, operands: &[&Value]) -> Step<Value> {
    let mut r = route(operands, 0)?.clone();
    let sequence: Vec<usize> = match op.priority {
        Priority::Position => (0..r.rows).collect(),
        Priority::Score => {
            let scores = last_axis(operands, 1)?;
            let first = |row: usize| r.expert(row, 0).map_or(0.0, |e| scores.at(row)[e]);
            order(&(0..r.rows).map(first).collect::<Vec<_>>())
        }
    };
    let capacity = match op.fraction {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be from 0 up")]
        Some(share) => (share * r.rows as f64).ceil() as u64,
        None => op.capacity.unwrap_or(u64::MAX),
    };
    let mut taken = vec![0u64; size(r.experts)?];
    for slot in 0..r.slots {
        for row in &sequence {
            let Some(e) = r.expert(*row, slot) else { continue };
            if taken[e] < capacity {
                taken[e] += 1;
                continue;
            }
            let at = row * r.slots + slot;
            r.ids[at] = -1;
            if let Some(w) = &mut r.weights {
                w[at] = 0.0;
            }
        }
    }
    Ok(Value::Route(r))
}

/// Rows whose class is not 0 use one expert with weight 1.
pub(super) fn override_rows(op: &Override, operands: &[&Value]) -> Step<Value> {
    let mut r = route(operands, 0)?.clone();
    let when = tensor(operands, 1)?.floats();
    let mut weights = r.weights.take().ok_or_else(|| Failure("the route has no weights".to_owned()))?;
    for (row, class) in when.iter().enumerate() {
        if *class == 0.0 {
            continue;
        }
        let slots = row * r.slots..(row + 1) * r.slots;
        r.ids[slots.clone()].fill(-1);
        weights[slots].fill(0.0);
        r.ids[row * r.slots] = i64::try_from(op.expert).unwrap_or(-1);
        weights[row * r.slots] = 1.0;
    }
    Ok(Value::Route(RouteValue { experts: op.experts, weights: Some(weights), ..r }))
}

pub(super) fn count(operands: &[&Value]) -> Step<Value> {
    let r = route(operands, 0)?;
    let mut counts = vec![0.0; size(r.experts)?];
    for id in &r.ids {
        if let Ok(e) = usize::try_from(*id) {
            counts[e] += 1.0;
        }
    }
    Ok(Value::Tensor(Array::f64(vec![counts.len()], counts)))
}
