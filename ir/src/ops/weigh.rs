//! Weights of the selected slots.

use super::{is_default, is_unit, unit};
use crate::{
    RouteType, Type, WeightName, codes,
    infer::{Cx, OpError, OpResult, numbers, want_route, want_rows},
};
use serde::{Deserialize, Serialize};

/// `%r = weigh %q, %s {norm = "sum"}`: weights of the slots, in the order of the attributes.
///
/// Operands: the route; the scores (absent: the route's own); then the one-column routes of
/// `drop_rows` and `keep_rows`, where those flags are set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weigh {
    /// All weights are 1.
    #[serde(default, rename = "const", skip_serializing_if = "is_default")]
    pub constant: bool,
    /// Applied over the selected slots.
    #[serde(default, rename = "fn", skip_serializing_if = "is_default")]
    pub function: WeighFn,
    /// Ids from here on are null experts: their weight is 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub real: Option<u64>,
    /// Slots after the first go when their weight is below this share of the first weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_below: Option<f64>,
    /// Rows in the `drop_rows` operand lose all slots.
    #[serde(default, skip_serializing_if = "is_default")]
    pub drop_rows: bool,
    /// Rows in the `keep_rows` operand keep all slots.
    #[serde(default, skip_serializing_if = "is_default")]
    pub keep_rows: bool,
    /// Divides by the norm of the row plus `eps`; a zero row stays 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<WeighNorm>,
    /// Added to the norm before dividing.
    #[serde(default, skip_serializing_if = "is_default")]
    pub eps: f64,
    /// The divisor is at least this (ERNIE's `moe_norm_min`).
    #[serde(default, skip_serializing_if = "is_default")]
    pub floor: f64,
    /// Learned factor of each expert, `[experts]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_scale: Option<WeightName>,
    /// Factor of all weights.
    #[serde(default = "unit", skip_serializing_if = "is_unit")]
    pub scale: f64,
}

/// Functions over the selected slots of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeighFn {
    /// The gathered scores.
    #[default]
    None,
    /// Softmax over the filled slots.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// Norms of a row of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeighNorm {
    /// Sum of the weights.
    Sum,
    /// Sum of the absolute values (DBRX with order 1).
    L1,
    /// Euclidean norm (DBRX with order 2).
    L2,
}

/// Checks that scores have a row per route row and a column per expert.
pub(crate) fn want_scores(scores: &Type, route: &RouteType) -> OpResult<()> {
    let (rows, experts) = want_rows(scores, "the scores")?;
    if *rows == route.rows && experts == route.experts {
        return Ok(());
    }
    let text = format!("scores [{rows}, {experts}] meet a route of {} rows and {} experts", route.rows, route.experts);
    Err(OpError::new(codes::SHAPE, text))
}

impl Weigh {
    /// Whether the second of so many operands is the scores.
    pub(crate) fn has_scores(&self, operands: usize) -> bool {
        operands > 1 + usize::from(self.drop_rows) + usize::from(self.keep_rows)
    }

    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let extra = usize::from(self.drop_rows) + usize::from(self.keep_rows);
        let least = 1 + extra;
        if operands.len() < least || operands.len() > least + 1 {
            let text = format!("has {} operands, takes {least} or {}", operands.len(), least + 1);
            return Err(OpError::new(codes::ARITY, text));
        }
        let route = want_route(operands[0], "the first operand")?;
        if self.has_scores(operands.len()) {
            want_scores(operands[1], route)?;
        } else if !route.weighted && !self.constant {
            return Err(OpError::new(codes::UNWEIGHED, "the route has no scores of its own")
                .help("give the scores as the second operand"));
        }
        for rows in &operands[operands.len() - extra..] {
            let rows = want_route(rows, "a row set")?;
            if rows.rows != route.rows {
                let text = format!("a row set has {} rows, the route {}", rows.rows, route.rows);
                return Err(OpError::new(codes::SHAPE, text));
            }
        }
        if self.drop_below.is_none() && extra > 0 {
            return Err(OpError::new(codes::ATTRIBUTE, "`drop_rows` and `keep_rows` go with `drop_below`"));
        }
        if self.norm.is_none() && (self.eps != 0.0 || self.floor != 0.0) {
            return Err(OpError::new(codes::ATTRIBUTE, "`eps` and `floor` go with `norm`"));
        }
        if let Some(scale) = &self.expert_scale {
            let shape = cx.shape(scale)?;
            if shape != [route.experts] {
                let text = format!("weight `{scale}` is {}, [{}] is needed", numbers(&shape), route.experts);
                return Err(OpError::new(codes::SHAPE, text));
            }
        }
        Ok(Type::Route(RouteType { weighted: true, ..route.clone() }))
    }
}
