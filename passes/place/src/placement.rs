//! The entry point: checks a request, runs the method, returns one kind of result per method.

use crate::affinity::{self, AffinityPlacement};
use crate::balance::balance;
use crate::bound::lower_bound;
use crate::error::{Code, PlaceError, divisors};
use crate::flow::Flow;
use crate::grouping::{self, GroupingPlacement};
use crate::input::{Input, Routing};
use crate::layout::{Replicated, Slots, round6};
use crate::least_loaded::{self, LeastLoaded, Settings, Variant};
use crate::loads::Loads;
use crate::moetuner::{self, TunerPlacement};
use crate::options::{Cluster, Method, Options};
use crate::trace::Trace;
use crate::{eplb, exact, one_per_rank};
use serde::Serialize;
use std::time::{Duration, Instant};

/// A placement with proven bounds; serialises with these keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bounded {
    /// Slots and loads.
    #[serde(flatten)]
    pub slots: Replicated,
    /// `[layer]`: no placement has a lower peak GPU load, rounded to 6 places.
    pub lower_bound: Vec<f64>,
    /// `[layer]`: whether the peak is proven least.
    pub optimal: Vec<bool>,
}

/// What [`place`] returns; serialises as the bare result.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Placement {
    /// From [`Method::Eplb`] and [`Method::OnePerRank`].
    Replicated(Replicated),
    /// From [`Method::Balance`] and [`Method::Ilp`].
    Bounded(Bounded),
    /// From the least-loaded methods, one layer.
    LeastLoaded(LeastLoaded),
    /// From the least-loaded methods, several layers.
    LeastLoadedLayers {
        /// One plan per layer.
        layers: Vec<LeastLoaded>,
    },
    /// From [`Method::Affinity`] and [`Method::AffinityIlp`].
    Affinity(AffinityPlacement),
    /// From [`Method::MoeTuner`].
    MoeTuner(TunerPlacement),
    /// From [`Method::Grouping`].
    Grouping(GroupingPlacement),
}

impl Placement {
    /// The slots and loads of any placement that keeps experts in slots (all but least-loaded).
    pub fn replicated(&self) -> Option<&Replicated> {
        match self {
            Placement::Replicated(slots) => Some(slots),
            Placement::Bounded(bounded) => Some(&bounded.slots),
            Placement::Affinity(affinity) => Some(&affinity.slots),
            Placement::MoeTuner(tuner) => Some(&tuner.placed.slots),
            Placement::Grouping(grouping) => Some(&grouping.placed.slots),
            Placement::LeastLoaded(_) | Placement::LeastLoadedLayers { .. } => None,
        }
    }
}

/// Places the experts of `input`. Options of the caller come before those of the input file.
///
/// Without a method: that of the file, else EPLB for loads and affinity for a trace.
///
/// # Errors
/// A refusal with a code, what is wrong and what would work; see [`Code`].
pub fn place(input: &Input, options: &Options) -> Result<Placement, PlaceError> {
    let options = options.or(&input.given);
    let method = options.method.unwrap_or(match input.routing {
        Routing::Loads(_) => Method::Eplb,
        Routing::Trace(_) => Method::Affinity,
    });
    let loads = match &input.routing {
        Routing::Loads(loads) => {
            expect_experts(&options, loads.experts())?;
            loads.clone()
        }
        Routing::Trace(trace) => sized(trace, &options)?.loads()?,
    };
    match method {
        Method::Eplb => {
            let cluster = Cluster::new(&options, loads.experts())?.hierarchy(loads.experts())?;
            replicated(&loads, &cluster, |load| Ok(eplb::place_layer(load, &cluster)))
        }
        Method::OnePerRank => one_per_rank(&options, &loads),
        Method::Balance => balanced(&options, &loads),
        Method::Ilp => integer_program(&options, &loads),
        Method::LeastLoaded => least_loaded(&options, &loads, Variant::Code),
        Method::LeastLoadedPaper => least_loaded(&options, &loads, Variant::Paper),
        Method::Affinity | Method::AffinityIlp | Method::MoeTuner | Method::Grouping => {
            let Routing::Trace(trace) = &input.routing else {
                return Err(PlaceError::new(
                    Code::WrongInput,
                    format!("{} needs a trace, the input holds loads", method.name()),
                    "record routed expert ids per token and layer (.jsonl or .safetensors), or use eplb or balance",
                ));
            };
            from_trace(method, &options, &sized(trace, &options)?, &loads)
        }
    }
}

