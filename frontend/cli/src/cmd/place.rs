//! `moec place`: experts onto GPUs by load.

use crate::{
    args::{Format, Place as Args},
    context::Context,
    failure::Failure,
};
use moec::{
    ir::{Code, Diagnostic},
    place::{self, Input, Layout, Method, MovePlan, Options, PlaceError, Placement, Routing, Trace},
    pointed::{self, Refusal},
    runtime::{SafetensorsBytes, Tensors as _},
};
use serde_json::json;
use std::{fmt::Write as _, path::Path};

fn refused(error: PlaceError) -> Failure {
    Failure::Refused(vec![Diagnostic::error(Code(error.code.as_str()), error.message).help(error.help)])
}

/// Places, and prints the result.
pub(crate) fn run(cx: &Context, args: &Args) -> Result<(), Failure> {
    let options = Options {
        method: args.method.as_deref().map(Method::from_name).transpose().map_err(refused)?,
        gpus: args.gpus,
        nodes: args.nodes,
        replicas: args.replicas,
        groups: args.expert_groups,
        experts_per_gpu: args.per_gpu,
        alpha: args.alpha,
        lambda: args.lambda,
        min_tokens: args.min_tokens,
        experts: args.experts,
        time_limit_s: args.time_limit,
        ..Options::default()
    };
    let input = read(cx, &args.input, options.experts)?;
    if args.metrics {
        return metrics(cx, &input);
    }
    let placement = place::place(&input, &options).map_err(refused)?;
    if let Some(old) = &args.from {
        return moves(cx, old, &placement);
    }
    match (cx.format, placement.replicated()) {
        (Format::Json, _) => cx.json(&serde_json::to_value(&placement).map_err(|e| Failure::Bug(e.to_string()))?),
        (Format::Html, Some(slots)) => {
            let loads = match input.routing {
                Routing::Loads(loads) => loads,
                Routing::Trace(trace) => trace.loads().map_err(refused)?,
            };
            cx.result(place::html(&loads, slots))
        }
        (Format::Html, None) => Err(Failure::Usage("this method moves tokens, not experts: use --format text".into())),
        (Format::Text, _) => cx.result(place::text(&placement)),
    }
}

/// How local the routing of a trace is, layer by layer.
fn metrics(cx: &Context, input: &Input) -> Result<(), Failure> {
    let Routing::Trace(trace) = &input.routing else {
        return Err(Failure::Usage("--metrics measures a trace of routed ids, and loads have no order".to_owned()));
    };
    let layers = place::metrics::report(trace).map_err(refused)?;
    if cx.is_json() {
        return cx.json(&json!({ "schema": 1, "layers": layers }));
    }
    let share = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{:.1} %", 100.0 * x));
    let mut out = String::from("layer  busiest/mean  segment use  cache, segments  cache, running  affinity\n");
    for (i, l) in layers.iter().enumerate() {
        let _ = writeln!(
            out,
            "{i:>5}  {:>12.3}  {:>11}  {:>15}  {:>14}  {:>8}",
            l.expert_max_over_mean,
            share(l.srp),
            share(Some(l.sch)),
            share(Some(l.sch_online)),
            share(l.affinity_to_next)
        );
    }
    cx.result(out)
}

