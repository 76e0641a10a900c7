//! Placement by inter-layer affinity (ExFlow, arXiv 2401.08383).
//!
//! Tokens that use expert `a` in one layer tend to use certain experts in the next. With both on one GPU the
//! token needs no transfer. Each GPU holds the same number of experts of every layer; the placement maximises
//! the transitions that stay on a GPU. With several nodes there are two levels, as in the paper: experts are
//! split over nodes first (a transfer between nodes costs 2, inside a node 1), then over the GPUs of each node.

use crate::error::{Code, PlaceError};
use crate::flow::Flow;
use crate::layout::{Replicated, Slots, round6};
use crate::loads::Loads;
use crate::options::Cluster;
use crate::partition::{self, Parts};
use crate::solver;
use microlp::{ComparisonOp, OptimizationDirection, Problem, SolveOutcome, Variable};
use serde::Serialize;
use std::time::Duration;

/// A placement from a trace, with the transfers it saves; serialises with these keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AffinityPlacement {
    /// Slots and loads, as for the other methods.
    #[serde(flatten)]
    pub slots: Replicated,
    /// `[layer][expert]`: the GPU.
    pub expert_to_gpu: Vec<Vec<usize>>,
    /// Share of transitions between adjacent layers that stay on a GPU.
    pub local_share: f64,
    /// Share that stays on a node (GPU included).
    pub node_share: f64,
    /// Mean cost of a transition: 0 on a GPU, 1 inside a node, 2 between nodes.
    pub mean_cost: f64,
    /// `local_share` of contiguous placement.
    pub contiguous_local_share: f64,
    /// Whether `local_share` is proven largest (integer program only).
    pub optimal: bool,
}

/// Places by local search.
pub(crate) fn search(flow: &Flow, loads: &Loads, cluster: &Cluster) -> Result<AffinityPlacement, PlaceError> {
    let node_gpus = cluster.node_gpus()?;
    let everyone: Vec<Vec<usize>> = vec![(0..flow.experts).collect(); flow.layers];
    let on_node = partition::split(flow, &everyone, cluster.nodes);
    let mut gpu: Parts = vec![vec![None; flow.experts]; flow.layers];
    for node in 0..cluster.nodes {
        let of_node =
            |row: &Vec<Option<usize>>| -> Vec<usize> { (0..row.len()).filter(|&e| row[e] == Some(node)).collect() };
        let members: Vec<Vec<usize>> = on_node.iter().map(of_node).collect();
        let inside = partition::split(flow, &members, node_gpus);
        for (row, found) in gpu.iter_mut().zip(&inside) {
            for (e, part) in found.iter().enumerate() {
                if let Some(part) = part {
                    row[e] = Some(node * node_gpus + part);
                }
            }
        }
    }
    report(flow, loads, cluster, &gpu, false)
}

/// Most integer variables of the exact program.
const MAX_VARIABLES: usize = 4_000;

