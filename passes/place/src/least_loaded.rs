//! Least-loaded expert parallelism: spill tokens and weights of overloaded experts.
//!
//! arXiv 2601.17111, algorithms 2 and 3. The published code and the paper differ, so both are here:
//!
//! | | code ([`Variant::Code`]) | paper ([`Variant::Paper`]) |
//! | --- | --- | --- |
//! | plain expert parallelism when | largest GPU load / mean < lambda | largest expert load / mean < lambda |
//! | capacity | `int(alpha * floor(total / gpus))`, alpha 1.1 | `floor(alpha * total / gpus)`, alpha 1 |
//! | owner without room | one pass over the other GPUs | chunks, least loaded GPU chosen anew each time |
//!
//! Every token is computed exactly once; a forced chunk may exceed the capacity.

use crate::error::{Code, PlaceError, divisors};
use crate::layout::{max_over_mean, round6};
use crate::options::{Options, gpus};
use indexmap::IndexMap;
use serde::Serialize;

/// Which form of the algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// As the published code computes it.
    Code,
    /// As the paper writes it.
    Paper,
}

/// Token ranges per expert and the weights that have to move; serialises with these keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LeastLoaded {
    /// Expert -> `(gpu, first token, end token)`, in the order the experts were handled; idle experts are absent.
    pub assignments: IndexMap<usize, Vec<(usize, u64, u64)>>,
    /// `(expert, from gpu, to gpu, first token, end token)`.
    pub weight_transfers: Vec<(usize, usize, usize, u64, u64)>,
    /// Tokens per GPU after spilling.
    pub gpu_load: Vec<u64>,
    /// Largest of `gpu_load` over the mean.
    pub max_over_mean: f64,
    /// Tokens per GPU in plain expert parallelism.
    pub native_gpu_load: Vec<u64>,
    /// Largest of `native_gpu_load` over the mean.
    pub native_max_over_mean: f64,
    /// Largest expert load over the mean.
    pub expert_max_over_mean: f64,
}

/// Checked settings of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Settings {
    variant: Variant,
    gpus: usize,
    per_gpu: usize,
    alpha: f64,
    lambda: f64,
    min_tokens: u64,
}

impl Settings {
    pub(crate) fn new(options: &Options, variant: Variant, experts: usize) -> Result<Self, PlaceError> {
        let gpus = gpus(options)?;
        let per_gpu = options.experts_per_gpu.unwrap_or(experts / gpus);
        if per_gpu.checked_mul(gpus) != Some(experts) {
            return Err(PlaceError::new(
                Code::NotDivisible,
                format!("{gpus} GPUs of {per_gpu} experts do not hold {experts} experts"),
                format!("GPU counts that work: {}", divisors(experts)),
            ));
        }
        let alpha = match variant {
            Variant::Code => 1.1,
            Variant::Paper => 1.0,
        };
        Ok(Settings {
            variant,
            gpus,
            per_gpu,
            alpha: Options::number(options.alpha, "alpha", alpha, 1e-6, 1e6)?,
            lambda: Options::number(options.lambda, "lambda", 1.3, 0.0, 1e6)?,
            min_tokens: options.min_tokens.unwrap_or(1024),
        })
    }

    fn capacity(&self, total: u64) -> u64 {
        match self.variant {
            Variant::Code => {
                let mean = total / self.gpus as u64;
                let capacity = (self.alpha * mean as f64) as u64;
                let capacity = if mean > 0 { capacity } else { total };
                capacity.max(1)
            }
            Variant::Paper => ((self.alpha * total as f64 / self.gpus as f64) as u64).max(1),
        }
    }
}

/// Plans one layer.
pub(crate) fn place_layer(tokens: &[u64], settings: &Settings) -> LeastLoaded {
    let mut native = vec![0_u64; settings.gpus];
    for (expert, &count) in tokens.iter().enumerate() {
        native[expert / settings.per_gpu] += count;
    }
    let expert_ratio = ratio(tokens);
    let native_ratio = ratio(&native);
    let watched = match settings.variant {
        Variant::Code => native_ratio,
        Variant::Paper => expert_ratio,
    };
    let mut plan = Plan {
        settings: *settings,
        capacity: settings.capacity(tokens.iter().sum()),
        assigned: vec![0; settings.gpus],
        pending: native.clone(),
        assignments: IndexMap::new(),
        transfers: Vec::new(),
    };
    if watched < settings.lambda {
        plan.keep_native(tokens);
    } else {
        plan.spill(tokens);
    }
    LeastLoaded {
        max_over_mean: round6(ratio(&plan.assigned)),
        native_max_over_mean: round6(native_ratio),
        expert_max_over_mean: round6(expert_ratio),
        assignments: plan.assignments,
        weight_transfers: plan.transfers,
        gpu_load: plan.assigned,
        native_gpu_load: native,
    }
}