/// What to copy and free to get from a placement in use to a new one.
fn moves(cx: &Context, old: &Path, new: &Placement) -> Result<(), Failure> {
    let name = old.display().to_string();
    let text = std::fs::read_to_string(old).map_err(|e| {
        let help = "name what `moec place --format json` printed";
        Failure::refused("E0803", format!("cannot read {name}: {e}"), help)
    })?;
    let point = |e: PlaceError| Failure::Refused(vec![Refusal::from(e).point(&name, &text)]);
    let Some(slots) = new.replicated() else {
        return Err(Failure::Usage("this method moves tokens, not experts: --from needs another one".to_owned()));
    };
    let from = Layout::from_json(&text).map_err(point)?;
    if let Some(found) = pointed::ambiguous(&name, &text) {
        return Err(Failure::Refused(vec![found]));
    }
    let to = Layout::from_slots(&slots.phy2log, slots.gpu_load.first().map_or(0, Vec::len)).map_err(refused)?;
    let MovePlan { moves, drops, kept, device_of_gpu } =
        place::plan_moves_relabeled(&from, &to).map_err(|e| point(e.at("phy2log")))?;
    if cx.is_json() {
        let copies: Vec<_> = moves.iter().map(|m| json!([m.layer, m.expert, m.from, m.to])).collect();
        return cx.json(&json!({
            "schema": 1, "moves": copies, "drops": drops, "kept": kept, "device_of_gpu": device_of_gpu,
            "placement": slots,
        }));
    }
    let mut out = format!("{} experts are copied, {} freed, {kept} stay\n", moves.len(), drops.len());
    for m in &moves {
        let _ = writeln!(out, "  layer {} expert {}: GPU {} to {}", m.layer, m.expert, m.from, m.to);
    }
    cx.result(out)
}

/// Loads or a trace, by what the file is.
pub(crate) fn read(cx: &Context, path: &Path, experts: Option<usize>) -> Result<Input, Failure> {
    let bytes = if path == Path::new("-") {
        cx.stdin()?
    } else {
        std::fs::read(path).map_err(|e| {
            let help = "name a file with loads or a trace, or - for stdin";
            Failure::refused("E0803", format!("cannot read {}: {e}", path.display()), help)
        })?
    };
    let name = path.display().to_string();
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => trace(&name, &bytes, experts),
        Some("jsonl") => {
            let text = text_of(&bytes)?;
            let point = |e| Failure::Refused(vec![Refusal::from(e).point_line(&name, text)]);
            Ok(Input::from(Trace::from_jsonl(text, experts).map_err(point)?))
        }
        _ => {
            let text = text_of(&bytes)?;
            let input = Input::from_json(text);
            let input = input.map_err(|e| Failure::Refused(vec![Refusal::from(e).point(&name, text)]))?;
            match pointed::ambiguous(&name, text) {
                Some(found) => Err(Failure::Refused(vec![found])),
                None => Ok(input),
            }
        }
    }
}

fn text_of(bytes: &[u8]) -> Result<&str, Failure> {
    std::str::from_utf8(bytes).map_err(|e| {
        Failure::refused("E0411", format!("the file is not text: {e}"), "loads are JSON, traces JSON lines")
    })
}

/// Ids per token of each layer: the tensors of integers, in the order of their names.
fn trace(name: &str, bytes: &[u8], experts: Option<usize>) -> Result<Input, Failure> {
    const FORM: &str = "a trace has a tensor [tokens, slots] of I32 or I64 for each layer";
    let file = SafetensorsBytes::new(bytes).map_err(|e| Failure::refused("E0804", format!("{name}: {e}"), FORM))?;
    let mut layers: Vec<(Vec<i64>, usize)> = Vec::new();
    let mut names = file.names();
    names.sort_by_key(|name| (digits(name), name.clone()));
    for name in names {
        let Some(view) = file.find(&name) else { continue };
        let [_, width] = view.shape.as_slice() else { continue };
        let tensor = moec::run::Tensor {
            name: name.clone(),
            dtype: view.dtype,
            shape: view.shape.clone(),
            bytes: view.read(0, view.bytes())?.into_vec(),
        };
        if matches!(view.dtype, moec::abi::DType::I32 | moec::abi::DType::I64) {
            let ids = tensor.numbers().into_iter().map(|v| v as i64).collect();
            layers.push((ids, usize::try_from(*width).unwrap_or(0)));
        }
    }
    if layers.is_empty() {
        return Err(Failure::refused("E0420", format!("{name} holds no routed ids"), FORM));
    }
    let layers: Vec<(&[i64], usize)> = layers.iter().map(|(ids, width)| (ids.as_slice(), *width)).collect();
    Ok(Input::from(Trace::from_layers(&layers, experts).map_err(refused)?))
}

/// Numbers of a name, so that `layer.10` follows `layer.9`.
fn digits(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}
