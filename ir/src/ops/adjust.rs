//! Additive and hard changes of scores.

use super::is_default;
use crate::{
    Type, WeightName, codes,
    infer::{Cx, OpError, OpResult, arithmetic, broadcast, sizes, want_rows, want_tensor},
};
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

impl Adjust {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let takes = 1 + usize::from(self.class_experts.is_some()) + usize::from(self.mask);
        if operands.len() != takes {
            return Err(OpError::new(codes::ARITY, format!("has {} operands, takes {takes}", operands.len())));
        }
        let (rows, experts) = want_rows(operands[0], "the scores")?;
        let shape = want_tensor(operands[0], "the scores")?.shape.clone();
        if let Some(add) = &self.add {
            cx.want_vector(add, experts)?;
        }
        if let Some(classes) = &self.class_experts {
            let class = want_tensor(operands[1], "the class")?;
            if class.shape != [rows.clone()] || class.dtype.is_float() {
                let text = format!("the class is {class}, one integer for each of {rows} rows is needed");
                return Err(OpError::new(codes::SHAPE, text));
            }
            check_classes(classes, experts)?;
        }
        if self.mask {
            let mask = &want_tensor(operands[takes - 1], "the mask")?.shape;
            if broadcast(&shape, mask)? != shape {
                let text = format!("a mask {} meets scores {}", sizes(mask), sizes(&shape));
                return Err(OpError::new(codes::SHAPE, text));
            }
        }
        self.check_fixed(experts)?;
        Ok(arithmetic(shape))
    }

    /// `on` and `off` are experts and disjoint; the block attributes are in range.
    fn check_fixed(&self, experts: u64) -> OpResult<()> {
        for (name, ids) in [("on", &self.on), ("off", &self.off)] {
            if let Some(id) = ids.iter().find(|id| **id >= experts) {
                return Err(OpError::new(codes::ON_OFF, format!("`{name}` names expert {id} of {experts}")));
            }
        }
        if let Some(id) = self.on.iter().find(|id| self.off.contains(id)) {
            return Err(OpError::new(codes::ON_OFF, format!("expert {id} is in `on` and in `off`")));
        }
        if self.causal_block == Some(0) || self.tokens == Some(0) {
            return Err(OpError::new(codes::VALUE, "`causal_block` and `tokens` must not be 0"));
        }
        if self.tokens.is_some() && self.causal_block.is_none() {
            return Err(OpError::new(codes::ATTRIBUTE, "`tokens` goes with `causal_block`"));
        }
        Ok(())
    }
}

/// Classes are integers, and their experts exist.
fn check_classes(classes: &IndexMap<String, Vec<u64>>, experts: u64) -> OpResult<()> {
    for (class, ids) in classes {
        if class.parse::<i64>().is_err() {
            return Err(OpError::new(codes::CLASSES, format!("class `{class}` is not an integer")));
        }
        if let Some(id) = ids.iter().find(|id| **id >= experts) {
            return Err(OpError::new(codes::CLASSES, format!("class {class} names expert {id} of {experts}")));
        }
    }
    Ok(())
}
