//! Time per output token and time to first token of a serving instance.
//!
//! One decode step is a sum of rooflines: weights read once per step (of the experts
//! that at least one token chose), keys and values of every request, products of the
//! batch, collectives, and launch overheads. Prefills of arriving requests interrupt
//! decoding, as continuous batching does. Requests beyond what the memory holds wait.
//! One parameter set per GPU and backend (`backend`).

use crate::{
    backend::ServeCalibration,
    choice::{Routing, largest_of},
    cluster::Cluster,
    collective::{Collective, Span},
    memory::{FIXED_BUFFERS, Memory},
    model::{Attention, FeedForward, LayerClass, ModelShape, matrices},
};
use serde::{Deserialize, Serialize};

/// Storage format of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// 16 bits.
    #[default]
    Bf16,
    /// 8 bits.
    Fp8,
    /// 8 bits with a scale per block.
    Fp8Block,
    /// 4-bit floats (NVFP4, MXFP4).
    Fp4,
    /// 4-bit integers, 16-bit arithmetic.
    Int4,
}

impl WeightFormat {
    /// Bytes of a weight, scales included.
    pub fn bytes(self) -> f64 {
        match self {
            Self::Bf16 => 2.0,
            Self::Fp8 => 1.0,
            Self::Fp8Block => 1.0 + 4.0 / 16384.0,
            Self::Fp4 => 0.5 + 1.0 / 16.0,
            Self::Int4 => 0.5 + 2.0 / 32.0,
        }
    }

    /// Bytes of an attention weight; four-bit checkpoints keep attention in 16 bits.
    fn attention_bytes(self) -> f64 {
        match self {
            Self::Bf16 | Self::Fp4 | Self::Int4 => 2.0,
            Self::Fp8 | Self::Fp8Block => self.bytes(),
        }
    }

    /// Bytes of a number of a row that is multiplied by such weights, scales aside.
    fn row_bytes(self) -> f64 {
        match self {
            Self::Bf16 | Self::Int4 => 2.0,
            Self::Fp8 | Self::Fp8Block => 1.0,
            Self::Fp4 => 0.5,
        }
    }

    fn peak(self, cluster: &Cluster) -> f64 {
        let gpu = &cluster.gpu;
        1e12 * match self {
            Self::Bf16 | Self::Int4 => gpu.bf16_tflops,
            Self::Fp8 | Self::Fp8Block => gpu.fp8_tflops.unwrap_or(gpu.bf16_tflops),
            Self::Fp4 => gpu.fp4_tflops.unwrap_or(gpu.bf16_tflops),
        }
    }
}

/// Where and how a model is served.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServeLayout {
    /// Tensor-parallel ways of attention.
    pub tp: u64,
    /// Attention data-parallel ways.
    pub dp: u64,
    /// Expert-parallel ways; `tp x dp = etp x ep`.
    pub ep: u64,
    /// Tensor-parallel ways of experts.
    pub etp: u64,
    /// Format of dense weights.
    pub dense: WeightFormat,
    /// Format of expert weights.
    pub experts: WeightFormat,
}

impl ServeLayout {
    /// GPUs of the instance.
    pub fn gpus(&self) -> u64 {
        self.tp * self.dp
    }
}

/// What is asked of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Prompt tokens.
    pub input: f64,
    /// Generated tokens.
    pub output: f64,
    /// Requests that clients keep open, on all ranks together.
    pub concurrency: f64,
}

/// Share of the adapter rate that dispatch and combine of prompts reach: DeepEP's normal kernels on 32 H200 took 4096
/// tokens 5.5 ms, 43 of 50 GB/s (`hardware.json`).
const DISPATCH_SHARE: f64 = 0.86;

/// The same in decoding: DeepEP's low-latency kernels took each further token of 2 to 256 as long as its remote copies
/// need at 45 to 46 of 50 GB/s, on 16, 32 and 64 H200 alike.
const COPY_SHARE: f64 = 0.92;

/// Share of the NVLink rate of the same kernels: 276 of 450 GB/s for 4096 tokens on 8 H200.
const INSIDE_SHARE: f64 = 0.61;

/// Columns of a grouped product that a tile covers; narrower shards of experts leave the rest idle.
const TILE: f64 = 128.0;