fn ratio(counts: &[u64]) -> f64 {
    let counts: Vec<f64> = counts.iter().map(|&count| count as f64).collect();
    max_over_mean(&counts)
}

struct Plan {
    settings: Settings,
    capacity: u64,
    assigned: Vec<u64>,
    /// Load of each GPU's own experts that are not handled yet.
    pending: Vec<u64>,
    assignments: IndexMap<usize, Vec<(usize, u64, u64)>>,
    transfers: Vec<(usize, usize, usize, u64, u64)>,
}

impl Plan {
    fn keep_native(&mut self, tokens: &[u64]) {
        for (expert, &count) in tokens.iter().enumerate() {
            if count > 0 {
                self.give(expert, expert / self.settings.per_gpu, 0, count);
            }
        }
    }

    fn spill(&mut self, tokens: &[u64]) {
        let mut order: Vec<usize> = (0..tokens.len()).filter(|&e| tokens[e] > 0).collect();
        order.sort_by_key(|&expert| std::cmp::Reverse(tokens[expert]));
        for expert in order {
            let owner = expert / self.settings.per_gpu;
            self.pending[owner] -= tokens[expert];
            let kept = self.room(owner).min(tokens[expert]);
            if kept > 0 {
                self.give(expert, owner, 0, kept);
            }
            if kept == tokens[expert] {
                continue;
            }
            let single_pass = self.settings.variant == Variant::Code && kept == 0;
            if single_pass {
                self.spread_once(expert, tokens[expert]);
            } else {
                self.spread(expert, kept, tokens[expert]);
            }
        }
    }

    /// Effective load: what is assigned plus own experts still to come.
    fn effective(&self, gpu: usize) -> u64 {
        self.assigned[gpu] + self.pending[gpu]
    }

    fn room(&self, gpu: usize) -> u64 {
        self.capacity.saturating_sub(self.effective(gpu))
    }

    /// Other GPUs than the owner, least effective load first, lower index first on a tie.
    fn helpers(&self, owner: usize) -> Vec<usize> {
        let mut helpers: Vec<usize> = (0..self.settings.gpus).filter(|&gpu| gpu != owner).collect();
        helpers.sort_by_key(|&gpu| self.effective(gpu));
        helpers
    }

    /// A chunk the GPU can take: full room or the rest, but nothing small unless it is all that is left.
    fn chunk(&self, gpu: usize, rest: u64) -> Option<u64> {
        let chunk = rest.min(self.room(gpu));
        (chunk > 0 && (chunk >= self.settings.min_tokens || chunk == rest)).then_some(chunk)
    }

    /// Chunk after chunk, each to the least loaded GPU that can take one; forced when none can.
    fn spread(&mut self, expert: usize, mut first: u64, end: u64) {
        while first < end {
            let helpers = self.helpers(expert / self.settings.per_gpu);
            let found = helpers.iter().find_map(|&gpu| Some((gpu, self.chunk(gpu, end - first)?)));
            let Some((gpu, chunk)) = found else {
                return self.force(expert, &helpers, first, end);
            };
            self.give(expert, gpu, first, first + chunk);
            first += chunk;
        }
    }

    /// One pass over the other GPUs; what is left is forced onto the first of them.
    fn spread_once(&mut self, expert: usize, end: u64) {
        let helpers = self.helpers(expert / self.settings.per_gpu);
        let mut first = 0;
        for &gpu in &helpers {
            if first == end {
                return;
            }
            if let Some(chunk) = self.chunk(gpu, end - first) {
                self.give(expert, gpu, first, first + chunk);
                first += chunk;
            }
        }
        if first < end {
            self.force(expert, &helpers, first, end);
        }
    }

    fn force(&mut self, expert: usize, helpers: &[usize], first: u64, end: u64) {
        let owner = expert / self.settings.per_gpu;
        self.give(expert, helpers.first().copied().unwrap_or(owner), first, end);
    }

    fn give(&mut self, expert: usize, gpu: usize, first: u64, end: u64) {
        let owner = expert / self.settings.per_gpu;
        self.assigned[gpu] += end - first;
        let ranges = self.assignments.entry(expert).or_default();
        match ranges.last_mut() {
            Some(last) if gpu == owner && last.0 == owner => last.2 = end,
            Some(_) | None => ranges.push((gpu, first, end)),
        }
        if gpu != owner {
            self.transfers.push((expert, owner, gpu, first, end));
        }
    }
}
