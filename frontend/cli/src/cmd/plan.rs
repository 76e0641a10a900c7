//! `moec plan`: mappings of a model onto GPUs.

use crate::{
    args::{Format, Plan as Args},
    context::Context,
    failure::Failure,
};
use moec::{
    frontend::json,
    ir::{Code, Diagnostic, Span, nearest},
    plan::{
        self, Cluster, Mapping, ModelShape, Objective, PlanError, Precision, Request, Routing, Schedule, Sharding,
        Strategy,
        calibration::{Software, TrainCalibration},
        choice::Recompute,
    },
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
    let cluster = cluster(cx, &args.cluster)?;
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
        Some(("file", path)) => Routing::Loads(loads(Path::new(path))?),
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
fn loads(path: &Path) -> Result<Vec<f64>, Failure> {
    let wrong = |what: String| {
        let message = format!("cannot read the loads in {}: {what}", path.display());
        Failure::refused("E0411", message, "give [[tokens per expert] per layer], as for `moec place`")
    };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let layers: Vec<Vec<f64>> = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let experts = layers.first().map_or(0, Vec::len);
    if experts == 0 || layers.iter().any(|l| l.len() != experts) {
        return Err(wrong("layers are empty or of different lengths".to_owned()));
    }
    Ok((0..experts).map(|e| layers.iter().filter_map(|l| l.get(e)).sum()).collect())
}

/// Where a member such as `gpu.hbm_gbps` or `collectives.3` stands; of a missing one, what it is missing from.
fn member(file: &json::Value, path: &str) -> Span {
    let mut at = file;
    for step in path.split('.') {
        let item = step.parse::<usize>().ok().and_then(|i| at.array()?.get(i));
        match item.or_else(|| at.get(step)) {
            Some(inner) => at = inner,
            None => break,
        }
    }
    at.span
}

/// The first `NaN` or infinity of a file.
fn not_finite(value: &json::Value) -> Option<(&str, Span)> {
    match &value.kind {
        json::Kind::NotFinite(figure) => Some((figure, value.span)),
        json::Kind::Array(items) => items.iter().find_map(not_finite),
        json::Kind::Object(members) => members.iter().find_map(|m| not_finite(&m.value)),
        json::Kind::Null | json::Kind::Bool(_) | json::Kind::Number(_) | json::Kind::String(_) => None,
    }
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
    let pointed = |found: Diagnostic| Failure::Refused(vec![Diagnostic { file: Some(name.to_owned()), ..found }]);
    let start = "`moec plan --cluster dgx-h100 --print-cluster` prints a file to start from";
    let file = json::parse(&text).map_err(|e| pointed(if e.help.is_some() { e } else { e.help(start) }))?;
    if let Some((figure, span)) = not_finite(&file) {
        let found = Diagnostic::error(Code("E0404"), format!("{figure} is not the figure of a machine"));
        return Err(pointed(found.primary(span, "this member").help("give a positive number")));
    }
    let cluster = Cluster::from_json(&text).map_err(|e| {
        let label = if e.at.is_some() { "this member" } else { "this file" };
        let span = e.at.as_deref().map_or(file.span, |at| member(&file, at));
        pointed(Diagnostic::error(Code(e.code), e.message).primary(span, label).help(e.help))
    })?;
    for (member, known) in cluster.unread(&text) {
        let last = member.rsplit('.').next().unwrap_or(&member);
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let warning = Diagnostic::warning(Code("W0201"), format!("unknown key {member} in {name}"));
        cx.report(&[match nearest(last, known.iter().copied()) {
            Some(near) => warning.help(format!("did you mean {near}?")),
            None => warning,
        }]);
    }
    Ok(cluster)
}
