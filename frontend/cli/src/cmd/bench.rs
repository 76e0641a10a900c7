//! `moec bench`: rows of times, or of counts on the simulator.

use super::run::{Loaded, load};
use crate::{args::Bench, context::Context, failure::Failure};
use moec::{
    Target,
    abi::{DType, Launch, Program},
    bench::{self, Options, Row},
    estimate::{self, Estimate},
    frontend::{Form, FormFacts},
    ir::Graph,
    limits,
    peers::{Peer, PeerRow},
    routing::Routing,
    run::{Input, Prepared},
    runtime::{Device, Sim},
    sim::Tally,
};
use serde_json::{Value, json};
use std::sync::Arc;

/// Measures and prints.
pub(crate) fn run(cx: &Context, args: &Bench) -> Result<(), Failure> {
    if args.tokens.is_empty() || args.tokens.contains(&0) {
        return Err(Failure::Usage("`--tokens` takes numbers from 1 on".to_owned()));
    }
    let routing = Spread::parse(&args.routing)?;
    if let Some(file) = &args.tune {
        return super::tune::run(cx, args, &routing, file);
    }
    if args.on.device == "sim" {
        return counts(cx, args, &routing);
    }
    let tuned = super::tune::table(args.tuned.as_deref())?;
    let loaded = load(cx, &args.what, &args.on, &["output", "topk_indices"], tuned)?;
    let layers: Vec<u64> = match args.on.layer {
        Some(layer) => vec![layer],
        None => first_layers(&loaded),
    };
    let mut rows = Vec::new();
    for layer in layers {
        let mut on = args.on.clone();
        on.layer = Some(layer);
        measure(cx, args, &loaded, &on, &routing, &mut rows)?;
    }
    if cx.is_json() { cx.json(&json!({"schema": 1, "rows": rows})) } else { Ok(()) }
}

/// A layer of each form.
fn first_layers(loaded: &Loaded) -> Vec<u64> {
    let mut layers: Vec<u64> =
        loaded.artefact.manifest().programs.iter().filter_map(|p| p.layers.first().copied()).collect();
    layers.dedup();
    layers.sort_unstable();
    layers.dedup();
    layers
}

/// `--routing` as it was written, before a layer is there.
pub(crate) enum Spread {
    Made(Routing),
    File(String),
}

impl Spread {
    fn parse(text: &str) -> Result<Self, Failure> {
        match text.split_once(':').unwrap_or((text, "")) {
            ("uniform", "") => Ok(Self::Made(Routing::Uniform)),
            ("all-to-one", "") => Ok(Self::Made(Routing::AllToOne)),
            ("zipf", s) => {
                let s = s.parse::<f64>().ok().filter(|s| s.is_finite() && *s >= 0.0);
                s.map(|s| Self::Made(Routing::Zipf(s)))
                    .ok_or_else(|| Failure::Usage(format!("`--routing {text}`: a number is due after `zipf:`")))
            }
            ("file", path) if !path.is_empty() => Ok(Self::File(path.to_owned())),
            _ => {
                Err(Failure::Usage(format!("`--routing {text}` is not known: uniform, zipf:S, all-to-one, file:PATH")))
            }
        }
    }

    /// The routing for a layer; a file says how many tokens there are.
    fn of(&self, prepared: &Prepared, tokens: u64) -> Result<(Routing, u64), Failure> {
        match self {
            Self::Made(routing) => Ok((routing.clone(), tokens)),
            Self::File(path) => {
                let (tokens, inputs) = prepared.inputs(&Input::File(path.into()))?;
                Ok((Routing::Given(inputs), tokens))
            }
        }
    }
}

pub(crate) fn facts(graph: &Graph) -> FormFacts {
    Form { graph: graph.clone(), layers: vec![0], prefixes: vec![String::new()] }.facts()
}

