//! Tokens per expert.

use serde::{Deserialize, Serialize};

/// `%n = count %r`: tokens per expert `[experts]`. A sum over ranks when distributed. Batch-dependent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Count {}
