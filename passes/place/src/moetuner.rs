//! Balanced clusters, then clusters onto GPUs by traffic (MoETuner, arXiv 2502.06643).
//!
//! Two programs, one after the other. The paper's equations were not available to us in full; these are ours,
//! after its description:
//!
//! 1. Per layer, experts into as many clusters as GPUs, none empty; cluster `c` has the same number of experts
//!    over the whole model for every `c`, while layers may differ. Minimise the sum over layers and clusters of
//!    `|tokens of the cluster - mean of the layer|`.
//! 2. Per layer, clusters onto GPUs one to one, GPUs keeping equal numbers of experts over the model. Minimise
//!    the largest over ordered pairs of GPUs of (tokens sent from one to the other between adjacent layers) x
//!    (link cost: 1 inside a node, `inter_node_cost` between nodes); then the sum.
//!
//! Small cases are solved exactly (integer program; all permutations), others by local search.

use crate::affinity::{self, AffinityPlacement};
use crate::balance::balance;
use crate::error::PlaceError;
use crate::flow::Flow;
use crate::layout::round6;
use crate::loads::Loads;
use crate::options::Cluster;
use crate::partition::Parts;
use crate::solver;
use microlp::{ComparisonOp, OptimizationDirection, Problem, SolveOutcome, Variable};
use serde::Serialize;
use std::time::Duration;

/// A placement with both objectives; serialises with these keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TunerPlacement {
    /// Slots, loads and transition shares.
    #[serde(flatten)]
    pub placed: AffinityPlacement,
    /// Sum over layers and clusters of the distance of the cluster's tokens from the mean.
    pub load_deviation: f64,
    /// Largest cost of a pair of GPUs.
    pub max_pair_cost: f64,
    /// Whether `load_deviation` is proven least.
    pub balance_optimal: bool,
    /// Whether `max_pair_cost` is proven least for these clusters.
    pub traffic_optimal: bool,
}

/// Most binary variables of the exact first stage.
const MAX_VARIABLES: usize = 100;
/// Most combinations of permutations tried in the second stage.
const MAX_COMBINATIONS: usize = 50_000;

pub(crate) fn place(
    flow: &Flow,
    loads: &Loads,
    cluster: &Cluster,
    inter_node_cost: f64,
    limit: Duration,
) -> Result<TunerPlacement, PlaceError> {
    let gpus = cluster.gpus;
    let (clusters, balance_optimal) = balanced_clusters(loads, gpus, limit);
    let node_gpus = cluster.node_gpus()?;
    let cost = |g: usize, h: usize| if g / node_gpus == h / node_gpus { 1.0 } else { inter_node_cost };
    let mut mapping = Mapping::new(flow, &clusters, gpus, &cost);
    let traffic_optimal = mapping.improve(cluster.nodes == 1);
    let gpu_of = |(layer, row): (usize, &Vec<usize>)| -> Vec<Option<usize>> {
        row.iter().map(|&c| Some(mapping.gpu[layer][c])).collect()
    };
    let parts: Parts = clusters.iter().enumerate().map(gpu_of).collect();
    Ok(TunerPlacement {
        placed: affinity::report(flow, loads, cluster, &parts, false)?,
        load_deviation: round6(deviation(loads, &clusters, gpus)),
        max_pair_cost: round6(mapping.value().0),
        balance_optimal,
        traffic_optimal,
    })
}

/// The first objective.
fn deviation(loads: &Loads, clusters: &[Vec<usize>], gpus: usize) -> f64 {
    let layer = |(load, of): (&Vec<f64>, &Vec<usize>)| {
        let (sums, mean) = sums(load, of, gpus);
        sums.iter().map(|s| (s - mean).abs()).sum::<f64>()
    };
    loads.layers().iter().zip(clusters).map(layer).sum()
}

fn sums(load: &[f64], of: &[usize], gpus: usize) -> (Vec<f64>, f64) {
    let mut sums = vec![0.0; gpus];
    of.iter().zip(load).for_each(|(&c, &l)| sums[c] += l);
    (sums, load.iter().sum::<f64>() / gpus as f64)
}

/// First stage: cluster of each expert per layer, and whether the deviation is proven least.
fn balanced_clusters(loads: &Loads, gpus: usize, limit: Duration) -> (Vec<Vec<usize>>, bool) {
    let start = search_clusters(loads, gpus);
    let value = deviation(loads, &start, gpus);
    if value <= 1e-9 {
        return (start, true);
    }
    if loads.layers().len() * loads.experts() * gpus > MAX_VARIABLES {
        return (start, false);
    }
    match exact_clusters(loads, gpus, limit, &start) {
        Some((found, optimal)) if deviation(loads, &found, gpus) <= value + 1e-9 => (found, optimal),
        Some(_) | None => (start, false),
    }
}

