//! Rows of a table.

use crate::WeightName;
use serde::{Deserialize, Serialize};

/// `%y = gather %ids {w = "tid2eid"}`: rows of a table by integer ids (class tables, hash routing).
/// Ids outside the table are an error at run time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gather {
    /// Table; ids index its first axis.
    pub w: WeightName,
}
