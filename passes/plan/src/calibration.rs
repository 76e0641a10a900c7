//! Fitted parameters of the cost model, kept as data.
//!
//! One set serves all rows of all sources; `examples/fit.rs` writes the file
//! from the published measurements and `examples/accuracy.rs` reports it. A share
//! is always in (0, 1], so no fitted value can beat the hardware's limits.

use crate::{
    cluster::{Cluster, Generation, Precision},
    collective::LinkEfficiency,
    error::PlanError,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::LazyLock};

/// One value per compute generation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerGeneration {
    /// A100.
    pub ampere: f64,
    /// H100, H200, H800.
    pub hopper: f64,
    /// B200, GB200.
    pub blackwell: f64,
    /// B300, GB300.
    pub blackwell_ultra: f64,
}

impl PerGeneration {
    /// The value of a generation.
    pub fn of(&self, generation: Generation) -> f64 {
        match generation {
            Generation::Ampere => self.ampere,
            Generation::Hopper => self.hopper,
            Generation::Blackwell => self.blackwell,
            Generation::BlackwellUltra => self.blackwell_ultra,
        }
    }
}

/// Measured attention efficiency at one sequence length, shares of the bf16 peak.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionPoint {
    /// Generation measured.
    pub generation: Generation,
    /// Sequence length.
    pub seq: f64,
    /// Forward share.
    pub forward: f64,
    /// Backward share.
    pub backward: f64,
}

/// What differs between training software releases.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Software {
    /// Exposed host time (synchronisation) per layer and pass, microseconds.
    pub host_us: f64,
    /// Host time to launch a layer's kernels, microseconds per pass; it counts only where it
    /// exceeds the GPU's time.
    pub host_base_us: f64,
    /// The same per local expert, for stacks that launch each expert by itself.
    pub host_expert_us: f64,
    /// Share of the expert all-to-all hidden behind compute.
    pub all_to_all_overlap: f64,
    /// Whether tensor-parallel collectives run in chunks beside the products they feed (user buffers).
    pub tensor_overlap: bool,
    /// Whether stages send and receive beside computing when chunks interleave; stages of one chunk always wait.
    pub pipeline_overlap: bool,
    /// Whether pipeline stages may hold chunks of different sizes, written by hand.
    pub free_layouts: bool,
    /// Kernel quality relative to the best release, in (0, 1].
    pub kernels: f64,
    /// Whether a token crosses to a node once, not once per expert there (DeepEP, HybridEP).
    pub node_dedup: bool,
    /// Whether attention scores stay on chip.
    pub flash_attention: bool,
    /// Whether single modules (norms, activations, up-projections) can be recomputed.
    pub fine_recompute: bool,
    /// Whether routing weights are applied inside the experts, so that their outputs need not be kept.
    pub early_weighting: bool,
}

/// Parameters of the training model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainCalibration {
    /// Share of the bf16 peak that large matrix products reach.
    pub gemm_bf16: PerGeneration,
    /// Share of the fp8 peak that large matrix products reach, scaling included.
    pub gemm_fp8: PerGeneration,
    /// Rows at which a matrix product runs at half rate.
    pub gemm_half_rows: f64,
    /// Width (columns, and depth) at which a matrix product runs at half rate.
    pub gemm_half_width: f64,
    /// Large grouped products relative to plain ones.
    pub grouped: f64,
    /// Rows per expert at which a grouped product runs at half rate.
    pub grouped_half_rows: f64,
    /// Width at which a grouped product runs at half rate.
    pub grouped_half_width: f64,
    /// Multiplier on the measured attention shares.
    pub attention: f64,
    /// Measured attention shares by length.
    pub attention_points: Vec<AttentionPoint>,
    /// Share of memory bandwidth that streaming kernels reach.
    pub memory: f64,
    /// Traffic of unfused element-wise kernels relative to the counted minimum.
    pub elementwise: f64,
    /// Further traffic factor in experts with biases or a clamped activation, which stacks do not fuse.
    pub unfused_experts: f64,
    /// Traffic of casts to 8 bits relative to one read and one write per operand.
    pub quantize: f64,
    /// Host time of 8-bit layers relative to bf16 layers.
    pub host_fp8: f64,
    /// Head width at which attention runs at half rate, relative to the measured widths.
    pub attention_half_dim: f64,
    /// Link shares.
    pub links: LinkEfficiency,
    /// Share of gradient reduction and parameter gathering hidden behind the passes of one micro-batch, as far as these last.
    pub dp_overlap: f64,
    /// The same for fully sharded parameters, per micro-batch.
    pub fsdp_overlap: f64,
    /// Bytes of a gradient that fully sharded parameters reduce.
    pub fsdp_gradient_bytes: f64,
    /// Share of a tensor-parallel collective hidden behind the product it feeds or empties, as far as that lasts.
    pub tp_overlap: f64,
    /// Share of context-parallel exchange hidden behind attention.
    pub cp_overlap: f64,
    /// Synchronisation of one step of the context-parallel ring, microseconds.
    pub cp_step_us: f64,
    /// Share of pipeline transfers that is exposed where they run beside computing.
    pub pp_exposed: f64,
    /// Fixed time per step (optimizer launch, logging, data), milliseconds.
    pub step_ms: f64,
    /// Time lost to stragglers, per doubling of the job above one node, as a share.
    pub straggler: f64,
    /// Releases by name.
    pub software: BTreeMap<String, Software>,
}

