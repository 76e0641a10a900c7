//! A weight as a value.

use crate::WeightName;
use serde::{Deserialize, Serialize};

/// `%w = param {w = "centroids"}`: the weight tensor itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Param {
    /// The weight.
    pub w: WeightName,
}