/// Prediction for an instance under a workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ServeEstimate {
    /// Mean time per output token, seconds.
    pub tpot: f64,
    /// Mean time to the first token with queueing, seconds.
    pub ttft: f64,
    /// Time to prefill one prompt, seconds.
    pub prefill: f64,
    /// One decode step without interruptions, seconds.
    pub step: f64,
    /// Requests decoded together per attention rank.
    pub batch: f64,
    /// Generated tokens per second and GPU.
    pub tokens_per_s_per_gpu: f64,
    /// Parts of a step, seconds: dense weights, experts, cache, collectives, overhead.
    pub parts: [f64; 5],
}

/// Names of [`ServeEstimate::parts`].
pub const PART_NAMES: [&str; 5] = ["dense", "experts", "attention", "collectives", "overhead"];

/// A model on an instance, with what does not depend on the workload.
pub struct ServeCx<'a> {
    model: &'a ModelShape,
    classes: Vec<LayerClass>,
    cluster: &'a Cluster,
    layout: ServeLayout,
    routing: &'a Routing,
}

/// What the busiest expert-parallel rank has to do for one routed layer.
struct Busiest {
    /// Experts that at least one token chose.
    touched: f64,
    /// Rows of its experts.
    rows: f64,
    /// Rows over the mean of all ranks.
    excess: f64,
}

/// What the busiest one receives over the mean.
#[derive(Clone, Copy)]
struct Received {
    /// Of all ranks.
    rank: f64,
    /// Of all NVLink domains.
    domain: f64,
}

impl Received {
    const EVEN: Self = Self { rank: 1.0, domain: 1.0 };
}

impl<'a> ServeCx<'a> {
    /// Prepares a model on an instance.
    pub fn new(model: &'a ModelShape, cluster: &'a Cluster, layout: ServeLayout, routing: &'a Routing) -> Self {
        Self { model, classes: model.classes(), cluster, layout, routing }
    }

    /// Ranks wait for the one that most rows go to, and for the one most of whose experts are chosen: what is popular
    /// and what chance adds, for `tokens` tokens of all ranks.
    fn busiest(&self, p: &ServeCalibration, experts: u64, top_k: u64, tokens: f64) -> Busiest {
        let ep = self.layout.ep;
        let local = experts as f64 / ep as f64;
        let popular = self.routing.imbalance(experts, ep, p.skew);
        let touched = self.routing.touched(experts, top_k, tokens.powf(p.spread).max(1.0), p.skew);
        let chance = largest_of(ep) * (local * touched * (1.0 - touched)).sqrt();
        let mean = tokens * top_k as f64 / ep as f64;
        let excess = (1.0 + (popular - 1.0).hypot(largest_of(ep) / mean.sqrt())).min(ep as f64);
        Busiest { touched: (local * touched + chance).min(local), rows: mean * excess, excess }
    }

    /// Bytes of weights on one GPU.
    pub fn weight_bytes(&self) -> f64 {
        let l = &self.layout;
        let hidden = self.model.hidden;
        let layers = self.classes.iter().map(|c| {
            let experts = c.layer.expert_parameters(hidden);
            let dense = c.layer.ffn_parameters(hidden) - experts;
            let per_layer = c.layer.attention_parameters(hidden) / l.tp as f64 * l.dense.attention_bytes()
                + dense / l.tp as f64 * l.dense.bytes()
                + experts / (l.ep * l.etp) as f64 * l.experts.bytes();
            c.count as f64 * per_layer
        });
        let layers = layers.sum::<f64>();
        layers + 2.0 * 2.0 * hidden as f64 * self.model.vocab as f64 / l.tp as f64
    }

    /// Bytes of cache on one GPU for one token of one request.
    pub fn cache_bytes_per_token(&self, number: f64) -> f64 {
        self.classes.iter().map(|c| c.count as f64 * self.layer_cache(c, number)).sum()
    }

    fn layer_cache(&self, class: &LayerClass, number: f64) -> f64 {
        let tp = self.layout.tp as f64;
        match class.layer.attention {
            Attention::Gqa { kv_heads, head_dim, .. } => {
                2.0 * (kv_heads as f64 / tp).max(1.0) * head_dim as f64 * number
            }
            // The compressed cache is kept by every tensor-parallel rank.
            Attention::Mla { kv_lora_rank, qk_rope_head_dim, .. } => (kv_lora_rank + qk_rope_head_dim) as f64 * number,
            Attention::Linear { .. } => 0.0,
        }
    }