/// The parameter file of the crate, parsed once.
static TRAIN: LazyLock<Result<TrainCalibration, String>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../data/train-calibration.json"))
        .map_err(|e| format!("train-calibration.json: {e}"))
});

impl TrainCalibration {
    /// The calibration that ships with the crate.
    ///
    /// # Errors
    /// `E0404` when the built-in file is damaged.
    pub fn built_in() -> Result<&'static Self, PlanError> {
        TRAIN.as_ref().map_err(|e| PlanError::cluster(e.clone(), "the calibration file of this build is damaged"))
    }

    /// Reads and checks a calibration file.
    ///
    /// # Errors
    /// `E0404` for malformed text and for shares outside (0, 1].
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let calibration: Self = serde_json::from_str(text).map_err(|e| {
            PlanError::cluster(format!("the calibration file cannot be read: {e}"), "start from the built-in file")
        })?;
        calibration.check()?;
        Ok(calibration)
    }

    /// The gate: shares lie in (0, 1], everything else is positive and finite.
    ///
    /// # Errors
    /// `E0404` names the value.
    pub fn check(&self) -> Result<(), PlanError> {
        let generations = [Generation::Ampere, Generation::Hopper, Generation::Blackwell, Generation::BlackwellUltra];
        let mut shares = vec![
            ("grouped", self.grouped),
            ("memory", self.memory),
            ("links.nvlink", self.links.nvlink),
            ("links.network", self.links.network),
            ("links.network_all_to_all", self.links.network_all_to_all),
            ("links.network_dispatch", self.links.network_dispatch),
        ];
        for g in generations {
            shares.push(("gemm_bf16", self.gemm_bf16.of(g)));
            shares.push(("gemm_fp8", self.gemm_fp8.of(g)));
        }
        shares.extend(self.attention_points.iter().flat_map(|p| {
            [("attention forward", p.forward * self.attention), ("attention backward", p.backward * self.attention)]
        }));
        shares.extend(self.software.values().map(|s| ("kernels", s.kernels)));
        for (name, share) in shares {
            if !(share > 0.0 && share <= 1.0) {
                return Err(PlanError::cluster(
                    format!("{name} = {share} is outside (0, 1]"),
                    "a share of a peak or link rate cannot exceed 1: check the measurement it comes from",
                ));
            }
        }
        let overlaps = [self.dp_overlap, self.fsdp_overlap, self.tp_overlap, self.cp_overlap, self.pp_exposed];
        let overlaps = overlaps.into_iter().chain(self.software.values().map(|s| s.all_to_all_overlap));
        for overlap in overlaps {
            if !(0.0..=1.0).contains(&overlap) {
                return Err(PlanError::cluster(
                    format!("overlap {overlap} is outside [0, 1]"),
                    "give the hidden share",
                ));
            }
        }
        if self.elementwise < 1.0 || self.unfused_experts < 1.0 || self.quantize < 1.0 {
            return Err(PlanError::cluster("traffic below the counted minimum", "use factors of 1 or more"));
        }
        Ok(())
    }

    /// A release by name.
    ///
    /// # Errors
    /// `E0404` with the known releases.
    pub fn software(&self, name: &str) -> Result<Software, PlanError> {
        self.software.get(name).copied().ok_or_else(|| {
            let known = self.software.keys().cloned().collect::<Vec<_>>().join(", ");
            PlanError::cluster(format!("`{name}` is not a known training software"), format!("known: {known}"))
        })
    }

    /// A release by name; `auto` is the release that the measurements of a generation come from:
    /// Megatron-Core 0.9 up to Hopper, Megatron-Bridge 26.08 from Blackwell.
    ///
    /// # Errors
    /// `E0404` with the known releases.
    pub fn software_for(&self, cluster: &Cluster, name: &str) -> Result<Software, PlanError> {
        match (name, cluster.gpu.generation) {
            ("auto", Generation::Ampere | Generation::Hopper) => self.software("mcore-0.9"),
            ("auto", Generation::Blackwell | Generation::BlackwellUltra) => self.software("bridge-26.08"),
            (name, _) => self.software(name),
        }
    }

    /// Share of the peak of large matrix products.
    pub fn gemm_share(&self, generation: Generation, precision: Precision) -> f64 {
        match precision {
            Precision::Bf16 => self.gemm_bf16.of(generation),
            Precision::Fp8 | Precision::Fp4 => self.gemm_fp8.of(generation),
        }
    }

    /// Forward and backward attention shares at a length: linear in its logarithm between
    /// points, flat beyond the longest, falling like `seq / (seq + 512)` below the shortest.
    pub fn attention_shares(&self, generation: Generation, seq: f64) -> (f64, f64) {
        let measured = match generation {
            Generation::BlackwellUltra => Generation::Blackwell,
            Generation::Ampere | Generation::Hopper | Generation::Blackwell => generation,
        };
        let mut points = self.attention_points.iter().filter(|p| p.generation == measured).peekable();
        let Some(first) = points.peek().copied() else {
            return (0.4, 0.3);
        };
        let scale = self.attention;
        if seq <= first.seq {
            let fall = seq / (seq + 512.0) * (first.seq + 512.0) / first.seq;
            return (first.forward * scale * fall, first.backward * scale * fall);
        }
        let mut low = first;
        for high in points {
            if seq <= high.seq {
                let x = (seq / low.seq).ln() / (high.seq / low.seq).ln();
                let mix = |a: f64, b: f64| (a + (b - a) * x) * scale;
                return (mix(low.forward, high.forward), mix(low.backward, high.backward));
            }
            low = high;
        }
        (low.forward * scale, low.backward * scale)
    }
}