/// Starts from even packings, then moves single experts in two layers at once (so that totals stay) and swaps.
fn search_clusters(loads: &Loads, gpus: usize) -> Vec<Vec<usize>> {
    let even = |load: &Vec<f64>| {
        let mut of = vec![0; load.len()];
        for (c, experts) in balance(load, gpus, load.len()).gpus.iter().enumerate() {
            experts.iter().for_each(|&e| of[e] = c);
        }
        swap_down(load, &mut of, gpus);
        of
    };
    let mut clusters: Vec<Vec<usize>> = loads.layers().iter().map(even).collect();
    while let Some(steps) = best_double_move(loads, &clusters, gpus) {
        for (layer, expert, to) in steps {
            clusters[layer][expert] = to;
            swap_down(&loads.layers()[layer], &mut clusters[layer], gpus);
        }
    }
    clusters
}

fn gain_of(sums: &[f64], mean: f64, from: usize, to: usize, moved: f64) -> f64 {
    let now = (sums[from] - mean).abs() + (sums[to] - mean).abs();
    now - (sums[from] - moved - mean).abs() - (sums[to] + moved - mean).abs()
}

/// Swaps two experts of different clusters while the deviation of the layer falls.
fn swap_down(load: &[f64], of: &mut [usize], gpus: usize) {
    let (mut sums, mean) = sums(load, of, gpus);
    loop {
        let mut best = (1e-9 * (mean + 1.0), None);
        for a in 0..load.len() {
            for b in a + 1..load.len() {
                let moved = load[a] - load[b];
                if of[a] != of[b] {
                    let gain = gain_of(&sums, mean, of[a], of[b], moved);
                    if gain > best.0 {
                        best = (gain, Some((a, b)));
                    }
                }
            }
        }
        let Some((a, b)) = best.1 else { return };
        sums[of[a]] -= load[a] - load[b];
        sums[of[b]] += load[a] - load[b];
        of.swap(a, b);
    }
}

/// Move `(layer, expert, to cluster)`.
type Step = (usize, usize, usize);

/// The pair of moves `c -> d` in one layer and `d -> c` in another that lowers the deviation most.
fn best_double_move(loads: &Loads, clusters: &[Vec<usize>], gpus: usize) -> Option<[Step; 2]> {
    let mut moves: Vec<Option<[(f64, Step); 2]>> = vec![None; gpus * gpus];
    for (layer, (load, of)) in loads.layers().iter().zip(clusters).enumerate() {
        let (sums, mean) = sums(load, of, gpus);
        let mut size = vec![0; gpus];
        of.iter().for_each(|&c| size[c] += 1);
        let mut best = vec![None::<(f64, Step)>; gpus * gpus];
        for (e, &from) in of.iter().enumerate().filter(|(_, c)| size[**c] > 1) {
            for to in (0..gpus).filter(|&to| to != from) {
                let gain = gain_of(&sums, mean, from, to, load[e]);
                if best[from * gpus + to].is_none_or(|b| gain > b.0) {
                    best[from * gpus + to] = Some((gain, (layer, e, to)));
                }
            }
        }
        // The two best layers of each direction, so that the two moves can lie in different layers.
        for (kept, found) in moves.iter_mut().zip(best) {
            let Some(found) = found else { continue };
            *kept = Some(match *kept {
                None => [found, (f64::NEG_INFINITY, found.1)],
                Some([first, _]) if found.0 > first.0 => [found, first],
                Some([first, second]) if found.0 > second.0 => [first, found],
                Some(both) => both,
            });
        }
    }
    let scale = loads.layers().iter().flatten().copied().fold(1.0, f64::max);
    let mut best = (1e-9 * scale, None);
    for c in 0..gpus {
        for d in c + 1..gpus {
            let (Some(there), Some(back)) = (moves[c * gpus + d], moves[d * gpus + c]) else { continue };
            for first in there {
                for second in back {
                    let gain = first.0 + second.0;
                    if first.1.0 != second.1.0 && gain > best.0 {
                        best = (gain, Some([first.1, second.1]));
                    }
                }
            }
        }
    }
    best.1
}

