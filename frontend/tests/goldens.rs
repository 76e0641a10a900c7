//! Every reference case: its config becomes a graph, and the graph computes what the reference did.
//!
//! `output_ref` is the reference in 64-bit floats over the same stored weights, so the interpreter
//! without rounding has to agree to within the noise of sums.

use indexmap::IndexMap;
use moec_frontend::{
    Model, read_config,
    weights::{Checkpoint, bind, materialize},
};
use moec_ir::{
    Weight,
    interp::{Array, ArrayData, Options, WeightIndex, Weights, interpret},
};
use std::path::{Path, PathBuf};

fn cases() -> Vec<PathBuf> {
    let root = std::env::var_os("MOEC_GOLDENS")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens")), PathBuf::from);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    files
}

/// Weights of a layer, straight from a file.
struct Stored<'a> {
    checkpoint: &'a Checkpoint,
    prefix: &'a str,
}

impl Weights for Stored<'_> {
    fn get(&self, name: &String, weight: &Weight, index: WeightIndex) -> Result<Array, moec_ir::interp::InterpError> {
        materialize(weight, index, self.prefix, &|tensor| self.checkpoint.raw(tensor))
            .map_err(|e| moec_ir::interp::InterpError::Weight { name: name.clone(), message: e.to_string() })
    }
}

/// A tensor of the case that is not a weight.
fn given(checkpoint: &Checkpoint, name: &str) -> Option<Array> {
    let raw = checkpoint.raw(name).ok()?;
    let dtype = raw.dtype;
    let shape = raw.shape.iter().map(|n| moec_ir::Extent::Fixed(*n)).collect();
    let weight = Weight { dtype, shape, source: moec_ir::Source::plain(name) };
    Some(materialize(&weight, WeightIndex::default(), "", &|tensor| checkpoint.raw(tensor)).unwrap())
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |a, v| if v.is_nan() { f64::INFINITY } else { a.max(v.abs()) })
}

fn read(checkpoint: &Checkpoint, case: &str) -> Model {
    read_config(&checkpoint.metadata()["config"], case).unwrap_or_else(|e| panic!("{case}: {e:#?}"))
}

/// What differs from the reference; nothing when all is well.
fn run(path: &Path) -> Result<(), String> {
    let case = path.file_stem().unwrap().to_string_lossy().into_owned();
    let checkpoint = Checkpoint::open(path).map_err(|e| format!("{e:?}"))?;
    let model = read(&checkpoint, &case);
    let prefix = checkpoint.metadata()["layer_prefix"].clone();
    let (form, layer) = model.block_of(&prefix).ok_or_else(|| format!("no block at {prefix}"))?;
    let form = model.forms[form].with_layout_of(&checkpoint.shapes()).map_err(|e| format!("{e:?}"))?;
    bind(&form, layer, &checkpoint).map_err(|e| format!("{e:#?}"))?;
    let mut graph = form.graph.clone();
    graph.infer().map_err(|e| format!("{e:#?}"))?;

    let mut inputs = IndexMap::new();
    for id in graph.inputs() {
        if let moec_ir::Op::Input(input) = &graph.node(id).op {
            inputs.insert(
                input.name.clone(),
                given(&checkpoint, &input.name).ok_or_else(|| format!("the case has no {}", input.name))?,
            );
        }
    }
    let weights = Stored { checkpoint: &checkpoint, prefix: &prefix };
    let results = interpret(&graph, &inputs, &weights, Options::default()).map_err(|e| e.to_string())?;

    let expected = given(&checkpoint, "output_ref").unwrap().floats();
    let output = results["output"].floats();
    let scale = largest(expected.iter().copied());
    let error = largest(expected.iter().zip(&output).map(|(a, b)| a - b)) / scale;
    if output.len() != expected.len() || error > 1e-9 {
        return Err(format!("output differs by {error:e}"));
    }
    selection(&checkpoint, &results)?;
    logits(&checkpoint, &results)
}

/// Experts and weights of every token, as sets over the slots that count.
fn selection(checkpoint: &Checkpoint, results: &IndexMap<String, Array>) -> Result<(), String> {
    let idx = given(checkpoint, "topk_indices").unwrap();
    let expected = given(checkpoint, "topk_weights_ref").unwrap().floats();
    let (ours, weights) = (&results["topk_indices"], results["topk_weights"].floats());
    let sorted = |ids: &[i64], w: &[f64]| -> Vec<(i64, f64)> {
        let mut pairs: Vec<(i64, f64)> =
            ids.iter().copied().zip(w.iter().copied()).filter(|(e, w)| *e >= 0 && *w != 0.0).collect();
        pairs.sort_by_key(|(e, _)| *e);
        pairs
    };
    let scale = largest(expected.iter().copied());
    let (theirs, k) = (idx.ints().unwrap(), idx.shape[1]);
    let (mine, slots) = (ours.ints().unwrap(), ours.shape[1]);
    for t in 0..idx.shape[0] {
        let a = sorted(&theirs[t * k..(t + 1) * k], &expected[t * k..(t + 1) * k]);
        let b = sorted(&mine[t * slots..(t + 1) * slots], &weights[t * slots..(t + 1) * slots]);
        let same = a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() <= 1e-9 * scale);
        if !same {
            return Err(format!("token {t}: expected {a:?}, got {b:?}"));
        }
    }
    Ok(())
}

/// Router logits, which the reference recorded in the type of the case.
fn logits(checkpoint: &Checkpoint, results: &IndexMap<String, Array>) -> Result<(), String> {
    let Some(expected) = given(checkpoint, "router_logits") else { return Ok(()) };
    let ours = results.get("router_logits").ok_or("no router_logits")?;
    let tolerance = if checkpoint.metadata()["dtype"].contains("bf") { 3e-2 } else { 2e-5 };
    let expected = expected.floats();
    let scale = largest(expected.iter().copied());
    let error = largest(expected.iter().zip(ours.floats()).map(|(a, b)| a - b)) / scale;
    if ours.len() != expected.len() || error > tolerance {
        return Err(format!("router_logits differ by {error:e} of {scale:e}"));
    }
    Ok(())
}

#[test]
fn graphs_compute_what_the_reference_did() {
    let cases = cases();
    assert!(cases.len() >= 100, "{} cases", cases.len());
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|path| run(path).err().map(|why| format!("{}: {why}", path.file_stem().unwrap().to_string_lossy())))
        .collect();
    assert!(failures.is_empty(), "{} of {} differ:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn integers_of_cases_stay_integers() {
    let path = cases().into_iter().find(|p| p.to_string_lossy().contains("_hash")).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let ids = given(&checkpoint, "input_ids").unwrap();
    assert!(matches!(ids.data, ArrayData::I64(_)));
}
