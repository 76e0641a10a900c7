//! `moec plan`: mappings of a model onto GPUs.

use crate::{
    args::{Format, Plan as Args},
    context::Context,
    failure::Failure,
};
use moec::{
    ir::{Code, Diagnostic},
    place,
    plan::{
        self, Cluster, Mapping, ModelShape, Objective, PlanError, Precision, Request, Routing, Schedule, Sharding,
        Strategy,
        calibration::{Software, TrainCalibration},
        choice::Recompute,
    },
    pointed::{self, Refusal},
};
use serde_json::Value;
use std::path::Path;

fn refused(error: PlanError) -> Failure {
    Failure::Refused(vec![Diagnostic::error(Code(error.code), error.message).help(error.help)])
}

/// Plans, and prints the best mappings.
pub(crate) fn run(cx: &Context, args: &Args) -> Result<(), Failure> {
    if args.print_cluster {
        return cx.result(format!("{}\n", cluster(cx, &args.cluster)?.to_json()));
    }
    let Some(gpus) = args.gpus else { return Err(Failure::Usage("plan needs --gpus N".to_owned())) };
    let fixed = Mapping::parse_fixed(&args.fix).map_err(refused)?;
    if args.groups {
        let groups = plan::groups(gpus, &fixed.mapping(), &args.order).map_err(refused)?;
        let value = serde_json::to_value(&groups).map_err(|e| Failure::Bug(e.to_string()))?;
        return cx.json(&value);
    }
    let Some(path) = &args.model else { return Err(Failure::Usage("plan needs a MODEL".to_owned())) };
    let model = shape(cx, path)?;
    let mut cluster = cluster(cx, &args.cluster)?;
    cluster.gpus_per_domain = args.gpus_per_node.unwrap_or(cluster.gpus_per_domain);
    let mut request = match args.objective.as_str() {
        "prefill" => Request::serve(Objective::Prefill, gpus, args.seq, args.generate),
        "decode" => Request::serve(Objective::Decode, gpus, args.seq, args.generate),
        _ => Request::train(gpus, args.seq, args.global_batch.unwrap_or(gpus.max(256))),
    };
    if let Some(batch) = args.global_batch {
        request.global_batch = batch;
    }
    request.fixed = fixed;
    request.top = args.top;
    request.order.clone_from(&args.order);
    request.latency_bound_ms = args.latency;
    request.memory_limit_gib = args.memory;
    request.capacity_factor = args.capacity;
    request.software.clone_from(&args.software);
    request.precision = match args.precision.as_str() {
        "fp8" => Precision::Fp8,
        "fp4" => Precision::Fp4,
        _ => Precision::Bf16,
    };
    request.routing = match args.routing.split_once(':') {
        None if args.routing == "usual" => Routing::Usual,
        None if args.routing == "balanced" => Routing::Balanced,
        Some(("zipf", s)) => {
            let s = s.parse().map_err(|_| Failure::Usage(format!("`--routing {}`: a number is due", args.routing)))?;
            Routing::Zipf(s)
        }
        Some(("file", path)) => Routing::Loads(loads(cx, Path::new(path), model.experts())?),
        _ => {
            let text = format!("`--routing {}` is not known: usual, balanced, zipf:S, file:LOADS", args.routing);
            return Err(Failure::Usage(text));
        }
    };
    request.recompute = args.recompute.as_deref().map(|name| match name {
        "none" => Recompute::None,
        "selective" => Recompute::Selective,
        _ => Recompute::Full,
    });
    request.sharding = args.sharding.as_deref().map(|name| match name {
        "none" => Sharding::None,
        "optimizer" => Sharding::Optimizer,
        _ => Sharding::Full,
    });
    request.schedule = match args.schedule.as_str() {
        "zero-bubble" => Schedule::ZeroBubble,
        "dualpipe" => Schedule::DualPipe,
        _ => Schedule::OneForwardOneBackward,
    };
    if let Some(share) = args.overlap {
        if !(0.0..=1.0).contains(&share) {
            return Err(Failure::Usage(format!("`--overlap {share}`: a share from 0 to 1 is due")));
        }
        let calibration = TrainCalibration::built_in().map_err(refused)?;
        let software = calibration.software_for(&cluster, &args.software).map_err(refused)?;
        request.software_override = Some(Software { all_to_all_overlap: share, ..software });
    }
    if let Some(name) = &args.strategy {
        let known = Strategy::ALL.map(Strategy::name).join(", ");
        let strategy = Strategy::from_name(name)
            .ok_or_else(|| Failure::Usage(format!("there is no strategy `{name}`: {known}")))?;
        request.strategy = Some(strategy);
    }
    let report = plan::plan_report(&model, &cluster, &request).map_err(refused)?;
    match cx.format {
        Format::Json => cx.json(&serde_json::to_value(&report).map_err(|e| Failure::Bug(e.to_string()))?),
        Format::Html => cx.result(plan::html::html(&report, &model, &cluster, &request).map_err(refused)?),
        Format::Text => cx.result(plan::text::text(&report)),
    }
}

