//! Additive and hard changes of scores.

use super::is_default;
use crate::WeightName;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// `%s2 = adjust %s {add = "bias"}`: changes applied in the order of the attributes.
///
/// Operands: the scores `[rows, experts]`; the class of each row, if `class_experts` is given;
/// then the mask (above 0 = allowed), if `mask` is set. Forbidden becomes -inf, forced +inf.
/// A class that is not in `class_experts` is an error at run time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adjust {
    /// Added to every row: selection bias, rerouting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add: Option<WeightName>,
    /// Experts that each class of rows may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_experts: Option<IndexMap<String, Vec<u64>>>,
    /// Whether a mask operand follows.
    #[serde(default, skip_serializing_if = "is_default")]
    pub mask: bool,
    /// Experts that no row may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub off: Vec<u64>,
    /// Experts that every row uses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub on: Vec<u64>,
    /// Keys in a block: row `h*T+t` forces block `t div B` and forbids later blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causal_block: Option<u64>,
    /// `T` of `causal_block`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}
