//! Ops on tensors: products, elementwise functions, norms, reductions.

use super::{
    Array, Failure, Step, Value,
    special::{erf, sigmoid, softplus},
    value::{for_each_index, last_axis, strides, tensor},
    weights::Fetch,
};
use crate::ops::{Binary, BinaryFn, Linear, Norm, NormKind, Reduce, ReduceFn, Softmax, UnaryFn};

pub(super) fn linear(op: &Linear, operands: &[&Value], w: &Fetch<'_>) -> Step<Value> {
    let (x, matrix) = (last_axis(operands, 0)?, w.matrix(&op.w)?);
    let bias = op.b.as_ref().map(|b| w.matrix(b)).transpose()?;
    let mut data = Vec::with_capacity(x.count * matrix.rows());
    for i in 0..x.count {
        let mut y = matrix.apply(x.at(i));
        if let Some(bias) = &bias {
            add(&mut y, &bias.data);
        }
        data.extend(y);
    }
    let mut shape = tensor(operands, 0)?.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = matrix.rows();
    }
    Ok(Value::Tensor(Array::f64(shape, data)))
}

/// `y += b`.
pub(super) fn add(y: &mut [f64], b: &[f64]) {
    for (y, b) in y.iter_mut().zip(b) {
        *y += b;
    }
}

/// One function of one number.
pub(super) fn apply(function: UnaryFn, x: f64) -> f64 {
    match function {
        UnaryFn::Relu => max(x, 0.0),
        UnaryFn::Relu2 => max(x, 0.0) * max(x, 0.0),
        UnaryFn::Silu => x * sigmoid(x),
        UnaryFn::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        UnaryFn::GeluTanh => {
            0.5 * x * (1.0 + (std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044_715 * x * x * x)).tanh())
        }
        UnaryFn::Sigmoid => sigmoid(x),
        UnaryFn::Tanh => x.tanh(),
        UnaryFn::Exp => x.exp(),
        UnaryFn::Log => x.ln(),
        UnaryFn::Neg => -x,
        UnaryFn::Square => x * x,
        UnaryFn::Softplus => softplus(x),
        UnaryFn::Sqrt => x.sqrt(),
        UnaryFn::Sign if x == 0.0 || x.is_nan() => x,
        UnaryFn::Sign => x.signum(),
        UnaryFn::Abs => x.abs(),
        UnaryFn::Identity => x,
    }
}

/// The larger; NaN if one is.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// The smaller; NaN if one is.
fn min(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.min(b) }
}

pub(super) fn unary(function: UnaryFn, operands: &[&Value]) -> Step<Value> {
    let x = tensor(operands, 0)?;
    Ok(Value::Tensor(Array::f64(x.shape.clone(), x.floats().into_iter().map(|v| apply(function, v)).collect())))
}

fn apply2(function: BinaryFn, a: f64, b: f64) -> f64 {
    match function {
        BinaryFn::Add => a + b,
        BinaryFn::Sub => a - b,
        BinaryFn::Mul => a * b,
        BinaryFn::Div => a / b,
        BinaryFn::Max => max(a, b),
        BinaryFn::Min => min(a, b),
        BinaryFn::Gt => f64::from(u8::from(a > b)),
        BinaryFn::Ge => f64::from(u8::from(a >= b)),
    }
}

pub(super) fn binary(op: &Binary, operands: &[&Value], w: &Fetch<'_>) -> Step<Value> {
    let a = tensor(operands, 0)?;
    let b = match (&op.w, op.c) {
        (Some(name), _) => w.plain(name)?,
        (None, Some(c)) => Array::f64(Vec::new(), vec![c]),
        (None, None) => tensor(operands, 1)?.clone(),
    };
    let rank = a.shape.len().max(b.shape.len());
    let (wide_a, wide_b) = (widen(&a.shape, rank), widen(&b.shape, rank));
    let shape: Vec<usize> = wide_a.iter().zip(&wide_b).map(|(x, y)| if *x == 1 { *y } else { *x }).collect();
    let (at_a, at_b) = (strides(&wide_a), strides(&wide_b));
    let (va, vb) = (a.floats(), b.floats());
    let mut data = Vec::new();
    for_each_index(&shape, |index| {
        data.push(apply2(op.function, va[place(index, &wide_a, &at_a)], vb[place(index, &wide_b, &at_b)]));
    });
    Ok(Value::Tensor(Array::f64(shape, data)))
}

/// The shape with ones in front, up to `rank` sizes.
fn widen(shape: &[usize], rank: usize) -> Vec<usize> {
    [vec![1; rank - shape.len()], shape.to_vec()].concat()
}

/// Position of an index in an array whose axes of size 1 are repeated.
fn place(index: &[usize], shape: &[usize], strides: &[usize]) -> usize {
    index.iter().zip(shape).zip(strides).map(|((i, n), s)| if *n == 1 { 0 } else { i * s }).sum()
}

