//! Rows to experts and back, and rows of tables.

use super::{
    Array, ArrayData, Failure, PlanValue, RaggedValue, Step, Value,
    value::{ragged, route, size, tensor},
    weights::Fetch,
};
use crate::ops::{Combine, Dispatch, Gather, Plan};

/// Rows of a table; an empty slot of a route, -1, gives the last one.
pub(super) fn gather(op: &Gather, operands: &[&Value], w: &Fetch<'_>) -> Step<Value> {
    let (ids, lead, slots_may_be_empty) = match operands.first() {
        Some(Value::Route(r)) => (r.ids.clone(), vec![r.rows, r.slots], true),
        _ => {
            let ids = tensor(operands, 0)?;
            (ids.ints().unwrap_or_default().to_vec(), ids.shape.clone(), false)
        }
    };
    let table = w.plain(&op.w)?;
    let (rows, width) = (table.shape[0], table.shape[1..].iter().product::<usize>());
    let mut picked = Vec::with_capacity(ids.len());
    for id in &ids {
        match usize::try_from(*id).ok().filter(|i| *i < rows) {
            Some(i) => picked.push(i),
            None if slots_may_be_empty && *id == -1 && rows > 0 => picked.push(rows - 1),
            None => return Err(Failure(format!("id {id} is outside the table `{}` of {rows} rows", op.w))),
        }
    }
    let places = || picked.iter().flat_map(|i| i * width..(i + 1) * width);
    let data = match &table.data {
        ArrayData::F64(v) => ArrayData::F64(places().map(|at| v[at]).collect()),
        ArrayData::I64(v) => ArrayData::I64(places().map(|at| v[at]).collect()),
    };
    Ok(Value::Tensor(Array { shape: [lead, table.shape[1..].to_vec()].concat(), data }))
}

pub(super) fn plan(op: &Plan, operands: &[&Value]) -> Step<Value> {
    Ok(Value::Plan(PlanValue { route: route(operands, 0)?.clone(), repeat: size(op.repeat)? }))
}

/// One row for every filled slot, sorted by expert, then by token and slot.
pub(super) fn dispatch(op: &Dispatch, operands: &[&Value]) -> Step<Value> {
    let (x, r, repeat) = (tensor(operands, 0)?, route(operands, 1)?, size(op.repeat)?);
    let row: Vec<usize> = x.shape[1..].to_vec();
    let width: usize = row.iter().product();
    let mut places = Vec::new();
    for token in 0..x.shape[0] {
        for slot in 0..r.slots {
            if let Some(e) = r.expert(token / repeat, slot) {
                places.push((e, token, slot));
            }
        }
    }
    places.sort_unstable();
    let values = x.floats();
    let mut data = Vec::with_capacity(places.len() * width);
    for (_, token, slot) in &places {
        let factor = if op.weighted { r.weight(token / repeat, *slot) } else { 1.0 };
        data.extend(values[token * width..(token + 1) * width].iter().map(|v| v * factor));
    }
    Ok(Value::Ragged(RaggedValue {
        route: r.clone(),
        repeat,
        tokens: places.iter().map(|p| p.1).collect(),
        slots: places.iter().map(|p| p.2).collect(),
        experts: places.iter().map(|p| p.0).collect(),
        row,
        data,
    }))
}

/// The sum over slots of weight times row, in slot order.
pub(super) fn combine(op: &Combine, operands: &[&Value]) -> Step<Value> {
    let (rows, r, repeat) = (ragged(operands, 0)?, route(operands, 1)?, size(op.repeat)?);
    let (width, tokens) = (rows.width(), r.rows * repeat);
    let mut sequence: Vec<usize> = (0..rows.tokens.len()).collect();
    sequence.sort_by_key(|i| (rows.tokens[*i], rows.slots[*i]));
    let mut data = vec![0.0; tokens * width];
    for i in sequence {
        let (token, slot) = (rows.tokens[i], rows.slots[i]);
        let weight = match (op.weighted, r.expert(token / repeat, slot)) {
            (true, _) => r.weight(token / repeat, slot),
            (false, filled) => f64::from(u8::from(filled.is_some())),
        };
        for (y, v) in data[token * width..(token + 1) * width].iter_mut().zip(rows.at(i)) {
            *y += weight * v;
        }
    }
    Ok(Value::Tensor(Array::f64([vec![tokens], rows.row.clone()].concat(), data)))
}
