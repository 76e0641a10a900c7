//! Expert rows back to tokens.

use super::{is_one, is_yes, one, yes};
use serde::{Deserialize, Serialize};

/// `%y = combine %d, %r`: sum over slots of weight * row, in slot order; tokens without slots give 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Combine {
    /// One route row covers this many consecutive tokens.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: u64,
    /// Rows are multiplied by the weight of their slot.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub weighted: bool,
}
