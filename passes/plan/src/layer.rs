//! Operations of one layer in training, with their time on one rank.
//!
//! Each op's time is at least `max(operations / peak, bytes / bandwidth)`, since
//! every share is at most 1. Counts follow Megatron-Core: sequence parallelism with
//! tensor parallelism, and the all-to-all dispatcher: permute, all-to-all over EP,
//! all-gather over ETP, grouped products, and the mirror image
//! (`transformer/moe/token_dispatcher.py`).

use crate::{
    calibration::{Software, TrainCalibration},
    cluster::{Cluster, Precision},
    collective::{Collective, Span, collective_seconds},
    model::{Attention, FeedForward, Layer, matrices},
};
use serde::Serialize;

/// What an op spends its time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Dense matrix products.
    Gemm,
    /// Attention core.
    Attention,
    /// Grouped products of routed experts.
    Experts,
    /// Norms, activations, permutations: limited by memory.
    Elementwise,
    /// Tensor-parallel collectives.
    TensorComm,
    /// Context-parallel exchange that is exposed.
    ContextComm,
    /// Expert all-to-all and expert tensor-parallel collectives that are exposed.
    ExpertComm,
    /// Exposed host time.
    Host,
}

impl Kind {
    /// All kinds in order of their index.
    pub const ALL: [Self; 8] = [
        Self::Gemm,
        Self::Attention,
        Self::Experts,
        Self::Elementwise,
        Self::TensorComm,
        Self::ContextComm,
        Self::ExpertComm,
        Self::Host,
    ];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::Attention => "attention",
            Self::Experts => "experts",
            Self::Elementwise => "elementwise",
            Self::TensorComm => "tensor_comm",
            Self::ContextComm => "context_comm",
            Self::ExpertComm => "expert_comm",
            Self::Host => "host",
        }
    }
}

/// One op of the report: what it does and how long it takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Op {
    /// What it is.
    pub name: &'static str,
    /// What it spends its time on.
    pub kind: Kind,
    /// Whether it belongs to the backward pass.
    pub backward: bool,
    /// Operations on this rank.
    pub flops: f64,
    /// Bytes through memory, or over links for a collective, on this rank.
    pub bytes: f64,
    /// Exposed time, seconds.
    pub seconds: f64,
}

/// Receives ops; summing and listing are two receivers.
pub(crate) trait Sink {
    fn op(&mut self, op: Op);
}

impl Sink for Vec<Op> {
    fn op(&mut self, op: Op) {
        self.push(op);
    }
}

/// Seconds by kind, forward and backward.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerTimes {
    /// Forward seconds, indexed by [`Kind`].
    pub forward: [f64; 8],
    /// Backward seconds, without recomputation.
    pub backward: [f64; 8],
}

impl LayerTimes {
    /// Seconds of the forward pass.
    pub fn forward_total(&self) -> f64 {
        self.forward.iter().sum()
    }

    /// Seconds of the backward pass.
    pub fn backward_total(&self) -> f64 {
        self.backward.iter().sum()
    }
}

impl Sink for LayerTimes {
    fn op(&mut self, op: Op) {
        let pass = if op.backward { &mut self.backward } else { &mut self.forward };
        pass[op.kind as usize] += op.seconds;
    }
}

/// Everything a layer's time depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerCx<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) cal: &'a TrainCalibration,
    pub(crate) software: Software,
    pub(crate) precision: Precision,
    pub(crate) hidden: f64,
    /// Tokens of a micro-batch on one context-parallel rank.
    pub(crate) tokens: f64,
    pub(crate) seq: f64,
    pub(crate) tp: Span,
    pub(crate) cp: Span,
    pub(crate) ep: Span,
    pub(crate) etp: Span,
    /// Load of the busiest expert rank over the mean, at least 1.
    pub(crate) imbalance: f64,
    /// Whether no token is dropped; dispatchers that copy once per node need it.
    pub(crate) dropless: bool,
    /// Whether experts have biases or a clamped activation.
    pub(crate) unfused_experts: bool,
}