/// The first stage as an integer program; `None` when the solver has no answer in time.
fn exact_clusters(
    loads: &Loads,
    gpus: usize,
    limit: Duration,
    start: &[Vec<usize>],
) -> Option<(Vec<Vec<usize>>, bool)> {
    let unit = loads.layers().iter().flatten().copied().fold(1.0, f64::max);
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let mut x: Vec<Vec<Vec<Variable>>> = Vec::new();
    let mut total: Vec<Vec<(Variable, f64)>> = vec![Vec::new(); gpus];
    for load in loads.layers() {
        let row: Vec<Vec<Variable>> =
            load.iter().map(|_| (0..gpus).map(|_| problem.add_binary_var(0.0)).collect()).collect();
        let mean = load.iter().sum::<f64>() / unit / gpus as f64;
        for of_expert in &row {
            let one: Vec<_> = of_expert.iter().map(|&v| (v, 1.0)).collect();
            problem.add_constraint(&one, ComparisonOp::Eq, 1.0);
        }
        for (c, all) in total.iter_mut().enumerate() {
            let held: Vec<_> = row.iter().map(|of| (of[c], 1.0)).collect();
            problem.add_constraint(&held, ComparisonOp::Ge, 1.0);
            all.extend(held);
            let distance = problem.add_var(1.0, (0.0, f64::INFINITY));
            for sign in [1.0, -1.0] {
                let mut terms: Vec<_> = row.iter().zip(load).map(|(of, l)| (of[c], -sign * l / unit)).collect();
                terms.push((distance, 1.0));
                problem.add_constraint(&terms, ComparisonOp::Ge, -sign * mean);
            }
        }
        x.push(row);
    }
    let each = loads.layers().len() * loads.experts() / gpus;
    for all in &total {
        problem.add_constraint(all, ComparisonOp::Eq, each as f64);
    }
    let hint = x.iter().zip(start).flat_map(|(row, of)| {
        let bits = |(of_expert, &c): (&Vec<Variable>, &usize)| -> Vec<(Variable, f64)> {
            of_expert.iter().enumerate().map(|(i, &v)| (v, f64::from(u8::from(i == c)))).collect()
        };
        row.iter().zip(of).flat_map(bits).collect::<Vec<_>>()
    });
    let options = solver::options(limit, hint.collect());
    let outcome = problem.solve_with(options).ok()?;
    let SolveOutcome::Solution(solution) = &outcome else { return None };
    let read = |row: &Vec<Vec<Variable>>| -> Option<Vec<usize>> {
        row.iter().map(|of| of.iter().position(|&v| solution.var_value(v) > 0.5)).collect()
    };
    let clusters: Option<Vec<Vec<usize>>> = x.iter().map(read).collect();
    Some((clusters?, outcome.is_optimal()))
}

/// Second stage: the GPU of each cluster per layer, with the traffic between GPUs.
struct Mapping<'a> {
    gpus: usize,
    /// `[layer][cluster]`.
    gpu: Vec<Vec<usize>>,
    /// `[layer][cluster]`: number of experts.
    size: Vec<Vec<usize>>,
    /// `[layer][from cluster * gpus + to cluster]`, in tokens.
    flow: Vec<Vec<f64>>,
    cost: &'a dyn Fn(usize, usize) -> f64,
}

impl<'a> Mapping<'a> {
    fn new(flow: &Flow, clusters: &[Vec<usize>], gpus: usize, cost: &'a dyn Fn(usize, usize) -> f64) -> Self {
        let between = |(layer, pairs): (usize, &Vec<i64>)| {
            let mut sums = vec![0.0; gpus * gpus];
            for (index, &tokens) in pairs.iter().enumerate() {
                let (a, b) = (index / flow.experts, index % flow.experts);
                sums[clusters[layer][a] * gpus + clusters[layer + 1][b]] += tokens as f64;
            }
            sums
        };
        let size = |of: &Vec<usize>| {
            let mut size = vec![0; gpus];
            of.iter().for_each(|&c| size[c] += 1);
            size
        };
        Mapping {
            gpus,
            gpu: vec![(0..gpus).collect(); clusters.len()],
            size: clusters.iter().map(size).collect(),
            flow: flow.between.iter().enumerate().map(between).collect(),
            cost,
        }
    }

    /// Cost of each ordered pair of GPUs.
    fn traffic(&self) -> Vec<f64> {
        let mut traffic = vec![0.0; self.gpus * self.gpus];
        for (layer, sums) in self.flow.iter().enumerate() {
            for (index, tokens) in sums.iter().enumerate() {
                let (g, h) = (self.gpu[layer][index / self.gpus], self.gpu[layer + 1][index % self.gpus]);
                if g != h {
                    traffic[g * self.gpus + h] += tokens * (self.cost)(g, h);
                }
            }
        }
        traffic
    }

