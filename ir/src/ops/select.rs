//! Choice of experts.

use super::{is_yes, yes};
use serde::{Deserialize, Serialize};

/// `%q = select %s {rule = "topk", k = 8}`: scores (or ids) to a route without weights.
///
/// Equal scores go to the lower expert. NaN ranks below every number. A score of -inf is never
/// selected, so fewer slots may be filled; empty slots hold -1 and come last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Select {
    /// Which experts are taken.
    pub rule: SelectRule,
}

/// Selection rules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
pub enum SelectRule {
    /// The `k` highest, by falling score.
    Topk {
        /// Experts per row.
        k: u64,
    },
    /// The experts at these ranks of the falling order.
    Rank {
        /// Ranks, from 0.
        ranks: Vec<u64>,
    },
    /// Every expert whose score is not -inf, by rising id.
    All,
    /// The shortest prefix of the falling order whose sum exceeds `p`; all if none does.
    Topp {
        /// Probability mass.
        p: f64,
        /// `> p`; `>= p` when not strict.
        #[serde(default = "yes", skip_serializing_if = "is_yes")]
        strict: bool,
        /// Upper bound of the slots.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_k: Option<u64>,
    },
    /// Scores above a threshold, by falling score.
    Threshold {
        /// Fixed threshold.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tau: Option<f64>,
        /// Threshold as a quantile of the row (linear interpolation).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        quantile: Option<f64>,
        /// `> tau`; `>= tau` when not strict.
        #[serde(default = "yes", skip_serializing_if = "is_yes")]
        strict: bool,
        /// Upper bound of the slots.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_k: Option<u64>,
        /// 1: the best expert is taken when none passes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        min_k: Option<u64>,
    },
    /// `k` in each of `groups` equal consecutive groups, group by group.
    GroupTopk {
        /// Groups.
        groups: u64,
        /// Experts per group.
        k: u64,
    },
    /// `k` among the best groups; a group's score is the sum of its `group_top` best scores.
    GroupLimited {
        /// Groups.
        groups: u64,
        /// Scores that count for a group: 1 in DeepSeek-V2, 2 in DeepSeek-V3.
        #[serde(default = "super::one", skip_serializing_if = "super::is_one")]
        group_top: u64,
        /// Groups kept.
        keep_groups: u64,
        /// Experts per row.
        k: u64,
        /// Score of experts in dropped groups: never selected when absent; 0 in DeepSeek-V2.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dropped: Option<f64>,
    },
    /// Every expert takes its best rows; a row's experts come by rising id. Batch-dependent.
    ExpertChoice {
        /// Rows per expert.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        capacity: Option<u64>,
        /// Rows per expert as a share of those allowed, rounded up.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        factor: Option<f64>,
    },
    /// Ids are data: `[rows]` or `[rows, k]`.
    Given {
        /// Number of experts.
        experts: u64,
    },
}
