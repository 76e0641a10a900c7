//! Choice among n*n experts by two short score rows.

use super::{
    Failure, RouteValue, Step, Value,
    select::order,
    value::{last_axis, size, tensor},
    weights::{Fetch, dot},
};
use crate::{Type, WeightName, ops::ProductKey};

pub(super) fn product_key(op: &ProductKey, operands: &[&Value], w: &Fetch<'_>, ty: &Type) -> Step<Value> {
    let Type::Route(ty) = ty else { return Err(Failure("has no route as result".to_owned())) };
    let (rows, k) = (last_axis(operands, 0)?.count, size(ty.slots)?);
    let mut found = Vec::with_capacity(rows);
    match op {
        ProductKey::Sum { k1, k2, .. } => {
            let (query, k1, k2) = (last_axis(operands, 0)?, w.matrix(k1)?, w.matrix(k2)?);
            for row in 0..rows {
                let (left, right) = query.at(row).split_at(k1.columns());
                found.push(best_sums(&k1.apply(left), &k2.apply(right), k));
            }
        }
        ProductKey::Scores { .. } => {
            let (a, b) = (last_axis(operands, 0)?, last_axis(operands, 1)?);
            found.extend((0..rows).map(|row| best_sums(a.at(row), b.at(row), k)));
        }
        ProductKey::Tucker { core, u, v, .. } => tucker([core, u, v], operands, w, k, &mut found)?,
    }
    let (mut ids, mut scores) = (Vec::new(), Vec::new());
    for mut row in found {
        row.resize(k, (-1, 0.0));
        ids.extend(row.iter().map(|(id, _)| *id));
        scores.extend(row.iter().map(|(_, s)| *s));
    }
    Ok(Value::Route(RouteValue { rows, slots: k, experts: ty.experts, ids, weights: Some(scores) }))
}

fn best(scores: &[f64], k: usize) -> Vec<usize> {
    order(scores).into_iter().take(k).collect()
}

/// The best `k` sums: among the best `k` of each side, by falling sum.
fn best_sums(a: &[f64], b: &[f64], k: usize) -> Vec<(i64, f64)> {
    let mut candidates = Vec::new();
    for i in best(a, k) {
        for j in best(b, k) {
            candidates.push(((i * b.len() + j) as i64, a[i] + b[j]));
        }
    }
    keep_best(&candidates, k)
}

fn keep_best(candidates: &[(i64, f64)], k: usize) -> Vec<(i64, f64)> {
    let scores: Vec<f64> = candidates.iter().map(|(_, s)| *s).collect();
    best(&scores, k).into_iter().map(|at| candidates[at]).collect()
}

/// Rank-1 prescores with `u` and `v`, then the exact score `s1' C s2` of the k*k candidates.
fn tucker(
    [core, u, v]: [&WeightName; 3],
    operands: &[&Value],
    w: &Fetch<'_>,
    k: usize,
    found: &mut Vec<Vec<(i64, f64)>>,
) -> Step<()> {
    let (core, u, v) = (w.matrix(core)?, w.matrix(u)?.data, w.matrix(v)?.data);
    let (q1, q2) = (last_axis(operands, 0)?, last_axis(operands, 1)?);
    let (k1, k2) = (tensor(operands, 2)?, tensor(operands, 3)?);
    let (flat1, flat2) = (k1.floats(), k2.floats());
    // For each of n keys the r inner products over c: `t_n = sum_c q_c K[n, c, :]`.
    let project = |q: &[f64], keys: &[f64], shape: &[usize]| -> Vec<Vec<f64>> {
        let (n, c, r) = (shape[0], shape[1], shape[2]);
        (0..n).map(|i| (0..r).map(|s| (0..c).map(|j| q[j] * keys[(i * c + j) * r + s]).sum()).collect()).collect()
    };
    for row in 0..q1.count {
        let a = project(q1.at(row), &flat1, &k1.shape);
        let b = project(q2.at(row), &flat2, &k2.shape);
        let left = best(&a.iter().map(|t| dot(t, &u)).collect::<Vec<_>>(), k);
        let right = best(&b.iter().map(|t| dot(t, &v)).collect::<Vec<_>>(), k);
        let mut candidates = Vec::new();
        for i in &left {
            for j in &right {
                let score = dot(&a[*i], &core.apply(&b[*j]));
                candidates.push(((i * b.len() + j) as i64, score));
            }
        }
        found.push(keep_best(&candidates, k));
    }
    Ok(())
}
