//! Cases of the form `moec-golden-1`: one block of a model from the reference library.

use super::{Bench, CaseResult, refused};
use crate::{Artefact, Compiler, Error};
use moec_check::golden;
pub use moec_check::golden::OUTPUTS;
use moec_runtime::{Model, SafetensorsBytes, Tensors};
use std::sync::Arc;

/// Builds, compiles, runs and compares a case.
pub(super) fn run(name: &str, tensors: &SafetensorsBytes<'_>, bench: &Bench) -> Result<CaseResult, Error> {
    let compiler = Compiler { targets: vec![bench.target], ..Compiler::default() };
    let artefact = Arc::new(compile(tensors, &compiler)?.load()?);
    let number = golden::layer(tensors, &artefact)?;
    let layer = Model::new(artefact, Arc::clone(&bench.device)).layer(number, tensors)?;
    Ok(golden::run(name, tensors, &layer)?)
}

/// The block of a case, compiled with all results that the case has expectations for (whatever `compiler` says of
/// them).
///
/// # Errors
/// The file is not a case, or its block cannot be compiled.
pub fn compile(tensors: &SafetensorsBytes<'_>, compiler: &Compiler) -> Result<Artefact, Error> {
    let text = |key: &str| tensors.text(key).ok_or_else(|| refused(format!("the case has no `{key}` in its metadata")));
    let model = moec_frontend::read_config(text("config")?, "config of the case").map_err(Error::Input)?;
    let prefix = text("layer_prefix")?;
    let Some((form, _)) = model.block_of(prefix) else {
        return Err(refused(format!("no layer of the model has the prefix `{prefix}`")));
    };
    let compiler = Compiler { outputs: OUTPUTS.map(str::to_owned).to_vec(), ..compiler.clone() };
    // Files of older library versions store the experts in another layout than newer ones.
    let shapes = tensors.names().into_iter().filter_map(|n| tensors.find(&n).map(|t| (n, t.shape.clone()))).collect();
    let form = model.forms[form].with_layout_of(&shapes).map_err(|d| Error::Input(vec![d]))?;
    compiler.compile_forms(&model.name, std::slice::from_ref(&form))
}
