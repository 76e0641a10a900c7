//! Rows with a fixed expert.

use crate::{
    RouteType, Type, codes,
    infer::{Cx, OpError, OpResult, arity, sizes, want_route, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%r2 = override %r, %when {expert = 8, experts = 9}`: rows whose class is not zero use one
/// expert with weight 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// The fixed expert.
    pub expert: u64,
    /// Number of experts of the result.
    pub experts: u64,
}

impl Override {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [route, when] = arity(operands)?;
        let route = want_route(route, "the first operand")?;
        let when = &want_tensor(when, "`when`")?.shape;
        if *when != [route.rows.clone()] {
            let text = format!("`when` is {}, the route has {} rows", sizes(when), route.rows);
            return Err(OpError::new(codes::SHAPE, text));
        }
        if !route.weighted {
            return Err(OpError::new(codes::UNWEIGHED, "the route has no weights").help("put a `weigh` in front"));
        }
        if self.expert >= self.experts || self.experts < route.experts {
            let text = format!("expert {} of {} over a route of {} experts", self.expert, self.experts, route.experts);
            return Err(OpError::new(codes::VALUE, text));
        }
        Ok(Type::Route(RouteType { experts: self.experts, ..route.clone() }))
    }
}
