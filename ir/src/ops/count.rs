//! Tokens per expert.

use crate::{
    Dim, Type,
    infer::{Cx, OpResult, arithmetic, arity, want_route},
};
use serde::{Deserialize, Serialize};

/// `%n = count %r`: tokens per expert `[experts]`. A sum over ranks when distributed.
///
/// The counts speak of the batch by their nature, so a graph with `count` needs no flag for them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Count {}

impl Count {
    #[expect(clippy::unused_self, reason = "all ops have the same rule signature")]
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [route] = arity(operands)?;
        Ok(arithmetic(vec![Dim::Const(want_route(route, "the operand")?.experts)]))
    }
}
