//! Ops that give each element, or each row of the last axis, on its own.

use super::cx::{Array, Cx, narrow};
use crate::{CodegenError, math, mlir::V};
use moec_ir::{
    Dim, WeightName,
    ops::{Binary, Einsum, Norm, NormKind, Reduce, ReduceFn, Shape, Softmax, Unary},
};

/// Axis that may count from the last.
fn axis_of(axis: i64, rank: usize) -> usize {
    let rank = i64::try_from(rank).unwrap_or(i64::MAX);
    usize::try_from(if axis < 0 { axis + rank } else { axis }).unwrap_or(0)
}

pub(super) fn unary<'c>(cx: &Cx<'_, 'c>, op: &Unary, at: V<'c>) -> Result<(), CodegenError> {
    let x = cx.array(0)?;
    cx.put(math::unary(cx.b, op.function, cx.float(&x, at)), at)
}

pub(super) fn param<'c>(cx: &Cx<'_, 'c>, name: &WeightName, at: V<'c>) -> Result<(), CodegenError> {
    let w = cx.weight(name)?;
    if cx.is_integer() { cx.put_integer(cx.integer(&w, at), at) } else { cx.put(cx.float(&w, at), at) }
}

/// One element of rows of a table.
pub(super) fn gather<'c>(cx: &Cx<'_, 'c>, name: &WeightName, at: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let (ids, table) = (cx.array(0)?, cx.weight(name)?);
    let sizes: Vec<u64> = table.shape.iter().filter_map(Dim::known).collect();
    let width = super::cx::c(sizes.iter().skip(1).product::<u64>().max(1));
    let id = cx.integer(&ids, b.divui(at, b.i64(width)));
    // An id outside of the table must not become an address.
    let last = b.i64(super::cx::c(sizes.first().copied().unwrap_or(1).saturating_sub(1)));
    let place = b.addi(b.mulc(b.minsi(b.maxsi(id, b.i64(0)), last), width), b.remui(at, b.i64(width)));
    if cx.is_integer() { cx.put_integer(cx.integer(&table, place), at) } else { cx.put(cx.float(&table, place), at) }
}

pub(super) fn binary<'c>(cx: &Cx<'_, 'c>, op: &Binary, at: V<'c>) -> Result<(), CodegenError> {
    let shape = cx.shape()?;
    let coordinates = cx.coordinates(at, shape);
    let load = |array: &Array<'c>| {
        let place = if array.shape == shape { at } else { cx.repeated(&coordinates, &array.shape) };
        cx.float(array, place)
    };
    let left = load(&cx.array(0)?);
    let right = match (&op.w, op.c) {
        (Some(w), _) => load(&cx.weight(w)?),
        (None, Some(value)) => cx.b.f32(narrow(value)),
        (None, None) => load(&cx.array(1)?),
    };
    cx.put(math::binary(cx.b, op.function, left, right), at)
}

/// One element of a rearrangement.
pub(super) fn shape<'c>(cx: &Cx<'_, 'c>, op: &Shape, at: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let to = cx.shape()?;
    let ints = cx.is_integer();
    let load = |array: &Array<'c>, place: V<'c>| if ints { cx.integer(array, place) } else { cx.float(array, place) };
    let kind = if ints { "i64" } else { "f32" };
    let zero = || if ints { b.i64(0) } else { b.f32(0.0) };
    let x = cx.array(0)?;
    let coordinates = cx.coordinates(at, to);
    let with = |axis: usize, value: V<'c>| {
        let mut changed = coordinates.clone();
        changed[axis] = value;
        changed
    };
    let value = match op {
        Shape::Reshape { .. } => load(&x, at),
        Shape::Slice { axis, range } => {
            let axis = axis_of(*axis, to.len());
            let Some(size) = x.shape.get(axis) else { return cx.fail("a scalar has no entries") };
            let Some([start, step]) = range.steps(size.known()) else { return cx.fail("the range is not on the axis") };
            // A range beyond the rows of a short batch must not leave the array.
            let place = b.addc(b.mulc(coordinates[axis], step), start);
            let from = with(axis, b.minsi(place, b.addc(cx.size(size), -1)));
            load(&x, cx.position(&from, &x.shape))
        }
        Shape::Repeat { n, axis } => {
            let axis = axis_of(*axis, to.len());
            let from = with(axis, b.divui(coordinates[axis], b.i64(super::cx::c((*n).max(1)))));
            load(&x, cx.position(&from, &x.shape))
        }
        Shape::Transpose { perm } => {
            let mut from = coordinates.clone();
            for (value, axis) in coordinates.iter().zip(perm) {
                from[axis_of(*axis, to.len())] = *value;
            }
            load(&x, cx.position(&from, &x.shape))
        }
        Shape::Pad { .. } => {
            let inside = match (coordinates.first(), x.shape.first()) {
                (Some(row), Some(rows)) => b.cmpi("slt", *row, cx.size(rows)),
                (None, _) | (_, None) => return cx.fail("a scalar has no rows"),
            };
            b.if_else(inside, &[kind], || vec![load(&x, at)], || vec![zero()])[0]
        }
        Shape::Stack { axis } => {
            let axis = axis_of(*axis, to.len());
            let mut inner = coordinates.clone();
            let which = inner.remove(axis);
            let arrays = (0..cx.operands()).map(|i| cx.array(i)).collect::<Result<Vec<_>, _>>()?;
            let parts: Vec<(V<'c>, Vec<V<'c>>)> =
                (0..arrays.len()).map(|i| (b.i64(super::cx::c(i as u64 + 1)), inner.clone())).collect();
            pick(cx, which, &arrays, &parts, kind, &load)
        }
        Shape::Concat { axis } => {
            let axis = axis_of(*axis, to.len());
            let arrays = (0..cx.operands()).map(|i| cx.array(i)).collect::<Result<Vec<_>, _>>()?;
            let mut start = b.i64(0);
            let mut parts = Vec::new();
            for array in &arrays {
                let from = with(axis, b.subi(coordinates[axis], start));
                start = b.addi(start, array.shape.get(axis).map_or_else(|| b.i64(1), |d| cx.size(d)));
                parts.push((start, from));
            }
            pick(cx, coordinates[axis], &arrays, &parts, kind, &load)
        }
    };
    if ints { cx.put_integer(value, at) } else { cx.put(value, at) }
}