impl LayerCx<'_> {
    fn memory_seconds(&self, bytes: f64) -> f64 {
        bytes / (self.cluster.hbm() * self.cal.memory)
    }

    /// Casts of a product's operands to 8 bits: one read of 2 bytes, two writes of 1 (both layouts).
    fn quantize(&self, rows: f64, columns: f64, depth: f64, sink: &mut impl Sink) {
        if self.precision != Precision::Bf16 {
            let factor = self.cal.quantize / self.cal.elementwise;
            self.stream_parts("quantize", 4.0 * rows * depth * factor, 4.0 * rows * columns * factor, sink);
        }
    }

    /// A dense product; gives the seconds of its forward pass.
    fn gemm(&self, name: &'static str, rows: f64, columns: f64, depth: f64, sink: &mut impl Sink) -> f64 {
        let half = self.cal.gemm_half_width;
        let share = self.software.kernels
            * saturation(rows, self.cal.gemm_half_rows)
            * saturation(columns, half)
            * saturation(depth, half);
        self.product(name, Kind::Gemm, Product { rows, experts: 1.0, columns, depth, share }, sink)
    }

    fn grouped(&self, name: &'static str, rows: f64, experts: f64, columns: f64, depth: f64, sink: &mut impl Sink) {
        let half = self.cal.grouped_half_width;
        let share = self.software.kernels
            * self.cal.grouped
            * saturation(rows / experts, self.cal.grouped_half_rows)
            * saturation(columns, half)
            * saturation(depth, half);
        self.product(name, Kind::Experts, Product { rows, experts, columns, depth, share }, sink);
    }

    /// Forward product, gradient of its input, and gradient of its weights, each under its own roofline.
    fn product(&self, name: &'static str, kind: Kind, p: Product, sink: &mut impl Sink) -> f64 {
        self.quantize(p.rows, p.columns, p.depth, sink);
        let flops = 2.0 * p.rows * p.columns * p.depth;
        let rate = self.cluster.peak_flops(self.precision)
            * self.cal.gemm_share(self.cluster.gpu.generation, self.precision)
            * p.share;
        let weights = p.experts * p.depth * p.columns;
        let ends = 2.0 * p.rows * (p.depth + p.columns);
        let roof = |bytes: f64| (flops / rate).max(self.memory_seconds(bytes));
        let bytes = ends + 2.0 * weights;
        let forward = roof(bytes);
        sink.op(Op { name, kind, backward: false, flops, bytes, seconds: forward });
        // The gradient of the weights adds into an fp32 buffer: with few rows that traffic is what it costs.
        let gradient = ends + 8.0 * weights;
        let seconds = forward + roof(gradient);
        sink.op(Op { name, kind, backward: true, flops: 2.0 * flops, bytes: bytes + gradient, seconds });
        forward
    }

    /// Memory-limited work; the backward pass moves about one and a half times as much.
    fn stream(&self, name: &'static str, bytes: f64, sink: &mut impl Sink) {
        self.stream_parts(name, bytes, 1.5 * bytes, sink);
    }

    fn stream_parts(&self, name: &'static str, forward: f64, backward: f64, sink: &mut impl Sink) {
        for (bytes, backward) in [(forward, false), (backward, true)] {
            let bytes = bytes * self.cal.elementwise;
            let seconds = self.memory_seconds(bytes) / self.software.kernels;
            sink.op(Op { name, kind: Kind::Elementwise, backward, flops: 0.0, bytes, seconds });
        }
    }

    /// Gather before and scatter after a tensor-parallel block, mirrored in the backward pass. Each runs in
    /// chunks beside the product that it feeds or empties, where the software does so; `gathered` and
    /// `scattered` are the forward seconds of those products.
    fn tensor_pair(&self, gathered: f64, scattered: f64, sink: &mut impl Sink) {
        if self.tp.ranks <= 1 {
            return;
        }
        let bytes = self.tokens * self.hidden * 2.0;
        let overlap = if self.software.tensor_overlap { self.cal.tp_overlap } else { 0.0 };
        let exposed = |op, product: f64| {
            let seconds = self.collective(op, self.tp, bytes);
            seconds - overlap * seconds.min(product)
        };
        let seconds = exposed(Collective::AllGather, gathered) + exposed(Collective::ReduceScatter, scattered);
        let wire = 2.0 * bytes * Collective::AllGather.wire_factor(self.tp.ranks as f64);
        let (name, kind) = ("tp all-gather + reduce-scatter", Kind::TensorComm);
        sink.op(Op { name, kind, backward: false, flops: 0.0, bytes: wire, seconds });
        sink.op(Op { name, kind, backward: true, flops: 0.0, bytes: wire, seconds });
    }

    fn collective(&self, op: Collective, span: Span, bytes: f64) -> f64 {
        collective_seconds(self.cluster, &self.cal.links, op, span, bytes)
    }

    /// Whether the dispatcher sends a token to a node once and writes rows in the order of experts; it needs every token.
    fn dedup(&self) -> bool {
        self.software.node_dedup && self.dropless
    }

    /// One direction of the expert exchange for `sent` tokens of this rank.
    fn all_to_all(&self, sent: f64, top_k: f64) -> (f64, f64) {
        let ranks = self.ep.ranks as f64;
        let row = self.hidden * 2.0;
        let bytes = sent * top_k * row;
        if self.ep.is_local() || !self.dedup() {
            return (self.collective(Collective::AllToAll, self.ep, bytes), bytes * (ranks - 1.0) / ranks);
        }
        // A token crosses to each remote node at most once and is copied there over NVLink.
        let nodes = ranks / self.ep.per_domain as f64;
        let visited = (nodes - 1.0) * (1.0 - (1.0 - 1.0 / nodes).powf(top_k));
        let remote = sent * visited * row;
        let network = remote / (self.cluster.nic_gbps * 1e9 * self.cal.links.network_dispatch);
        let inside = Span { ranks: self.ep.per_domain, per_domain: self.ep.per_domain };
        let local = self.collective(Collective::AllToAll, inside, bytes);
        (network.max(local) + self.cluster.latency_us.network * 1e-6 * nodes.log2(), remote)
    }
}

