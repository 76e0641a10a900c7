//! Choice of experts.

use super::{
    Failure, RouteValue, Step, Value,
    value::{last_axis, size, tensor},
};
use crate::{
    Type,
    ops::{Select, SelectRule},
};
use std::cmp::Ordering;

/// Positions by falling score; equal scores by rising position, NaN below every number, -inf last.
pub(super) fn order(scores: &[f64]) -> Vec<usize> {
    let mut positions: Vec<usize> = (0..scores.len()).collect();
    positions.sort_by(|a, b| falling(scores[*a], scores[*b]));
    positions
}

fn falling(a: f64, b: f64) -> Ordering {
    // A row of NaN still chooses experts, so that its result is NaN and not a number that looks right.
    let rank = |score: f64| if score.is_nan() { 1 } else { 2 * u8::from(score > f64::NEG_INFINITY) };
    rank(b).cmp(&rank(a)).then_with(|| b.partial_cmp(&a).unwrap_or(Ordering::Equal))
}

/// Whether a score may be selected: not -inf.
fn allowed(score: f64) -> bool {
    score.is_nan() || score > f64::NEG_INFINITY
}

pub(super) fn select(op: &Select, operands: &[&Value], ty: &Type) -> Step<Value> {
    let bounded;
    let rule = if op.bound {
        let bound = tensor(operands, 1)?.floats().first().copied().unwrap_or(f64::NAN);
        bounded = at_most(&op.rule, bound);
        &bounded
    } else {
        &op.rule
    };
    let Type::Route(ty) = ty else { return Err(Failure("has no route as result".to_owned())) };
    if let SelectRule::Given { experts } = rule {
        return given(operands, *experts);
    }
    let scores = last_axis(operands, 0)?;
    let slots = size(ty.slots)?;
    let columns = match rule {
        SelectRule::ExpertChoice { capacity, factor } => {
            Some(expert_choice(&scores.data, scores.count, scores.width, *capacity, *factor))
        }
        SelectRule::Topk { .. }
        | SelectRule::Rank { .. }
        | SelectRule::All
        | SelectRule::Topp { .. }
        | SelectRule::Threshold { .. }
        | SelectRule::GroupTopk { .. }
        | SelectRule::GroupLimited { .. }
        | SelectRule::Given { .. } => None,
    };
    let mut ids = Vec::with_capacity(scores.count * slots);
    for row in 0..scores.count {
        let line = scores.at(row);
        let mut chosen = match &columns {
            Some(chosen) => chosen[row].clone(),
            None => one_row(rule, line)?,
        };
        chosen.truncate(slots);
        ids.extend(chosen.iter().map(|e| *e as i64));
        ids.extend(std::iter::repeat_n(-1, slots - chosen.len()));
    }
    Ok(Value::Route(RouteValue { rows: scores.count, slots, experts: ty.experts, ids, weights: None }))
}

/// The rule with the smaller of its own bound and the one of the run.
fn at_most(rule: &SelectRule, bound: f64) -> SelectRule {
    match rule {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounds are small")]
        SelectRule::Topk { k } => SelectRule::Topk { k: (*k).min(bound.max(0.0) as u64) },
        SelectRule::Topp { p, strict, max_k } => SelectRule::Topp { p: p.min(bound), strict: *strict, max_k: *max_k },
        SelectRule::Rank { .. }
        | SelectRule::All
        | SelectRule::Threshold { .. }
        | SelectRule::GroupTopk { .. }
        | SelectRule::GroupLimited { .. }
        | SelectRule::ExpertChoice { .. }
        | SelectRule::Given { .. } => rule.clone(),
    }
}

