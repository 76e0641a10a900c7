//! Rows to experts.

use super::{is_default, is_one, one};
use serde::{Deserialize, Serialize};

/// `%d = dispatch %x, %r`: one row for every filled slot, sorted by expert, then by row and slot.
///
/// The expert-parallel boundary. A second operand that is a plan has been made from the route before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dispatch {
    /// One route row covers this many consecutive tokens (segment, sequence or step routing).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: u64,
    /// The expert's input is multiplied by the weight (Llama 4).
    #[serde(default, skip_serializing_if = "is_default")]
    pub weighted: bool,
}
