//! What a search decides besides the mapping, and what a job asks for.

use crate::{
    calibration::Software,
    cluster::Precision,
    mapping::{DEFAULT_ORDER, Fixed, Mapping},
};
use serde::{Deserialize, Serialize};

/// What is computed again in the backward pass instead of being kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Everything is kept.
    #[default]
    None,
    /// Norms, activations and up-projections are recomputed, and the attention core where scores
    /// are kept in memory (arXiv 2205.05198, section 5).
    Selective,
    /// Only layer inputs are kept.
    Full,
}

impl Recompute {
    /// All choices, cheapest in time first.
    pub const ALL: [Self; 3] = [Self::None, Self::Selective, Self::Full];
}

/// How weights, gradients and optimizer state are spread over data-parallel ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharding {
    /// Every rank keeps everything.
    None,
    /// Optimizer state is sharded (ZeRO-1, Megatron's distributed optimizer).
    #[default]
    Optimizer,
    /// Weights, gradients and optimizer are sharded; layers are gathered when used (ZeRO-3, FSDP).
    Full,
}

/// Pipeline schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// One forward, one backward; interleaved when there are virtual stages (arXiv 2104.04473).
    #[default]
    OneForwardOneBackward,
    /// ZB1P: weight gradients fill the bubble (arXiv 2401.10241).
    ZeroBubble,
    /// Bidirectional, with forward and backward overlapped (arXiv 2412.19437, section 3.2.1).
    DualPipe,
}

/// Families of mappings that published comparisons use (arXiv 2504.14960, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Strategy {
    /// Fully sharded data parallelism with tensor parallelism.
    #[serde(rename = "fsdp")]
    Fsdp,
    /// The same with expert parallelism.
    #[serde(rename = "fsdp+ep")]
    FsdpEp,
    /// Tensor, expert and data parallelism with a sharded optimizer, no pipeline.
    #[serde(rename = "tp+ep+dp")]
    TpEpDp,
    /// Five-dimensional, experts bound to the attention mapping (`etp = tp`, `ep` divides `dp`).
    #[serde(rename = "unfolded")]
    Unfolded,
    /// Five-dimensional with the expert mapping free.
    #[serde(rename = "folded")]
    Folded,
}

impl Strategy {
    /// All strategies.
    pub const ALL: [Self; 5] = [Self::Fsdp, Self::FsdpEp, Self::TpEpDp, Self::Unfolded, Self::Folded];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fsdp => "fsdp",
            Self::FsdpEp => "fsdp+ep",
            Self::TpEpDp => "tp+ep+dp",
            Self::Unfolded => "unfolded",
            Self::Folded => "folded",
        }
    }

    /// The strategy of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    /// How state is sharded.
    pub fn sharding(self) -> Sharding {
        match self {
            Self::Fsdp | Self::FsdpEp => Sharding::Full,
            Self::TpEpDp | Self::Unfolded | Self::Folded => Sharding::Optimizer,
        }
    }

    /// Whether a mapping belongs to the strategy; `dp` and `edp` are its data-parallel ways.
    pub fn admits(self, m: &Mapping, dp: u64) -> bool {
        let bound = m.etp == m.tp && dp.is_multiple_of(m.ep);
        match self {
            Self::Fsdp => m.pp == 1 && m.ep == 1 && m.etp == m.tp,
            Self::FsdpEp | Self::TpEpDp => m.pp == 1 && bound,
            Self::Unfolded => bound,
            Self::Folded => true,
        }
    }
}

/// What the plan is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Shortest training step.
    #[default]
    Train,
    /// Shortest time to the first token.
    Prefill,
    /// Most tokens per second and GPU within a latency bound.
    Decode,
}

/// How tokens spread over experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Routing {
    /// As where the calibration was measured: even in training, whose losses balance experts, and with
    /// the skew of the parameter set in serving.
    #[default]
    Usual,
    /// Every expert is equally likely.
    Balanced,
    /// Expert `i` gets a share proportional to `1 / (i + 1)^s`.
    Zipf(f64),
    /// Measured tokens per expert.
    Loads(Vec<f64>),
}

impl Routing {
    /// Expected load of the busiest of `ep` ranks with contiguous experts, over the mean. `skew` is the standard
    /// deviation of an expert's load over the mean where routing is the usual one.
    pub fn imbalance(&self, experts: u64, ep: u64, skew: f64) -> f64 {
        let loads = match self {
            Self::Usual => {
                let sigma = log_deviation(skew * (ep as f64 / experts.max(1) as f64).sqrt());
                return (sigma * largest_of(ep) - sigma * sigma / 2.0).exp().max(1.0);
            }
            Self::Balanced => return 1.0,
            Self::Zipf(_) | Self::Loads(_) => self.loads(experts, skew),
        };
        let total: f64 = loads.iter().sum();
        if ep == 0 || total <= 0.0 || loads.is_empty() {
            return 1.0;
        }
        let per_rank = (loads.len() / ep as usize).max(1);
        let busiest = loads.chunks(per_rank).map(|c| c.iter().sum::<f64>()).fold(0.0, f64::max);
        (busiest * ep as f64 / total).max(1.0)
    }

    /// Share of the experts that at least one of `tokens` tokens chooses, each `top_k` of them. Popular experts are
    /// chosen again and again, so that skewed routing touches fewer.
    pub fn touched(&self, experts: u64, top_k: u64, tokens: f64, skew: f64) -> f64 {
        let mut loads = self.loads(experts, skew);
        if loads.iter().sum::<f64>() <= 0.0 {
            loads = vec![1.0];
        }
        let number = loads.len() as f64;
        let chosen = top_k as f64 / experts.max(1) as f64 * number / loads.iter().sum::<f64>();
        let untouched: f64 = loads.iter().map(|load| (1.0 - (chosen * load).min(1.0)).powf(tokens)).sum();
        1.0 - untouched / number
    }

