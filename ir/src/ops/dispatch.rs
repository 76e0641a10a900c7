//! Rows to experts.

use super::{is_default, is_one, one};
use crate::{
    RaggedType, RouteType, Type, codes,
    infer::{Cx, OpError, OpResult, arity, overflow, want_known, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%d = dispatch %x, %r`: one row for every filled slot, sorted by expert, then by row and slot.
///
/// The expert-parallel boundary. A second operand that is a plan has been made from the route before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dispatch {
    /// One route row covers this many consecutive tokens (segment, sequence or step routing).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: u64,
    /// The expert's input is multiplied by the weight (Llama 4).
    #[serde(default, skip_serializing_if = "is_default")]
    pub weighted: bool,
}

impl Dispatch {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [x, route] = arity(operands)?;
        let x = want_tensor(x, "the first operand")?;
        let route = match route {
            Type::Route(route) | Type::Plan(route) => route,
            Type::Tensor(_) | Type::Ragged(_) => {
                let text = format!("the second operand must be a route or a plan, is a {}", route.kind());
                return Err(OpError::new(codes::KIND, text));
            }
        };
        let Some((rows, row)) = x.shape.split_first() else {
            return Err(OpError::new(codes::SHAPE, "the first operand is a scalar, rows are needed"));
        };
        check_repeat(route, self.repeat, rows)?;
        if self.weighted && !route.weighted {
            return Err(OpError::new(codes::UNWEIGHED, "the route has no weights").help("put a `weigh` in front"));
        }
        let row = row.iter().map(|d| want_known(d, "the first operand")).collect::<OpResult<Vec<u64>>>()?;
        Ok(Type::Ragged(RaggedType { route: route.clone(), repeat: self.repeat, dtype: x.dtype, row }))
    }
}

/// `repeat` times the rows of the route are the rows of the data.
fn check_repeat(route: &RouteType, repeat: u64, rows: &crate::Dim) -> OpResult<()> {
    if repeat == 0 {
        return Err(OpError::new(codes::REPEAT, "`repeat` is 0, at least 1 is needed"));
    }
    if route.rows.clone().mul(repeat.into()).ok_or_else(overflow)? == *rows {
        return Ok(());
    }
    let text = format!("repeat {repeat} times {} route rows are not the {rows} rows of the data", route.rows);
    Err(OpError::new(codes::REPEAT, text))
}
