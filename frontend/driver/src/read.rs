//! A model with where it came from.

use moec_frontend::Model;
use moec_ir::Diagnostic;
use sha2::{Digest, Sha256};
use std::path::Path;

/// A model that was read and checked.
#[derive(Clone, Debug)]
pub struct Source {
    /// The model.
    pub model: Model,
    /// Names and SHA-256 of what was read, for the manifest.
    pub inputs: Vec<(String, String)>,
}

/// Reads a config, its folder, a graph file or IR text.
///
/// # Errors
/// All independent errors of the file.
pub fn path(path: &Path) -> Result<Source, Vec<Diagnostic>> {
    let model = moec_frontend::read_model(path)?;
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let content = std::fs::read(&file).unwrap_or_default();
    // The name alone: artefacts do not depend on where the model lay.
    let name = file.file_name().map_or_else(|| "config.json".into(), |n| n.to_string_lossy().into_owned());
    Ok(Source { model, inputs: vec![(name, hash(&content))] })
}

/// Reads a model from bytes; `file` names them in findings.
///
/// # Errors
/// As [`path`](self::path()).
pub fn bytes(bytes: &[u8], file: &str) -> Result<Source, Vec<Diagnostic>> {
    let model = moec_frontend::read_model_bytes(bytes, file)?;
    Ok(Source { model, inputs: vec![(file.to_owned(), hash(bytes))] })
}

fn hash(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect()
}
