//! Choice of experts.

use super::{is_default, is_yes, yes};
use crate::{
    RouteType, Type, codes,
    infer::{Cx, OpError, OpResult, arity, overflow, sizes, volume, want_known, want_rows, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%q = select %s {rule = "topk", k = 8}`: scores (or ids) to a route without weights.
///
/// Equal scores go to the lower expert. NaN ranks below every number. `topk`, `all`, `threshold` and
/// `expert_choice` never select a score of -inf, so fewer slots may be filled; empty slots hold -1 and come last.
/// The other rules fill places of an order in which -inf comes last.
///
/// With `bound` a second operand `[1]` says at run time how many slots `topk` fills (an integer), or which mass
/// `topp` gathers; the attribute is the largest value: the smaller of both counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Select {
    /// Whether a second operand bounds `k` or `p` at run time.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bound: bool,
    /// Which experts are taken.
    #[serde(flatten)]
    pub rule: SelectRule,
}

impl From<SelectRule> for Select {
    fn from(rule: SelectRule) -> Self {
        Self { bound: false, rule }
    }
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
        /// Score of experts in dropped groups: -inf when absent; 0 in DeepSeek-V2.
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
    /// Ids are data: `[rows]` or `[rows, ..]`, row by row.
    Given {
        /// Number of experts.
        experts: u64,
    },
}

impl Select {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let scores = if self.bound {
            let [scores, bound] = arity(operands)?;
            self.check_bound(bound)?;
            scores
        } else {
            let [scores] = arity(operands)?;
            scores
        };
        if let SelectRule::Given { experts } = self.rule {
            return given(scores, experts);
        }
        let (rows, experts) = want_rows(scores, "the scores")?;
        let slots = self.rule.slots(experts)?;
        Ok(Type::Route(RouteType { rows: rows.clone(), slots, experts, weighted: false }))
    }

    /// The bound is one number, and the rule has one to bound.
    fn check_bound(&self, bound: &Type) -> OpResult<()> {
        let bound = want_tensor(bound, "the bound")?;
        let floats = match self.rule {
            SelectRule::Topk { .. } => false,
            SelectRule::Topp { .. } => true,
            SelectRule::Rank { .. }
            | SelectRule::All
            | SelectRule::Threshold { .. }
            | SelectRule::GroupTopk { .. }
            | SelectRule::GroupLimited { .. }
            | SelectRule::ExpertChoice { .. }
            | SelectRule::Given { .. } => {
                return Err(OpError::new(codes::ATTRIBUTE, "`bound` goes with the rules `topk` and `topp`"));
            }
        };
        if bound.shape == [crate::Dim::Const(1)] && bound.dtype.is_float() == floats {
            return Ok(());
        }
        let kind = if floats { "a float" } else { "an integer" };
        Err(OpError::new(codes::SHAPE, format!("the bound is {bound}, {kind} [1] is needed")))
    }
}

/// Ids are data: integers `[rows]` or `[rows, k]`; of more axes, those behind the first are one.
fn given(ids: &Type, experts: u64) -> OpResult<Type> {
    let ids = want_tensor(ids, "the ids")?;
    if ids.dtype.is_float() {
        return Err(OpError::new(codes::KIND, format!("ids must be integers, are {}", ids.dtype.name())));
    }
    let (rows, slots) = match ids.shape.as_slice() {
        [rows, slots @ ..] => (rows, want_known(&volume(slots)?, "the ids")?),
        shape => {
            return Err(OpError::new(codes::SHAPE, format!("ids are {}, [rows] or [rows, k] is needed", sizes(shape))));
        }
    };
    Ok(Type::Route(RouteType { rows: rows.clone(), slots, experts, weighted: false }))
}

impl SelectRule {
    /// Slots of a row, and the checks of the rule against the number of experts.
    fn slots(&self, experts: u64) -> OpResult<u64> {
        match self {
            Self::Topk { k } => top_k(*k, experts, "experts"),
            Self::Rank { ranks } => self::ranks(ranks, experts),
            Self::All | Self::Given { .. } => Ok(experts),
            Self::Topp { p, max_k, .. } => {
                if p.is_nan() {
                    return Err(OpError::new(codes::VALUE, "`p` is not a number"));
                }
                at_most(*max_k, experts)
            }
            Self::Threshold { tau, quantile, max_k, min_k, .. } => {
                threshold(*tau, *quantile, *min_k)?;
                at_most(*max_k, experts)
            }
            Self::GroupTopk { groups, k } => {
                let size = group_size(*groups, experts)?;
                top_k(*k, size, "experts in a group")?.checked_mul(*groups).ok_or_else(overflow)
            }
            Self::GroupLimited { groups, group_top, keep_groups, k, dropped } => {
                let size = group_size(*groups, experts)?;
                if dropped.is_some_and(f64::is_nan) {
                    return Err(OpError::new(codes::VALUE, "`dropped` is not a number"));
                }
                if *group_top == 0 || *group_top > size {
                    let text = format!("`group_top` is {group_top}, a group has {size} experts");
                    return Err(OpError::new(codes::GROUPS, text));
                }
                if *keep_groups == 0 || keep_groups > groups {
                    let text = format!("`keep_groups` is {keep_groups}, there are {groups} groups");
                    return Err(OpError::new(codes::KEEP_GROUPS, text));
                }
                let left = keep_groups.checked_mul(size).ok_or_else(overflow)?;
                if *k > left && dropped.is_none() {
                    let text = format!("k is {k}, {keep_groups} groups of {size} keep {left} experts");
                    return Err(OpError::new(codes::KEEP_GROUPS, text));
                }
                top_k(*k, experts, "experts")
            }
            Self::ExpertChoice { capacity, factor } => expert_choice(*capacity, *factor).map(|()| experts),
        }
    }
}

fn top_k(k: u64, experts: u64, what: &str) -> OpResult<u64> {
    if k == 0 || k > experts {
        return Err(OpError::new(codes::TOP_K, format!("k is {k}, there are {experts} {what}")));
    }
    Ok(k)
}

/// An upper bound of the slots may exceed the experts; then they bound it.
fn at_most(max_k: Option<u64>, experts: u64) -> OpResult<u64> {
    match max_k {
        Some(0) => Err(OpError::new(codes::TOP_K, "`max_k` is 0, at least one expert is needed")),
        Some(k) => Ok(k.min(experts)),
        None => Ok(experts),
    }
}

fn group_size(groups: u64, experts: u64) -> OpResult<u64> {
    if groups == 0 || !experts.is_multiple_of(groups) {
        return Err(OpError::new(codes::GROUPS, format!("{groups} groups do not divide {experts} experts")));
    }
    Ok(experts / groups)
}

fn ranks(ranks: &[u64], experts: u64) -> OpResult<u64> {
    if ranks.is_empty() {
        return Err(OpError::new(codes::RANKS, "`ranks` is empty"));
    }
    for (i, rank) in ranks.iter().enumerate() {
        if *rank >= experts {
            return Err(OpError::new(codes::RANKS, format!("rank {rank} of {experts} experts")));
        }
        if ranks.iter().take(i).any(|r| r == rank) {
            return Err(OpError::new(codes::RANKS, format!("rank {rank} stands twice in `ranks`")));
        }
    }
    Ok(ranks.len() as u64)
}

fn threshold(tau: Option<f64>, quantile: Option<f64>, min_k: Option<u64>) -> OpResult<()> {
    match (tau, quantile) {
        (Some(tau), None) if !tau.is_nan() => {}
        (None, Some(q)) if (0.0..=1.0).contains(&q) => {}
        (Some(_), None) => return Err(OpError::new(codes::VALUE, "`tau` is not a number")),
        (None, Some(q)) => {
            return Err(OpError::new(codes::VALUE, format!("`quantile` is {q}, a number from 0 to 1 is needed")));
        }
        (None, None) | (Some(_), Some(_)) => {
            return Err(OpError::new(codes::ATTRIBUTE, "takes either `tau` or `quantile`"));
        }
    }
    match min_k {
        None | Some(0 | 1) => Ok(()),
        Some(k) => Err(OpError::new(codes::VALUE, format!("`min_k` is {k}, 0 or 1 is possible"))),
    }
}

fn expert_choice(capacity: Option<u64>, factor: Option<f64>) -> OpResult<()> {
    match (capacity, factor) {
        (Some(_), None) => Ok(()),
        (None, Some(f)) if f >= 0.0 && f.is_finite() => Ok(()),
        (None, Some(f)) => Err(OpError::new(codes::VALUE, format!("`factor` is {f}, a share of the rows is needed"))),
        (None, None) | (Some(_), Some(_)) => Err(OpError::new(codes::ATTRIBUTE, "takes either `capacity` or `factor`")),
    }
}
