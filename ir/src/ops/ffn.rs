//! The feed-forward form: dense, and as a bank part.

use super::{UnaryFn, is_default};
use crate::WeightSpec;
use serde::{Deserialize, Serialize};

/// `%y = ffn %x {up = "..", gate = "..", down = "..", act = "silu"}`
///
/// `down(act(gate x) * up x)`, or `down(act(up x))` without a gate. The same attributes describe
/// one part of an expert bank. The inner width is the row count of `up`; 0 gives output 0.
/// Without `down` the value is the inner activation (kernel form, made by `fuse-expert-ffn`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ffn {
    /// Gate matrix `[inner, in]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<WeightSpec>,
    /// Gate bias `[inner]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate_bias: Option<WeightSpec>,
    /// Up matrix `[inner, in]` (`[2 inner, in]` when packed).
    pub up: WeightSpec,
    /// Up bias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up_bias: Option<WeightSpec>,
    /// Down matrix `[out, inner]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down: Option<WeightSpec>,
    /// Down bias `[out]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down_bias: Option<WeightSpec>,
    /// Activation of the gate (of `up` without a gate).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<UnaryFn>,
    /// `up` holds value rows, then gate rows; the activation is on the second half.
    #[serde(default, skip_serializing_if = "is_default")]
    pub packed: bool,
    /// Activations are quantised to int8, one scale per token, before each product (MoTE).
    #[serde(default, skip_serializing_if = "is_default")]
    pub a8: bool,
    /// Upper clamp of the gate and two-sided clamp of the up value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<f64>,
    /// Whether the gate is clamped before or after its activation.
    #[serde(default, skip_serializing_if = "is_default")]
    pub limit_on: LimitOn,
    /// The gate's activation is `g * sigmoid(alpha g)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Added to the up value, after its clamp.
    #[serde(default, skip_serializing_if = "is_default")]
    pub up_add: f64,
}

/// Where `limit` clamps the gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitOn {
    /// The pre-activation (gpt-oss, DeepSeek-V4, GLM-5).
    #[default]
    Gate,
    /// The activated value (Step-3).
    Act,
}
