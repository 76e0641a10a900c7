//! Timing a layer: launches over and over, on data that no cache holds.

use crate::{
    Error, Target,
    limits::Limits,
    reference::Stored,
    run::{Prepared, Tensor, put, random_input},
};
use moec_abi::Program;
use moec_frontend::FormFacts;
use moec_ir::{
    Graph, NodeId, Op,
    interp::{WeightIndex, Weights as _},
};
use serde::Serialize;
use std::time::{Duration, Instant};

/// How tokens spread over experts.
#[derive(Clone, Debug, PartialEq)]
pub enum Routing {
    /// Random rows: with random weights, every expert alike.
    Uniform,
    /// The expert of rank `i` is wanted in proportion to `i^-s`.
    Zipf(f64),
    /// All tokens want the same experts.
    AllToOne,
    /// Inputs that somebody recorded.
    Given(Vec<Tensor>),
}

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
    /// Least time that the limits of the machine allow, over the median.
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

/// Nodes from which the selection of a graph computes its scores: the weights of plain routers.
fn router(graph: &Graph) -> Option<(NodeId, String)> {
    let select = graph.ids().into_iter().find(|id| matches!(graph.node(*id).op, Op::Select(_)))?;
    let mut open = vec![select];
    let mut seen = Vec::new();
    while let Some(id) = open.pop() {
        if seen.contains(&id) {
            continue;
        }
        seen.push(id);
        if let Op::Linear(linear) = &graph.node(id).op {
            return Some((id, linear.w.clone()));
        }
        open.extend(graph.operands(id));
    }
    None
}

/// Rows that point to the wanted experts: the sum of their rows of the router, which are far from each other.
fn directed(
    prepared: &Prepared,
    graph: &Graph,
    mut inputs: Vec<Tensor>,
    pick: &mut dyn FnMut(u64) -> Vec<usize>,
) -> Result<Vec<Tensor>, Error> {
    let none = || Error::refused("E0407", "the layer has no plain router", "use --routing uniform or file:PATH");
    let (_, weight) = router(graph).ok_or_else(none)?;
    let declared = graph.weights.get(&weight).ok_or_else(none)?;
    let stored = Stored { tensors: prepared.tensors(), prefix: prepared.prefix() };
    let matrix = stored
        .get(&weight, declared, WeightIndex::default())
        .map_err(|e| Error::refused("E0407", format!("the router cannot be read: {e}"), "use --routing uniform"))?;
    let values = matrix.floats();
    let [experts, width] = *matrix.shape.as_slice() else { return Err(none()) };
    let input =
        inputs.iter_mut().find(|t| t.shape.last() == Some(&(width as u64)) && !t.dtype_is_id()).ok_or_else(none)?;
    let mut bytes = Vec::with_capacity(input.bytes.len());
    for token in 0..input.shape.first().copied().unwrap_or(0) {
        let mut row = vec![0.0; width];
        for (strength, expert) in (1..).zip(pick(token).into_iter().rev()) {
            let from = values.get((expert % experts.max(1)) * width..).unwrap_or_default();
            for (sum, value) in row.iter_mut().zip(from) {
                *sum += (1.0 + 0.01 * f64::from(strength)) * value;
            }
        }
        let size = (row.iter().map(|v| v * v).sum::<f64>() / width as f64).sqrt().max(1e-30);
        row.into_iter().try_for_each(|v| put(input.dtype, v / size, &mut bytes)).ok_or_else(none)?;
    }
    input.bytes = bytes;
    Ok(inputs)
}

/// Inputs of set number `set`.
fn inputs(
    prepared: &Prepared,
    graph: &Graph,
    facts: &FormFacts,
    options: &Options,
    set: u64,
) -> Result<Vec<Tensor>, Error> {
    if let Routing::Given(inputs) = &options.routing {
        return Ok(inputs.clone());
    }
    let random = prepared
        .layer()
        .inputs()?
        .into_iter()
        .map(|b| random_input(b, options.tokens, set + 1))
        .collect::<Result<Vec<_>, Error>>()?;
    let (experts, top_k) =
        (usize::try_from(facts.experts).unwrap_or(1).max(1), usize::try_from(facts.top_k).unwrap_or(1));
    match &options.routing {
        Routing::Uniform | Routing::Given(_) => Ok(random),
        Routing::AllToOne => directed(prepared, graph, random, &mut |_| (0..top_k).collect()),
        Routing::Zipf(s) => {
            let weights: Vec<f64> = (1..=experts).map(|i| (i as f64).powf(-s)).collect();
            let mut state = set.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
            let mut uniform = move || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 11) as f64 / (1u64 << 53) as f64
            };
            directed(prepared, graph, random, &mut |_| {
                let mut chosen: Vec<usize> = Vec::new();
                while chosen.len() < top_k.min(experts) {
                    let left = |e: &usize| !chosen.contains(e);
                    let total: f64 = (0..experts).filter(left).map(|e| weights[e]).sum();
                    let mut at = uniform() * total;
                    let next = (0..experts).filter(left).find(|e| {
                        at -= weights[*e];
                        at <= 0.0
                    });
                    let last = (0..experts).rev().find(left);
                    chosen.extend(next.or(last));
                }
                chosen
            })
        }
    }
}

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
    let sets = (0..SETS).map(|set| inputs(first, graph, facts, options, set)).collect::<Result<Vec<_>, Error>>()?;
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
        floor_share: floor.map(|f| f / median_ms),
        kernels: kernels.into_iter().map(|(name, mut all)| (name, quantile(&mut all, 0.5))).collect(),
    })
}

/// Runs a layer once, on the inputs of the first set.
///
/// # Errors
/// As [`measure`].
pub fn once(layer: &Prepared, graph: &Graph, facts: &FormFacts, options: &Options) -> Result<(), Error> {
    let inputs = inputs(layer, graph, facts, options, 0)?;
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
