//! Attention with given queries, keys and values.

use super::{
    Array, RaggedValue, Step, Value,
    tensor::softmax,
    value::{ragged, route, size, tensor},
    weights::dot,
};
use crate::ops::Attention;

pub(super) fn attention(op: &Attention, operands: &[&Value]) -> Step<Value> {
    if let Some(Value::Ragged(_)) = operands.first() {
        return per_slot(operands);
    }
    let (q, k, v) = (tensor(operands, 0)?, tensor(operands, 1)?, tensor(operands, 2)?);
    let [queries, heads, d] = [q.shape[0], q.shape[1], q.shape[2]];
    let (keys, n) = (k.shape[0], v.shape[2]);
    let (fq, fk, fv) = (q.floats(), k.floats(), v.floats());
    let key = |u: usize, h: usize| &fk[(u * heads + h) * d..(u * heads + h + 1) * d];
    let value = |u: usize, h: usize| &fv[(u * heads + h) * n..(u * heads + h + 1) * n];
    let mut data = Vec::with_capacity(queries * heads * n);
    for t in 0..queries {
        for h in 0..heads {
            let seen = match op.block {
                Some(block) => in_blocks(route(operands, 3)?, h * queries + t, size(block)?, t, keys),
                None if op.causal => (0..=t).collect(),
                None => (0..keys).collect::<Vec<_>>(),
            };
            let query = &fq[(t * heads + h) * d..(t * heads + h + 1) * d];
            data.extend(attend(query, &seen, n, |u| key(u, h), |u| value(u, h)));
        }
    }
    Ok(Value::Tensor(Array::f64(vec![queries, heads, n], data)))
}

/// Keys of the selected blocks, up to the token itself.
fn in_blocks(route: &super::RouteValue, row: usize, block: usize, t: usize, keys: usize) -> Vec<usize> {
    (0..route.slots)
        .filter_map(|slot| route.expert(row, slot))
        .flat_map(|b| b * block..(b * block + block).min(keys))
        .filter(|u| *u <= t)
        .collect()
}

/// One head per slot over shared keys and values.
fn per_slot(operands: &[&Value]) -> Step<Value> {
    let (q, k, v) = (ragged(operands, 0)?, tensor(operands, 1)?, tensor(operands, 2)?);
    let (d, n) = (k.shape[1], v.shape[1]);
    let (fk, fv) = (k.floats(), v.floats());
    let mut data = Vec::new();
    for (i, t) in q.tokens.iter().enumerate() {
        let seen: Vec<usize> = (0..=*t).collect();
        data.extend(attend(q.at(i), &seen, n, |u| &fk[u * d..(u + 1) * d], |u| &fv[u * n..(u + 1) * n]));
    }
    Ok(Value::Ragged(RaggedValue { row: vec![n], data, ..q.clone() }))
}

/// `softmax(q k / sqrt d) v` over the keys that are seen; 0 when none is.
fn attend<'a>(
    query: &[f64],
    seen: &[usize],
    n: usize,
    key: impl Fn(usize) -> &'a [f64],
    value: impl Fn(usize) -> &'a [f64],
) -> Vec<f64> {
    let scale = (query.len() as f64).sqrt();
    let logits: Vec<f64> = seen.iter().map(|u| dot(key(*u), query) / scale).collect();
    let mut sum = vec![0.0; n];
    for (u, p) in seen.iter().zip(softmax(&logits)) {
        for (s, v) in sum.iter_mut().zip(value(*u)) {
            *s += p * v;
        }
    }
    sum
}
