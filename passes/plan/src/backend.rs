//! What is known of a serving backend on a GPU: one parameter set for each pair that was measured.
//!
//! Sets are fitted in `examples/fit_serving.rs`; users copy and edit the file.

use crate::{
    cluster::{Cluster, Generation},
    error::PlanError,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::LazyLock};

/// Parameters of one GPU and backend. Shares are of hardware peaks, in (0, 1].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServeCalibration {
    /// Share of memory bandwidth for dense weights.
    pub dense_memory: f64,
    /// Share of memory bandwidth for expert weights.
    pub expert_memory: f64,
    /// Share of memory bandwidth for keys and values.
    pub cache_memory: f64,
    /// Share of the peak of large dense products.
    pub dense_flops: f64,
    /// Share of the peak of large grouped products.
    pub expert_flops: f64,
    /// Rows per expert at which grouped products run at half rate.
    pub expert_half_rows: f64,
    /// Share of the bf16 peak that prefill attention reaches.
    pub attention_flops: f64,
    /// Exponent of the number of experts that a batch touches; below 1 routing repeats itself.
    pub spread: f64,
    /// Standard deviation of an expert's load over the mean.
    pub skew: f64,
    /// Time that each halving of experts over ranks adds to reading them: their products become short and narrow.
    pub slicing: f64,
    /// Time of launches and small kernels per layer, microseconds.
    pub layer_us: f64,
    /// Further time of a routed layer, microseconds.
    pub moe_layer_us: f64,
    /// Further time of a latent- or linear-attention layer, microseconds.
    pub special_attention_us: f64,
    /// Scheduler and sampling time per step, microseconds.
    pub step_us: f64,
    /// Scheduler and sampling time per request and step, microseconds.
    pub request_us: f64,
    /// Latency of a collective of a layer, microseconds.
    pub collective_us: f64,
    /// The same per doubling of its ranks.
    pub collective_rank_us: f64,
    /// Share of the measured link rate that a layer's collectives reach.
    pub link: f64,
    /// Time per step in which attention data-parallel ranks agree on what runs, microseconds.
    pub agree_us: f64,
    /// How much of other requests' prefill time delays a decode step.
    pub interference: f64,
    /// Fixed time of a prefill, milliseconds.
    pub prefill_ms: f64,
    /// Time of a request outside the GPU until its first token, milliseconds.
    pub first_token_ms: f64,
    /// Share of the open requests of a rank that a new one waits for to be prefilled.
    pub queue: f64,
    /// Decode steps a new request waits before it is scheduled.
    pub wait_steps: f64,
    /// Bytes of a cached number.
    pub cache_bytes: f64,
    /// Share of memory that weights and cache may use.
    pub memory_share: f64,
    /// Tokens gained per step by speculative decoding, by backend version and model family; 1 is none.
    #[serde(default)]
    pub speculation: BTreeMap<String, f64>,
}

/// Parameter sets by `generation-or-GPU/backend`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServeFile {
    /// Sets by key such as `dgx-h200/vllm`.
    pub sets: BTreeMap<String, ServeCalibration>,
}

static BUILT_IN: LazyLock<Result<ServeFile, String>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../data/serve-calibration.json"))
        .map_err(|e| format!("serve-calibration.json: {e}"))
});

impl ServeFile {
    /// The parameter sets that ship with the crate.
    ///
    /// # Errors
    /// `E0404` when the built-in file is damaged.
    pub fn built_in() -> Result<&'static Self, PlanError> {
        BUILT_IN.as_ref().map_err(|e| PlanError::cluster(e.clone(), "the calibration file of this build is damaged"))
    }

    /// The set measured on a cluster, or that of the same backend on the nearest generation.
    ///
    /// # Errors
    /// `E0404` for an unknown backend, with the known ones.
    pub fn set(&self, cluster: &Cluster, backend: &str) -> Result<&ServeCalibration, PlanError> {
        if let Some(set) = self.sets.get(&format!("{}/{backend}", cluster.name)) {
            return Ok(set);
        }
        let order = match cluster.gpu.generation {
            Generation::Ampere | Generation::Hopper => ["dgx-h100", "dgx-h200", "dgx-b200"],
            Generation::Blackwell | Generation::BlackwellUltra => ["dgx-b200", "dgx-h200", "dgx-h100"],
        };
        order.iter().find_map(|gpu| self.sets.get(&format!("{gpu}/{backend}"))).ok_or_else(|| {
            let mut known: Vec<&str> = self.sets.keys().filter_map(|k| k.split('/').nth(1)).collect();
            known.sort_unstable();
            known.dedup();
            PlanError::cluster(
                format!("`{backend}` is not a known serving backend"),
                format!("known: {}", known.join(", ")),
            )
        })
    }
}