/// The element of the first part whose end lies behind `which`.
fn pick<'c>(
    cx: &Cx<'_, 'c>,
    which: V<'c>,
    arrays: &[Array<'c>],
    parts: &[(V<'c>, Vec<V<'c>>)],
    kind: &str,
    load: &dyn Fn(&Array<'c>, V<'c>) -> V<'c>,
) -> V<'c> {
    let own = || load(&arrays[0], cx.position(&parts[0].1, &arrays[0].shape));
    if arrays.len() == 1 {
        return own();
    }
    cx.b.if_else(
        cx.b.cmpi("slt", which, parts[0].0),
        &[kind],
        || vec![own()],
        || vec![pick(cx, which, &arrays[1..], &parts[1..], kind, load)],
    )[0]
}

/// Sums over nested loops: `body` gives the term at these indices.
fn sums<'c>(cx: &Cx<'_, 'c>, sizes: &[V<'c>], indices: &mut Vec<V<'c>>, term: &dyn Fn(&[V<'c>]) -> V<'c>) -> V<'c> {
    let b = cx.b;
    let Some((size, rest)) = sizes.split_first() else { return term(indices) };
    b.for_(b.i64(0), *size, b.i64(1), &[b.f32(0.0)], |i, sum| {
        indices.push(i);
        let part = sums(cx, rest, indices, term);
        indices.pop();
        vec![b.addf(sum[0], part)]
    })[0]
}

/// One element of a sum of products.
pub(super) fn einsum<'c>(cx: &Cx<'_, 'c>, op: &Einsum, at: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let arrays = (0..cx.operands()).map(|i| cx.array(i)).collect::<Result<Vec<_>, _>>()?;
    let ranks: Vec<usize> = arrays.iter().map(|a| a.shape.len()).collect();
    let Some((inputs, result)) = op.letters(&ranks) else { return cx.fail("the equation is not valid") };
    // Sizes of the letters; a size of 1 gives way to another.
    let mut letters: Vec<(char, Dim)> = result.iter().map(|c| (*c, Dim::Const(1))).collect();
    for (array, axes) in arrays.iter().zip(&inputs) {
        for (letter, dim) in axes.iter().zip(&array.shape) {
            match letters.iter_mut().find(|(c, _)| c == letter) {
                None => letters.push((*letter, dim.clone())),
                Some((_, known)) if *known == Dim::Const(1) => known.clone_from(dim),
                Some(_) => {}
            }
        }
    }
    let outer = cx.coordinates(at, cx.shape()?);
    let inner: Vec<V<'c>> = letters[result.len()..].iter().map(|(_, dim)| cx.size(dim)).collect();
    let strides: Vec<Vec<V<'c>>> = arrays.iter().map(|a| cx.strides(&a.shape)).collect();
    let term = |indices: &[V<'c>]| {
        let index = |letter: char| {
            let place = letters.iter().position(|(c, _)| *c == letter).unwrap_or(0);
            outer.get(place).or_else(|| indices.get(place - outer.len())).copied().unwrap_or_else(|| b.i64(0))
        };
        let values = arrays.iter().zip(&inputs).zip(&strides).map(|((array, axes), strides)| {
            let mut place = b.i64(0);
            for ((letter, dim), stride) in axes.iter().zip(&array.shape).zip(strides) {
                if *dim != Dim::Const(1) {
                    place = b.addi(place, b.muli(index(*letter), *stride));
                }
            }
            cx.float(array, place)
        });
        values.reduce(|x, y| b.mulf(x, y)).unwrap_or_else(|| b.f32(1.0))
    };
    let total = sums(cx, &inner, &mut Vec::new(), &term);
    cx.put(total, at)
}

