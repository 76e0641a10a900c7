//! Cases of the form `moec-system-golden-1`: a graph with weights, inputs and expected results.

use super::{Bench, CaseResult, Status, host, refused};
use crate::{Compiler, Error};
use moec_abi::DType;
use moec_check::{
    compare,
    execute::{Found, execute, is_integer},
};
use moec_ir::{
    Dim, Extent, Graph, Part, TensorType,
    json::{Signature, TensorShape, read_graph},
};
use moec_runtime::{Model, SafetensorsBytes, TensorView, Tensors};
use serde::Deserialize;
use std::{collections::BTreeMap, sync::Arc};

/// Limits of a case.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Tolerance {
    pub(super) max_rel: f64,
    pub(super) rms_rel: f64,
    topk_weights_abs: f64,
}

/// The weights of a case under the names that the graph has for them.
struct Weights<'a>(&'a SafetensorsBytes<'a>);

impl Tensors for Weights<'_> {
    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        self.0.find(&format!("weights.{name}"))
    }
}

/// Builds, compiles, runs and compares a case.
pub(super) fn run(name: &str, tensors: &SafetensorsBytes<'_>, bench: &Bench) -> Result<CaseResult, Error> {
    let text = |key: &str| tensors.text(key).ok_or_else(|| refused(format!("the case has no `{key}` in its metadata")));
    let tolerance: Tolerance =
        serde_json::from_str(text("tolerance")?).map_err(|e| refused(format!("`tolerance` in the metadata: {e}")))?;
    let source = text("graph")?;
    if source.is_empty() {
        return host::run(name, text("case")?, tensors, tolerance);
    }
    let (graph, tokens) = graph(source, tensors)?;
    let compiler = Compiler { targets: vec![bench.target], outputs: Vec::new(), ..Compiler::default() };
    let parts: BTreeMap<String, Part> = graph.outputs.iter().map(|o| (o.name.clone(), o.part)).collect();
    let artefact = compiler.compile_graph(text("case")?, graph)?;
    let layer = Model::new(Arc::new(artefact.load()?), Arc::clone(&bench.device)).layer(0, &Weights(tensors))?;
    let results = execute(&layer, tokens, tensors, "inputs.")?;
    judge(name, tensors, tolerance, &parts, &results)
}

/// The graph with the types of the case's tensors, and the number of tokens.
///
/// The first axis of inputs is `T` where the graph allows it; some graphs hold for one number of tokens only.
fn graph(source: &str, tensors: &SafetensorsBytes<'_>) -> Result<(Graph, u64), Error> {
    let mut fixed = Signature::default();
    for name in tensors.names() {
        let Some(view) = tensors.find(&name) else { continue };
        let dtype = element(view.dtype)?;
        if let Some(weight) = name.strip_prefix("weights.") {
            let shape = view.shape.iter().copied().map(Extent::Fixed).collect();
            fixed.tensors.insert(weight.to_owned(), TensorShape { dtype, shape });
        } else if let Some(input) = name.strip_prefix("inputs.") {
            let shape = view.shape.iter().copied().map(Dim::Const).collect();
            fixed.inputs.insert(input.to_owned(), TensorType { dtype, shape });
        }
    }
    let lead = fixed.inputs.get("x").or_else(|| fixed.inputs.values().next());
    let tokens = lead.and_then(|ty| ty.shape.first()).and_then(Dim::known).unwrap_or(1);
    // First with one axis per input, then with both axes of square ones (attention probabilities).
    for square in [false, true] {
        let mut symbolic = fixed.clone();
        for (name, ty) in &mut symbolic.inputs {
            let all = square && name != "x" && ty.shape.len() == 2 && ty.shape.first() == ty.shape.last();
            for (axis, dim) in ty.shape.iter_mut().enumerate() {
                if *dim == Dim::Const(tokens) && (axis == 0 || all) {
                    *dim = Dim::Tokens;
                }
            }
        }
        if let Ok(graph) = read_graph(source, &symbolic) {
            return Ok((graph, tokens));
        }
    }
    Ok((read_graph(source, &fixed).map_err(Error::Input)?, tokens))
}

fn element(dtype: DType) -> Result<moec_ir::DType, Error> {
    Ok(match dtype {
        DType::F64 => moec_ir::DType::F64,
        DType::F32 => moec_ir::DType::F32,
        DType::Bf16 => moec_ir::DType::Bf16,
        DType::F16 => moec_ir::DType::F16,
        DType::I32 => moec_ir::DType::I32,
        DType::I64 => moec_ir::DType::I64,
        DType::U8 => moec_ir::DType::U8,
        DType::I8 => moec_ir::DType::I8,
        DType::F8e4m3 | DType::F8e5m2 => return Err(refused(format!("{dtype:?} needs its scales, cases have none"))),
    })
}

