//! Matrix product with a weight.

use crate::{
    Dim, Type, WeightName, codes,
    infer::{Cx, OpError, OpResult, arithmetic, arity, want_last, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%y = linear %x {w = "router.weight"}`: `x W^T + b` on the last axis, `W` is `[out, in]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// Matrix `[out, in]`.
    pub w: WeightName,
    /// Bias `[out]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b: Option<WeightName>,
}

impl Linear {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [x] = arity(operands)?;
        let (rest, width) = want_last(&want_tensor(x, "the operand")?.shape, "the operand")?;
        let [out, input] = cx.matrix(&self.w)?;
        if input != width {
            return Err(OpError::new(
                codes::SHAPE,
                format!("weight `{}` takes rows of {input}, the operand has rows of {width}", self.w),
            ));
        }
        if let Some(b) = &self.b {
            cx.want_vector(b, out)?;
        }
        Ok(arithmetic(rest.iter().cloned().chain([Dim::Const(out)]).collect()))
    }
}
