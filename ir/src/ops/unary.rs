//! Elementwise functions of one value.

use crate::{
    Type,
    infer::{Cx, OpResult, arithmetic, arity, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%y = unary %x {fn = "silu"}`: one function of each element.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unary {
    /// The function.
    #[serde(rename = "fn")]
    pub function: UnaryFn,
}

/// Functions of one number; also the activations of expert banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnaryFn {
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    Relu2,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + erf(x / sqrt 2)) / 2`.
    Gelu,
    /// The tanh form of gelu.
    GeluTanh,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `e^x`.
    Exp,
    /// Natural logarithm.
    Log,
    /// `-x`.
    Neg,
    /// `x^2`.
    Square,
    /// `log(1 + exp(x))`.
    Softplus,
    /// Square root.
    Sqrt,
    /// -1, 0 or 1; 0 at 0.
    Sign,
    /// Absolute value.
    Abs,
    /// `x`.
    Identity,
}

impl Unary {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [x] = arity(operands)?;
        Ok(arithmetic(want_tensor(x, "the operand")?.shape.clone()))
    }
}
