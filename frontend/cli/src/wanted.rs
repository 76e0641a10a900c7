//! What flags name: models, targets, devices, weights.

use crate::{context::Context, failure::Failure};
use moec::{
    Target,
    frontend::Model,
    host_target,
    ir::{DType, nearest},
    read::{self, Source},
    run::{Input, Weights},
    runtime::{Cpu, Cuda, Device, Sim},
};
use std::{path::Path, sync::Arc};

/// Reads a model; `-` is stdin. Warnings are reported.
pub(crate) fn model(cx: &Context, path: &Path) -> Result<Source, Failure> {
    let source = if path == Path::new("-") { read::bytes(&cx.stdin()?, "-")? } else { read::path(path)? };
    if !cx.quiet {
        cx.report(&source.model.warnings);
    }
    Ok(source)
}

/// What a model is, in a few words.
pub(crate) fn about(source: &Source) -> String {
    let model = &source.model;
    let facts = model.forms.first().map(moec::frontend::Form::facts).unwrap_or_default();
    let layers = match model.layers.len() {
        1 => "1 layer".to_owned(),
        n => format!("{n} layers"),
    };
    let experts =
        if facts.experts == 0 { String::new() } else { format!(", {} experts, top {}", facts.experts, facts.top_k) };
    format!("{}: {layers}{experts}", model.family)
}

/// Targets of processors of this kind that differ for weights of type `dtype`.
pub(crate) fn cpu_targets(dtype: DType) -> Vec<Target> {
    let targets = Target::ALL.into_iter();
    targets
        .filter(|t| !t.is_gpu() && t.triple().starts_with(std::env::consts::ARCH))
        .filter(|t| !t.bf16_only() || dtype == DType::Bf16)
        .collect()
}

/// The target of a name.
pub(crate) fn target(name: &str) -> Result<Target, Failure> {
    Target::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = std::iter::once("cpu").chain(Target::ALL.map(Target::name)).collect();
        let near = nearest(name, known.iter().copied()).map_or_else(String::new, |n| format!("; the nearest is `{n}`"));
        Failure::refused("E0401", format!("unknown target `{name}`"), format!("targets: {}{near}", known.join(", ")))
    })
}

/// Targets of a list of names; `cpu` stands for all of this host's processors.
pub(crate) fn targets(names: &[String], dtype: DType) -> Result<Vec<Target>, Failure> {
    let mut targets = Vec::new();
    for name in names {
        let more = if name == "cpu" { cpu_targets(dtype) } else { vec![target(name)?] };
        for target in more {
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
    }
    Ok(targets)
}

/// The GPU of this machine: its name and the best target for it.
pub(crate) fn gpu() -> Option<(String, Target)> {
    let cuda = Cuda::open(0).ok()?;
    Some((cuda.device_name().to_owned(), gpu_target(&cuda)?))
}

fn gpu_target(cuda: &Cuda) -> Option<Target> {
    Target::ALL.into_iter().filter(|t| t.is_gpu() && cuda.runs(t.name()).is_ok()).max_by_key(|t| cuda.rank(t.name()))
}

/// A device, and the target to compile for it.
pub(crate) fn device(name: &str, threads: u32, wanted: Option<&str>) -> Result<(Arc<dyn Device>, Target), Failure> {
    let asked = wanted.filter(|t| *t != "cpu").map(target).transpose()?;
    let (device, best): (Arc<dyn Device>, Target) = match name.split_once(':').unwrap_or((name, "")) {
        ("cpu", "") => (Arc::new(Cpu::new(threads)), host_target()),
        ("sim", "") => (Arc::new(Sim::new(moec::sim::Options::default())), Target::Sm90a),
        ("cuda", number) => {
            let number = if number.is_empty() { Ok(0) } else { number.parse() };
            let number =
                number.map_err(|_| Failure::Usage(format!("`{name}`: the number of a GPU is due after `cuda:`")))?;
            let cuda = Cuda::open(number)?;
            let best = gpu_target(&cuda).ok_or_else(|| {
                let message = format!("{} runs none of our targets", cuda.device_name());
                Failure::refused("E0813", message, "`moec list targets` lists them")
            })?;
            (Arc::new(cuda), best)
        }
        _ => return Err(Failure::Usage(format!("unknown device `{name}`; devices: cpu, sim, cuda, cuda:N"))),
    };
    let target = asked.unwrap_or(best);
    device.runs(target.name()).map_err(|why| {
        let message = format!("code for {} does not run on {name}: {why}", target.name());
        Failure::refused("E0401", message, format!("leave out --target, which takes {}", best.name()))
    })?;
    Ok((device, target))
}

/// Weights of a flag.
pub(crate) fn weights(text: &str) -> Result<Weights, Failure> {
    match text.strip_prefix("random:") {
        Some(seed) => seed
            .parse()
            .map(Weights::Random)
            .map_err(|_| Failure::Usage(format!("`--weights {text}`: a whole number is due after `random:`"))),
        None if text == "random" => Ok(Weights::Random(1)),
        None => Ok(Weights::Folder(text.into())),
    }
}

/// Inputs of a flag.
pub(crate) fn input(text: &str) -> Result<Input, Failure> {
    match text.strip_prefix("random:") {
        Some(tokens) => tokens
            .parse()
            .map(Input::Random)
            .map_err(|_| Failure::Usage(format!("`--input {text}`: a number of tokens is due after `random:`"))),
        None => Ok(Input::File(text.into())),
    }
}

/// Those of some results that a model has; if it has none of them, all that it has.
pub(crate) fn outputs(model: &Model, names: &[&str]) -> Vec<String> {
    let offered = |name: &str| model.forms.iter().any(|f| f.graph.outputs.iter().any(|o| o.name == name));
    names.iter().filter(|name| offered(name)).map(|name| (*name).to_owned()).collect()
}
