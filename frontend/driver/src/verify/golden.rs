//! Cases of the form `moec-golden-1`: one block of a model from the reference library.

use super::{
    Bench, CaseResult, Status, compare,
    execute::{Found, execute, refused},
};
use crate::{Compiler, Error};
use moec_runtime::{Model, SafetensorsBytes, Tensors};
use serde::Deserialize;
use std::{collections::BTreeMap, sync::Arc};

/// Limits of a case.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Tolerance {
    max_rel: f64,
    rms_rel: f64,
    topk_weights_rel: f64,
}

/// Builds, compiles, runs and compares a case.
pub(super) fn run(name: &str, tensors: &SafetensorsBytes<'_>, bench: &Bench) -> Result<CaseResult, Error> {
    let text = |key: &str| tensors.text(key).ok_or_else(|| refused(format!("the case has no `{key}` in its metadata")));
    let model = moec_frontend::read_config(text("config")?, "config of the case").map_err(Error::Input)?;
    let prefix = text("layer_prefix")?;
    let tolerance: Tolerance =
        serde_json::from_str(text("tolerance")?).map_err(|e| refused(format!("`tolerance` in the metadata: {e}")))?;
    let Some((form, layer)) = model.block_of(prefix) else {
        return Err(refused(format!("no layer of the model has the prefix `{prefix}`")));
    };
    let compiler = Compiler {
        targets: vec![bench.target],
        outputs: ["output", "topk_indices", "topk_weights"].map(str::to_owned).to_vec(),
        ..Compiler::default()
    };
    // Files of older library versions store the experts in another layout than newer ones.
    let shapes = tensors.names().into_iter().filter_map(|n| tensors.find(&n).map(|t| (n, t.shape.clone()))).collect();
    let form = model.forms[form].with_layout_of(&shapes).map_err(|d| Error::Input(vec![d]))?;
    let artefact = compiler.compile_forms(&model.name, std::slice::from_ref(&form))?;
    let layer = Model::new(Arc::new(artefact.load()?), Arc::clone(&bench.device)).layer(layer, tensors)?;
    let (_, shape) = compare::tensor(tensors, "hidden_states")?;
    let tokens = shape.first().copied().unwrap_or(0);
    let results = execute(&layer, tokens, tensors, "")?;
    judge(name, tensors, tolerance, tokens, &results)
}

fn judge(
    name: &str,
    tensors: &SafetensorsBytes<'_>,
    tolerance: Tolerance,
    tokens: u64,
    results: &BTreeMap<String, Found>,
) -> Result<CaseResult, Error> {
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