    /// Loads of experts, or of equal shares of them.
    fn loads(&self, experts: u64, skew: f64) -> Vec<f64> {
        match self {
            Self::Usual => {
                let sigma = log_deviation(skew);
                NORMAL_EIGHTHS.iter().flat_map(|z| [(sigma * z).exp(), (-sigma * z).exp()]).collect()
            }
            Self::Balanced => vec![1.0],
            Self::Zipf(s) => (0..experts).map(|i| ((i + 1) as f64).powf(-s)).collect(),
            Self::Loads(loads) => loads.clone(),
        }
    }
}

/// Loads of experts and ranks are log-normal (deepseek-ai/DeepEP, pull request 393): the standard deviation of the
/// logarithm, for that of the load over its mean.
fn log_deviation(deviation: f64) -> f64 {
    (1.0 + deviation * deviation).ln().sqrt()
}

/// Middles of the upper four of eight equally likely parts of a standard normal distribution.
const NORMAL_EIGHTHS: [f64; 4] = [0.157, 0.489, 0.887, 1.534];

/// Expected largest of `n` standard normal numbers, within 0.04 for `n` up to 300.
pub(crate) fn largest_of(n: u64) -> f64 {
    (1.475 * (n.max(1) as f64).ln().sqrt() - 0.664).max(0.0)
}

/// What the user asks of the planner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// GPUs of the job.
    pub gpus: u64,
    /// What to optimise.
    pub objective: Objective,
    /// Sequence length; of the prompt for prefill and decode.
    pub seq: u64,
    /// Sequences per step (training) or requests in flight on all GPUs (decode; 0 lets the search choose).
    pub global_batch: u64,
    /// Tokens generated per request (decode).
    pub output: u64,
    /// Largest time per output token (decode) or to the first token (prefill), milliseconds.
    pub latency_bound_ms: Option<f64>,
    /// Number format of matrix products.
    pub precision: Precision,
    /// Limits the search to one strategy; `None` searches folded mappings with a sharded optimizer.
    pub strategy: Option<Strategy>,
    /// Pinned sizes.
    pub fixed: Fixed,
    /// Pinned recomputation.
    pub recompute: Option<Recompute>,
    /// Pinned sharding of training state.
    pub sharding: Option<Sharding>,
    /// Pipeline schedule.
    pub schedule: Schedule,
    /// Rank order.
    pub order: String,
    /// How tokens spread over experts.
    pub routing: Routing,
    /// Tokens kept per expert relative to the mean; `None` is dropless.
    pub capacity_factor: Option<f64>,
    /// Memory of a GPU that may be used, GiB; `None` is all of it.
    pub memory_limit_gib: Option<f64>,
    /// Training release or serving backend, see the calibration files; `auto` takes what was measured
    /// on the GPU's generation, and vLLM for serving.
    pub software: String,
    /// Overrides the release's figures.
    pub software_override: Option<Software>,
    /// Number of plans to return.
    pub top: usize,
}

impl Request {
    /// A training request with defaults for everything else.
    pub fn train(gpus: u64, seq: u64, global_batch: u64) -> Self {
        Self {
            gpus,
            objective: Objective::Train,
            seq,
            global_batch,
            output: 1024,
            latency_bound_ms: None,
            precision: Precision::Bf16,
            strategy: None,
            fixed: Fixed::default(),
            recompute: None,
            sharding: None,
            schedule: Schedule::default(),
            order: DEFAULT_ORDER.to_owned(),
            routing: Routing::Usual,
            capacity_factor: None,
            memory_limit_gib: None,
            software: "auto".to_owned(),
            software_override: None,
            top: 5,
        }
    }

    /// A serving request: `seq` prompt tokens and `output` generated tokens.
    pub fn serve(objective: Objective, gpus: u64, seq: u64, output: u64) -> Self {
        Self { objective, output, ..Self::train(gpus, seq, 0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_skewed_experts_are_as_uneven_as_was_measured() {
        // DeepSeek-R1, 256 experts on 32 ranks (TensorRT-LLM, examples/wide_ep/ep_load_balancer): deviation of the loads
        // of ranks over the mean, and by how much the busiest exceeds the mean, of six layers and of all.
        let layers = [(0.184, 0.498), (0.198, 0.538), (0.204, 0.459), (0.557, 2.461), (0.333, 0.717), (0.372, 1.120)];
        for (deviation, excess) in layers.into_iter().chain([(0.480, 1.564)]) {
            let skew = deviation * (256.0_f64 / 32.0).sqrt();
            let predicted = Routing::Usual.imbalance(256, 32, skew) - 1.0;
            assert!((predicted / excess - 1.0).abs() < 0.4, "{deviation}: {predicted}, measured {excess}");
        }
    }

    #[test]
    fn skewed_routing_touches_fewer_experts() {
        let touched = |routing: &Routing| routing.touched(64, 4, 32.0, 1.36);
        let even = 1.0 - (1.0_f64 - 4.0 / 64.0).powf(32.0);
        assert!((touched(&Routing::Balanced) - even).abs() < 1e-12);
        assert!(touched(&Routing::Usual) < even);
        assert!(touched(&Routing::Zipf(1.0)) < even);
        // Loads of nothing say nothing.
        assert!((touched(&Routing::Loads(vec![0.0; 64])) - even).abs() < 1e-12);
    }
}