/// Rows of one layer.
fn measure(
    cx: &Context,
    args: &Bench,
    loaded: &Loaded,
    on: &crate::args::Where,
    spread: &Spread,
    rows: &mut Vec<Value>,
) -> Result<(), Failure> {
    let first = loaded.prepare(cx, on)?;
    let graph = loaded.graph(&first)?;
    let facts = facts(&graph);
    let target = Target::from_name(&first.program()?.target);
    let on_cpu = on.device == "cpu";
    let narrow = first.layer().inputs()?.iter().any(|b| b.dtype == DType::Bf16);
    let target = target.map(|t| if t.bf16_only() && !narrow { Target::X86V4 } else { t });
    // Machines have faster and slower minutes, so each row has limits, and a peer's time, of its own.
    let limits = || match target {
        Some(target) if on_cpu && bench::has_limits(target) => limits::measure(&loaded.device, target).map(Some),
        Some(_) | None => Ok(None),
    };
    let copies = bench::copies(first.layer().weights_bytes());
    let mut layers = vec![first];
    while layers.len() < copies {
        layers.push(loaded.prepare(cx, on)?);
    }
    head(cx, &layers);
    let mut peer = match &args.peers {
        Some(_) => Some(Peer::torch(&facts, if narrow { "bf16" } else { "f32" }, &on.device, on.threads)?),
        None => None,
    };
    for &tokens in &args.tokens {
        let Some(first) = layers.first() else { continue };
        let (routing, tokens) = spread.of(first, tokens)?;
        let options = Options { tokens, routing, launches: args.reps, kernels_only: !on_cpu };
        let model = &loaded.artefact.manifest().model;
        let mut row = bench::measure(model, &layers, &graph, &facts, &options, limits()?)?;
        row.device.clone_from(&on.device);
        row.routing.clone_from(&args.routing);
        let timed = peer.as_mut().map(|peer| peer.time(tokens)).transpose()?;
        let peer = peer.as_ref().zip(timed.as_ref());
        if !cx.is_json() {
            cx.result(line(&row, peer))?;
        }
        rows.push(value(&row, peer)?);
        if matches!(spread, Spread::File(_)) {
            break;
        }
    }
    Ok(())
}

/// What is measured, and how.
fn head(cx: &Context, layers: &[Prepared]) {
    let Some(first) = layers.first() else { return };
    cx.say(
        "Timing",
        &format!(
            "layer {}: {}; weights {} x {}",
            first.layer().number(),
            first.layer().describe(),
            layers.len(),
            super::compile::size(first.layer().weights_bytes())
        ),
    );
}

fn line(row: &Row, peer: Option<(&Peer, &PeerRow)>) -> String {
    let share = match (row.floor_share, row.limits) {
        (Some(share), Some(l)) => {
            format!("  {:>4.0} % of the floor ({:.1} GB/s, {:.0} GFLOP/s)", 100.0 * share, l.read * 1e-9, l.peak * 1e-9)
        }
        (_, _) => String::new(),
    };
    let hit = row.experts_hit.map_or_else(String::new, |h| format!("  {h:.0} experts hit"));
    let peer = peer.map_or_else(String::new, |(peer, timed)| {
        let (ratio, name) = (timed.median_ms / row.median_ms, &peer.name);
        format!("{:>21.3} ms  {name} {}, {} calls, ratio {ratio:.2}\n", timed.median_ms, peer.version, timed.launches)
    });
    format!(
        "{:>6} tokens  {:>9.3} ms  (p5 {:.3}, p95 {:.3}, {} launches)  {:>6.1} GB/s  {:>7.1} GFLOP/s{share}{hit}\n{peer}",
        row.tokens, row.median_ms, row.p5_ms, row.p95_ms, row.launches, row.gb_per_s, row.gflop_per_s
    )
}

fn value(row: &Row, peer: Option<(&Peer, &PeerRow)>) -> Result<Value, Failure> {
    let mut value = serde_json::to_value(row).map_err(|e| Failure::Bug(e.to_string()))?;
    if let (Some((peer, timed)), Some(members)) = (peer, value.as_object_mut()) {
        members.insert(
            "peers".to_owned(),
            json!([{"name": peer.name, "version": peer.version, "median_ms": timed.median_ms,
                    "ratio": timed.median_ms / row.median_ms}]),
        );
    }
    Ok(value)
}

/// The least time of each kernel of a launch that was simulated.
pub(crate) fn estimates(program: &Program, tally: &Tally, tokens: u64, facts: &FormFacts) -> Vec<(String, Estimate)> {
    // Uniform routing hits so many experts in the mean.
    let (experts, routes) = (facts.experts.max(1) as f64, (facts.top_k * tokens) as f64);
    let share = 1.0 - (1.0 - 1.0 / experts).powf(routes);
    let one = |launch: &Launch| {
        let counts = tally.kernels.get(&launch.symbol)?;
        let footprint = estimate::footprint(program, launch, tokens, share);
        let target = Target::from_name(&program.target)?;
        Some((launch.name.clone(), estimate::estimate(counts, footprint, target)?))
    };
    program.launches.iter().filter_map(one).collect()
}

