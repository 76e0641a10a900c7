//! Sums of products over named axes.

use serde::{Deserialize, Serialize};

/// `%y = einsum %a, %b {eq = "te,teh->th"}`: explicit form with an arrow, letters only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Einsum {
    /// Axes of the operands and of the result.
    pub eq: String,
}
