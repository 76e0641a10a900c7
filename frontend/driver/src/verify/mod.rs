//! Reference cases against compiled kernels.
//!
//! A case is a safetensors file that holds inputs, weights and expected results; its metadata
//! says which form it has. Each is built from its own config or graph, compiled for the device,
//! run, and compared under its own tolerance.

pub mod golden;
mod host;
mod system;

use crate::{Error, Target};
pub use moec_check::{CaseResult, Status};
use moec_ir::{Code, Diagnostic};
use moec_runtime::{Device, SafetensorsBytes};
use std::{path::Path, sync::Arc};

/// The case cannot be run, for this reason.
fn refused(message: impl Into<String>) -> Error {
    Error::Input(vec![Diagnostic::error(Code("E0314"), message.into())])
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
        Ok(bytes) => run(&name, &bytes, bench).unwrap_or_else(|error| CaseResult::failed(&name, error.to_string())),
        Err(error) => CaseResult::failed(&name, error.to_string()),
    }
}

fn run(name: &str, bytes: &[u8], bench: &Bench) -> Result<CaseResult, Error> {
    let tensors = SafetensorsBytes::new(bytes)?;
    match tensors.text("format") {
        Some("moec-golden-1") => golden::run(name, &tensors, bench),
        Some("moec-system-golden-1") => system::run(name, &tensors, bench),
        Some("moec-ptx-case-1") => {
            moec_check::ptx::run(name, bytes, &*bench.device).map_err(|e| refused(e.to_string()))
        }
        Some(other) => Ok(CaseResult::failed(name, format!("unknown case format `{other}`"))),
        None => Ok(CaseResult::failed(name, "the file has no `format` in its metadata")),
    }
}