/// A product of `rows` rows, spread over `experts` matrices of `depth x columns`, at a share of the peak.
struct Product {
    rows: f64,
    experts: f64,
    columns: f64,
    depth: f64,
    share: f64,
}

fn saturation(size: f64, half: f64) -> f64 {
    size / (size + half)
}

/// Host time of a layer that the GPU waits for, forward and backward seconds.
pub(crate) fn host_seconds(cx: &LayerCx<'_>, layer: &Layer, times: &LayerTimes) -> (f64, f64) {
    // With dropping, expert sizes are known beforehand: one batched launch and nothing to wait for.
    let local = if cx.dropless { (layer.experts() as f64 / cx.ep.ranks as f64).ceil() } else { 0.0 };
    let format = if cx.precision == Precision::Bf16 { 1.0 } else { cx.cal.host_fp8 };
    let launch = (cx.software.host_base_us + local * cx.software.host_expert_us) * format * 1e-6;
    let wait = if cx.dropless { cx.software.host_us * 1e-6 } else { 0.0 };
    (wait + (launch - times.forward_total()).max(0.0), 1.5 * wait + (2.0 * launch - times.backward_total()).max(0.0))
}

/// Emits all ops of a layer, forward and backward.
pub(crate) fn layer_ops(cx: &LayerCx<'_>, layer: &Layer, sink: &mut impl Sink) {
    attention_ops(cx, layer, sink);
    let (h, t) = (cx.hidden, cx.tokens);
    let own = t / cx.tp.ranks as f64;
    match layer.feed_forward {
        FeedForward::Dense { intermediate, gated } => {
            dense_ffn(cx, intermediate as f64 / cx.tp.ranks as f64, gated, sink);
        }
        FeedForward::Moe { experts, top_k, expert_intermediate, shared_intermediate, gated } => {
            let (e, k) = (experts as f64, top_k as f64);
            if shared_intermediate > 0 {
                dense_ffn(cx, shared_intermediate as f64 / cx.tp.ranks as f64, gated, sink);
            }
            // Router scores in fp32, softmax and top-k: streamed, the product is small.
            cx.stream("router", own * (2.0 * h + 12.0 * e), sink);
            // Permute and unpermute read and write each copy of a row before and after the exchange; received rows
            // are sorted by local expert and back, unless there is one or the dispatcher has put them in order.
            let local = e / cx.ep.ranks as f64;
            let sorts = if local > 1.0 && !cx.dedup() { 2.0 } else { 0.0 };
            cx.stream("permute", own * k * h * 2.0 * (4.0 + sorts), sink);
            expert_exchange(cx, own, k, sink);
            let etp = cx.etp.ranks as f64;
            let rows = own * k * etp * cx.imbalance;
            let local = (e / cx.ep.ranks as f64).max(1.0);
            let width = expert_intermediate as f64 / etp;
            cx.grouped("experts up", rows, local, width * (matrices(gated) - 1.0), h, sink);
            let unfused = if cx.unfused_experts { cx.cal.unfused_experts } else { 1.0 };
            let activation = rows * width * 2.0 * matrices(gated) + rows * h * 2.0 * (unfused - 1.0);
            cx.stream("expert activation", activation * unfused, sink);
            cx.grouped("experts down", rows, local, h, width, sink);
        }
    }
    cx.stream("norms and residuals", own * h * 2.0 * 8.0, sink);
}

