//! Normalisation of the last axis.

use crate::WeightName;
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
