//! Transport plans over the batch.

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
