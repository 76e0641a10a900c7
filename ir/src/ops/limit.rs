//! Capacity of experts.

use super::is_default;
use crate::{
    Type, codes,
    infer::{Cx, OpError, OpResult, arity, want_route},
};
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

impl Limit {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let (route, scores) = match self.priority {
            Priority::Position => {
                let [route] = arity(operands)?;
                (route, None)
            }
            Priority::Score => {
                let [route, scores] = arity(operands)?;
                (route, Some(scores))
            }
        };
        let route = want_route(route, "the first operand")?;
        if let Some(scores) = scores {
            super::weigh::want_scores(scores, route)?;
        }
        match (self.capacity, self.fraction) {
            (Some(_), None) => {}
            (None, Some(share)) if share >= 0.0 && share.is_finite() => {}
            (None, Some(share)) => {
                return Err(OpError::new(
                    codes::VALUE,
                    format!("`fraction` is {share}, a share of the rows is needed"),
                ));
            }
            (None, None) | (Some(_), Some(_)) => {
                return Err(OpError::new(codes::ATTRIBUTE, "takes either `capacity` or `fraction`"));
            }
        }
        Ok(Type::Route(route.clone()))
    }
}