fn dense_ffn(cx: &LayerCx<'_>, width: f64, gated: bool, sink: &mut impl Sink) {
    let up = cx.gemm("ffn up", cx.tokens, width * (matrices(gated) - 1.0), cx.hidden, sink);
    cx.stream("ffn activation", cx.tokens * width * 2.0 * matrices(gated), sink);
    let down = cx.gemm("ffn down", cx.tokens, cx.hidden, width, sink);
    cx.tensor_pair(up, down, sink);
}

fn expert_exchange(cx: &LayerCx<'_>, own: f64, top_k: f64, sink: &mut impl Sink) {
    if cx.ep.ranks > 1 {
        let (seconds, bytes) = cx.all_to_all(own * cx.imbalance, top_k);
        let exposed = seconds * (1.0 - cx.software.all_to_all_overlap);
        for name in ["dispatch all-to-all", "combine all-to-all"] {
            for backward in [false, true] {
                sink.op(Op { name, kind: Kind::ExpertComm, backward, flops: 0.0, bytes, seconds: exposed });
            }
        }
    }
    if cx.etp.ranks > 1 {
        let etp = cx.etp.ranks as f64;
        let bytes = own * top_k * cx.hidden * 2.0 * etp * cx.imbalance;
        let seconds = cx.collective(Collective::AllGather, cx.etp, bytes)
            + cx.collective(Collective::ReduceScatter, cx.etp, bytes);
        let bytes = 2.0 * bytes * (etp - 1.0) / etp;
        for backward in [false, true] {
            sink.op(Op {
                name: "etp all-gather + reduce-scatter",
                kind: Kind::ExpertComm,
                backward,
                flops: 0.0,
                bytes,
                seconds,
            });
        }
    }
}

fn attention_ops(cx: &LayerCx<'_>, layer: &Layer, sink: &mut impl Sink) {
    let (h, t, tp) = (cx.hidden, cx.tokens, cx.tp.ranks as f64);
    // Bytes of keys and values of a token, which context parallelism passes around.
    let (kv_row, gathered, scattered) = match layer.attention {
        Attention::Gqa { heads, kv_heads, head_dim, .. } => {
            let (q, kv) = ((heads * head_dim) as f64 / tp, (kv_heads * head_dim) as f64 / tp.min(kv_heads as f64));
            let qkv = cx.gemm("qkv", t, q + 2.0 * kv, h, sink);
            cx.stream("rope", t * (q + kv) * 2.0 * 2.0, sink);
            let out = cx.gemm("attention out", t, h, q, sink);
            (4.0 * kv, qkv, out)
        }
        Attention::Mla { heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
            let heads = heads as f64 / tp;
            let (nope, rope, v) = (qk_nope_head_dim as f64, qk_rope_head_dim as f64, v_head_dim as f64);
            let own = t / tp;
            let query = match q_lora_rank {
                0 => cx.gemm("query", t, heads * (nope + rope), h, sink),
                rank => {
                    cx.gemm("query down", own, rank as f64, h, sink);
                    cx.gemm("query up", t, heads * (nope + rope), rank as f64, sink)
                }
            };
            let rank = kv_lora_rank as f64;
            cx.gemm("kv down", own, rank + rope, h, sink);
            cx.gemm("kv up", t, heads * (nope + v), rank, sink);
            cx.stream("rope", t * heads * (2.0 * (nope + rope) + v) * 2.0 * 2.0, sink);
            let out = cx.gemm("attention out", t, h, heads * v, sink);
            (2.0 * heads * (nope + rope + v), query, out)
        }
        Attention::Linear { key_heads, value_heads, key_dim, value_dim } => {
            let (keys, values) = ((key_heads * key_dim) as f64 / tp, (value_heads * value_dim) as f64 / tp);
            let into = cx.gemm("linear attention in", t, 2.0 * keys + 2.0 * values, h, sink);
            cx.stream("convolution", t * (2.0 * keys + 2.0 * values) * 2.0 * 3.0, sink);
            let out = cx.gemm("linear attention out", t, h, values, sink);
            (0.0, into, out)
        }
    };
    cx.tensor_pair(gathered, scattered, sink);
    core_ops(cx, layer, kv_row, sink);
}

