//! Choice among n*n experts by two short score rows.

use crate::WeightName;
use serde::{Deserialize, Serialize};

/// `%q = product_key %query {kind = "sum", k1 = "keys1", k2 = "keys2", k = 16}`: route with scores
/// over `n*n` experts, id = `i*n + j`. The `n*n` scores are never formed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ProductKey {
    /// Operand: query `[rows, 2d]`; score = first half against `k1` plus second half against `k2` (PEER).
    Sum {
        /// Keys `[n, d]` of the first half.
        k1: WeightName,
        /// Keys `[n, d]` of the second half.
        k2: WeightName,
        /// Experts per row.
        k: u64,
    },
    /// Operands: two score rows `[rows, n]` and `[rows, m]`; score = their sum (Doge).
    Scores {
        /// Experts per row.
        k: u64,
    },
    /// Operands: two queries, then two key tables; Tucker-decomposed score (UltraMemV2).
    Tucker {
        /// Core tensor.
        core: WeightName,
        /// Left factor of the core's rank-1 approximation.
        u: WeightName,
        /// Right factor.
        v: WeightName,
        /// Experts per row.
        k: u64,
    },
}
