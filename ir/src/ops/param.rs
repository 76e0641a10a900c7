//! A weight as a value.

use crate::{
    TensorType, Type, WeightName,
    infer::{Cx, OpResult, arity, fixed},
};
use serde::{Deserialize, Serialize};

/// `%w = param {w = "centroids"}`: the weight tensor itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Param {
    /// The weight.
    pub w: WeightName,
}

impl Param {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [] = arity(operands)?;
        let shape = fixed(&cx.shape(&self.w)?);
        Ok(Type::Tensor(TensorType { dtype: cx.weight(&self.w)?.dtype, shape }))
    }
}