fn core_ops(cx: &LayerCx<'_>, layer: &Layer, kv_row: f64, sink: &mut impl Sink) {
    let (t, tp) = (cx.tokens, cx.tp.ranks as f64);
    let context = layer.mean_context(cx.seq);
    let flops = t * (layer.core_flops_per_context() * context + layer.state_flops()) / tp;
    // A context-parallel ring runs one kernel per pair of chunks: on its own chunk a rank computes half of the
    // scores, on the others all, which keeps a kernel as busy as a causal one of twice the length.
    let (ranks, generation) = (cx.cp.ranks as f64, cx.cluster.gpu.generation);
    let chunk = cx.seq / ranks;
    let (own, others) = (cx.cal.attention_shares(generation, chunk), cx.cal.attention_shares(generation, 2.0 * chunk));
    let mix = |own: f64, others: f64| 1.0 / (1.0 / (ranks * own) + (1.0 - 1.0 / ranks) / others);
    let (forward, backward) = (mix(own.0, others.0), mix(own.1, others.1));
    // The measured heads are 192 wide for scores and 128 for values.
    let (width, half) = (layer.head_width(), cx.cal.attention_half_dim);
    let narrow = (saturation(width, half) / saturation(160.0, half)).min(1.0);
    let (forward, backward) = (forward * narrow, backward * narrow);
    let peak = cx.cluster.peak_flops(Precision::Bf16);
    let (mut fwd, mut bwd) = (flops / (peak * forward), 2.5 * flops / (peak * backward));
    let mut bytes = t * kv_row * 2.0;
    fwd = fwd.max(cx.memory_seconds(bytes));
    bwd = bwd.max(cx.memory_seconds(2.0 * bytes));
    if !cx.software.flash_attention {
        // Scores are written, masked, exponentiated and dropped in memory: about 11 bytes per score.
        let heads = match layer.attention {
            Attention::Gqa { heads, .. } | Attention::Mla { heads, .. } => heads as f64,
            Attention::Linear { .. } => 0.0,
        };
        bytes += 11.0 * t * cx.seq * heads / tp;
        let gemm = peak * cx.cal.gemm_share(cx.cluster.gpu.generation, Precision::Bf16) * 0.5;
        // The causal half is not skipped.
        fwd = 2.0 * flops / gemm + cx.memory_seconds(bytes);
        bwd = 2.0 * fwd;
    }
    sink.op(Op { name: "attention core", kind: Kind::Attention, backward: false, flops, bytes, seconds: fwd });
    sink.op(Op {
        name: "attention core",
        kind: Kind::Attention,
        backward: true,
        flops: 2.5 * flops,
        bytes: 2.0 * bytes,
        seconds: bwd,
    });
    if cx.cp.ranks > 1 && kv_row > 0.0 {
        // Every step's output is rescaled and added to the sum in 16 bits (two reads, one write); half of the steps
        // touch half of the rows only, as causal chunks are dealt out from both ends.
        let width = layer.core_flops_per_context() / 4.0 / tp;
        cx.stream("cp correction", t * width * 6.0 * 0.75 * ranks, sink);
        let bytes = t * cx.cp.ranks as f64 * kv_row;
        let steps = (cx.cp.ranks - 1) as f64 * cx.cal.cp_step_us * 1e-6;
        let ring = cx.collective(Collective::AllGather, cx.cp, bytes);
        let (name, kind) = ("cp ring", Kind::ContextComm);
        let exposed = |ring: f64, core: f64| (ring - cx.cal.cp_overlap * core).max(ring * (1.0 - cx.cal.cp_overlap));
        sink.op(Op { name, kind, backward: false, flops: 0.0, bytes, seconds: exposed(ring, fwd) + steps });
        sink.op(Op {
            name,
            kind,
            backward: true,
            flops: 0.0,
            bytes: 2.0 * bytes,
            seconds: exposed(2.0 * ring, bwd) + 2.0 * steps,
        });
    }
}

/// Output projection and loss of one micro-batch.
pub(crate) fn logits_ops(cx: &LayerCx<'_>, vocab: f64, sink: &mut impl Sink) {
    let columns = vocab / cx.tp.ranks as f64;
    cx.gemm("logits", cx.tokens, columns, cx.hidden, sink);
    // Fp32 softmax and loss over the vocabulary.
    cx.stream("loss", cx.tokens * columns * 4.0 * 2.0, sink);
}
