//! `moec run`: one layer on one device, compared with the reference if wanted.

use crate::{
    args::{Run, Where},
    context::Context,
    failure::Failure,
    wanted,
};
use moec::{
    Compiler, FormReport, Table,
    run::{self, Comparison, Launched, Prepared, Tensor},
    runtime::{Artefact, Device},
};
use serde_json::json;
use std::{path::Path, sync::Arc, time::Instant};

/// An artefact for a device, read or compiled.
pub(crate) struct Loaded {
    /// For the runtime.
    pub artefact: Arc<Artefact>,
    /// What the compiler knows, if it was compiled just now.
    pub forms: Vec<FormReport>,
    /// Where it runs.
    pub device: Arc<dyn Device>,
}

/// Reads an artefact, or compiles a model with these results.
pub(crate) fn load(cx: &Context, what: &Path, on: &Where, outputs: &[&str], tuned: Table) -> Result<Loaded, Failure> {
    let (device, target) = wanted::device(&on.device, on.threads, on.target.as_deref())?;
    if what.join("manifest.json").is_file() {
        let artefact = Arc::new(Artefact::load(what)?);
        if let Some(chain) = artefact.manifest().chains.first() {
            let message = format!("{} holds rank {} of several, which cannot run alone", what.display(), chain.rank);
            let help = "`moec run MODEL --plan FILE` runs all ranks in one process";
            return Err(Failure::refused("E0402", message, help));
        }
        cx.say("Reading", &format!("{}/ ({})", what.display(), artefact.manifest().model));
        return Ok(Loaded { artefact, forms: Vec::new(), device });
    }
    let source = wanted::model(cx, what)?;
    cx.say("Reading", &format!("{} ({})", what.display(), wanted::about(&source)));
    let model = source.model;
    let start = Instant::now();
    let outputs = wanted::outputs(&model, outputs);
    let compiler = Compiler { targets: vec![target], outputs, tuned, ..Compiler::default() };
    let forms: Vec<_> = match on.layer {
        None => model.forms.clone(),
        Some(layer) => model.forms.iter().filter(|f| f.layers.contains(&layer)).cloned().collect(),
    };
    if let (Some(layer), true) = (on.layer, forms.is_empty()) {
        let have: Vec<u64> = model.forms.iter().flat_map(|f| f.layers.iter().copied()).collect();
        let help = format!("layers with experts: {}", super::check::ranges(&have));
        return Err(Failure::refused("E0215", format!("layer {layer} has no experts"), help));
    }
    let compiled = compiler.compile_forms(&model.name, &forms)?;
    let seconds = start.elapsed().as_secs_f64();
    cx.say("Compiled", &format!("for {} in {seconds:.1}s", target.name()));
    Ok(Loaded { artefact: Arc::new(compiled.load()?), forms: compiled.forms, device })
}

impl Loaded {
    /// Binds a layer.
    pub(crate) fn prepare(&self, cx: &Context, on: &Where) -> Result<Prepared, Failure> {
        let prepared = run::prepare(&self.artefact, &self.device, on.layer, &wanted::weights(&on.weights)?)?;
        let (bytes, seconds) = (prepared.layer().weights_bytes(), prepared.bound_in.as_secs_f64());
        let size = super::compile::size(bytes);
        cx.say("Packed", &format!("weights of {size} in {seconds:.1}s ({:.1} GB/s)", bytes as f64 * 1e-9 / seconds));
        Ok(prepared)
    }

    /// The graph of a layer that is bound.
    pub(crate) fn graph(&self, prepared: &Prepared) -> Result<moec::ir::Graph, Failure> {
        let name = &prepared.program()?.name;
        match self.forms.iter().find(|f| f.name == *name) {
            Some(form) => Ok(form.graph.clone()),
            None => Ok(prepared.graph()?),
        }
    }
}

