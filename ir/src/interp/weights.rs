//! Weights while a graph runs: where they come from, and values composed of several.

use super::{Array, Failure, InterpError, Step};
use crate::{Weight, WeightName, WeightSpec, infer::Cx};
use indexmap::IndexMap;

/// Which tensor of a template is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WeightIndex {
    /// Expert inside its bank part (`{e}`).
    pub expert: Option<u64>,
    /// Group of a factored weight (`{g}`).
    pub group: Option<u64>,
}

impl WeightIndex {
    /// The name with `{e}` and `{g}` replaced.
    pub fn apply(&self, name: &str) -> String {
        let mut name = name.to_owned();
        for (mark, value) in [("{e}", self.expert), ("{g}", self.group)] {
            if let Some(value) = value {
                name = name.replace(mark, &value.to_string());
            }
        }
        name
    }
}

/// Source of weights.
pub trait Weights {
    /// The tensor behind a weight of the graph, as the graph sees it: decoded, after its view.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn get(&self, name: &WeightName, weight: &Weight, index: WeightIndex) -> Result<Array, InterpError>;
}

/// Weights by name; `{e}` and `{g}` are replaced in the name.
#[derive(Clone, Debug, Default)]
pub struct MapWeights(pub IndexMap<String, Array>);

impl Weights for MapWeights {
    fn get(&self, name: &WeightName, _: &Weight, index: WeightIndex) -> Result<Array, InterpError> {
        let key = index.apply(name);
        self.0
            .get(&key)
            .cloned()
            .ok_or_else(|| InterpError::Weight { name: name.clone(), message: format!("there is no tensor `{key}`") })
    }
}

/// Weights with the graph's declarations.
pub(super) struct Fetch<'a> {
    pub(super) cx: &'a Cx<'a>,
    pub(super) weights: &'a dyn Weights,
}

/// A matrix or vector of numbers.
pub(super) struct Matrix {
    pub(super) data: Vec<f64>,
    pub(super) shape: Vec<usize>,
}

impl Matrix {
    pub(super) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    pub(super) fn columns(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    pub(super) fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.columns()..(i + 1) * self.columns()]
    }

    /// `W x` for each of the rows in `x`.
    pub(super) fn apply(&self, x: &[f64]) -> Vec<f64> {
        (0..self.rows()).map(|o| dot(self.row(o), x)).collect()
    }
}

/// Sum of products.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

