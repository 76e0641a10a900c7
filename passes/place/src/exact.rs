//! The peak-load program as a mixed-integer program, exact when time allows.
//!
//! Integer `x[e, c, g]`: replicas of expert `e` on GPU `g` when it has `c` replicas in all; binary `z[e, c]`
//! picks the count. Minimise `peak` with
//!
//! * `sum_c z[e, c] = 1`, `sum_g x[e, c, g] = c z[e, c]`,
//! * `sum_{e, c} x[e, c, g] = slots / gpus`,
//! * `sum_{e, c} load[e] / c x[e, c, g] <= peak`.
//!
//! Without replicas this is the program of `balance` for one replica each. GPUs are interchangeable, so the
//! experts, heaviest first, may use only as many GPUs as the ones before can have opened.

use crate::balance::{Packed, balance};
use crate::bound::lower_bound;
use crate::error::{Code, PlaceError};
use crate::solver;
use microlp::{ComparisonOp, OptimizationDirection, Problem, SolveOutcome, Variable};
use std::time::Duration;

/// Most integer variables handed to the solver.
const MAX_VARIABLES: usize = 20_000;

/// A placement with the bound that is proven for it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Exact {
    pub(crate) packed: Packed,
    /// Proven lower bound on the peak load.
    pub(crate) bound: f64,
    /// Whether the peak equals the bound.
    pub(crate) optimal: bool,
}

/// Solves one layer within `limit`, starting from the local search.
pub(crate) fn solve(load: &[f64], n_gpus: usize, slots: usize, limit: Duration) -> Result<Exact, PlaceError> {
    let start = balance(load, n_gpus, slots);
    let bound = lower_bound(load, n_gpus, slots);
    if start.peak() <= bound * (1.0 + 1e-9) {
        return Ok(Exact { packed: start, bound, optimal: true });
    }
    let most = slots - load.len() + 1;
    if load.len() * most * (n_gpus + 1) > MAX_VARIABLES {
        return Err(PlaceError::new(
            Code::TooLarge,
            format!(
                "{} experts in {slots} slots on {n_gpus} GPUs need {} integer variables",
                load.len(),
                load.len() * most * (n_gpus + 1)
            ),
            format!("the integer program takes up to {MAX_VARIABLES}; use balance, which reports a lower bound"),
        ));
    }
    let program = Program::new(load, n_gpus, slots, bound, &start);
    let options = solver::options(limit, program.hint(&start));
    let outcome = program.problem.solve_with(options).map_err(|error| {
        PlaceError::new(
            Code::Solver,
            format!("the integer solver failed: {error}"),
            "use balance, which needs no solver and reports a lower bound",
        )
    })?;
    let proven = outcome.stats().best_bound.map_or(bound, |b| bound.max(b * program.unit));
    let SolveOutcome::Solution(solution) = &outcome else {
        return Ok(Exact { packed: start, bound: proven, optimal: false });
    };
    let found = program.read(load, |variable| solution.var_value(variable).round() as usize);
    let packed = if found.peak() < start.peak() { found } else { start };
    let optimal = outcome.is_optimal();
    Ok(Exact { bound: if optimal { packed.peak() } else { proven.min(packed.peak()) }, packed, optimal })
}

struct Program {
    problem: Problem,
    /// Loads are divided by it, so that the numbers of the program are near 1.
    unit: f64,
    /// Experts, heaviest first; the index of `x` and `z`.
    order: Vec<usize>,
    /// `z[rank][count - 1]`.
    z: Vec<Vec<Variable>>,
    /// `x[rank][count - 1][gpu]`, for the GPUs this expert may use.
    x: Vec<Vec<Vec<Variable>>>,
    n_gpus: usize,
}

