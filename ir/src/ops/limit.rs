//! Capacity of experts.

use super::is_default;
use serde::{Deserialize, Serialize};

/// `%r2 = limit %r {capacity = 16}`: at most `capacity` rows per expert. Batch-dependent.
///
/// Slot 0 of all rows first, then slot 1, ..; inside a slot by position, or by falling score of the
/// first choice (then the scores are the second operand). Dropped slots get id -1 and weight 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Rows per expert.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u64>,
    /// Rows per expert as a share of the tokens, rounded up (NLLB's `moe_eval_capacity_token_fraction`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// Who comes first.
    #[serde(default, skip_serializing_if = "is_default")]
    pub priority: Priority,
}

/// Order in which rows claim an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Earlier rows first.
    #[default]
    Position,
    /// Higher score of the first choice first.
    Score,
}