/// Counts of the simulator, a row for each number of tokens.
fn counts(cx: &Context, args: &Bench, spread: &Spread) -> Result<(), Failure> {
    let tuned = super::tune::table(args.tuned.as_deref())?;
    let mut loaded = load(cx, &args.what, &args.on, &["output", "topk_indices"], tuned)?;
    // The device is kept as what it is, so that it can be asked for its counts.
    let sim = Arc::new(Sim::new(moec::sim::Options::default()));
    loaded.device = Arc::clone(&sim) as Arc<dyn Device>;
    let mut rows = Vec::new();
    let prepared = loaded.prepare(cx, &args.on)?;
    let graph = loaded.graph(&prepared)?;
    for &tokens in &args.tokens {
        let (routing, tokens) = spread.of(&prepared, tokens)?;
        sim.take_counts();
        sim.take_busy();
        let options = Options { tokens, routing, launches: Some(1), kernels_only: true };
        bench::once(&prepared, &graph, &facts(&graph), &options)?;
        let tally = sim.take_counts();
        let seconds = sim.take_busy().as_secs_f64();
        let c = &tally.total;
        let program = prepared.program()?;
        let kernels = estimates(program, &tally, tokens, &facts(&graph));
        let row = json!({
            "model": loaded.artefact.manifest().model, "layer": prepared.layer().number(), "device": "sim",
            "target": program.target, "tokens": tokens, "routing": args.routing,
            "instructions": c.warp_instructions, "bytes_global": c.global_bytes_read + c.global_bytes_written,
            "bytes_shared": c.shared_bytes_read + c.shared_bytes_written, "bank_conflicts": c.bank_conflicts(),
            "kinds": c.by_kind, "sectors_global": c.global_sectors, "sectors_global_ideal": c.global_sectors_ideal,
            "lane_instructions": c.lane_instructions, "simulation_seconds": seconds,
            "registers": c.registers, "shared_bytes": c.shared_bytes, "tensor_flops": c.tensor_flops,
            "blocks": c.blocks, "occupancy": f64::from(c.occupancy_permille) / 1000.0,
            "kernels": kernels.iter().map(|(name, e)| json!({
                "name": name, "limit": e.limit().0, "microseconds": e.microseconds,
                "cycles": e.cycles.iter().map(|(l, n)| (l.name().to_owned(), json!(n))).collect::<serde_json::Map<_, _>>(),
            })).collect::<Vec<_>>(),
        });
        if !cx.is_json() {
            cx.result(format!(
                "{tokens:>6} tokens  {} instructions, {} bytes global, {} bytes shared, {} bank conflicts, {} registers, {} bytes of shared memory\n",
                c.warp_instructions,
                c.global_bytes_read + c.global_bytes_written,
                c.shared_bytes_read + c.shared_bytes_written,
                c.bank_conflicts(),
                c.registers,
                c.shared_bytes
            ))?;
            let kinds: Vec<String> = c.by_kind.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
            cx.result(format!("        instructions: {}\n", kinds.join(", ")))?;
            cx.result(format!(
                "        {} sectors of global memory ({} side by side), {} operations of tensor cores, occupancy {:.0} %\n",
                c.global_sectors,
                c.global_sectors_ideal,
                c.tensor_flops,
                f64::from(c.occupancy_permille) / 10.0
            ))?;
            cx.result(format!(
                "        simulated {:.1} million instructions of threads and {:.2} GFLOP of tensor cores a second\n",
                c.lane_instructions as f64 / seconds / 1e6,
                c.tensor_flops as f64 / seconds / 1e9
            ))?;
            for (name, e) in &kernels {
                let (limit, cycles) = e.limit();
                cx.result(format!(
                    "        {name:<24} at least {cycles:>9.0} cycles, {:>8.2} us, bound by {}\n",
                    e.microseconds,
                    limit.name()
                ))?;
            }
        }
        rows.push(row);
    }
    if cx.is_json() { cx.json(&json!({"schema": 1, "rows": rows})) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_read() {
        assert!(Spread::parse("uniform").is_ok());
        assert!(Spread::parse("zipf:1.1").is_ok());
        assert!(Spread::parse("zipf:x").is_err());
        assert!(Spread::parse("file:").is_err());
    }
}