impl Program {
    fn new(load: &[f64], n_gpus: usize, slots: usize, bound: f64, start: &Packed) -> Self {
        let unit = bound.max(f64::MIN_POSITIVE);
        let most = slots - load.len() + 1;
        let per_gpu = slots / n_gpus;
        let mut order: Vec<usize> = (0..load.len()).collect();
        order.sort_by(|&a, &b| load[b].total_cmp(&load[a]));
        let mut problem = Problem::new(OptimizationDirection::Minimize);
        let peak = problem.add_var(1.0, (1.0, start.peak() / unit * (1.0 + 1e-9)));
        let (mut z, mut x) = (Vec::new(), Vec::new());
        let mut on_gpu: Vec<Vec<(Variable, f64)>> = vec![Vec::new(); n_gpus];
        let mut load_of: Vec<Vec<(Variable, f64)>> = vec![vec![(peak, -1.0)]; n_gpus];
        for (rank, &expert) in order.iter().enumerate() {
            let open = ((rank + 1) * most).min(n_gpus);
            let picks: Vec<Variable> = (0..most).map(|_| problem.add_binary_var(0.0)).collect();
            let mut of_expert = Vec::new();
            for (index, &pick) in picks.iter().enumerate() {
                let count = index + 1;
                let side = count.min(per_gpu) as i32;
                let on: Vec<Variable> = (0..open).map(|_| problem.add_integer_var(0.0, (0, side))).collect();
                let mut all: Vec<(Variable, f64)> = on.iter().map(|&v| (v, 1.0)).collect();
                all.push((pick, -(count as f64)));
                problem.add_constraint(&all, ComparisonOp::Eq, 0.0);
                for (gpu, &variable) in on.iter().enumerate() {
                    on_gpu[gpu].push((variable, 1.0));
                    load_of[gpu].push((variable, load[expert] / unit / count as f64));
                }
                of_expert.push(on);
            }
            let one: Vec<(Variable, f64)> = picks.iter().map(|&v| (v, 1.0)).collect();
            problem.add_constraint(&one, ComparisonOp::Eq, 1.0);
            z.push(picks);
            x.push(of_expert);
        }
        for gpu in 0..n_gpus {
            problem.add_constraint(&on_gpu[gpu], ComparisonOp::Eq, per_gpu as f64);
            problem.add_constraint(&load_of[gpu], ComparisonOp::Le, 0.0);
        }
        Program { problem, unit, order, z, x, n_gpus }
    }

    /// The start as a warm start, GPUs renumbered by the order in which the heaviest experts open them.
    fn hint(&self, start: &Packed) -> Vec<(Variable, f64)> {
        let mut gpus: Vec<usize> = Vec::new();
        for &expert in &self.order {
            for gpu in 0..self.n_gpus {
                if start.gpus[gpu].contains(&expert) && !gpus.contains(&gpu) {
                    gpus.push(gpu);
                }
            }
        }
        let mut hint = Vec::new();
        for (rank, &expert) in self.order.iter().enumerate() {
            for (index, on) in self.x[rank].iter().enumerate() {
                let picked = start.count[expert] == index + 1;
                hint.push((self.z[rank][index], f64::from(u8::from(picked))));
                for (place, &variable) in on.iter().enumerate() {
                    let held = start.gpus[gpus[place]].iter().filter(|&&e| e == expert).count();
                    hint.push((variable, if picked { held as f64 } else { 0.0 }));
                }
            }
        }
        hint
    }

    fn read(&self, load: &[f64], value: impl Fn(Variable) -> usize) -> Packed {
        let mut gpus = vec![Vec::new(); self.n_gpus];
        let mut count = vec![0; load.len()];
        for (rank, &expert) in self.order.iter().enumerate() {
            for on in &self.x[rank] {
                for (gpu, &variable) in on.iter().enumerate() {
                    let held = value(variable);
                    gpus[gpu].extend(std::iter::repeat_n(expert, held));
                    count[expert] += held;
                }
            }
        }
        let share = |&e: &usize| load[e] / count[e] as f64;
        Packed { load: gpus.iter().map(|experts| experts.iter().map(share).sum()).collect(), gpus, count }
    }
}
