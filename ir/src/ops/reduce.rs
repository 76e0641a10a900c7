//! Reduction of one axis.

use super::is_default;
use crate::{
    Dim, Type,
    infer::{Cx, OpResult, arithmetic, arity, axis_of, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%y = reduce %x {fn = "mean", axis = -1}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reduce {
    /// The function.
    #[serde(rename = "fn")]
    pub function: ReduceFn,
    /// Axis; negative counts from the last.
    pub axis: i64,
    /// Keep the axis with size 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub keep: bool,
}

/// Reductions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceFn {
    /// Sum.
    Sum,
    /// Arithmetic mean.
    Mean,
    /// Largest.
    Max,
    /// Smallest.
    Min,
}

impl Reduce {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [x] = arity(operands)?;
        let mut shape = want_tensor(x, "the operand")?.shape.clone();
        let axis = axis_of(self.axis, shape.len())?;
        if self.keep {
            shape.splice(axis..=axis, [Dim::Const(1)]);
        } else {
            shape.remove(axis);
        }
        Ok(arithmetic(shape))
    }
}
