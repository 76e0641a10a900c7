//! Values that are composed of several stored tensors.

use crate::{
    error::{Code, Result, RuntimeError},
    tensors::Tensors,
    weights::materialize,
};
use moec_abi::{Matrix, Recipe, Source};

/// Values row by row.
pub(crate) struct Dense {
    pub(crate) values: Vec<f32>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

fn size(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| RuntimeError::new(Code::Memory, format!("{n} values do not fit in memory")))
}

/// The source with the number of a group in its name.
pub(crate) fn in_group(source: &Source, group: Option<u64>) -> Source {
    match group {
        None => source.clone(),
        Some(g) => Source { tensor: source.tensor.replace("{g}", &g.to_string()), ..source.clone() },
    }
}

/// Part `i` of a recipe for expert `e`.
fn part(recipe: &Recipe, i: usize, matrix: &Matrix, e: u64, prefix: &str, tensors: &dyn Tensors) -> Result<Dense> {
    let (number, group) = recipe.number(i, e);
    let (rows, columns) = matrix.size_of(number).ok_or_else(|| {
        RuntimeError::new(Code::Artefact, format!("tensor {} has no size for {number}", matrix.source.tensor))
    })?;
    let values = materialize(&in_group(&matrix.source, group), rows, columns, e, prefix, tensors)?;
    Ok(Dense { values, rows: size(rows)?, columns: size(columns)? })
}

/// The composed values for expert `e`.
pub(crate) fn compose(recipe: &Recipe, e: u64, prefix: &str, tensors: &dyn Tensors) -> Result<Dense> {
    let mut parts = Vec::new();
    for (i, matrix) in recipe.parts().into_iter().enumerate() {
        parts.push(part(recipe, i, matrix, e, prefix, tensors)?);
    }
    let misfit = || {
        RuntimeError::new(Code::TensorMismatch, "the tensors of a composed weight do not fit together".to_owned())
            .with_help("the checkpoint does not belong to the graph that was compiled")
    };
    match (recipe, parts.as_mut_slice()) {
        (Recipe::Zero { shape: [rows, columns] }, _) => {
            let (rows, columns) = (size(*rows)?, size(*columns)?);
            Ok(Dense { values: vec![0.0; rows * columns], rows, columns })
        }
        (Recipe::Product { .. }, [left, right]) if left.columns == right.rows => {
            let mut result =
                Dense { values: vec![0.0; left.rows * right.columns], rows: left.rows, columns: right.columns };
            add_product(left, right, 1.0, &mut result);
            Ok(result)
        }
        (Recipe::Adapted { scale, .. }, [base, a, b])
            if b.columns == a.rows && (b.rows, a.columns) == (base.rows, base.columns) =>
        {
            let mut result = Dense { values: std::mem::take(&mut base.values), ..*base };
            add_product(b, a, f64::from_bits(*scale), &mut result);
            Ok(result)
        }
        (Recipe::Grouped { group_size, .. }, [codes, scale, zero])
            if scale.values.len() == zero.values.len() && codes.rows == scale.rows =>
        {
            let group = size(*group_size)?.max(1);
            if scale.columns * group < codes.columns {
                return Err(misfit());
            }
            for (i, value) in codes.values.iter_mut().enumerate() {
                let at = i / codes.columns * scale.columns + i % codes.columns / group;
                *value = (*value - zero.values[at]) * scale.values[at];
            }
            Ok(Dense { values: std::mem::take(&mut codes.values), ..*codes })
        }
        (Recipe::Packed { bits, offset, .. }, [codes]) => packed(codes, *bits, *offset),
        (Recipe::Repeated { rows, .. }, [row]) if row.rows == 1 => {
            let rows = size(*rows)?;
            Ok(Dense { values: row.values.repeat(rows), rows, columns: row.columns })
        }
        (Recipe::Scaled { .. }, [codes, scale])
            if (scale.rows == 1 || scale.rows == codes.rows)
                && (scale.columns == 1 || scale.columns == codes.columns) =>
        {
            for (i, value) in codes.values.iter_mut().enumerate() {
                let row = if scale.rows == 1 { 0 } else { i / codes.columns };
                let column = if scale.columns == 1 { 0 } else { i % codes.columns };
                *value *= scale.values[row * scale.columns + column];
            }
            Ok(Dense { values: std::mem::take(&mut codes.values), ..*codes })
        }
        (Recipe::Take { axis, .. }, [dense, ids]) => take(dense, ids, *axis).ok_or_else(misfit),
        (
            Recipe::Product { .. }
            | Recipe::Adapted { .. }
            | Recipe::Grouped { .. }
            | Recipe::Packed { .. }
            | Recipe::Repeated { .. }
            | Recipe::Scaled { .. }
            | Recipe::Take { .. },
            _,
        ) => Err(misfit()),
    }
}

/// Bytes of several codes each.
fn packed(codes: &Dense, bits: u64, offset: u64) -> Result<Dense> {
    let each = size(8 / bits.max(1))?.max(1);
    let columns = codes.columns.div_ceil(each);
    let mut values = vec![0.0; codes.rows * columns];
    let top = ((1u64 << bits.min(8)) - 1) as f32;
    for (i, code) in codes.values.iter().enumerate() {
        let stored = code + offset as f32;
        if !(0.0..=top).contains(&stored) || stored.fract() != 0.0 {
            let message = format!("the code {code} of a weight does not fit in {bits} bits");
            return Err(RuntimeError::new(Code::TensorMismatch, message)
                .with_help("codes are integers; the checkpoint does not belong to the graph that was compiled"));
        }
        let (row, column) = (i / codes.columns, i % codes.columns);
        // Bytes are small integers, which f32 holds exactly.
        values[row * columns + column / each] += stored * (1u32 << (column % each * size(bits)?)) as f32;
    }
    Ok(Dense { values, rows: codes.rows, columns })
}

/// `result += scale * left right`, summed in f64.
fn add_product(left: &Dense, right: &Dense, scale: f64, result: &mut Dense) {
    let mut sums = vec![0f64; right.columns];
    for row in 0..left.rows {
        sums.fill(0.0);
        for k in 0..right.rows {
            let factor = f64::from(left.values[row * left.columns + k]);
            let line = &right.values[k * right.columns..(k + 1) * right.columns];
            sums.iter_mut().zip(line).for_each(|(sum, value)| *sum += factor * f64::from(*value));
        }
        let out = &mut result.values[row * right.columns..(row + 1) * right.columns];
        out.iter_mut().zip(&sums).for_each(|(value, sum)| *value = (f64::from(*value) + scale * sum) as f32);
    }
}

/// Rows or columns by index; `None` when an index lies outside.
fn take(dense: &Dense, ids: &Dense, axis: u64) -> Option<Dense> {
    let limit = if axis == 0 { dense.rows } else { dense.columns };
    let index = |id: &f32| (*id >= 0.0 && (*id as usize) < limit).then_some(*id as usize);
    let kept = ids.values.iter().map(index).collect::<Option<Vec<usize>>>()?;
    let (rows, columns) = if axis == 0 { (kept.len(), dense.columns) } else { (dense.rows, kept.len()) };
    let mut values = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        for column in 0..columns {
            let at = if axis == 0 { kept[row] * dense.columns + column } else { row * dense.columns + kept[column] };
            values.push(dense.values[at]);
        }
    }
    Some(Dense { values, rows, columns })
}