fn sized(trace: &Trace, options: &Options) -> Result<Trace, PlaceError> {
    match options.experts {
        Some(experts) => trace.with_experts(experts),
        None => Ok(trace.clone()),
    }
}

fn expect_experts(options: &Options, experts: usize) -> Result<(), PlaceError> {
    match options.experts {
        Some(named) if named != experts => Err(PlaceError::new(
            Code::Ragged,
            format!("{named} experts were named, the loads have {experts}"),
            "leave the number of experts out, or give loads for all of them",
        )),
        Some(_) | None => Ok(()),
    }
}

fn replicated(
    loads: &Loads,
    cluster: &Cluster,
    place_layer: impl Fn(&[f64]) -> Result<Slots, PlaceError>,
) -> Result<Placement, PlaceError> {
    let slots: Result<Vec<Slots>, PlaceError> = loads.layers().iter().map(|load| place_layer(load)).collect();
    Ok(Placement::Replicated(Replicated::new(loads, cluster.gpus, slots?)?))
}

fn one_per_rank(options: &Options, loads: &Loads) -> Result<Placement, PlaceError> {
    let ranks = crate::options::gpus(options)?;
    if ranks < loads.experts() {
        return Err(PlaceError::new(
            Code::TooFewSlots,
            format!("{ranks} ranks cannot hold {} experts, one each", loads.experts()),
            format!("use at least {} GPUs, or eplb with several experts per GPU", loads.experts()),
        ));
    }
    let options = Options { replicas: Some(options.replicas.unwrap_or(ranks)), ..options.clone() };
    let cluster = Cluster::new(&options, loads.experts())?;
    if cluster.per_gpu() != 1 {
        return Err(PlaceError::new(
            Code::BadOption,
            format!("{} replicas on {ranks} ranks are not one per rank", cluster.slots),
            format!("ask for {ranks} replicas, or use eplb"),
        ));
    }
    replicated(loads, &cluster, |load| Ok(one_per_rank::place_layer(load, ranks)))
}

/// Several nodes with groups: groups go to nodes first, then each node is balanced by itself.
fn balanced(options: &Options, loads: &Loads) -> Result<Placement, PlaceError> {
    let cluster = Cluster::new(options, loads.experts())?.hierarchy(loads.experts())?;
    let node_gpus = cluster.node_gpus()?;
    let (mut slots, mut bounds, mut optimal) = (Vec::new(), Vec::new(), Vec::new());
    for load in loads.layers() {
        let group_size = load.len() / cluster.groups;
        let group_load: Vec<f64> = load.chunks(group_size).map(|group| group.iter().sum()).collect();
        let nodes = balance(&group_load, cluster.nodes, cluster.groups).gpus;
        let mut gpus = Vec::new();
        for mut groups in nodes {
            groups.sort_unstable();
            let experts: Vec<usize> = groups.iter().flat_map(|g| g * group_size..(g + 1) * group_size).collect();
            let of_node: Vec<f64> = experts.iter().map(|&e| load[e]).collect();
            let packed = balance(&of_node, node_gpus, cluster.slots / cluster.nodes);
            gpus.extend(packed.gpus.iter().map(|gpu| gpu.iter().map(|&e| experts[e]).collect::<Vec<_>>()));
        }
        let placed = Slots::from_gpus(&gpus, load.len());
        let bound = lower_bound(load, cluster.gpus, cluster.slots);
        optimal.push(peak(load, &gpus) <= bound * (1.0 + 1e-9));
        bounds.push(round6(bound));
        slots.push(placed);
    }
    Ok(Placement::Bounded(Bounded {
        slots: Replicated::new(loads, cluster.gpus, slots)?,
        lower_bound: bounds,
        optimal,
    }))
}

