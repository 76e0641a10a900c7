//! Attention with given queries, keys and values.

use super::{is_yes, yes};
use serde::{Deserialize, Serialize};

/// `%o = attention %q, %k, %v`: `softmax(q k^T / sqrt d) v`, `q` is `[T, h, d]`.
///
/// With `block` there is a fourth operand, a route with rows `head*T + t` that lists the key
/// blocks to read; always causal inside. A ragged `q` (one head per slot) shares `k`, `v` `[T, d]`
/// and is always causal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// A token sees no later token.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub causal: bool,
    /// Keys in a block, when a route selects blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<u64>,
}
