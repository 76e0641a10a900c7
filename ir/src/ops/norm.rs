//! Normalisation of the last axis.

use crate::{
    Type, WeightName, codes,
    infer::{Cx, OpError, OpResult, arithmetic, arity, broadcast, fixed, want_last, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%y = norm %x {kind = "rms", w = "norm.weight"}`: normalises the last axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// Which normalisation.
    pub kind: NormKind,
    /// Added to the mean square or variance. 1e-6 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Factor, `[n]` (`rms`, `layer`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub w: Option<WeightName>,
    /// Offset, `[n]` (`layer`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b: Option<WeightName>,
    /// Running mean, `[n]` (`batch`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<WeightName>,
    /// Running variance, `[n]` (`batch`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub var: Option<WeightName>,
}

/// Kinds of normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean x^2 + eps) * w`.
    Rms,
    /// `(x - mean) / sqrt(var + eps) * w + b`.
    Layer,
    /// `x / max(|x|, 1e-12)`.
    L2,
    /// `(x - mean_w) / sqrt(var_w + eps)` with running statistics.
    Batch,
}

impl Norm {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [x] = arity(operands)?;
        let shape = &want_tensor(x, "the operand")?.shape;
        let (_, width) = want_last(shape, "the operand")?;
        self.check_attributes()?;
        for w in [&self.w, &self.b].into_iter().flatten() {
            cx.want_vector(w, width)?;
        }
        for w in [&self.mean, &self.var].into_iter().flatten() {
            if broadcast(shape, &fixed(&cx.shape(w)?))? != *shape {
                return Err(OpError::new(codes::SHAPE, format!("weight `{w}` has more sizes than the operand")));
            }
        }
        Ok(arithmetic(shape.clone()))
    }

    /// Every attribute that is given must have a use, and `batch` needs its statistics.
    fn check_attributes(&self) -> OpResult<()> {
        let (w, b, running) = match self.kind {
            NormKind::Rms => (true, false, false),
            NormKind::Layer => (true, true, false),
            NormKind::L2 => (false, false, false),
            NormKind::Batch => (false, false, true),
        };
        let given = [
            ("w", self.w.is_some(), w),
            ("b", self.b.is_some(), b),
            ("mean", self.mean.is_some(), running),
            ("var", self.var.is_some(), running),
            ("eps", self.eps.is_some(), self.kind != NormKind::L2),
        ];
        for (name, given, used) in given {
            if given && !used {
                return Err(OpError::new(codes::ATTRIBUTE, format!("`{name}` has no meaning for this kind")));
            }
        }
        if running && (self.mean.is_none() || self.var.is_none()) {
            return Err(OpError::new(codes::ATTRIBUTE, "kind batch needs `mean` and `var`"));
        }
        Ok(())
    }
}
