//! Matrix product with a weight.

use crate::WeightName;
use serde::{Deserialize, Serialize};

/// `%y = linear %x {w = "router.weight"}`: `x W^T + b` on the last axis, `W` is `[out, in]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// Matrix `[out, in]`.
    pub w: WeightName,
    /// Bias `[out]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b: Option<WeightName>,
}
