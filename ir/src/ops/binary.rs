//! Elementwise functions of two values.

use crate::{
    Type, WeightName, codes,
    infer::{Cx, OpError, OpResult, arithmetic, arity, broadcast, fixed, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%y = binary %a, %b {fn = "add"}`: the second operand is a value, a weight, or a constant; broadcasting as usual.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binary {
    /// The function.
    #[serde(rename = "fn")]
    pub function: BinaryFn,
    /// Second operand, if it is a weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub w: Option<WeightName>,
    /// Second operand, if it is a constant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub c: Option<f64>,
}

/// Functions of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BinaryFn {
    /// `a + b`.
    Add,
    /// `a - b`.
    Sub,
    /// `a * b`.
    Mul,
    /// `a / b`.
    Div,
    /// The larger.
    Max,
    /// The smaller.
    Min,
    /// 1 where `a > b`, else 0.
    Gt,
    /// 1 where `a >= b`, else 0.
    Ge,
}

impl Binary {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let (a, b) = match (&self.w, self.c) {
            (None, None) => {
                let [a, b] = arity(operands)?;
                (a, want_tensor(b, "the second operand")?.shape.clone())
            }
            (Some(w), None) => {
                let [a] = arity(operands)?;
                (a, fixed(&cx.shape(w)?))
            }
            (None, Some(_)) => {
                let [a] = arity(operands)?;
                (a, Vec::new())
            }
            (Some(_), Some(_)) => {
                return Err(OpError::new(codes::ATTRIBUTE, "has a weight `w` and a constant `c`, takes one of them"));
            }
        };
        Ok(arithmetic(broadcast(&want_tensor(a, "the first operand")?.shape, &b)?))
    }
}