    /// Requests per attention rank that fit the memory at a mean length.
    pub fn capacity(&self, p: &ServeCalibration, tokens: f64) -> f64 {
        let free = self.cluster.gpu.hbm_bytes * p.memory_share - self.weight_bytes() - FIXED_BUFFERS;
        let windowed: f64 =
            self.classes.iter().map(|c| c.count as f64 * self.layer_cache(c, p.cache_bytes) * window(c, tokens)).sum();
        (free / windowed.max(1.0)).max(0.0)
    }

    /// Memory of one GPU with `batch` requests of `tokens` tokens.
    pub fn memory(&self, p: &ServeCalibration, batch: f64, tokens: f64) -> Memory {
        let cache: f64 =
            self.classes.iter().map(|c| c.count as f64 * self.layer_cache(c, p.cache_bytes) * window(c, tokens)).sum();
        Memory {
            weights: self.weight_bytes(),
            kv_cache: cache * batch,
            buffers: FIXED_BUFFERS,
            fragmentation: 0.02 * self.cluster.gpu.hbm_bytes,
            ..Memory::default()
        }
    }

    /// Seconds of one pass over `tokens` tokens per attention rank; in decoding each attends to `context` tokens.
    fn pass(&self, p: &ServeCalibration, tokens: f64, context: f64, prefill: bool) -> [f64; 5] {
        let l = &self.layout;
        let (h, tp) = (self.model.hidden as f64, l.tp as f64);
        let hbm = self.cluster.hbm();
        let mut parts = [0.0; 5];
        for class in &self.classes {
            let n = class.count as f64;
            let layer = &class.layer;
            let attention = layer.attention_parameters(self.model.hidden) / tp;
            parts[0] += n * self.dense_seconds(p, tokens, attention, attention * l.dense.attention_bytes());
            parts[2] += n * self.attention_seconds(p, class, tokens, context, prefill);
            let special = match layer.attention {
                Attention::Gqa { .. } => 0.0,
                Attention::Mla { .. } | Attention::Linear { .. } => p.special_attention_us,
            };
            let mut overhead = p.layer_us + special;
            let mut received = Received::EVEN;
            match layer.feed_forward {
                FeedForward::Dense { intermediate, gated } => {
                    let weights = matrices(gated) * h * intermediate as f64 / tp;
                    parts[0] += n * self.dense_seconds(p, tokens, weights, weights * l.dense.bytes());
                }
                FeedForward::Moe { experts, top_k, expert_intermediate, shared_intermediate, gated } => {
                    let shared = (matrices(gated) * h * shared_intermediate as f64 + h * experts as f64) / tp;
                    parts[0] += n * self.dense_seconds(p, tokens, shared, shared * l.dense.bytes());
                    let all = tokens * l.dp as f64;
                    let one = matrices(gated) * h * expert_intermediate as f64 / l.etp as f64;
                    let Busiest { touched, rows, excess } = self.busiest(p, experts, top_k, all);
                    let share = p.expert_flops * (rows / touched) / (rows / touched + p.expert_half_rows);
                    let inner = expert_intermediate as f64 / l.etp as f64;
                    let tiles = (inner / TILE).ceil() * TILE / inner;
                    let sliced = 1.0 + p.slicing * (l.etp as f64).log2();
                    let read = sliced * touched * one * l.experts.bytes() / (hbm * p.expert_memory);
                    let compute = 2.0 * rows * one * tiles / (l.experts.peak(self.cluster) * share);
                    // Rows are gathered, their outputs written, and those read again by the weighted sum.
                    let moved = rows * (3.0 * h + matrices(gated) * inner) * 2.0 / hbm;
                    parts[1] += n * (read.max(compute) + moved);
                    overhead += p.moe_layer_us;
                    let domains = (l.gpus() / self.cluster.gpus_per_domain).max(1);
                    received = Received { rank: excess, domain: self.routing.imbalance(experts, domains, p.skew) };
                }
            }
            parts[3] += n * self.collective_seconds(p, tokens, layer.top_k(), received, prefill);
            parts[4] += n * overhead * 1e-6;
        }
        let head = h * self.model.vocab as f64 / tp;
        let rows = if prefill { 1.0 } else { tokens };
        parts[0] += self.dense_seconds(p, rows, head, head * 2.0);
        parts
    }

    fn dense_seconds(&self, p: &ServeCalibration, rows: f64, weights: f64, bytes: f64) -> f64 {
        let share = p.dense_flops * rows / (rows + 64.0);
        let compute = 2.0 * rows * weights / (self.layout.dense.peak(self.cluster) * share);
        (bytes / (self.cluster.hbm() * p.dense_memory)).max(compute)
    }

