//! The feed-forward form: dense, and as a bank part.

use super::{UnaryFn, is_default};
use crate::{
    Dim, TensorType, Type, WeightSpec, codes,
    infer::{Cx, OpError, OpResult, arity, numbers, want_last, want_tensor},
};
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

impl Ffn {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [x] = arity(operands)?;
        let x = want_tensor(x, "the operand")?;
        let (rest, width) = want_last(&x.shape, "the operand")?;
        self.check_attributes()?;
        let out = self.width(cx, 0, width, false)?;
        let shape = rest.iter().cloned().chain([Dim::Const(out)]).collect();
        Ok(Type::Tensor(TensorType { dtype: x.dtype, shape }))
    }

    /// The weight specifications, by attribute.
    pub fn specs(&self) -> Vec<(&'static str, &WeightSpec)> {
        [
            ("gate", self.gate.as_ref()),
            ("gate_bias", self.gate_bias.as_ref()),
            ("up", Some(&self.up)),
            ("up_bias", self.up_bias.as_ref()),
            ("down", self.down.as_ref()),
            ("down_bias", self.down_bias.as_ref()),
        ]
        .into_iter()
        .filter_map(|(name, spec)| spec.map(|s| (name, s)))
        .collect()
    }

    /// Attributes that need each other are there, and none is without meaning.
    pub(crate) fn check_attributes(&self) -> OpResult<()> {
        let wrong = |text: &str| Err(OpError::new(codes::ATTRIBUTE, text));
        if self.gate.is_some() && self.packed {
            return wrong("`packed` holds the gate already, `gate` is a second one");
        }
        let gated = self.gate.is_some() || self.packed;
        if !gated && (self.alpha.is_some() || self.limit.is_some() || self.up_add != 0.0) {
            return wrong("`alpha`, `limit` and `up_add` go with a gate");
        }
        if self.limit.is_some_and(|limit| limit.is_nan() || limit < 0.0) {
            return wrong("`limit` bounds a size, so it is 0 or more");
        }
        if self.limit.is_none() && self.limit_on != LimitOn::Gate {
            return wrong("`limit_on` goes with `limit`");
        }
        if self.act.is_none() && self.alpha.is_none() {
            return wrong("`act` is missing");
        }
        if self.alpha.is_some() && self.act.is_some_and(|act| act != UnaryFn::Silu) {
            return wrong(
                "`alpha` makes the activation `g * sigmoid(alpha g)`, another `act` has no meaning beside it",
            );
        }
        if self.gate.is_none() && self.gate_bias.is_some() {
            return wrong("`gate_bias` goes with `gate`");
        }
        if self.down.is_none() && self.down_bias.is_some() {
            return wrong("`down_bias` goes with `down`");
        }
        let plain = [&self.gate_bias, &self.up_bias, &self.down_bias].iter().all(|b| b.is_none());
        if self.a8 && (!plain || self.packed || self.limit.is_some() || self.alpha.is_some() || self.up_add != 0.0) {
            return wrong("`a8` takes no biases, clamps or packed halves");
        }
        Ok(())
    }

    /// Width of the result for expert `e` over rows of `width`: that of `down`, or the inner width.
    /// If `narrow`, the matrix may take the first entries of a row only.
    pub(crate) fn width(&self, cx: &Cx<'_>, e: u64, width: u64, narrow: bool) -> OpResult<u64> {
        let up = self.up.shape(cx, e)?;
        let [rows, input] = matrix("up", &up)?;
        if input != width && !(narrow && input < width) {
            return Err(misfit(format!("`up` {} of expert {e} meets rows of {width}", numbers(&up))));
        }
        if let Some(gate) = &self.gate {
            let gate = gate.shape(cx, e)?;
            if gate != up {
                let text = format!("`gate` {} and `up` {} of expert {e} differ", numbers(&gate), numbers(&up));
                return Err(misfit(text));
            }
        }
        if self.packed && !rows.is_multiple_of(2) {
            return Err(misfit(format!("packed `up` {} of expert {e} has no two halves", numbers(&up))));
        }
        let inner = if self.packed { rows / 2 } else { rows };
        for (name, bias) in [("up_bias", &self.up_bias), ("gate_bias", &self.gate_bias)] {
            want_bias(cx, name, bias.as_ref(), e, rows)?;
        }
        let Some(down) = &self.down else { return Ok(inner) };
        let down = down.shape(cx, e)?;
        let [out, from] = matrix("down", &down)?;
        if from != inner {
            let text = format!("`down` {} of expert {e} takes {from}, the inner width is {inner}", numbers(&down));
            return Err(misfit(text));
        }
        want_bias(cx, "down_bias", self.down_bias.as_ref(), e, out)?;
        Ok(out)
    }
}

fn misfit(text: String) -> OpError {
    OpError::new(codes::FFN_SHAPES, text)
}

/// The two sizes of a matrix.
pub(crate) fn matrix(name: &str, shape: &[u64]) -> OpResult<[u64; 2]> {
    <[u64; 2]>::try_from(shape).map_err(|_| misfit(format!("`{name}` is {}, a matrix is needed", numbers(shape))))
}

/// Checks that a bias, if there is one, is a vector of `n`.
pub(crate) fn want_bias(cx: &Cx<'_>, name: &str, bias: Option<&WeightSpec>, e: u64, n: u64) -> OpResult<()> {
    let Some(bias) = bias else { return Ok(()) };
    let shape = bias.shape(cx, e)?;
    if shape == [n] {
        return Ok(());
    }
    Err(misfit(format!("`{name}` {} of expert {e} meets {n} values", numbers(&shape))))
}
