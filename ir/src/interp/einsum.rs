//! Sums of products over named axes.

use super::{
    Array, Step, Value,
    value::{for_each_index, strides, tensor},
};
use crate::ops::Einsum;
use indexmap::IndexMap;

/// One loop over all axes of the equation.
pub(super) fn einsum(op: &Einsum, operands: &[&Value]) -> Step<Value> {
    let arrays = (0..operands.len()).map(|i| tensor(operands, i)).collect::<Step<Vec<_>>>()?;
    let equation = op.equation(&arrays.iter().map(|a| a.shape.len()).collect::<Vec<_>>())?;
    let mut sizes: IndexMap<char, usize> = equation.result.iter().map(|c| (*c, 1)).collect();
    for (array, letters) in arrays.iter().zip(&equation.operands) {
        for (letter, n) in letters.iter().zip(&array.shape) {
            let size = sizes.entry(*letter).or_insert(1);
            if *size == 1 {
                *size = *n;
            }
        }
    }
    let all: Vec<usize> = sizes.values().copied().collect();
    // Distance in each operand for a step on each axis; an axis of size 1 is repeated.
    let steps: Vec<Vec<usize>> = arrays
        .iter()
        .zip(&equation.operands)
        .map(|(array, letters)| {
            let mut step = vec![0; all.len()];
            for ((letter, n), stride) in letters.iter().zip(&array.shape).zip(strides(&array.shape)) {
                if let Some(axis) = sizes.get_index_of(letter)
                    && *n != 1
                {
                    step[axis] += stride;
                }
            }
            step
        })
        .collect();
    let values: Vec<Vec<f64>> = arrays.iter().map(|a| a.floats()).collect();
    let shape: Vec<usize> = all[..equation.result.len()].to_vec();
    let mut data = vec![0.0; shape.iter().product()];
    let at_result = strides(&shape);
    let place = |index: &[usize], step: &[usize]| -> usize { index.iter().zip(step).map(|(i, s)| i * s).sum() };
    for_each_index(&all, |index| {
        let term: f64 = values.iter().zip(&steps).map(|(v, step)| v[place(index, step)]).product();
        data[place(&index[..shape.len()], &at_result)] += term;
    });
    Ok(Value::Tensor(Array::f64(shape, data)))
}