    /// The second objective: largest pair, then sum.
    fn value(&self) -> (f64, f64) {
        let traffic = self.traffic();
        (traffic.iter().copied().fold(0.0, f64::max), traffic.iter().sum())
    }

    fn keeps_totals(&self) -> bool {
        let mut total = vec![0; self.gpus];
        for (gpu, size) in self.gpu.iter().zip(&self.size) {
            gpu.iter().zip(size).for_each(|(&g, &s)| total[g] += s);
        }
        total.iter().all(|&t| t == total[0])
    }

    /// Lowers the objective; whether the result is proven least.
    fn improve(&mut self, symmetric: bool) -> bool {
        let free = self.gpu.len() - usize::from(symmetric);
        let permutations: Option<usize> = (1..=self.gpus).try_fold(1_usize, |n, i| n.checked_mul(i));
        let combinations = permutations.and_then(|n| n.checked_pow(free as u32));
        if combinations.is_some_and(|n| n <= MAX_COMBINATIONS) {
            self.try_all(usize::from(symmetric));
            return true;
        }
        self.descend();
        false
    }

    fn try_all(&mut self, first_layer: usize) {
        let permutations = permutations(self.gpus);
        let free = self.gpu.len() - first_layer;
        let mut best = (self.value(), self.gpu.clone());
        for code in 0..permutations.len().pow(free as u32) {
            let mut rest = code;
            for layer in first_layer..self.gpu.len() {
                self.gpu[layer].clone_from(&permutations[rest % permutations.len()]);
                rest /= permutations.len();
            }
            let value = self.value();
            if value < best.0 && self.keeps_totals() {
                best = (value, self.gpu.clone());
            }
        }
        self.gpu = best.1;
    }

    /// Swaps two equally large clusters in one layer, one of them on a GPU of the costliest pair, while it helps.
    fn descend(&mut self) {
        let mut value = self.value();
        loop {
            let traffic = self.traffic();
            let top = (0..traffic.len()).fold(0, |best, i| if traffic[i] > traffic[best] { i } else { best });
            let mut best = None;
            for layer in 0..self.gpu.len() {
                for c in 0..self.gpus {
                    let at = self.gpu[layer][c];
                    if at != top / self.gpus && at != top % self.gpus {
                        continue;
                    }
                    for d in (0..self.gpus).filter(|&d| d != c && self.size[layer][d] == self.size[layer][c]) {
                        let found = self.after_swap(&traffic, layer, c, d);
                        if found < best.map_or(value, |(v, _)| v) {
                            best = Some((found, (layer, c, d)));
                        }
                    }
                }
            }
            let Some((_, (layer, c, d))) = best else { return };
            self.gpu[layer].swap(c, d);
            let found = self.value();
            if found >= value {
                self.gpu[layer].swap(c, d);
                return;
            }
            value = found;
        }
    }

    /// The objective after swapping the GPUs of clusters `c` and `d`.
    fn after_swap(&self, traffic: &[f64], layer: usize, c: usize, d: usize) -> (f64, f64) {
        let mut next = traffic.to_vec();
        let (of_c, of_d) = (self.gpu[layer][c], self.gpu[layer][d]);
        let mut add = |g: usize, h: usize, tokens: f64| {
            if g != h {
                next[g * self.gpus + h] += tokens * (self.cost)(g, h);
            }
        };
        for (mine, old, new) in [(c, of_c, of_d), (d, of_d, of_c)] {
            for other in 0..self.gpus {
                if layer + 1 < self.gpu.len() {
                    let (tokens, h) = (self.flow[layer][mine * self.gpus + other], self.gpu[layer + 1][other]);
                    add(old, h, -tokens);
                    add(new, h, tokens);
                }
                if layer > 0 {
                    let (tokens, g) = (self.flow[layer - 1][other * self.gpus + mine], self.gpu[layer - 1][other]);
                    add(g, old, -tokens);
                    add(g, new, tokens);
                }
            }
        }
        (next.iter().copied().fold(0.0, f64::max), next.iter().sum())
    }
}

/// All permutations of `0..n`, in lexicographic order.
fn permutations(n: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for _ in 0..n {
        all = all
            .iter()
            .flat_map(|head: &Vec<usize>| (0..n).filter(|i| !head.contains(i)).map(|i| [&head[..], &[i]].concat()))
            .collect();
    }
    all
}
