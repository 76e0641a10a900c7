//! Values while a graph runs.

use crate::{DType, Dim, RaggedType, RouteType, TensorType, Type};

/// A dense array in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Elements.
    pub data: ArrayData,
}

/// Elements of an array.
#[derive(Clone, Debug, PartialEq)]
pub enum ArrayData {
    /// Numbers.
    F64(Vec<f64>),
    /// Ids and classes.
    I64(Vec<i64>),
}

impl Array {
    /// An array of numbers.
    pub fn f64(shape: Vec<usize>, data: Vec<f64>) -> Self {
        Self { shape, data: ArrayData::F64(data) }
    }

    /// An array of integers.
    pub fn i64(shape: Vec<usize>, data: Vec<i64>) -> Self {
        Self { shape, data: ArrayData::I64(data) }
    }

    /// Number of elements that are there.
    pub fn len(&self) -> usize {
        match &self.data {
            ArrayData::F64(v) => v.len(),
            ArrayData::I64(v) => v.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The integers, if it holds integers.
    pub fn ints(&self) -> Option<&[i64]> {
        match &self.data {
            ArrayData::I64(v) => Some(v),
            ArrayData::F64(_) => None,
        }
    }

    /// All elements as numbers.
    pub fn floats(&self) -> Vec<f64> {
        match &self.data {
            ArrayData::F64(v) => v.clone(),
            ArrayData::I64(v) => v.iter().map(|i| *i as f64).collect(),
        }
    }

    /// What is wrong with the array itself.
    pub(crate) fn check(&self) -> Result<(), String> {
        let wanted = self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if wanted == Some(self.len()) {
            return Ok(());
        }
        Err(format!("shape {:?} with {} elements", self.shape, self.len()))
    }

    pub(crate) fn ty(&self) -> TensorType {
        let dtype = match self.data {
            ArrayData::F64(_) => DType::F32,
            ArrayData::I64(_) => DType::I64,
        };
        TensorType { dtype, shape: self.shape.iter().map(|n| Dim::Const(*n as u64)).collect() }
    }
}

/// Which experts each row uses.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteValue {
    /// Number of rows.
    pub rows: usize,
    /// Slots of a row.
    pub slots: usize,
    /// Number of experts.
    pub experts: u64,
    /// Expert of each slot, `[rows, slots]`; -1 is an empty slot.
    pub ids: Vec<i64>,
    /// Weight of each slot; 0 in empty slots.
    pub weights: Option<Vec<f64>>,
}

impl RouteValue {
    pub(crate) fn ty(&self) -> RouteType {
        RouteType {
            rows: Dim::Const(self.rows as u64),
            slots: self.slots as u64,
            experts: self.experts,
            weighted: self.weights.is_some(),
        }
    }

    /// Expert of a slot, if it is filled.
    pub fn expert(&self, row: usize, slot: usize) -> Option<usize> {
        self.ids.get(row * self.slots + slot).and_then(|e| usize::try_from(*e).ok())
    }

    /// Weight of a slot; 1 where the route has none.
    pub fn weight(&self, row: usize, slot: usize) -> f64 {
        self.weights.as_ref().map_or(1.0, |w| w[row * self.slots + slot])
    }
}

/// Positions of rows sorted by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanValue {
    /// The route behind it.
    pub route: RouteValue,
    /// Consecutive tokens that one route row stands for.
    pub repeat: usize,
}

/// Rows sorted by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct RaggedValue {
    /// The route that spread the rows.
    pub route: RouteValue,
    /// Consecutive tokens that one route row stands for.
    pub repeat: usize,
    /// Token of each row.
    pub tokens: Vec<usize>,
    /// Slot of each row.
    pub slots: Vec<usize>,
    /// Expert of each row, rising.
    pub experts: Vec<usize>,
    /// Shape of one row.
    pub row: Vec<usize>,
    /// The rows, one after another.
    pub data: Vec<f64>,
}

impl RaggedValue {
    /// Elements of one row.
    pub fn width(&self) -> usize {
        self.row.iter().product()
    }

    /// The elements of row `i`.
    pub fn at(&self, i: usize) -> &[f64] {
        let n = self.width();
        &self.data[i * n..(i + 1) * n]
    }
}

/// A value of the graph.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A dense array.
    Tensor(Array),
    /// Expert choices.
    Route(RouteValue),
    /// Positions of rows sorted by expert.
    Plan(PlanValue),
    /// Rows sorted by expert.
    Ragged(RaggedValue),
}

impl Value {
    /// The type with the sizes at hand; numbers count as f32, integers as i64.
    pub fn ty(&self) -> Type {
        match self {
            Self::Tensor(array) => Type::Tensor(array.ty()),
            Self::Route(route) => Type::Route(route.ty()),
            Self::Plan(plan) => Type::Plan(plan.route.ty()),
            Self::Ragged(rows) => Type::Ragged(RaggedType {
                route: rows.route.ty(),
                repeat: rows.repeat as u64,
                dtype: DType::F32,
                row: rows.row.iter().map(|n| *n as u64).collect(),
            }),
        }
    }
}

/// A matrix or stack of rows: elements with the size of the last axis.
pub(super) struct Rows {
    pub(super) data: Vec<f64>,
    pub(super) width: usize,
    pub(super) count: usize,
}

impl Rows {
    pub(super) fn at(&self, row: usize) -> &[f64] {
        &self.data[row * self.width..(row + 1) * self.width]
    }
}

use super::{Failure, Step};

/// The array of operand `i`.
pub(super) fn tensor<'a>(operands: &[&'a Value], i: usize) -> Step<&'a Array> {
    match operands.get(i) {
        Some(Value::Tensor(array)) => Ok(array),
        Some(Value::Route(_) | Value::Plan(_) | Value::Ragged(_)) | None => {
            Err(Failure(format!("operand {i} is not a tensor")))
        }
    }
}

/// The route of operand `i`.
pub(super) fn route<'a>(operands: &[&'a Value], i: usize) -> Step<&'a RouteValue> {
    match operands.get(i) {
        Some(Value::Route(route)) => Ok(route),
        Some(Value::Plan(plan)) => Ok(&plan.route),
        Some(Value::Tensor(_) | Value::Ragged(_)) | None => Err(Failure(format!("operand {i} is not a route"))),
    }
}

/// The rows of operand `i`.
pub(super) fn ragged<'a>(operands: &[&'a Value], i: usize) -> Step<&'a RaggedValue> {
    match operands.get(i) {
        Some(Value::Ragged(rows)) => Ok(rows),
        Some(Value::Tensor(_) | Value::Route(_) | Value::Plan(_)) | None => {
            Err(Failure(format!("operand {i} holds no rows sorted by expert")))
        }
    }
}

/// Operand `i` as rows of its last axis.
pub(super) fn last_axis(operands: &[&Value], i: usize) -> Step<Rows> {
    let array = tensor(operands, i)?;
    let width = array.shape.last().copied().unwrap_or(1);
    let count = array.shape.split_last().map_or(1, |(_, rest)| rest.iter().product());
    Ok(Rows { data: array.floats(), width, count })
}

/// A size as an index type.
pub(super) fn size(n: u64) -> Step<usize> {
    usize::try_from(n).map_err(|_| Failure(format!("size {n} exceeds the memory")))
}

/// Distances of neighbours on each axis.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// Calls `visit` with every index of a shape, in row-major order.
pub(super) fn for_each_index(shape: &[usize], mut visit: impl FnMut(&[usize])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = vec![0; shape.len()];
    loop {
        visit(&index);
        let mut axis = shape.len();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
}
