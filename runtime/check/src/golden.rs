//! Cases of the form `moec-golden-1`: one block of a model from the reference library.

use crate::{
    CaseResult, Status, compare,
    execute::{Found, execute, refused},
};
use moec_runtime::{Artefact, Layer, Result, SafetensorsBytes};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Results of a compiled block that a case has expectations for.
pub const OUTPUTS: [&str; 3] = ["output", "topk_indices", "topk_weights"];

/// Limits of a case.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Tolerance {
    max_rel: f64,
    rms_rel: f64,
    topk_weights_rel: f64,
}

/// The layer of a compiled case that has its tensors: other layers of the model may share the form.
///
/// # Errors
/// The file is not a case, or the artefact has no such layer.
pub fn layer(tensors: &SafetensorsBytes<'_>, artefact: &Artefact) -> Result<u64> {
    let prefix =
        tensors.text("layer_prefix").ok_or_else(|| refused("the case has no `layer_prefix` in its metadata"))?;
    let program = artefact.program(0)?;
    let mut layers = program.layers.iter().zip(&program.prefixes);
    let found = layers.find(|(_, of)| *of == prefix).map(|(layer, _)| *layer);
    found.ok_or_else(|| refused(format!("no layer of the artefact has the prefix `{prefix}`")))
}

/// Runs a layer that was compiled for the case, with all of [`OUTPUTS`], and judges it under the case's own limits.
///
/// # Errors
/// The file is not a case, or the device fails.
pub fn run(name: &str, tensors: &SafetensorsBytes<'_>, layer: &Layer) -> Result<CaseResult> {
    let results = results(tensors, layer)?;
    let text = tensors.text("tolerance").ok_or_else(|| refused("the case has no `tolerance` in its metadata"))?;
    let tolerance: Tolerance =
        serde_json::from_str(text).map_err(|e| refused(format!("`tolerance` in the metadata: {e}")))?;
    judge(name, tensors, tolerance, tokens(tensors)?, &results)
}

/// What the layer gives for the inputs of the case, by name.
///
/// # Errors
/// As [`run`].
pub fn results(tensors: &SafetensorsBytes<'_>, layer: &Layer) -> Result<BTreeMap<String, Found>> {
    execute(layer, tokens(tensors)?, tensors, "")
}

fn tokens(tensors: &SafetensorsBytes<'_>) -> Result<u64> {
    let (_, shape) = compare::tensor(tensors, "hidden_states")?;
    Ok(shape.first().copied().unwrap_or(0))
}

fn judge(
    name: &str,
    tensors: &SafetensorsBytes<'_>,
    tolerance: Tolerance,
    tokens: u64,
    results: &BTreeMap<String, Found>,
) -> Result<CaseResult> {
    let result = |key: &str| {
        results
            .get(key)
            .map(|found| &*found.values)
            .ok_or_else(|| refused(format!("the compiled layer has no output `{key}`")))
    };
    let (expected, _) = compare::tensor(tensors, "output_ref")?;
    let (max_rel, rms_rel) = compare::difference(result("output")?, &expected);
    let (ids, _) = compare::tensor(tensors, "topk_indices")?;
    let (weights, _) = compare::tensor(tensors, "topk_weights_ref")?;
    let (mismatches, weights_rel) =
        selection((result("topk_indices")?, result("topk_weights")?), (&ids, &weights), tokens);
    let mut reasons = Vec::new();
    if !(max_rel <= tolerance.max_rel && rms_rel <= tolerance.rms_rel) {
        reasons.push(format!(
            "output differs: max {max_rel:.2e} (limit {:.0e}), rms {rms_rel:.2e} (limit {:.0e})",
            tolerance.max_rel, tolerance.rms_rel
        ));
    }
    if mismatches > 0 {
        reasons.push(format!("{mismatches} of {tokens} tokens chose other experts"));
    }
    if !(weights_rel <= tolerance.topk_weights_rel) {
        reasons.push(format!("weights differ: {weights_rel:.2e} (limit {:.0e})", tolerance.topk_weights_rel));
    }
    Ok(CaseResult {
        name: name.to_owned(),
        status: if reasons.is_empty() { Status::Pass } else { Status::Fail },
        out_max_rel: Some(max_rel),
        out_rms_rel: Some(rms_rel),
        selection_mismatches: Some(mismatches),
        reason: if reasons.is_empty() { None } else { Some(reasons.join("; ")) },
    })
}

/// Tokens with another set of experts, and the largest difference of weights of the same expert,
/// relative to the largest weight. Slots with weight 0 (dropped, skipped) choose nothing.
fn selection(got: (&[f64], &[f64]), expected: (&[f64], &[f64]), tokens: u64) -> (u64, f64) {
    let tokens = usize::try_from(tokens).unwrap_or(0).max(1);
    let rows = |ids: &[f64], weights: &[f64], t: usize| -> Vec<(i64, f64)> {
        let k = ids.len() / tokens;
        #[expect(clippy::cast_possible_truncation, reason = "ids were integers")]
        let mut row: Vec<(i64, f64)> = (0..k)
            .map(|j| (ids[t * k + j] as i64, weights[t * k + j]))
            .filter(|(id, w)| *id >= 0 && *w != 0.0)
            .collect();
        row.sort_by_key(|(id, _)| *id);
        row
    };
    let top = expected.1.iter().fold(0f64, |m, w| m.max(w.abs()));
    let (mut mismatches, mut worst) = (0, 0f64);
    for t in 0..tokens {
        let (g, e) = (rows(got.0, got.1, t), rows(expected.0, expected.1, t));
        if g.iter().map(|x| x.0).ne(e.iter().map(|x| x.0)) {
            mismatches += 1;
            continue;
        }
        for (g, e) in g.iter().zip(&e) {
            let d = (g.1 - e.1).abs();
            worst = worst.max(if d.is_nan() { f64::INFINITY } else { d });
        }
    }
    (mismatches, if worst == 0.0 { 0.0 } else { worst / top })
}