fn peak(load: &[f64], gpus: &[Vec<usize>]) -> f64 {
    let mut count = vec![0.0; load.len()];
    gpus.iter().flatten().for_each(|&e| count[e] += 1.0);
    let sum = |gpu: &Vec<usize>| gpu.iter().map(|&e| load[e] / count[e]).sum::<f64>();
    gpus.iter().map(sum).fold(0.0, f64::max)
}

/// Global: groups and nodes are not part of the program. Layers share the time limit.
fn integer_program(options: &Options, loads: &Loads) -> Result<Placement, PlaceError> {
    let cluster = Cluster::new(options, loads.experts())?;
    let deadline = Instant::now() + time_limit(options)?;
    let (mut slots, mut bounds, mut optimal) = (Vec::new(), Vec::new(), Vec::new());
    for (layer, load) in loads.layers().iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (loads.layers().len() - layer) as u32;
        let solved = exact::solve(load, cluster.gpus, cluster.slots, share)?;
        slots.push(Slots::from_gpus(&solved.packed.gpus, load.len()));
        bounds.push(round6(solved.bound));
        optimal.push(solved.optimal);
    }
    Ok(Placement::Bounded(Bounded {
        slots: Replicated::new(loads, cluster.gpus, slots)?,
        lower_bound: bounds,
        optimal,
    }))
}

fn time_limit(options: &Options) -> Result<Duration, PlaceError> {
    let seconds = Options::number(options.time_limit_s, "time_limit_s", 10.0, 0.0, 86_400.0)?;
    Ok(Duration::from_secs_f64(seconds))
}

fn least_loaded(options: &Options, loads: &Loads, variant: Variant) -> Result<Placement, PlaceError> {
    let settings = Settings::new(options, variant, loads.experts())?;
    let plan = |layer| Ok(least_loaded::place_layer(&loads.token_counts(layer)?, &settings));
    let mut layers: Vec<LeastLoaded> = (0..loads.layers().len()).map(plan).collect::<Result<_, PlaceError>>()?;
    match (layers.len(), layers.pop()) {
        (1, Some(only)) => Ok(Placement::LeastLoaded(only)),
        (_, last) => {
            layers.extend(last);
            Ok(Placement::LeastLoadedLayers { layers })
        }
    }
}

fn from_trace(method: Method, options: &Options, trace: &Trace, loads: &Loads) -> Result<Placement, PlaceError> {
    let experts = trace.experts();
    let gpus = crate::options::gpus(options)?;
    if !experts.is_multiple_of(gpus) {
        return Err(PlaceError::new(
            Code::NotDivisible,
            format!("{experts} experts do not divide over {gpus} GPUs"),
            format!(
                "GPU counts that work: {}; where the trace does not show the last experts, name their number",
                divisors(experts)
            ),
        ));
    }
    let cluster = Cluster::new(options, experts)?;
    cluster.without_replicas(experts, method)?;
    cluster.node_gpus()?;
    if method == Method::Grouping {
        let theta = Options::number(options.theta, "theta", 0.1, 0.0, 1.0)?;
        return Ok(Placement::Grouping(grouping::place(trace, loads, &cluster, theta)?));
    }
    let flow = Flow::new(trace);
    if method == Method::MoeTuner {
        let cost = Options::number(options.inter_node_cost, "inter_node_cost", 8.0, 1.0, 1e6)?;
        let limit = time_limit(options)?;
        return Ok(Placement::MoeTuner(moetuner::place(&flow, loads, &cluster, cost, limit)?));
    }
    Ok(Placement::Affinity(if method == Method::AffinityIlp {
        affinity::exact(&flow, loads, &cluster, time_limit(options)?)?
    } else {
        affinity::search(&flow, loads, &cluster)?
    }))
}
