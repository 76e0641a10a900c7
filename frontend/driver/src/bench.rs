//! Timing a layer: launches over and over, on data that no cache holds.

use crate::{
    Error, Target,
    limits::Limits,
    routing::{Routing, inputs},
    run::{Prepared, Tensor},
};
use moec_abi::Program;
use moec_frontend::FormFacts;
use moec_ir::Graph;
use serde::Serialize;
use std::time::{Duration, Instant};

/// What was measured for one number of tokens.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name of the model.
    pub model: String,
    /// Number of the layer.
    pub layer: u64,
    /// Device.
    pub device: String,
    /// Target of the code.
    pub target: String,
    /// Type of inputs and outputs.
    pub dtype: String,
    /// Tokens of a launch.
    pub tokens: u64,
    /// How tokens spread over experts, as it was asked for.
    pub routing: String,
    /// Experts that some token chose, in the mean, if the layer tells.
    pub experts_hit: Option<f64>,
    /// Launches that were measured.
    pub launches: usize,
    /// Half of the launches took less.
    pub median_ms: f64,
    /// One launch in twenty took less.
    pub p5_ms: f64,
    /// One launch in twenty took more.
    pub p95_ms: f64,
    /// Bytes that have to move, over the median.
    pub gb_per_s: f64,
    /// Operations that have to be done, over the median.
    pub gflop_per_s: f64,
    /// What the machine could do in the same minute, if that can be measured.
    pub limits: Option<Limits>,
    /// Least time that these limits allow, over the median.
    pub floor_share: Option<f64>,
    /// Median of each kernel, in milliseconds.
    pub kernels: Vec<(String, f64)>,
}

/// What is measured, and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens of a launch.
    pub tokens: u64,
    /// How they spread.
    pub routing: Routing,
    /// Launches; else as many as fit the time.
    pub launches: Option<u32>,
    /// Whether the times of the kernels count rather than that of the call (devices with their own memory).
    pub kernels_only: bool,
}

/// Time for one row, without a fixed number of launches.
const BUDGET: Duration = Duration::from_secs(1);
/// Sets of inputs that take turns.
const SETS: u64 = 8;

/// Experts that some token chose.
fn hit(outputs: &[Tensor]) -> Option<usize> {
    let ids = outputs.iter().find(|t| t.name == "topk_indices")?.numbers();
    let mut chosen: Vec<i64> = ids.into_iter().filter(|v| *v >= 0.0).map(|v| v as i64).collect();
    chosen.sort_unstable();
    chosen.dedup();
    Some(chosen.len())
}

/// Bytes that a launch has to move: weights of the experts that are used, other weights, inputs and outputs.
fn bytes(program: &Program, facts: &FormFacts, hit: f64, io: usize) -> f64 {
    let weights: f64 = program
        .slots
        .iter()
        .map(|s| {
            let share = if s.experts > 1 { (hit / facts.experts.max(1) as f64).min(1.0) } else { 1.0 };
            s.bytes as f64 * share
        })
        .sum();
    weights + io as f64
}

