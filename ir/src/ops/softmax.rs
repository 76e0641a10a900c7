//! Softmax of the last axis.

use super::{is_unit, unit};
use crate::{
    Type, codes,
    infer::{Cx, OpError, OpResult, arithmetic, arity, want_last, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%p = softmax %x`: `softmax(x / temp)` on the last axis. A row of -inf alone gives NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Softmax {
    /// Temperature.
    #[serde(default = "unit", skip_serializing_if = "is_unit")]
    pub temp: f64,
}

impl Softmax {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [x] = arity(operands)?;
        let shape = &want_tensor(x, "the operand")?.shape;
        if shape.is_empty() {
            want_last(shape, "the operand")?;
        }
        if self.temp == 0.0 || !self.temp.is_finite() {
            return Err(OpError::new(
                codes::VALUE,
                format!("`temp` is {}, a number other than 0 is needed", self.temp),
            ));
        }
        Ok(arithmetic(shape.clone()))
    }
}