/// Places by the integer program of the paper, starting from the search: exact when time allows.
///
/// Binary `x[l, e, g]`; each pair of experts with transitions has a cost of at least `|x[l, a, g] - x[l+1, b, g]|`.
pub(crate) fn exact(
    flow: &Flow,
    loads: &Loads,
    cluster: &Cluster,
    limit: Duration,
) -> Result<AffinityPlacement, PlaceError> {
    let (experts, layers, gpus) = (flow.experts, flow.layers, cluster.gpus);
    if cluster.nodes > 1 {
        return Err(PlaceError::new(
            Code::BadOption,
            "the integer program of affinity has one level of GPUs",
            "leave out --nodes, or use affinity, which places on nodes first",
        ));
    }
    let pairs: usize = flow.between.iter().flatten().filter(|&&n| n > 0).count();
    if experts * layers * gpus + pairs > MAX_VARIABLES {
        return Err(PlaceError::new(
            Code::TooLarge,
            format!("the program needs {} variables", experts * layers * gpus + pairs),
            format!("it takes up to {MAX_VARIABLES}; use affinity, or fewer layers"),
        ));
    }
    let start = search(flow, loads, cluster)?;
    let total = flow.total().max(1) as f64;
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let x: Vec<Vec<Vec<Variable>>> = (0..layers)
        .map(|_| (0..experts).map(|_| (0..gpus).map(|_| problem.add_binary_var(0.0)).collect()).collect())
        .collect();
    for row in &x {
        let mut held = vec![Vec::new(); gpus];
        for of_expert in row {
            of_expert.iter().zip(&mut held).for_each(|(&v, on_gpu)| on_gpu.push((v, 1.0)));
            let one: Vec<_> = of_expert.iter().map(|&v| (v, 1.0)).collect();
            problem.add_constraint(&one, ComparisonOp::Eq, 1.0);
        }
        for on_gpu in &held {
            problem.add_constraint(on_gpu, ComparisonOp::Eq, (experts / gpus) as f64);
        }
    }
    // GPUs are interchangeable: the first experts of layer 0 open them in order.
    for (e, of_expert) in x[0].iter().enumerate() {
        for &variable in of_expert.iter().skip(e + 1) {
            problem.add_constraint([(variable, 1.0)], ComparisonOp::Le, 0.0);
        }
    }
    for (layer, between) in flow.between.iter().enumerate() {
        for (index, &tokens) in between.iter().enumerate().filter(|(_, n)| **n > 0) {
            let (a, b) = (index / experts, index % experts);
            let cost = problem.add_var(tokens as f64 / total, (0.0, 1.0));
            for (&from, &to) in x[layer][a].iter().zip(&x[layer + 1][b]) {
                problem.add_constraint([(cost, 1.0), (from, -1.0), (to, 1.0)], ComparisonOp::Ge, 0.0);
            }
        }
    }
    let relabel = opening_order(&start.expert_to_gpu[0], gpus);
    let mut hint = Vec::new();
    for (row, placed) in x.iter().zip(&start.expert_to_gpu) {
        for (of_expert, &gpu) in row.iter().zip(placed) {
            hint.extend(of_expert.iter().enumerate().map(|(g, &v)| (v, f64::from(u8::from(g == relabel[gpu])))));
        }
    }
    let options = solver::options(limit, hint);
    let outcome = problem.solve_with(options).map_err(|error| {
        PlaceError::new(
            Code::Solver,
            format!("the integer solver failed: {error}"),
            "use affinity, which needs no solver",
        )
    })?;
    let SolveOutcome::Solution(solution) = &outcome else {
        return Ok(start);
    };
    let part: Parts = x
        .iter()
        .map(|row| {
            let gpu = |of: &Vec<Variable>| of.iter().position(|&v| solution.var_value(v) > 0.5);
            row.iter().map(gpu).collect()
        })
        .collect();
    let found = report(flow, loads, cluster, &part, outcome.is_optimal())?;
    if found.local_share < start.local_share {
        return Ok(start);
    }
    Ok(found)
}

/// New number of each GPU, in the order in which the experts of a layer first use them.
fn opening_order(expert_to_gpu: &[usize], gpus: usize) -> Vec<usize> {
    let mut number = vec![usize::MAX; gpus];
    let mut next = 0;
    for &gpu in expert_to_gpu {
        if number[gpu] == usize::MAX {
            number[gpu] = next;
            next += 1;
        }
    }
    number
}

/// Tables and shares of a placement in which every expert has a GPU.
pub(crate) fn report(
    flow: &Flow,
    loads: &Loads,
    cluster: &Cluster,
    gpu: &Parts,
    optimal: bool,
) -> Result<AffinityPlacement, PlaceError> {
    let node_gpus = cluster.node_gpus()?;
    let experts: Vec<Vec<usize>> = vec![(0..flow.experts).collect(); flow.layers];
    let on_node: Parts = gpu.iter().map(|row| row.iter().map(|g| g.map(|g| g / node_gpus)).collect()).collect();
    let total = flow.total();
    // Without transitions (a single layer) nothing leaves its GPU.
    let share = |local: i64| if total == 0 { 1.0 } else { local as f64 / total as f64 };
    let (local, node) = (share(flow.local(gpu)), share(flow.local(&on_node)));
    let contiguous = partition::contiguous(flow, &experts, cluster.gpus);
    let slots = gpu.iter().map(|row| {
        let held = |g: usize| (0..row.len()).filter(|&e| row[e] == Some(g)).collect();
        let gpus: Vec<Vec<usize>> = (0..cluster.gpus).map(held).collect();
        Slots::from_gpus(&gpus, flow.experts)
    });
    Ok(AffinityPlacement {
        slots: Replicated::new(loads, cluster.gpus, slots.collect())?,
        expert_to_gpu: gpu.iter().map(|row| row.iter().flatten().copied().collect()).collect(),
        local_share: round6(local),
        node_share: round6(node),
        mean_cost: round6((1.0 - local) + (1.0 - node)),
        contiguous_local_share: round6(share(flow.local(&contiguous))),
        optimal,
    })
}
