//! Expert banks and dense feed-forward networks.

use super::{
    Array, Failure, RaggedValue, Step, Value,
    special::sigmoid,
    tensor::{add, apply},
    value::{last_axis, ragged, size, tensor},
    weights::{Fetch, Matrix, dot},
};
use crate::{
    Type,
    ops::{BankPart, Experts, Ffn, LimitOn, PartKind},
};

/// Each row through its expert.
pub(super) fn experts(op: &Experts, operands: &[&Value], w: &Fetch<'_>, ty: &Type) -> Step<Value> {
    let Type::Ragged(ty) = ty else { return Err(Failure("has no rows as result".to_owned())) };
    let rows = ragged(operands, 0)?;
    let row = ty.row.iter().map(|n| size(*n)).collect::<Step<Vec<_>>>()?;
    let width: usize = row.iter().product();
    let mut data = vec![0.0; rows.tokens.len() * width];
    let tables = op.bank.iter().map(|part| tables(part, w)).collect::<Step<Vec<_>>>()?;
    let mut start = 0;
    // Rows are sorted, so that the rows of an expert are neighbours.
    for group in rows.experts.chunk_by(|a, b| a == b) {
        let id = group[0] as u64;
        let part = op.bank.iter().zip(&tables).find(|(p, _)| p.ids[0] <= id && id < p.ids[1]);
        let (part, tables) = part.ok_or_else(|| Failure(format!("expert {id} is in no part")))?;
        let x: Vec<&[f64]> = (start..start + group.len()).map(|i| rows.at(i)).collect();
        for (i, y) in through(part, part.number(id), &x, w, tables)?.into_iter().enumerate() {
            let at = (start + i) * width;
            // An expert that is narrower than the widest leaves zeros behind its values.
            data[at..at + y.len()].copy_from_slice(&y);
        }
        start += group.len();
    }
    Ok(Value::Ragged(RaggedValue { row, data, ..rows.clone() }))
}

/// Tables with a row for each expert, which are loaded once for all.
fn tables(part: &BankPart, w: &Fetch<'_>) -> Step<Vec<Matrix>> {
    match &part.kind {
        PartKind::Const { value } => Ok(vec![w.matrix(value)?]),
        PartKind::Neuron(op) => Ok(vec![w.matrix(&op.u)?, w.matrix(&op.v)?]),
        PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) | PartKind::Identity {} | PartKind::Zero {} => {
            Ok(Vec::new())
        }
    }
}

/// Rows of expert `e` of a part.
fn through(part: &BankPart, e: u64, x: &[&[f64]], w: &Fetch<'_>, tables: &[Matrix]) -> Step<Vec<Vec<f64>>> {
    Ok(match &part.kind {
        PartKind::Ffn(op) => ffn(op, e, x, w)?,
        PartKind::Linear(op) => affine(x, &w.spec(&op.w, e)?, w.bias(op.bias.as_ref(), e)?.as_deref()),
        PartKind::Film(op) => {
            let mul = affine(x, &w.spec(&op.mul, e)?, w.bias(op.mul_bias.as_ref(), e)?.as_deref());
            let mut y = affine(x, &w.spec(&op.add, e)?, w.bias(op.add_bias.as_ref(), e)?.as_deref());
            for ((y, m), x) in y.iter_mut().zip(&mul).zip(x) {
                for ((y, m), x) in y.iter_mut().zip(m).zip(*x) {
                    *y += m * x;
                }
            }
            y
        }
        PartKind::Const { .. } => vec![table_row(&tables[0], e)?.to_vec(); x.len()],
        PartKind::Neuron(op) => {
            let (u, v) = (table_row(&tables[0], e)?, table_row(&tables[1], e)?);
            let scaled = |x: &&[f64]| {
                let a = apply(op.act, dot(u, x));
                v.iter().map(|v| a * v).collect()
            };
            x.iter().map(scaled).collect()
        }
        PartKind::Identity {} => x.iter().map(|row| row.to_vec()).collect(),
        PartKind::Zero {} => vec![Vec::new(); x.len()],
    })
}

/// Row `e` of a table.
fn table_row(table: &Matrix, e: u64) -> Step<&[f64]> {
    let width: usize = table.shape[1..].iter().product();
    let at = size(e)? * width;
    Ok(&table.data[at..at + width])
}

/// `W x + b`; a row may be wider than the matrix, then its first entries count.
fn affine(x: &[&[f64]], matrix: &Matrix, bias: Option<&[f64]>) -> Vec<Vec<f64>> {
    let one = |row: &&[f64]| {
        let mut y = matrix.apply(row);
        if let Some(bias) = bias {
            add(&mut y, bias);
        }
        y
    };
    x.iter().map(one).collect()
}

