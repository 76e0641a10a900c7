//! Rearrangements: every result element is one operand element, or 0 in a pad.

use super::{
    Array, ArrayData, Failure, RouteValue, Step, Value,
    value::{for_each_index, route, size, strides, tensor},
};
use crate::{Type, ops::Shape};

pub(super) fn shape(op: &Shape, operands: &[&Value], ty: &Type) -> Step<Value> {
    if let Some(Value::Route(first)) = operands.first() {
        return match op {
            Shape::Reshape { .. } => {
                Ok(Value::Route(RouteValue { rows: first.rows * first.slots, slots: 1, ..first.clone() }))
            }
            Shape::Concat { .. }
            | Shape::Slice { .. }
            | Shape::Transpose { .. }
            | Shape::Repeat { .. }
            | Shape::Pad { .. }
            | Shape::Stack { .. } => concat_routes(operands),
        };
    }
    let Type::Tensor(ty) = ty else { return Err(Failure("has no tensor as result".to_owned())) };
    let shape = ty.shape.iter().map(|d| size(d.known().unwrap_or_default())).collect::<Step<Vec<usize>>>()?;
    let arrays = (0..operands.len()).map(|i| tensor(operands, i)).collect::<Step<Vec<_>>>()?;
    let axis_of = |axis: i64, rank: usize| crate::infer::axis_of(axis, rank);
    let x = arrays[0];
    let from = strides(&x.shape);
    let flat = |index: &[usize]| -> usize { index.iter().zip(&from).map(|(i, s)| i * s).sum() };
    let changed = |index: &[usize], axis: usize, to: usize| {
        let mut index = index.to_vec();
        index[axis] = to;
        (0, flat(&index))
    };
    // Where each result element comes from: operand and position.
    let mut sources: Vec<Option<(usize, usize)>> = Vec::new();
    match op {
        Shape::Reshape { .. } => sources.extend((0..x.len()).map(|i| Some((0, i)))),
        Shape::Slice { axis, range } => {
            let axis = axis_of(*axis, shape.len())?;
            let size = x.shape[axis];
            let outside = || Failure(format!("range {range} of an axis with {size} entries"));
            let [start, step] = range.steps(Some(size as u64)).ok_or_else(outside)?;
            let place = |i: usize| usize::try_from(start + step * i as i64).unwrap_or_default();
            for_each_index(&shape, |i| sources.push(Some(changed(i, axis, place(i[axis])))));
        }
        Shape::Repeat { n, axis } => {
            let (axis, n) = (axis_of(*axis, shape.len())?, size(*n)?);
            for_each_index(&shape, |i| sources.push(Some(changed(i, axis, i[axis] / n))));
        }
        Shape::Pad { .. } => {
            for_each_index(&shape, |i| sources.push((i[0] < x.shape[0]).then(|| (0, flat(i)))));
        }
        Shape::Transpose { perm } => {
            let perm = perm.iter().map(|p| Ok(axis_of(*p, shape.len())?)).collect::<Step<Vec<_>>>()?;
            for_each_index(&shape, |i| {
                let at: usize = i.iter().zip(&perm).map(|(n, old)| n * from[*old]).sum();
                sources.push(Some((0, at)));
            });
        }
        Shape::Stack { axis } => {
            let axis = axis_of(*axis, shape.len())?;
            for_each_index(&shape, |i| {
                let mut inner = i.to_vec();
                let operand = inner.remove(axis);
                sources.push(Some((operand, flat(&inner))));
            });
        }
        Shape::Concat { axis } => {
            let axis = axis_of(*axis, shape.len())?;
            for_each_index(&shape, |i| {
                let (mut operand, mut at) = (0, i[axis]);
                while at >= arrays[operand].shape[axis] {
                    at -= arrays[operand].shape[axis];
                    operand += 1;
                }
                let mut inner = i.to_vec();
                inner[axis] = at;
                let place = inner.iter().zip(strides(&arrays[operand].shape)).map(|(n, s)| n * s).sum();
                sources.push(Some((operand, place)));
            });
        }
    }
    Ok(Value::Tensor(pick(&arrays, shape, &sources)))
}

/// The elements at the sources; integers stay integers where all operands are.
fn pick(arrays: &[&Array], shape: Vec<usize>, sources: &[Option<(usize, usize)>]) -> Array {
    let ints: Option<Vec<&[i64]>> = arrays.iter().map(|a| a.ints()).collect();
    let data = if let Some(ints) = ints {
        ArrayData::I64(sources.iter().map(|s| s.map_or(0, |(a, i)| ints[a][i])).collect())
    } else {
        let floats: Vec<Vec<f64>> = arrays.iter().map(|a| a.floats()).collect();
        ArrayData::F64(sources.iter().map(|s| s.map_or(0.0, |(a, i)| floats[a][i])).collect())
    };
    Array { shape, data }
}

/// Slots side by side.
fn concat_routes(operands: &[&Value]) -> Step<Value> {
    let routes = (0..operands.len()).map(|i| route(operands, i)).collect::<Step<Vec<_>>>()?;
    let first = routes[0];
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for row in 0..first.rows {
        for r in &routes {
            let slots = row * r.slots..(row + 1) * r.slots;
            ids.extend_from_slice(&r.ids[slots.clone()]);
            if let Some(w) = &r.weights {
                weights.extend_from_slice(&w[slots]);
            }
        }
    }
    Ok(Value::Route(RouteValue {
        rows: first.rows,
        slots: routes.iter().map(|r| r.slots).sum(),
        experts: first.experts,
        ids,
        weights: first.weights.is_some().then_some(weights),
    }))
}
