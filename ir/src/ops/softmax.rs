//! Softmax of the last axis.

use super::{is_unit, unit};
use serde::{Deserialize, Serialize};

/// `%p = softmax %x`: `softmax(x / temp)` on the last axis. A row of -inf alone gives NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Softmax {
    /// Temperature.
    #[serde(default = "unit", skip_serializing_if = "is_unit")]
    pub temp: f64,
}