    fn attention_seconds(
        &self,
        p: &ServeCalibration,
        class: &LayerClass,
        tokens: f64,
        context: f64,
        prefill: bool,
    ) -> f64 {
        let tp = self.layout.tp as f64;
        let hbm = self.cluster.hbm() * p.cache_memory;
        let peak = self.cluster.gpu.bf16_tflops * 1e12 * p.attention_flops;
        if prefill {
            let flops = tokens
                * (class.layer.core_flops_per_context() * class.layer.mean_context(tokens) + class.layer.state_flops());
            return flops / tp / peak;
        }
        match class.layer.attention {
            Attention::Gqa { .. } => tokens * window(class, context) * self.layer_cache(class, p.cache_bytes) / hbm,
            Attention::Mla { heads, kv_lora_rank, qk_rope_head_dim, .. } => {
                let read = tokens * context * self.layer_cache(class, p.cache_bytes) / hbm;
                // Absorbed form: every head scores and sums the compressed cache.
                let flops = tokens * context * heads as f64 / tp * 2.0 * (2 * kv_lora_rank + qk_rope_head_dim) as f64;
                read.max(flops / peak)
            }
            // The state of every request is read and written.
            Attention::Linear { value_heads, key_dim, value_dim, .. } => {
                tokens * (value_heads * key_dim * value_dim) as f64 / tp * 4.0 * 2.0 / hbm
            }
        }
    }

    /// Two all-reduces over tensor ranks, or the exchange over attention data-parallel ranks: inside a domain, and for
    /// experts in slices, every rank gathers all tokens. Beyond it a token of a prompt crosses to a domain once and goes
    /// to a rank once, if one of its experts is there; in decoding it is sent to each of its experts, which saves a hop.
    fn collective_seconds(
        &self,
        p: &ServeCalibration,
        tokens: f64,
        top_k: f64,
        received: Received,
        prefill: bool,
    ) -> f64 {
        let l = &self.layout;
        let bytes = tokens * self.model.hidden as f64 * 2.0;
        let domain = self.cluster.gpus_per_domain;
        let network = self.cluster.nic_gbps * 1e9;
        let nvlink = self.cluster.gpu.nvlink_gbps * 1e9;
        let latency = |ranks: u64, hops: f64| {
            let ranks = p.collective_rank_us * (ranks as f64).log2();
            (p.collective_us + ranks + 2.0 * hops * self.cluster.latency_us.network) * 1e-6
        };
        // Measured instances sit in one NVLink domain; beyond it the adapters of a domain work together.
        let gathered = |op: Collective, span: Span, bytes: f64| {
            let hops = (span.ranks as f64 / span.per_domain as f64).log2();
            let rate = if span.is_local() { nvlink } else { network * span.per_domain as f64 };
            latency(span.ranks, hops) + bytes * op.wire_factor(span.ranks as f64) / (rate * p.link)
        };
        let mut seconds = 0.0;
        if l.tp > 1 {
            let calls = if l.dp > 1 { 1.0 } else { 2.0 };
            seconds += calls * gathered(Collective::AllReduce, Span::new(l.tp, 1, domain), bytes);
        }
        if l.dp > 1 {
            let span = Span::new(l.dp, l.tp, domain);
            let domains = l.gpus() as f64 / domain as f64;
            seconds += if span.is_local() || l.etp > 1 {
                2.0 * gathered(Collective::AllGather, span, bytes * l.dp as f64)
            } else {
                // Rows go out as experts multiply them and come back in 16 bits: the mean of both directions.
                let row = bytes * 0.5 * (1.0 + l.experts.row_bytes() / 2.0);
                let reached = |of: f64| of * (1.0 - (1.0 - 1.0 / of).powf(top_k));
                let remote = 1.0 - 1.0 / domains;
                // Copies of a token that leave its domain, and that move inside domains. A prompt's cross to the rank
                // of the same place, so that adapters share what a popular rank receives.
                let exchange = if prefill {
                    let out = received.domain * reached(domains) * remote / (network * DISPATCH_SHARE);
                    out.max(received.rank * reached(l.dp as f64) / (nvlink * INSIDE_SHARE))
                } else {
                    let out = top_k * remote / (network * COPY_SHARE);
                    received.rank * out.max(top_k / domains / (nvlink * INSIDE_SHARE))
                };
                // Ranks send to each other directly, so that there is one hop, however many domains there are.
                2.0 * (latency(l.dp, 1.0) + row * exchange)
            };
        }
        seconds
    }