/// Experts of one row. Rules that take the best leave out -inf; for rules that fill places it comes last.
fn one_row(rule: &SelectRule, s: &[f64]) -> Step<Vec<usize>> {
    let n = s.len();
    let first = |order: Vec<usize>, k: u64| order.into_iter().take(usize::try_from(k).unwrap_or(usize::MAX)).collect();
    Ok(match rule {
        SelectRule::Topk { k } => first(order(s).into_iter().filter(|e| allowed(s[*e])).collect(), *k),
        SelectRule::Rank { ranks } => {
            let order = order(s);
            ranks.iter().filter_map(|r| order.get(usize::try_from(*r).ok()?).copied()).collect()
        }
        SelectRule::All => (0..n).filter(|e| allowed(s[*e])).collect(),
        SelectRule::Topp { p, strict, max_k } => {
            let order = order(s);
            let mut sum = 0.0;
            let reached = order.iter().position(|e| {
                sum += s[*e];
                if *strict { sum > *p } else { sum >= *p }
            });
            first(order, (reached.map_or(n, |i| i + 1) as u64).min(max_k.unwrap_or(u64::MAX)))
        }
        SelectRule::Threshold { tau, quantile, strict, max_k, min_k } => {
            let bound = match quantile {
                Some(q) => quantile_of(s, *q),
                None => tau.unwrap_or(f64::NAN),
            };
            let order = order(s);
            let passes = |e: &usize| if *strict { s[*e] > bound } else { s[*e] >= bound };
            let passing: Vec<usize> = first(order.iter().copied().filter(passes).collect(), max_k.unwrap_or(u64::MAX));
            if passing.is_empty() && min_k.unwrap_or(0) > 0 { first(order, 1) } else { passing }
        }
        SelectRule::GroupTopk { groups, k } => {
            let m = n / size(*groups)?;
            (0..size(*groups)?)
                .flat_map(|g| {
                    first(order(&s[g * m..(g + 1) * m]), *k)
                        .into_iter()
                        .map(move |e: usize| g * m + e)
                        .collect::<Vec<_>>()
                })
                .collect()
        }
        SelectRule::GroupLimited { groups, group_top, keep_groups, k, dropped } => {
            let m = n / size(*groups)?;
            let best = |g: usize| -> f64 {
                let group = &s[g * m..(g + 1) * m];
                let top: Vec<usize> = first(order(group), *group_top);
                top.into_iter().map(|e| group[e]).sum()
            };
            let kept: Vec<usize> = first(order(&(0..size(*groups)?).map(best).collect::<Vec<_>>()), *keep_groups);
            let limited: Vec<f64> = (0..n)
                .map(|e| if kept.contains(&(e / m)) { s[e] } else { dropped.unwrap_or(f64::NEG_INFINITY) })
                .collect();
            first(order(&limited), *k)
        }
        SelectRule::ExpertChoice { .. } | SelectRule::Given { .. } => Vec::new(),
    })
}

/// Quantile by linear interpolation between neighbours, counted from the nearer one.
fn quantile_of(s: &[f64], q: f64) -> f64 {
    if s.iter().any(|v| v.is_nan()) || s.is_empty() {
        return f64::NAN;
    }
    let mut rising = s.to_vec();
    rising.sort_by(f64::total_cmp);
    let at = q * (rising.len() - 1) as f64;
    let low = at.floor();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "q lies in 0..=1")]
    let i = low as usize;
    let (a, b, t) = (rising[i], rising[(i + 1).min(rising.len() - 1)], at - low);
    if t < 0.5 { a + (b - a) * t } else { b - (b - a) * (1.0 - t) }
}

/// Every expert takes its best rows; a row's experts come by rising id.
fn expert_choice(s: &[f64], rows: usize, n: usize, capacity: Option<u64>, factor: Option<f64>) -> Vec<Vec<usize>> {
    let mut chosen = vec![Vec::new(); rows];
    for e in 0..n {
        let column: Vec<f64> = (0..rows).map(|t| s[t * n + e]).collect();
        // A row that is forced has a place, but it competes with no other.
        let competes = |t: &usize| allowed(column[*t]) && column[*t] < f64::INFINITY;
        let open = (0..rows).filter(competes).count();
        let share = factor.map(|f| (f * open as f64).ceil());
        for (i, t) in order(&column).into_iter().enumerate().filter(|(_, t)| competes(t)) {
            let fits = match (capacity, share) {
                (Some(c), _) => (i as u64) < c,
                (None, share) => (i as f64) < share.unwrap_or(0.0),
            };
            if fits {
                chosen[t].push(e);
            }
        }
    }
    chosen
}

/// Ids are data; -1 is an empty slot.
fn given(operands: &[&Value], experts: u64) -> Step<Value> {
    let array = tensor(operands, 0)?;
    let rows = array.shape.first().copied().unwrap_or(1);
    let slots = array.shape.iter().skip(1).product();
    let ids = array.ints().unwrap_or_default();
    let exists = |id: i64| id == -1 || u64::try_from(id).is_ok_and(|e| e < experts);
    if let Some(id) = ids.iter().find(|id| !exists(**id)) {
        return Err(Failure(format!("expert {id} is not one of {experts}")));
    }
    Ok(Value::Route(RouteValue { rows, slots, experts, ids: ids.to_vec(), weights: None }))
}