/// `values *= scale`, where the scale is repeated along axes of size 1.
pub(super) fn scale_in_place(values: &mut [f64], shape: &[usize], scale: &[f64], scale_shape: &[usize]) {
    let wide = widen(scale_shape, shape.len());
    let steps = strides(&wide);
    let mut at = 0;
    for_each_index(shape, |index| {
        values[at] *= scale[place(index, &wide, &steps)];
        at += 1;
    });
}

pub(super) fn norm(op: &Norm, operands: &[&Value], w: &Fetch<'_>) -> Step<Value> {
    let x = tensor(operands, 0)?;
    let eps = op.eps.unwrap_or(1e-6);
    if op.kind == NormKind::Batch {
        return batch_norm(op, x, eps, w);
    }
    let rows = last_axis(operands, 0)?;
    let load = |name: &Option<String>| name.as_ref().map(|n| w.matrix(n)).transpose();
    let (factor, offset) = (load(&op.w)?, load(&op.b)?);
    let n = rows.width as f64;
    let mut data = Vec::with_capacity(rows.data.len());
    for i in 0..rows.count {
        let row = rows.at(i);
        let squares = row.iter().map(|v| v * v).sum::<f64>();
        let mean = row.iter().sum::<f64>() / n;
        let (shift, divisor) = match op.kind {
            NormKind::Rms => (0.0, (squares / n + eps).sqrt()),
            NormKind::Layer => {
                let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
                (mean, (variance + eps).sqrt())
            }
            NormKind::L2 => (0.0, max(squares.sqrt(), 1e-12)),
            NormKind::Batch => (0.0, 1.0),
        };
        for (j, v) in row.iter().enumerate() {
            let scaled = (v - shift) / divisor * factor.as_ref().map_or(1.0, |f| f.data[j]);
            data.push(scaled + offset.as_ref().map_or(0.0, |o| o.data[j]));
        }
    }
    Ok(Value::Tensor(Array::f64(x.shape.clone(), data)))
}

/// `(x - mean) / sqrt(var + eps)`, repeated as an elementwise function is.
fn batch_norm(op: &Norm, x: &Array, eps: f64, w: &Fetch<'_>) -> Step<Value> {
    let (Some(mean), Some(var)) = (&op.mean, &op.var) else { return Err(Failure("mean or var is missing".into())) };
    let (mean, var) = (w.plain(mean)?, w.plain(var)?);
    let rank = x.shape.len();
    let (wide_mean, wide_var) = (widen(&mean.shape, rank), widen(&var.shape, rank));
    let (at_mean, at_var) = (strides(&wide_mean), strides(&wide_var));
    let (values, mean, var) = (x.floats(), mean.floats(), var.floats());
    let mut data = Vec::with_capacity(values.len());
    for_each_index(&x.shape, |index| {
        let m = mean[place(index, &wide_mean, &at_mean)];
        let v = var[place(index, &wide_var, &at_var)];
        data.push((values[data.len()] - m) / (v + eps).sqrt());
    });
    Ok(Value::Tensor(Array::f64(x.shape.clone(), data)))
}

/// Softmax of one row; a row of -inf alone gives NaN.
pub(super) fn softmax(row: &[f64]) -> Vec<f64> {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, max);
    let top = if top.is_finite() { top } else { 0.0 };
    let e: Vec<f64> = row.iter().map(|z| (z - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|v| v / sum).collect()
}

pub(super) fn softmax_op(op: &Softmax, operands: &[&Value]) -> Step<Value> {
    let rows = last_axis(operands, 0)?;
    let mut data = Vec::with_capacity(rows.data.len());
    for i in 0..rows.count {
        data.extend(softmax(&rows.at(i).iter().map(|z| z / op.temp).collect::<Vec<_>>()));
    }
    Ok(Value::Tensor(Array::f64(tensor(operands, 0)?.shape.clone(), data)))
}

pub(super) fn reduce(op: &Reduce, operands: &[&Value]) -> Step<Value> {
    let x = tensor(operands, 0)?;
    let axis = crate::infer::axis_of(op.axis, x.shape.len())?;
    let n = x.shape[axis];
    let (inner, outer) = (x.shape[axis + 1..].iter().product::<usize>(), x.shape[..axis].iter().product::<usize>());
    let bounded = matches!(op.function, ReduceFn::Max | ReduceFn::Min);
    if n == 0 && bounded && inner * outer > 0 {
        return Err(Failure(format!("the largest or smallest of no values, axis {axis} is empty")));
    }
    let values = x.floats();
    let mut data = Vec::with_capacity(inner * outer);
    for o in 0..outer {
        for i in 0..inner {
            let line = (0..n).map(|j| values[(o * n + j) * inner + i]);
            data.push(match op.function {
                ReduceFn::Sum => line.sum(),
                ReduceFn::Mean => line.sum::<f64>() / n as f64,
                ReduceFn::Max => line.fold(f64::NEG_INFINITY, max),
                ReduceFn::Min => line.fold(f64::INFINITY, min),
            });
        }
    }
    let mut shape = x.shape.clone();
    if op.keep {
        shape[axis] = 1;
    } else {
        shape.remove(axis);
    }
    Ok(Value::Tensor(Array::f64(shape, data)))
}