/// Runs, writes and compares.
pub(crate) fn run(cx: &Context, args: &Run) -> Result<(), Failure> {
    if let Some(spread) = super::spread::read(cx, &args.spread)? {
        return super::spread::run(cx, args, &spread);
    }
    let input = wanted::input(&args.input)?;
    let wanted_outputs: &[&str] = if args.compare { &["output", "topk_indices", "topk_weights"] } else { &["output"] };
    let loaded = load(cx, &args.what, &args.on, wanted_outputs, Table::default())?;
    let prepared = loaded.prepare(cx, &args.on)?;
    for reason in &prepared.choice {
        cx.detail("Choice", reason);
    }
    if let Some(path) = &args.save_weights {
        let packed = prepared.packed_weights()?;
        moec::files::write(path, &packed)?;
        cx.say("Written", &format!("{} ({})", path.display(), super::compile::size(packed.len() as u64)));
    }
    let (tokens, inputs) = prepared.inputs(&input)?;
    let launched = prepared.launch(tokens, &inputs)?;
    if let Some(path) = &args.output {
        moec::files::write(path, &run::safetensors(&launched.outputs)?)?;
        cx.say("Written", &path.display().to_string());
    }
    let comparison = if args.compare {
        let graph = loaded.graph(&prepared)?;
        cx.detail("Reference", "computing with the interpreter");
        Some(prepared.compare(&graph, &inputs, &launched.outputs)?)
    } else {
        None
    };
    report(cx, &prepared, tokens, &launched, comparison.as_ref())?;
    match comparison {
        Some(comparison) if !comparison.passed() => Err(Failure::Different),
        Some(_) | None => Ok(()),
    }
}

pub(crate) fn report(
    cx: &Context,
    prepared: &Prepared,
    tokens: u64,
    launched: &Launched,
    comparison: Option<&Comparison>,
) -> Result<(), Failure> {
    let program = prepared.program()?;
    let layer = prepared.layer().number();
    let milliseconds = launched.time.as_secs_f64() * 1e3;
    if cx.is_json() {
        let outputs: Vec<_> =
            launched.outputs.iter().map(|t| json!({"name": t.name, "shape": t.shape, "dtype": t.dtype})).collect();
        return cx.json(&json!({
            "schema": 1, "name": program.name, "target": program.target, "layer": layer, "tokens": tokens,
            "time_ms": milliseconds, "outputs": outputs,
            "compare": comparison.map(|c| json!({
                "passed": c.passed(), "out_max_rel": c.max_rel, "out_rms_rel": c.rms_rel,
                "selection_mismatches": c.selection.map(|s| s.0),
            })),
        }));
    }
    let mut out = format!(
        "layer {layer} on {}: {tokens} tokens in {milliseconds:.2} ms (first call), {} kernels\n",
        program.target,
        program.launches.len()
    );
    for tensor in &launched.outputs {
        out.push_str(&format!("  {}\n", summary(tensor)));
    }
    if let Some(c) = comparison {
        let selection = match c.selection {
            Some((0, _)) => "selection exact".to_owned(),
            Some((n, all)) => format!("selection differs for {n} of {all} tokens"),
            None => "selection not an output (compile with --outputs all)".to_owned(),
        };
        let verdict = if c.passed() { "agrees with" } else { "DIFFERS from" };
        out.push_str(&format!(
            "{verdict} the reference: max {:.1e} (limit {:.0e}), rms {:.1e} (limit {:.0e}), {selection}; reference took {:.1}s\n",
            c.max_rel,
            c.limits.0,
            c.rms_rel,
            c.limits.1,
            c.time.as_secs_f64()
        ));
    }
    cx.result(out)
}

/// Shape and size of an output.
fn summary(tensor: &Tensor) -> String {
    let numbers = tensor.numbers();
    let odd = numbers.iter().filter(|v| !v.is_finite()).count();
    let mean = (numbers.iter().filter(|v| v.is_finite()).map(|v| v * v).sum::<f64>()
        / (numbers.len() - odd).max(1) as f64)
        .sqrt();
    let odd = if odd > 0 { format!(", {odd} values not finite") } else { String::new() };
    format!("{}: {:?} {:?}, rms {mean:.4e}{odd}", tensor.name, tensor.dtype, tensor.shape)
}