/// One element of a reduction.
pub(super) fn reduce<'c>(cx: &Cx<'_, 'c>, op: &Reduce, at: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let x = cx.array(0)?;
    let axis = axis_of(op.axis, x.shape.len());
    let (n, inner) = (cx.size(&x.shape[axis]), cx.strides(&x.shape)[axis]);
    let start = b.addi(b.muli(b.muli(b.divui(at, inner), n), inner), b.remui(at, inner));
    let first = match op.function {
        ReduceFn::Sum | ReduceFn::Mean => 0.0,
        ReduceFn::Max => f32::NEG_INFINITY,
        ReduceFn::Min => f32::INFINITY,
    };
    let total = b.for_(b.i64(0), n, b.i64(1), &[b.f32(first)], |i, sum| {
        let value = cx.float(&x, b.addi(start, b.muli(i, inner)));
        vec![match op.function {
            ReduceFn::Sum | ReduceFn::Mean => b.addf(sum[0], value),
            ReduceFn::Max => b.maximumf(sum[0], value),
            ReduceFn::Min => b.minimumf(sum[0], value),
        }]
    })[0];
    let total = if op.function == ReduceFn::Mean { b.divf(total, b.cast("arith.sitofp", n, "f32")) } else { total };
    cx.put(total, at)
}

/// Last axis of a tensor: its size, and the position of row `row`.
fn row<'c>(cx: &Cx<'_, 'c>, x: &Array<'c>, row: V<'c>) -> (V<'c>, V<'c>) {
    let n = x.shape.last().map_or_else(|| cx.b.i64(1), |d| cx.size(d));
    (n, cx.b.muli(row, n))
}

fn fold<'c>(cx: &Cx<'_, 'c>, n: V<'c>, first: f32, step: impl FnOnce(V<'c>, V<'c>) -> V<'c>) -> V<'c> {
    let b = cx.b;
    b.for_(b.i64(0), n, b.i64(1), &[b.f32(first)], |i, sum| vec![step(sum[0], i)])[0]
}

/// Softmax of row `unit` of the last axis.
pub(super) fn softmax<'c>(cx: &Cx<'_, 'c>, op: &Softmax, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let x = cx.array(0)?;
    let (n, start) = row(cx, &x, unit);
    let scaled = |i: V<'c>| {
        let value = cx.float(&x, b.addi(start, i));
        if op.temp.to_bits() == 1f64.to_bits() { value } else { b.divf(value, b.f32(narrow(op.temp))) }
    };
    let top = fold(cx, n, f32::NEG_INFINITY, |top, i| b.maximumf(top, scaled(i)));
    let term = |i: V<'c>| math::exp(b, b.subf(scaled(i), top));
    let sum = fold(cx, n, 0.0, |sum, i| b.addf(sum, term(i)));
    let mut outcome = Ok(());
    b.each(b.i64(0), n, |i| outcome = cx.put(b.divf(term(i), sum), b.addi(start, i)));
    outcome
}

/// Normalises row `unit` of the last axis; of the batch form, element `unit`.
pub(super) fn norm<'c>(cx: &Cx<'_, 'c>, op: &Norm, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let x = cx.array(0)?;
    let eps = b.f32(narrow(op.eps.unwrap_or(1e-6)));
    if op.kind == NormKind::Batch {
        let (Some(mean), Some(var)) = (&op.mean, &op.var) else { return cx.fail("`mean` or `var` is missing") };
        let coordinates = cx.coordinates(unit, &x.shape);
        let load = |w: &Array<'c>| cx.float(w, cx.repeated(&coordinates, &w.shape));
        let centred = b.subf(cx.float(&x, unit), load(&cx.weight(mean)?));
        let deviation = math::sqrt(b, b.addf(load(&cx.weight(var)?), eps));
        return cx.put(b.divf(centred, deviation), unit);
    }
    let (n, start) = row(cx, &x, unit);
    let value = |i: V<'c>| cx.float(&x, b.addi(start, i));
    let count = b.cast("arith.sitofp", n, "f32");
    let centre = if op.kind == NormKind::Layer {
        b.divf(fold(cx, n, 0.0, |sum, i| b.addf(sum, value(i))), count)
    } else {
        b.f32(0.0)
    };
    let squares = fold(cx, n, 0.0, |sum, i| {
        let d = b.subf(value(i), centre);
        b.addf(sum, b.mulf(d, d))
    });
    let divisor = if op.kind == NormKind::L2 {
        b.maximumf(math::sqrt(b, squares), b.f32(1e-12))
    } else {
        math::sqrt(b, b.addf(b.divf(squares, count), eps))
    };
    let affine = [&op.w, &op.b].map(|w| w.as_ref().map(|w| cx.weight(w)).transpose());
    let [factor, offset] = affine;
    let (factor, offset) = (factor?, offset?);
    let mut outcome = Ok(());
    b.each(b.i64(0), n, |i| {
        let y = b.divf(b.subf(value(i), centre), divisor);
        let y = factor.as_ref().map_or(y, |w| b.mulf(y, cx.float(w, i)));
        let y = offset.as_ref().map_or(y, |w| b.addf(y, cx.float(w, i)));
        outcome = cx.put(y, b.addi(start, i));
    });
    outcome
}
