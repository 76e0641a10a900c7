//! Positions of rows sorted by expert.

use super::{is_one, one};
use crate::{
    Type,
    infer::{Cx, OpResult, arity, want_route},
};
use serde::{Deserialize, Serialize};

/// `%p = plan %r`: counts, offsets and gather map of a route, without moving data.
///
/// Made by `plan-dispatch`; sorting is by expert, then by row and slot, so it is stable and
/// deterministic. Experts without rows take no space and nothing is padded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// One route row covers this many consecutive tokens.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: u64,
}

impl Plan {
    #[expect(clippy::unused_self, reason = "all ops have the same rule signature")]
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [route] = arity(operands)?;
        Ok(Type::Plan(want_route(route, "the operand")?.clone()))
    }
}
