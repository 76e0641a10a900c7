//! Cases against a device, without a compiler.
//!
//! A case is a safetensors file that holds inputs and expected results, with its own limits. [`golden`] holds a
//! compiled layer against one, [`ptx`] runs PTX of other producers. Who has a compiler makes the layer first; who has
//! none (a bare machine with a GPU) brings it along.

pub mod compare;
pub mod execute;
pub mod golden;
pub mod ptx;

use serde::Serialize;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// Everything agrees.
    Pass,
    /// Something differs, or could not be compiled.
    Fail,
    /// The device is not here, or cannot show what the case is about.
    Skip,
}

/// Result of one case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseResult {
    /// Name of the case.
    pub name: String,
    /// How it ended.
    pub status: Status,
    /// Largest difference of the output, relative to the largest expected value.
    pub out_max_rel: Option<f64>,
    /// Root mean square of the differences, relative to that of the expected values.
    pub out_rms_rel: Option<f64>,
    /// Tokens whose set of experts differs.
    pub selection_mismatches: Option<u64>,
    /// Why it failed or was skipped.
    pub reason: Option<String>,
}

impl CaseResult {
    /// A case without numbers.
    #[must_use]
    pub fn bare(name: &str, status: Status, reason: Option<String>) -> Self {
        Self { name: name.to_owned(), status, out_max_rel: None, out_rms_rel: None, selection_mismatches: None, reason }
    }

    /// A case that failed for this reason.
    #[must_use]
    pub fn failed(name: &str, reason: impl Into<String>) -> Self {
        Self::bare(name, Status::Fail, Some(reason.into()))
    }
}
