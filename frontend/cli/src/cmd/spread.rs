//! Plans and placements that `compile` and `run` follow, and all ranks of a layer in one process.

use super::run::{Loaded, report};
use crate::{
    args::{Run, SpreadFiles},
    context::Context,
    failure::Failure,
    wanted,
};
use moec::{
    Compiler,
    plan::ranks::Layout,
    pointed,
    ranks::{Spread, run_ranks},
    run::Launched,
    runtime::{Cpu, Device},
};
use std::{path::Path, sync::Arc, time::Instant};

/// The plan and placement that were named.
pub(crate) fn read(cx: &Context, files: &SpreadFiles) -> Result<Option<Spread>, Failure> {
    let text = |path: &Path| {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Ok((name, text)),
            Err(e) => {
                let help = "name what `moec plan` or `moec place` printed with --format json";
                Err(Failure::refused("E0803", format!("cannot read {name}: {e}"), help))
            }
        }
    };
    match (&files.plan, &files.placement) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Failure::Usage("--placement needs --plan, which says how many ranks there are".into())),
        (Some(plan), placement) => {
            let placement = placement.as_deref().map(text).transpose()?;
            let (name, plan) = text(plan)?;
            let placement = placement.as_ref().map(|(name, text)| (name.as_str(), text.as_str()));
            let spread = Spread::from_json((&name, &plan), placement)?;
            cx.report(&pointed::unread(&name, Layout::unread(&plan)));
            Ok(Some(spread))
        }
    }
}

/// Runs a layer on all ranks of a stage, as threads.
pub(crate) fn run(cx: &Context, args: &Run, spread: &Spread) -> Result<(), Failure> {
    if args.on.device != "cpu" {
        return Err(Failure::Usage("--plan runs all ranks as threads of the processor: --device cpu".to_owned()));
    }
    if args.what.join("manifest.json").is_file() {
        return Err(Failure::Usage("--plan compiles every rank, so it needs a MODEL, not an artefact".to_owned()));
    }
    let outputs = ["output"];
    let loaded: Loaded = super::run::load(cx, &args.what, &args.on, &outputs, moec::Table::default())?;
    let prepared = loaded.prepare(cx, &args.on)?;
    let (tokens, inputs) = prepared.inputs(&wanted::input(&args.input)?)?;
    let model = wanted::model(cx, &args.what)?.model;
    let (_, target) = wanted::device(&args.on.device, args.on.threads, args.on.target.as_deref())?;
    let ranks = spread.ranks()?;
    let compiler = Compiler { targets: vec![target], ..Compiler::default() };
    let start = Instant::now();
    let compiled = compiler.compile_ranks(&model, spread, &ranks)?;
    let mut artefacts = Vec::new();
    for (rank, artefact) in ranks.iter().zip(compiled) {
        artefacts.push((*rank, artefact.load()?));
    }
    cx.say(
        "Compiled",
        &format!("{} ranks for {} in {:.1}s", ranks.len(), target.name(), start.elapsed().as_secs_f64()),
    );
    let device = || -> Arc<dyn Device> { Arc::new(Cpu::new(1)) };
    let layer = prepared.layer().number();
    let start = Instant::now();
    let results = run_ranks(spread, &artefacts, &device, layer, prepared.tensors(), (tokens, &inputs))?;
    let launched = Launched { outputs: results, time: start.elapsed(), launches: Vec::new() };
    if let Some(path) = &args.output {
        moec::files::write(path, &moec::run::safetensors(&launched.outputs)?)?;
        cx.say("Written", &path.display().to_string());
    }
    let comparison = if args.compare {
        Some(prepared.compare(&loaded.graph(&prepared)?, &inputs, &launched.outputs)?)
    } else {
        None
    };
    cx.say("Running", &format!("all {} ranks of a pipeline stage, weights packed for each", ranks.len()));
    report(cx, &prepared, tokens, &launched, comparison.as_ref())?;
    match comparison {
        Some(comparison) if !comparison.passed() => Err(Failure::Different),
        Some(_) | None => Ok(()),
    }
}
