//! Expert rows back to tokens.

use super::{is_one, is_yes, one, yes};
use crate::{
    Dim, TensorType, Type, codes,
    infer::{Cx, OpError, OpResult, arity, overflow, want_ragged, want_route},
};
use serde::{Deserialize, Serialize};

/// `%y = combine %d, %r`: sum over slots of weight * row, in slot order; tokens without slots give 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Combine {
    /// One route row covers this many consecutive tokens.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: u64,
    /// Rows are multiplied by the weight of their slot.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub weighted: bool,
}

impl Combine {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [rows, route] = arity(operands)?;
        let (rows, route) = (want_ragged(rows, "the first operand")?, want_route(route, "the second operand")?);
        if self.repeat != rows.repeat {
            let text = format!("`repeat` is {}, the rows were dispatched with {}", self.repeat, rows.repeat);
            return Err(OpError::new(codes::REPEAT, text));
        }
        if route.rows != rows.route.rows || route.slots != rows.route.slots {
            let text = format!(
                "a route of {} rows and {} slots meets rows dispatched by {} rows and {} slots",
                route.rows, route.slots, rows.route.rows, rows.route.slots
            );
            return Err(OpError::new(codes::SHAPE, text));
        }
        if self.weighted && !route.weighted {
            return Err(OpError::new(codes::UNWEIGHED, "the route has no weights")
                .help("put a `weigh` in front, or set `weighted` to false"));
        }
        let tokens = route.rows.clone().mul(self.repeat.into()).ok_or_else(overflow)?;
        let shape = [tokens].into_iter().chain(rows.row.iter().copied().map(Dim::Const)).collect();
        Ok(Type::Tensor(TensorType { dtype: rows.dtype, shape }))
    }
}