impl Fetch<'_> {
    /// A weight that does not depend on the expert.
    pub(super) fn plain(&self, name: &WeightName) -> Step<Array> {
        self.get(name, WeightIndex::default(), 0)
    }

    /// A weight as numbers.
    pub(super) fn matrix(&self, name: &WeightName) -> Step<Matrix> {
        self.plain(name).map(|a| Matrix { data: a.floats(), shape: a.shape })
    }

    /// The tensor, checked against the declared shape of entry `e`.
    fn get(&self, name: &WeightName, index: WeightIndex, e: u64) -> Step<Array> {
        let weight = self.cx.weight(name)?;
        let wanted = self.cx.shape_at(name, e)?;
        let array = self.weights.get(name, weight, index)?;
        array.check().map_err(|m| Failure(format!("weight `{name}`: {m}")))?;
        // A column is a vector, in files that say so and in those that do not.
        let long = |sizes: &[u64]| sizes.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
        let found: Vec<u64> = array.shape.iter().map(|n| *n as u64).collect();
        if long(&found) == long(&wanted) {
            let shape = wanted.iter().map(|n| usize::try_from(*n).unwrap_or(usize::MAX)).collect();
            return Ok(Array { shape, ..array });
        }
        let key = index.apply(name);
        Err(Failure(format!("weight `{key}` has shape {:?}, {wanted:?} is declared", array.shape)))
    }

    fn numbers(&self, name: &WeightName, e: u64, group: Option<u64>, entry: u64) -> Step<Matrix> {
        let array = self.get(name, WeightIndex { expert: Some(e), group }, entry)?;
        Ok(Matrix { data: array.floats(), shape: array.shape })
    }

    /// The composed value for expert `e` of a part. Its shapes have been checked.
    pub(super) fn spec(&self, spec: &WeightSpec, e: u64) -> Step<Matrix> {
        spec.shape(self.cx, e)?;
        match spec {
            WeightSpec::Plain(name) => self.numbers(name, e, None, e),
            WeightSpec::Mul { mul: [a, b], group } => {
                let g = group.get(super::value::size(e)?).copied().unwrap_or_default();
                let factor = |name| self.numbers(name, e, Some(g), WeightSpec::entry(name, e, g));
                Ok(product(&factor(a)?, &factor(b)?))
            }
            WeightSpec::Base { base, a, b, scale } => {
                let mut sum = self.numbers(base, e, None, e)?;
                let delta = product(&self.numbers(b, e, None, e)?, &self.numbers(a, e, None, e)?);
                for (x, d) in sum.data.iter_mut().zip(delta.data) {
                    *x += scale * d;
                }
                Ok(sum)
            }
            WeightSpec::Grouped { codes, scale, zero, group_size, bits } => {
                let mut value = self.numbers(codes, e, None, e)?;
                let own = usize::try_from(e).ok().and_then(|e| bits.get(e)).copied();
                let held = |code: f64, bits: u64| {
                    code.fract() == 0.0 && (0.0..f64::from(1u32 << bits.min(31))).contains(&code)
                };
                if let Some(code) = own.and_then(|bits| value.data.iter().find(|code| !held(**code, bits))) {
                    return Err(Failure(format!(
                        "`{codes}` of expert {e} has the code {code}, which its bits do not hold"
                    )));
                }
                let (scale, zero) = (self.numbers(scale, e, None, e)?, self.numbers(zero, e, None, e)?);
                let (columns, group) = (value.columns(), super::value::size(*group_size)?);
                for (i, x) in value.data.iter_mut().enumerate() {
                    let at = (i / columns) * scale.columns() + (i % columns) / group;
                    *x = (*x - zero.data[at]) * scale.data[at];
                }
                Ok(value)
            }
            WeightSpec::Ternary { codes, scale } => {
                let mut value = self.numbers(codes, e, None, e)?;
                if let Some(code) = value.data.iter().find(|code| ![-1.0, 0.0, 1.0].contains(*code)) {
                    return Err(Failure(format!(
                        "`{codes}` of expert {e} has the code {code}, which is not -1, 0 or 1"
                    )));
                }
                let scale = self.numbers(scale, e, None, e)?;
                super::tensor::scale_in_place(&mut value.data, &value.shape, &scale.data, &scale.shape);
                Ok(value)
            }
            WeightSpec::Slice { slice, axis, n } => {
                let dense = self.numbers(slice, e, None, e)?;
                let axis = super::value::size(*axis)?;
                let len = dense.shape[axis] / super::value::size(*n)?;
                let start = super::value::size(e)? * len;
                Ok(take(&dense, axis, &(start..start + len).collect::<Vec<_>>()))
            }
            WeightSpec::Take { take: name, ids, axis } => {
                let dense = self.numbers(name, e, None, e)?;
                let axis = super::value::size(*axis)?;
                let mut kept = Vec::new();
                for id in self.numbers(ids, e, None, e)?.data {
                    if !(id >= 0.0 && id < dense.shape[axis] as f64) {
                        return Err(Failure(format!("index {id} of `{ids}` is outside `{name}`")));
                    }
                    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
                    kept.push(id as usize);
                }
                Ok(take(&dense, axis, &kept))
            }
        }
    }

    /// A bias, if there is one.
    pub(super) fn bias(&self, spec: Option<&WeightSpec>, e: u64) -> Step<Option<Vec<f64>>> {
        spec.map(|s| self.spec(s, e).map(|m| m.data)).transpose()
    }
}

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let (rows, inner, columns) = (a.rows(), b.rows(), b.columns());
    let mut data = vec![0.0; rows * columns];
    for i in 0..rows {
        for k in 0..inner {
            for j in 0..columns {
                data[i * columns + j] += a.data[i * inner + k] * b.data[k * columns + j];
            }
        }
    }
    Matrix { data, shape: vec![rows, columns] }
}

/// Entries `kept` of an axis.
fn take(dense: &Matrix, axis: usize, kept: &[usize]) -> Matrix {
    let mut shape = dense.shape.clone();
    shape[axis] = kept.len();
    let strides = super::value::strides(&dense.shape);
    let mut data = Vec::new();
    super::value::for_each_index(&shape, |index| {
        let at: usize = index.iter().enumerate().map(|(i, n)| strides[i] * if i == axis { kept[*n] } else { *n }).sum();
        data.push(dense.data[at]);
    });
    Matrix { data, shape }
}
