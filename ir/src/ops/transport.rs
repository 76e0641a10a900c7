//! Transport plans over the batch.

use crate::{
    Type, codes,
    infer::{Cx, OpError, OpResult, arithmetic, arity, want_rows, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%p = transport %s {kind = "sinkhorn", xi = 0.5, iters = 50}`: scores to a transport plan. Batch-dependent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Transport {
    /// Entropic transport: `iters` Sinkhorn steps on `exp((s - max s) / xi)` with uniform marginals.
    Sinkhorn {
        /// Entropy weight.
        xi: f64,
        /// Steps.
        iters: u64,
    },
    /// Sparse transport: semi-dual gradient ascent, at most `capacity` tokens per expert.
    Sparse {
        /// Nonzeros in a column.
        capacity: u64,
        /// Weight of the quadratic term.
        gamma: f64,
        /// Gradient steps.
        steps: u64,
        /// Step size.
        eta: f64,
    },
}

impl Transport {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [scores] = arity(operands)?;
        want_rows(scores, "the scores")?;
        let positive = |name: &str, value: f64| {
            if value > 0.0 && value.is_finite() {
                return Ok(());
            }
            Err(OpError::new(codes::VALUE, format!("`{name}` is {value}, a number above 0 is needed")))
        };
        match self {
            Self::Sinkhorn { xi, .. } => positive("xi", *xi)?,
            Self::Sparse { capacity, gamma, .. } => {
                positive("gamma", *gamma)?;
                if *capacity == 0 {
                    return Err(OpError::new(codes::VALUE, "`capacity` is 0, at least one token is needed"));
                }
            }
        }
        Ok(arithmetic(want_tensor(scores, "the scores")?.shape.clone()))
    }
}