    /// Predicts an instance under a workload.
    pub fn estimate(&self, p: &ServeCalibration, w: &Workload, speculation: f64) -> ServeEstimate {
        let ranks = self.layout.dp as f64;
        let open = (w.concurrency / ranks).max(1.0);
        let capacity = self.capacity(p, w.input + 0.5 * w.output).max(1.0);
        let batch = open.min(capacity);
        let mean = w.input + 0.5 * w.output;
        let agreement = if self.layout.dp > 1 { p.agree_us } else { 0.0 };
        let step_overhead = (p.step_us + agreement + p.request_us * batch) * 1e-6;
        let mut parts = self.pass(p, batch, mean, false);
        parts[4] += step_overhead;
        let step = parts.iter().sum::<f64>() / speculation;
        let prefill = self.pass(p, w.input, 0.0, true).iter().sum::<f64>() + p.prefill_ms * 1e-3;
        // Over one request's lifetime every other request of the rank is replaced once.
        let interrupted = p.interference * (batch - 1.0).max(0.0) / w.output.max(1.0) * prefill;
        let tpot = step + interrupted;
        let waiting = (open - batch).max(0.0) / batch * w.output * tpot;
        let ttft = p.first_token_ms * 1e-3
            + prefill * (1.0 + p.queue * (open - 1.0).min(batch))
            + p.wait_steps * tpot
            + waiting;
        let lifetime = tpot * w.output + (ttft - waiting).max(0.0);
        let tokens = batch * ranks * w.output / lifetime;
        ServeEstimate {
            tpot,
            ttft,
            prefill,
            step,
            batch,
            tokens_per_s_per_gpu: tokens / self.layout.gpus() as f64,
            parts,
        }
    }
}

/// Tokens of the context that a layer looks at.
fn window(class: &LayerClass, context: f64) -> f64 {
    match class.layer.attention {
        Attention::Gqa { window: Some(window), .. } => context.min(window as f64),
        Attention::Gqa { window: None, .. } | Attention::Mla { .. } => context,
        Attention::Linear { .. } => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::ServeFile;

    /// The exchange of one layer on ranks of H200 nodes, microseconds.
    fn exchange_us(ranks: u64, tokens: f64, prefill: bool) -> f64 {
        let model = crate::ModelShape::from_config_json(
            &serde_json::from_str::<serde_json::Value>(include_str!("../data/models.json")).unwrap()["DeepSeek-V3"],
        )
        .unwrap();
        let cluster = Cluster::preset("dgx-h200").unwrap();
        let set = ServeFile::built_in().unwrap().set(&cluster, "trtllm").unwrap();
        let format = WeightFormat::Fp8Block;
        let layout = ServeLayout { tp: 1, dp: ranks, ep: ranks, etp: 1, dense: format, experts: format };
        let cx = ServeCx::new(&model, &cluster, layout, &Routing::Balanced);
        1e6 * cx.collective_seconds(set, tokens, 8.0, Received::EVEN, prefill)
    }

    #[test]
    fn decoding_across_nodes_exchanges_rows_as_fast_as_was_measured() {
        // DeepEP, low-latency kernels, dispatch and combine on 2, 4 and 8 nodes (`hardware.json`).
        let measured = [
            (2.0, [48.5, 55.6, 59.5]),
            (8.0, [59.8, 73.8, 78.0]),
            (16.0, [76.0, 96.9, 105.3]),
            (32.0, [101.0, 140.8, 158.3]),
            (64.0, [160.2, 234.6, 254.3]),
            (128.0, [288.3, 406.2, 471.5]),
            (256.0, [520.5, 764.7, 880.7]),
        ];
        for (tokens, nodes) in measured {
            for (ranks, measured) in [16, 32, 64].into_iter().zip(nodes) {
                let us = exchange_us(ranks, tokens, false);
                assert!((us / measured - 1.0).abs() < 0.2, "{tokens} on {ranks}: {us} us, measured {measured}");
            }
        }
    }

    #[test]
    fn prompts_cross_nodes_as_fast_as_was_measured() {
        // DeepEP, normal kernels, 4096 tokens (`hardware.json`).
        for (ranks, measured) in [(16, 2632.0), (32, 5493.9)] {
            let us = exchange_us(ranks, 4096.0, true);
            assert!((us / measured - 1.0).abs() < 0.25, "{ranks} ranks: {us} us, measured {measured}");
        }
    }
}
