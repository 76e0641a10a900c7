//! Rearrangements without arithmetic.

use crate::{
    DType, Dim, RouteType, TensorType, Type, codes,
    infer::{Cx, OpError, OpResult, arity, axis_of, overflow, sizes, volume, want_route, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%y = shape %a, %b {fn = "concat", axis = 1}`: moves values, computes nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum Shape {
    /// Values one after another along `axis`. Routes are joined slot by slot (`axis` 1).
    Concat {
        /// Axis; negative counts from the last.
        axis: i64,
    },
    /// Entries of `axis`.
    Slice {
        /// Axis; negative counts from the last.
        axis: i64,
        /// Which entries.
        range: Range,
    },
    /// The same elements in row-major order with another shape; one size may be -1. Slots of a route become rows of one
    /// slot each (`[-1, 1]`).
    Reshape {
        /// New sizes.
        to: Vec<i64>,
    },
    /// Axes in another order.
    Transpose {
        /// Old axis of each new axis; negative counts from the last.
        perm: Vec<i64>,
    },
    /// Each entry of `axis` `n` times in a row.
    Repeat {
        /// Copies.
        n: u64,
        /// Axis; negative counts from the last.
        axis: i64,
    },
    /// Zeros at the end of axis 0 up to a multiple.
    Pad {
        /// The size becomes a multiple of this.
        multiple: u64,
    },
    /// Values side by side along a new `axis`.
    Stack {
        /// Position of the new axis.
        axis: i64,
    },
}

/// Entries of an axis: `[start, end]` with the end left out, or `[start, end, step]`. Where all of them are negative,
/// they count from the end of the axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<i64>", into = "Vec<i64>")]
pub struct Range {
    /// First entry.
    pub start: i64,
    /// The entry before which it ends.
    pub end: i64,
    /// Distance of neighbours; negative for falling ones.
    pub step: i64,
}

impl From<[i64; 2]> for Range {
    fn from([start, end]: [i64; 2]) -> Self {
        Self { start, end, step: 1 }
    }
}

impl TryFrom<Vec<i64>> for Range {
    type Error = String;

    fn try_from(values: Vec<i64>) -> Result<Self, String> {
        match values[..] {
            [start, end] => Ok([start, end].into()),
            [start, end, step] if step != 0 => Ok(Self { start, end, step }),
            _ => Err("a range is [start, end] or [start, end, step] with a step that is not 0".into()),
        }
    }
}

impl From<Range> for Vec<i64> {
    fn from(range: Range) -> Self {
        let mut values = vec![range.start, range.end];
        if range.step != 1 {
            values.push(range.step);
        }
        values
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.start, self.end)?;
        if self.step == 1 { Ok(()) } else { write!(f, " by {}", self.step) }
    }
}

impl Range {
    /// Entries that it holds; `None` where the end lies before the start.
    pub fn entries(self) -> Option<u64> {
        let (span, step) = (self.end.checked_sub(self.start)?, self.step);
        let forward = if step < 0 { span.checked_neg()? } else { span };
        Some(u64::try_from(forward).ok()?.div_ceil(step.unsigned_abs()))
    }

    /// Least number of entries of an axis that holds the range.
    pub fn reach(self) -> u64 {
        let entries = self.entries().unwrap_or(0);
        let Some(before) = entries.checked_sub(1) else { return self.start.unsigned_abs() };
        let last = i64::try_from(before).unwrap_or(i64::MAX).saturating_mul(self.step).saturating_add(self.start);
        let needed = |at: i64| if at < 0 { at.unsigned_abs() } else { at.unsigned_abs().saturating_add(1) };
        needed(self.start).max(needed(last))
    }

    /// First entry and distance, both as they count from the start of an axis with `size` entries; `None` where entries
    /// do not lie on it, or count from an end that is not known.
    pub fn steps(self, size: Option<u64>) -> Option<[i64; 2]> {
        let entries = i64::try_from(self.entries()?).ok()?;
        let size = size.map(i64::try_from).transpose().ok()?;
        if entries == 0 {
            let on = self.start.unsigned_abs() <= size.map_or(u64::MAX, i64::unsigned_abs);
            return on.then_some([0, self.step]);
        }
        let last = self.start.checked_add(self.step.checked_mul(entries - 1)?)?;
        let start = match size {
            Some(size) if self.start < 0 && last < 0 => self.start.checked_add(size)?,
            Some(_) | None => self.start,
        };
        let last = start + (last - self.start);
        let on = |at: i64| at >= 0 && size.is_none_or(|size| at < size);
        (on(start) && on(last)).then_some([start, self.step])
    }
}

impl Shape {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        match self {
            Self::Concat { axis } => return concat(*axis, operands),
            Self::Stack { axis } => return stack(*axis, operands),
            Self::Slice { .. }
            | Self::Reshape { .. }
            | Self::Transpose { .. }
            | Self::Repeat { .. }
            | Self::Pad { .. } => {}
        }
        let [x] = arity(operands)?;
        if let (Self::Reshape { to }, Type::Route(route)) = (self, x) {
            return slots_as_rows(to, route);
        }
        let x = want_tensor(x, "the operand")?;
        let shape = match self {
            Self::Slice { axis, range } => slice(&x.shape, *axis, *range)?,
            Self::Reshape { to } => reshape(&x.shape, to)?,
            Self::Transpose { perm } => transpose(&x.shape, perm)?,
            Self::Repeat { n, axis } => {
                let axis = axis_of(*axis, x.shape.len())?;
                map_axis(&x.shape, axis, |d| d.mul((*n).into()))?
            }
            Self::Pad { multiple: 0 } => {
                return Err(OpError::new(codes::VALUE, "`multiple` is 0, at least 1 is needed"));
            }
            Self::Pad { multiple } => {
                axis_of(0, x.shape.len())?;
                map_axis(&x.shape, 0, |d| d.ceil_div(*multiple).mul((*multiple).into()))?
            }
            Self::Concat { .. } | Self::Stack { .. } => x.shape.clone(),
        };
        Ok(Type::Tensor(TensorType { dtype: x.dtype, shape }))
    }
}

/// The shape with one size changed.
fn map_axis(shape: &[Dim], axis: usize, change: impl Fn(Dim) -> Option<Dim>) -> OpResult<Vec<Dim>> {
    let mut shape = shape.to_vec();
    if let Some(dim) = shape.get_mut(axis) {
        *dim = change(dim.clone()).ok_or_else(overflow)?;
    }
    Ok(shape)
}

/// The element type that holds both: equal types, else f32.
fn common_type(types: &[&TensorType]) -> DType {
    match types {
        [first, rest @ ..] if rest.iter().all(|t| t.dtype == first.dtype) => first.dtype,
        _ => DType::F32,
    }
}

fn tensors<'a>(operands: &[&'a Type]) -> OpResult<Vec<&'a TensorType>> {
    if operands.is_empty() {
        return Err(OpError::new(codes::ARITY, "has no operands, takes at least 1"));
    }
    operands.iter().map(|ty| want_tensor(ty, "an operand")).collect()
}

fn concat(axis: i64, operands: &[&Type]) -> OpResult<Type> {
    if matches!(operands.first(), Some(Type::Route(_))) {
        return concat_routes(axis, operands);
    }
    let tensors = tensors(operands)?;
    let mut shape = tensors[0].shape.clone();
    let axis = axis_of(axis, shape.len())?;
    for ty in &tensors[1..] {
        let others_equal = ty.shape.len() == shape.len()
            && ty.shape.iter().zip(&shape).enumerate().all(|(i, (a, b))| i == axis || a == b);
        if !others_equal {
            let text = format!("{} and {} differ beside axis {axis}", sizes(&shape), sizes(&ty.shape));
            return Err(OpError::new(codes::SHAPE, text));
        }
        shape = map_axis(&shape, axis, |d| d.add(ty.shape[axis].clone()))?;
    }
    Ok(Type::Tensor(TensorType { dtype: common_type(&tensors), shape }))
}

/// Routes side by side: the slots of the first, then those of the second, and so on.
fn concat_routes(axis: i64, operands: &[&Type]) -> OpResult<Type> {
    if axis_of(axis, 2)? != 1 {
        return Err(OpError::new(codes::SHAPE, format!("routes are joined along axis 1, not {axis}")));
    }
    let routes = operands.iter().map(|ty| want_route(ty, "an operand")).collect::<OpResult<Vec<_>>>()?;
    let first = routes[0];
    let mut slots = 0u64;
    for route in &routes {
        if route.rows != first.rows || route.experts != first.experts || route.weighted != first.weighted {
            let text = format!("routes [{first}] and [{route}] differ in more than slots");
            return Err(OpError::new(codes::SHAPE, text));
        }
        slots = slots.checked_add(route.slots).ok_or_else(overflow)?;
    }
    Ok(Type::Route(RouteType { slots, ..first.clone() }))
}

/// Every slot a row.
fn slots_as_rows(to: &[i64], route: &RouteType) -> OpResult<Type> {
    if to != [-1, 1] {
        return Err(OpError::new(codes::SHAPE, format!("a route [{route}] becomes rows of one slot, `to` is {to:?}")));
    }
    let rows = route.rows.clone().mul(route.slots.into()).ok_or_else(overflow)?;
    Ok(Type::Route(RouteType { rows, slots: 1, ..route.clone() }))
}

fn stack(axis: i64, operands: &[&Type]) -> OpResult<Type> {
    let tensors = tensors(operands)?;
    let mut shape = tensors[0].shape.clone();
    if let Some(ty) = tensors.iter().find(|ty| ty.shape != shape) {
        let text = format!("{} and {} differ", sizes(&shape), sizes(&ty.shape));
        return Err(OpError::new(codes::SHAPE, text));
    }
    let axis = axis_of(axis, shape.len() + 1)?;
    shape.insert(axis, Dim::Const(tensors.len() as u64));
    Ok(Type::Tensor(TensorType { dtype: common_type(&tensors), shape }))
}

fn slice(shape: &[Dim], axis: i64, range: Range) -> OpResult<Vec<Dim>> {
    let at = axis_of(axis, shape.len())?;
    let size = shape.get(at).cloned().unwrap_or(Dim::Const(0));
    match (range.entries(), range.steps(size.known())) {
        (Some(entries), Some(_)) => map_axis(shape, at, |_| Some(Dim::Const(entries))),
        (_, None) | (None, _) => {
            Err(OpError::new(codes::SHAPE, format!("range {range} of axis {axis}, which has {size} entries")))
        }
    }
}

/// One size may be -1: the quotient of all elements by the other sizes.
fn reshape(shape: &[Dim], to: &[i64]) -> OpResult<Vec<Dim>> {
    let total = volume(shape)?;
    let mut known = 1u64;
    let mut open = None;
    for (i, size) in to.iter().enumerate() {
        match u64::try_from(*size) {
            Ok(n) => known = known.checked_mul(n).ok_or_else(overflow)?,
            Err(_) if *size == -1 && open.is_none() => open = Some(i),
            Err(_) => {
                return Err(OpError::new(codes::VALUE, format!("size {size} in {to:?}; one size may be -1")));
            }
        }
    }
    let mut result: Vec<Dim> = to.iter().map(|n| Dim::Const(u64::try_from(*n).unwrap_or(0))).collect();
    let fits = match open {
        None => total == Dim::Const(known),
        Some(_) if known == 0 => false,
        Some(at) => {
            result[at] = total.clone().ceil_div(known);
            total.known().is_none_or(|n| n.is_multiple_of(known))
        }
    };
    if fits {
        return Ok(result);
    }
    let text = format!("{} has {total} elements, {to:?} has not", sizes(shape));
    Err(OpError::new(codes::SHAPE, text))
}

fn transpose(shape: &[Dim], perm: &[i64]) -> OpResult<Vec<Dim>> {
    let mut seen = vec![false; shape.len()];
    let mut result = Vec::with_capacity(shape.len());
    for axis in perm {
        match axis_of(*axis, shape.len()) {
            Ok(at) if !seen[at] => {
                seen[at] = true;
                result.push(shape[at].clone());
            }
            Ok(_) | Err(_) => break,
        }
    }
    if result.len() == shape.len() && perm.len() == shape.len() {
        return Ok(result);
    }
    Err(OpError::new(codes::VALUE, format!("`perm` {perm:?} is not an order of {} axes", shape.len())))
}