/// Rounds a row to signed bytes: codes and their scale.
fn int8(row: &[f64]) -> (Vec<f64>, f64) {
    let scale = row.iter().fold(0.0f64, |m, v| m.max(v.abs())).max(1e-5) / 127.0;
    (row.iter().map(|v| (v / scale).round_ties_even().clamp(-128.0, 127.0)).collect(), scale)
}

/// `W x` with `x` rounded to signed bytes.
fn int8_product(x: &[f64], matrix: &Matrix) -> Vec<f64> {
    let (codes, scale) = int8(x);
    matrix.apply(&codes).into_iter().map(|y| y * scale).collect()
}

fn ffn(op: &Ffn, e: u64, x: &[&[f64]], w: &Fetch<'_>) -> Step<Vec<Vec<f64>>> {
    let up = w.spec(&op.up, e)?;
    let down = op.down.as_ref().map(|d| w.spec(d, e)).transpose()?;
    if up.rows() == 0 {
        // An expert without neurons gives 0, not its bias.
        return Ok(vec![vec![0.0; down.as_ref().map_or(0, Matrix::rows)]; x.len()]);
    }
    let inner = inner(op, e, x, &up, w)?;
    let rows: Vec<&[f64]> = inner.iter().map(Vec::as_slice).collect();
    let Some(down) = down else { return Ok(inner) };
    if op.a8 {
        return Ok(rows.iter().map(|h| int8_product(h, &down)).collect());
    }
    Ok(affine(&rows, &down, w.bias(op.down_bias.as_ref(), e)?.as_deref()))
}

/// The inner activation.
fn inner(op: &Ffn, e: u64, x: &[&[f64]], up: &Matrix, w: &Fetch<'_>) -> Step<Vec<Vec<f64>>> {
    let gate = op.gate.as_ref().map(|g| w.spec(g, e)).transpose()?;
    let product = |x: &[&[f64]], matrix: &Matrix, bias: Option<&[f64]>| -> Vec<Vec<f64>> {
        if op.a8 { x.iter().map(|row| int8_product(row, matrix)).collect() } else { affine(x, matrix, bias) }
    };
    let mut values = product(x, up, w.bias(op.up_bias.as_ref(), e)?.as_deref());
    let gates = match &gate {
        Some(gate) => Some(product(x, gate, w.bias(op.gate_bias.as_ref(), e)?.as_deref())),
        None if op.packed => Some(values.iter_mut().map(|v| v.split_off(v.len() / 2)).collect()),
        None => None,
    };
    let act = |z: f64| op.act.map_or(z, |f| apply(f, z));
    match gates {
        None => {
            for v in values.iter_mut().flatten() {
                *v = act(*v);
            }
        }
        Some(gates) => {
            for (v, g) in values.iter_mut().flatten().zip(gates.iter().flatten()) {
                *v = gated(op, *g, *v, act);
            }
        }
    }
    Ok(values)
}

/// `act(g) * (v + up_add)` with the clamps.
fn gated(op: &Ffn, g: f64, v: f64, act: impl Fn(f64) -> f64) -> f64 {
    let above = |z: f64, limit: f64| if z > limit { limit } else { z };
    let (mut g, mut v) = (g, v);
    if let Some(limit) = op.limit {
        v = if v < -limit { -limit } else { above(v, limit) };
        if op.limit_on == LimitOn::Gate {
            g = above(g, limit);
        }
    }
    let mut a = op.alpha.map_or_else(|| act(g), |alpha| g * sigmoid(alpha * g));
    if let (Some(limit), LimitOn::Act) = (op.limit, op.limit_on) {
        a = above(a, limit);
    }
    a * (v + op.up_add)
}

/// The dense form: one network for all rows.
pub(super) fn dense(op: &Ffn, operands: &[&Value], w: &Fetch<'_>, ty: &Type) -> Step<Value> {
    let Type::Tensor(ty) = ty else { return Err(Failure("has no tensor as result".to_owned())) };
    let rows = last_axis(operands, 0)?;
    let x: Vec<&[f64]> = (0..rows.count).map(|i| rows.at(i)).collect();
    let data = ffn(op, 0, &x, w)?.concat();
    let mut shape = tensor(operands, 0)?.shape.clone();
    if let (Some(last), Some(width)) = (shape.last_mut(), ty.shape.last().and_then(crate::Dim::known)) {
        *last = size(width)?;
    }
    Ok(Value::Tensor(Array::f64(shape, data)))
}