/// Measures layers, which hold the same weights and take turns.
///
/// # Errors
/// A launch fails, or the routing cannot be made.
pub fn measure(
    model: &str,
    layers: &[Prepared],
    graph: &Graph,
    facts: &FormFacts,
    options: &Options,
    limits: Option<Limits>,
) -> Result<Row, Error> {
    let Some(first) = layers.first() else { return Err(Error::Internal("no layer to measure".to_owned())) };
    let sets = (0..SETS)
        .map(|set| inputs(first, graph, facts, &options.routing, options.tokens, set))
        .collect::<Result<Vec<_>, Error>>()?;
    let mut turns = layers.iter().cycle().zip(sets.iter().cycle());
    let mut next = || -> Result<_, Error> {
        let Some((layer, inputs)) = turns.next() else { return Err(Error::Internal("no inputs".to_owned())) };
        layer.launch(options.tokens, inputs)
    };
    let mut experts = Vec::new();
    let mut io = 0;
    for _ in 0..2 {
        let launched = next()?;
        experts.extend(hit(&launched.outputs));
        io = launched.outputs.iter().map(|t| t.bytes.len()).sum();
    }
    io += sets.first().map_or(0, |s| s.iter().map(|t| t.bytes.len()).sum());
    let start = Instant::now();
    let mut times = Vec::new();
    let mut kernels: Vec<(String, Vec<f64>)> = Vec::new();
    while match options.launches {
        Some(count) => times.len() < count.max(1) as usize,
        None => times.len() < 5 || (start.elapsed() < BUDGET && times.len() < 1000),
    } {
        let launched = next()?;
        let inside: u64 = launched.launches.iter().map(|l| l.nanoseconds).sum();
        times.push(if options.kernels_only { inside as f64 * 1e-6 } else { launched.time.as_secs_f64() * 1e3 });
        experts.extend(hit(&launched.outputs));
        for launch in launched.launches {
            let milliseconds = launch.nanoseconds as f64 * 1e-6;
            match kernels.iter_mut().find(|(name, _)| *name == launch.name) {
                Some((_, all)) => all.push(milliseconds),
                None => kernels.push((launch.name, vec![milliseconds])),
            }
        }
    }
    let program = first.program()?;
    let median_ms = quantile(&mut times, 0.5);
    let experts_hit = (!experts.is_empty()).then(|| experts.iter().sum::<usize>() as f64 / experts.len() as f64);
    let all = facts.experts as f64;
    let assignments = options.tokens as f64 * facts.top_k as f64;
    let expected = all * (1.0 - (1.0 - 1.0 / all.max(1.0)).powf(assignments));
    let bytes = bytes(program, facts, experts_hit.unwrap_or(expected), io);
    let operations = facts.flops_per_token as f64 * options.tokens as f64;
    let floor = limits.map(|l| (bytes / l.read).max(operations / l.peak) * 1e3);
    Ok(Row {
        model: model.to_owned(),
        layer: first.layer().number(),
        device: String::new(),
        target: program.target.clone(),
        dtype: sets
            .first()
            .and_then(|s| s.first())
            .map_or_else(String::new, |t| format!("{:?}", t.dtype).to_lowercase()),
        tokens: options.tokens,
        routing: String::new(),
        experts_hit,
        launches: times.len(),
        median_ms,
        p5_ms: quantile(&mut times, 0.05),
        p95_ms: quantile(&mut times, 0.95),
        gb_per_s: bytes / median_ms * 1e-6,
        gflop_per_s: operations / median_ms * 1e-6,
        limits,
        floor_share: floor.map(|f| f / median_ms),
        kernels: kernels.into_iter().map(|(name, mut all)| (name, quantile(&mut all, 0.5))).collect(),
    })
}

/// Runs a layer once, on the inputs of the first set.
///
/// # Errors
/// As [`measure`].
pub fn once(layer: &Prepared, graph: &Graph, facts: &FormFacts, options: &Options) -> Result<(), Error> {
    let inputs = inputs(layer, graph, facts, &options.routing, options.tokens, 0)?;
    layer.launch(options.tokens, &inputs)?;
    Ok(())
}

/// The value below which a share of the times lies.
fn quantile(times: &mut [f64], share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    let last = times.len().saturating_sub(1);
    times.get((share * last as f64).round() as usize).copied().unwrap_or(0.0)
}

/// Copies of a layer's weights that together are larger than caches.
pub fn copies(weights_bytes: u64) -> usize {
    const ENOUGH: u64 = 512 << 20;
    const MOST: u64 = 8;
    usize::try_from(ENOUGH.div_ceil(weights_bytes.max(1)).clamp(1, MOST)).unwrap_or(1)
}

/// Whether the limits of a device can be measured.
pub fn has_limits(target: Target) -> bool {
    !target.is_gpu()
}
