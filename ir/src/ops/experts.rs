//! Expert banks.

use super::{Ffn, UnaryFn, is_default};
use crate::{WeightName, WeightSpec};
use serde::{Deserialize, Serialize};

/// `%e = experts %d {bank = [..]}`: each row through its expert.
///
/// Parts may differ in kind, width and storage, and cover `0..experts` of the route exactly once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// The parts, by rising ids.
    pub bank: Vec<BankPart>,
}

/// Experts `ids[0] .. ids[1]` of a bank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BankPart {
    /// First id and one past the last.
    pub ids: [u64; 2],
    /// `{e}` in weight names is the id minus this.
    #[serde(default, skip_serializing_if = "is_default")]
    pub base_id: u64,
    /// What these experts compute.
    #[serde(flatten)]
    pub kind: PartKind,
}

/// What the experts of a part compute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PartKind {
    /// Feed-forward network.
    Ffn(Box<Ffn>),
    /// One matrix.
    Linear(LinearBank),
    /// `M(x) * x + A(x)` (MoFME).
    Film(Film),
    /// The expert's row of a table; the input is ignored.
    Const {
        /// Table `[experts, ..]`.
        value: WeightName,
    },
    /// One neuron each: `act(u_e . x) v_e` (PEER).
    Neuron(Neuron),
    /// The input (LongCat).
    Identity {},
    /// Zero (null experts).
    Zero {},
}

/// `w x + bias`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearBank {
    /// Matrix `[out, in]`.
    pub w: WeightSpec,
    /// Bias `[out]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias: Option<WeightSpec>,
}

/// Feature-wise modulation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Film {
    /// Multiplier matrix `[n, n]`.
    pub mul: WeightSpec,
    /// Multiplier bias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mul_bias: Option<WeightSpec>,
    /// Offset matrix `[n, n]`.
    pub add: WeightSpec,
    /// Offset bias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_bias: Option<WeightSpec>,
}

/// Experts of rank one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Neuron {
    /// Input vectors `[experts, in]`.
    pub u: WeightName,
    /// Output vectors `[experts, out]`.
    pub v: WeightName,
    /// Activation.
    pub act: UnaryFn,
}