/// What planning needs of a config.
fn shape(cx: &Context, path: &Path) -> Result<ModelShape, Failure> {
    let bytes = if path == Path::new("-") {
        cx.stdin()?
    } else {
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        // The frontend's refusals point into the file.
        moec::frontend::read_model(&file)?;
        std::fs::read(&file).map_err(|e| {
            Failure::refused("E0112", format!("cannot read {}: {e}", file.display()), "name a config.json")
        })?
    };
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::refused("E0405", format!("not JSON: {e}"), "planning reads a config.json"))?;
    ModelShape::from_config_json(&value).map_err(refused)
}

/// Tokens per expert, summed over the layers of a LOADS file.
fn loads(cx: &Context, path: &Path, experts: u64) -> Result<Vec<f64>, Failure> {
    let loads = match super::place::read(cx, path, None)?.routing {
        place::Routing::Loads(loads) => loads,
        place::Routing::Trace(trace) => trace
            .loads()
            .map_err(|e| Failure::Refused(vec![Diagnostic::error(Code(e.code.as_str()), e.message).help(e.help)]))?,
    };
    if loads.experts() as u64 != experts {
        let message = format!("{} has loads of {} experts, the model has {experts}", path.display(), loads.experts());
        let help = format!("give {experts} loads per layer");
        // Loads are JSON, unlike traces.
        let text = std::fs::read_to_string(path).unwrap_or_default();
        return Err(match path.extension().and_then(|e| e.to_str()) {
            Some("safetensors" | "jsonl") => Failure::refused("E0402", message, help),
            Some(_) | None => {
                let refusal = Refusal::new("E0402", message, help, "0");
                Failure::Refused(vec![refusal.point(&path.display().to_string(), &text)])
            }
        });
    }
    Ok((0..loads.experts()).map(|e| loads.layers().iter().filter_map(|l| l.get(e)).sum()).collect())
}

fn cluster(cx: &Context, name: &str) -> Result<Cluster, Failure> {
    let path = Path::new(name);
    if Cluster::preset_names().contains(&name) || !path.is_file() {
        return Cluster::preset(name).map_err(|e| match path.extension().is_some() || path.components().count() > 1 {
            true => Failure::refused("E0404", format!("there is no file `{name}`"), e.help),
            false => refused(e),
        });
    }
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::refused("E0404", format!("cannot read {name}: {e}"), "name a preset or a JSON file"))?;
    let cluster = Cluster::from_json(&text).map_err(|e| Failure::Refused(vec![Refusal::from(e).point(name, &text)]))?;
    if let Some(found) = pointed::ambiguous(name, &text) {
        return Err(Failure::Refused(vec![found]));
    }
    cx.report(&pointed::unread(name, cluster.unread(&text)));
    Ok(cluster)
}
