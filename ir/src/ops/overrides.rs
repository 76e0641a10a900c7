//! Rows with a fixed expert.

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