fn judge(
    name: &str,
    tensors: &SafetensorsBytes<'_>,
    tolerance: Tolerance,
    parts: &BTreeMap<String, Part>,
    results: &BTreeMap<String, Found>,
) -> Result<CaseResult, Error> {
    let mut judgement = Judgement { tolerance, reasons: Vec::new(), output: None, mismatches: None };
    for (output, part) in parts {
        let found =
            results.get(output).ok_or_else(|| refused(format!("the compiled graph has no output `{output}`")))?;
        let key = if output == "output" { "expected.output_ref".to_owned() } else { format!("expected.{output}") };
        let (bytes, dtype, shape) = compare::raw(tensors, &key)?;
        let expected = compare::floats(dtype, &bytes);
        let got = match part {
            Part::Whole => found.values.clone(),
            Part::Idx | Part::Weights => judgement.trimmed(output, found, &shape),
        };
        match part {
            Part::Idx => judgement.equal(output, &got, &expected, shape.last().copied().unwrap_or(1)),
            Part::Weights => judgement.slots(output, &got, &expected),
            Part::Whole if is_integer(dtype) => judgement.equal(output, &got, &expected, 1),
            Part::Whole => judgement.close(output, &got, &expected),
        }
    }
    Ok(judgement.result(name))
}

/// What comparisons found so far.
pub(super) struct Judgement {
    tolerance: Tolerance,
    reasons: Vec<String>,
    output: Option<(f64, f64)>,
    mismatches: Option<u64>,
}

impl Judgement {
    pub(super) fn new(tolerance: Tolerance) -> Self {
        Self { tolerance, reasons: Vec::new(), output: None, mismatches: None }
    }

    /// Slots of a route up to those that the case has; the others must be empty.
    fn trimmed(&mut self, name: &str, found: &Found, shape: &[u64]) -> Vec<f64> {
        let [have, wanted] =
            [&found.shape[..], shape].map(|s| s.last().and_then(|n| usize::try_from(*n).ok()).unwrap_or(1).max(1));
        if wanted >= have {
            return found.values.clone();
        }
        if found.values.chunks(have).flat_map(|row| &row[wanted..]).any(|v| *v != 0.0 && *v != -1.0) {
            self.reasons.push(format!("`{name}` fills more than {wanted} slots"));
        }
        found.values.chunks(have).flat_map(|row| &row[..wanted]).copied().collect()
    }

    /// Integers, row by row.
    pub(super) fn equal(&mut self, name: &str, got: &[f64], expected: &[f64], width: u64) {
        let width = usize::try_from(width).unwrap_or(1).max(1);
        let rows = got.chunks(width).zip(expected.chunks(width)).filter(|(g, e)| g != e).count() as u64;
        if name == "topk_indices" {
            self.mismatches = Some(rows);
        }
        if rows > 0 || got.len() != expected.len() {
            self.reasons.push(format!("`{name}` differs in {rows} rows"));
        }
    }

    fn slots(&mut self, name: &str, got: &[f64], expected: &[f64]) {
        let worst = got.iter().zip(expected).fold(0f64, |m, (g, e)| {
            let d = (g - e).abs();
            if d.is_nan() { f64::INFINITY } else { m.max(d) }
        });
        let limit = self.tolerance.topk_weights_abs;
        if worst > limit || got.len() != expected.len() {
            self.reasons.push(format!("`{name}` differs by {worst:.2e} (limit {limit:.0e})"));
        }
    }

    pub(super) fn close(&mut self, name: &str, got: &[f64], expected: &[f64]) {
        let (max, rms) = compare::difference(got, expected);
        let Tolerance { max_rel, rms_rel, .. } = self.tolerance;
        if name == "output" {
            self.output = Some((max, rms));
        }
        if !(max <= max_rel && rms <= rms_rel) {
            let limits = format!("max {max:.2e} (limit {max_rel:.0e}), rms {rms:.2e} (limit {rms_rel:.0e})");
            self.reasons.push(format!("`{name}` differs: {limits}"));
        }
    }

    pub(super) fn result(self, name: &str) -> CaseResult {
        CaseResult {
            name: name.to_owned(),
            status: if self.reasons.is_empty() { Status::Pass } else { Status::Fail },
            out_max_rel: self.output.map(|o| o.0),
            out_rms_rel: self.output.map(|o| o.1),
            selection_mismatches: self.mismatches,
            reason: if self.reasons.is_empty() { None } else { Some(self.reasons.join("; ")) },
        }
    }
}
