//! Reference cases against compiled kernels.
//!
//! A case is a safetensors file that holds inputs, weights and expected results; its metadata
//! says which form it has. Each is built from its own config or graph, compiled for the device,
//! run, and compared under its own tolerance.

pub(crate) mod compare;
mod execute;
mod golden;
mod host;
mod ptx;
mod system;

use crate::{Error, Target};
use moec_runtime::{Device, SafetensorsBytes};
use serde::Serialize;
use std::{path::Path, sync::Arc};

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// Everything agrees.
    Pass,
    /// Something differs, or could not be compiled.
    Fail,
    /// The device is not here.
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
    fn failed(name: String, reason: String) -> Self {
        Self {
            name,
            status: Status::Fail,
            out_max_rel: None,
            out_rms_rel: None,
            selection_mismatches: None,
            reason: Some(reason),
        }
    }
}

/// Where cases run.
#[derive(Clone)]
pub struct Bench {
    /// The device.
    pub device: Arc<dyn Device>,
    /// Target that is compiled for it.
    pub target: Target,
}

/// Runs one case file.
pub fn case(path: &Path, bench: &Bench) -> CaseResult {
    let name = path.file_stem().map_or_else(|| "case".to_owned(), |s| s.to_string_lossy().into_owned());
    match std::fs::read(path) {
        Ok(bytes) => run(&name, &bytes, bench).unwrap_or_else(|error| CaseResult::failed(name, error.to_string())),
        Err(error) => CaseResult::failed(name, error.to_string()),
    }
}

fn run(name: &str, bytes: &[u8], bench: &Bench) -> Result<CaseResult, Error> {
    let tensors = SafetensorsBytes::new(bytes)?;
    match tensors.text("format") {
        Some("moec-golden-1") => golden::run(name, &tensors, bench),
        Some("moec-system-golden-1") => system::run(name, &tensors, bench),
        Some("moec-ptx-case-1") => ptx::run(name, bytes, bench),
        Some(other) => Ok(CaseResult::failed(name.to_owned(), format!("unknown case format `{other}`"))),
        None => Ok(CaseResult::failed(name.to_owned(), "the file has no `format` in its metadata".to_owned())),
    }
}
