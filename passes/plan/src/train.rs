//! Time and memory of a training step for one choice.
//!
//! Layer times depend on few sizes and are computed once for each of them
//! (`LayerSet`); what depends on the pipeline, recomputation and sharding is
//! added per choice, in well under a microsecond, which makes searches cheap.

use crate::{
    calibration::{Software, TrainCalibration},
    choice::{Recompute, Request, Schedule, Sharding},
    cluster::Cluster,
    collective::{Collective, Span, collective_seconds},
    groups::Strides,
    layer::{Kind, LayerCx, LayerTimes, Op, host_seconds, layer_ops, logits_ops},
    mapping::{DEFAULT_ORDER, Mapping},
    memory::{self, FIXED_BUFFERS, FRAGMENTATION, LocalParameters, Memory, ShardWays},
    model::{Layer, ModelShape},
    pipeline::{StageTimes, bubble_seconds, in_flight, stage_layers, weight_copies},
};
use std::ops::Range;

/// Share of the element-wise work that selective recomputation repeats: norms and activations, not the
/// permutation of tokens.
const SELECTIVE_ELEMENTWISE: f64 = 0.4;

/// One complete choice of a training search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrainChoice {
    /// The mapping.
    pub mapping: Mapping,
    /// Data-parallel ways of attention.
    pub dp: u64,
    /// Data-parallel ways of experts.
    pub edp: u64,
    /// Sequences per micro-batch.
    pub mbs: u64,
    /// Virtual stages per pipeline rank.
    pub vpp: u64,
    /// What is recomputed.
    pub recompute: Recompute,
    /// Eighths of the layers that full recomputation covers, 8 for all, rounded up to whole layers of a chunk:
    /// Megatron's `recompute-num-layers` counts the layers of every virtual stage.
    pub recompute_eighths: u64,
    /// How state is sharded.
    pub sharding: Sharding,
}

/// Seconds of a step by cause, on the slowest stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTimes {
    /// Forward and backward by [`Kind`], recomputation included.
    pub kinds: [f64; 8],
    /// Pipeline idle time.
    pub bubble: f64,
    /// Exposed pipeline transfers.
    pub pipeline_comm: f64,
    /// Exposed gradient reduction and parameter gathering.
    pub data_comm: f64,
    /// Optimizer and fixed time.
    pub optimizer: f64,
    /// Stragglers.
    pub straggler: f64,
}

impl StepTimes {
    /// Seconds of the step.
    pub fn total(&self) -> f64 {
        self.kinds.iter().sum::<f64>()
            + self.bubble
            + self.pipeline_comm
            + self.data_comm
            + self.optimizer
            + self.straggler
    }
}

/// What a choice costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainEstimate {
    /// Time by cause.
    pub times: StepTimes,
    /// Memory of the fullest GPU.
    pub memory: Memory,
    /// Forward, backward of the slowest stage per micro-batch.
    pub stage_forward: f64,
    /// Backward of the slowest stage per micro-batch, with recomputation.
    pub stage_backward: f64,
    /// Micro-batches per step.
    pub micro_batches: u64,
}

/// Times and sizes of every layer class for one `(tp, cp, ep, etp, mbs)`.
pub(crate) struct LayerSet {
    classes: Vec<ClassCost>,
    logits: LayerTimes,
    /// Tokens of a micro-batch on one context-parallel rank.
    tokens: f64,
}

struct ClassCost {
    times: LayerTimes,
    forward: f64,
    backward: f64,
    selective: f64,
    activations: [f64; 3],
    working_set: f64,
    dense_parameters: f64,
    expert_parameters: f64,
}

/// Distinct stages of a pipeline: what the time and memory of a choice depend on.
pub(crate) struct StagePlan {
    stages: Vec<DistinctStage>,
}

struct DistinctStage {
    counts: Vec<f64>,
    /// Stages with these counts.
    times: f64,
    index: u64,
    is_last: bool,
}

/// A model, machine and job, ready to be evaluated at many choices.
pub(crate) struct TrainCx<'a> {
    pub(crate) model: &'a ModelShape,
    pub(crate) cluster: &'a Cluster,
    pub(crate) cal: &'a TrainCalibration,
    pub(crate) software: Software,
    pub(crate) request: &'a Request,
    layers: Vec<Layer>,
    class_of: Vec<usize>,
    model_flops_per_token: f64,
}

impl<'a> TrainCx<'a> {
    pub(crate) fn new(
        model: &'a ModelShape,
        cluster: &'a Cluster,
        cal: &'a TrainCalibration,
        software: Software,
        request: &'a Request,
    ) -> Self {
        let layers: Vec<Layer> = model.classes().iter().map(|c| c.layer).collect();
        let index = |layer: &Layer| layers.iter().position(|l| l == layer).unwrap_or(0);
        let mut class_of: Vec<usize> = model.layers.iter().map(index).collect();
        if let Some(&last) = class_of.last() {
            class_of.extend((0..model.mtp_layers).map(|_| last));
        }
        let model_flops_per_token = model.training_flops_per_token(request.seq);
        Self { model, cluster, cal, software, request, layers, class_of, model_flops_per_token }
    }

    /// Layers that the pipeline spreads, prediction layers included.
    pub(crate) fn depth(&self) -> u64 {
        self.class_of.len() as u64
    }

    /// Model operations per token of a training step.
    pub(crate) fn flops_per_token(&self) -> f64 {
        self.model_flops_per_token
    }

    /// Whether ranks are in the default order, in which layer times do not depend on the pipeline.
    pub(crate) fn default_order(&self) -> bool {
        self.request.order == DEFAULT_ORDER
    }

    /// Rank strides; a mapping that the order refuses never gets here.
    fn strides(&self, m: &Mapping) -> Strides {
        let default = Strides::in_default_order(self.request.gpus, m);
        if self.default_order() {
            default
        } else {
            Strides::new(self.request.gpus, m, &self.request.order).unwrap_or(default)
        }
    }

    fn layer_cx(&self, m: &Mapping, mbs: u64, experts: u64) -> LayerCx<'_> {
        let strides = self.strides(m);
        let domain = self.cluster.gpus_per_domain;
        let imbalance = self.request.routing.imbalance(experts, m.ep, 0.0);
        LayerCx {
            cluster: self.cluster,
            cal: self.cal,
            software: self.software,
            precision: self.request.precision,
            hidden: self.model.hidden as f64,
            tokens: mbs as f64 * self.request.seq as f64 / m.cp as f64,
            seq: self.request.seq as f64,
            tp: Span::new(m.tp, strides.tp, domain),
            cp: Span::new(m.cp, strides.cp, domain),
            ep: Span::new(m.ep, strides.ep, domain),
            etp: Span::new(m.etp, strides.etp, domain),
            dropless: self.request.capacity_factor.is_none(),
            unfused_experts: self.model.unfused_experts,
            imbalance: self.request.capacity_factor.map_or(imbalance, |cf| imbalance.min(cf.max(1.0))),
        }
    }

    /// Share of the attention core that selective recomputation repeats: all of it where scores are
    /// kept in memory, none where the kernel keeps no scores.
    fn selective_attention(&self) -> f64 {
        if self.software.flash_attention { 0.0 } else { 1.0 }
    }

    pub(crate) fn layer_set(&self, m: &Mapping, mbs: u64) -> LayerSet {
        let hidden = self.model.hidden;
        let (tp, etp) = (m.tp as f64, m.etp as f64);
        let classes = self.layers.iter().map(|layer| {
            let cx = self.layer_cx(m, mbs, layer.experts());
            let mut times = LayerTimes::default();
            layer_ops(&cx, layer, &mut times);
            let (forward, backward) = host_seconds(&cx, layer, &times);
            times.forward[Kind::Host as usize] += forward;
            times.backward[Kind::Host as usize] += backward;
            let kept = memory::ActivationCx {
                hidden: hidden as f64,
                tokens: cx.tokens,
                tp,
                etp,
                imbalance: cx.imbalance,
                fine_recompute: self.software.fine_recompute,
                early_weighting: self.software.early_weighting,
            };
            let act = |recompute| memory::layer_activations(layer, &kept, recompute);
            ClassCost {
                times,
                forward: times.forward_total(),
                backward: times.backward_total(),
                selective: self.selective_attention() * times.forward[Kind::Attention as usize]
                    + SELECTIVE_ELEMENTWISE * times.forward[Kind::Elementwise as usize],
                activations: Recompute::ALL.map(act),
                working_set: memory::working_set(layer, &kept),
                dense_parameters: (layer.attention_parameters(hidden) + layer.ffn_parameters(hidden)
                    - layer.expert_parameters(hidden))
                    / tp,
                expert_parameters: layer.expert_parameters(hidden) / (m.ep * m.etp) as f64,
            }
        });
        let classes = classes.collect();
        let cx = self.layer_cx(m, mbs, 0);
        let mut logits = LayerTimes::default();
        logits_ops(&cx, self.model.vocab as f64, &mut logits);
        LayerSet { classes, logits, tokens: cx.tokens }
    }

    /// All ops of one micro-batch on one rank, one entry per layer class, for reports.
    pub(crate) fn ops(&self, m: &Mapping, mbs: u64) -> Vec<(u64, Vec<Op>)> {
        let mut all: Vec<(u64, Vec<Op>)> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let mut ops = Vec::new();
            layer_ops(&self.layer_cx(m, mbs, layer.experts()), layer, &mut ops);
            all.push((self.class_of.iter().filter(|&&c| c == index).count() as u64, ops));
        }
        let mut ops = Vec::new();
        logits_ops(&self.layer_cx(m, mbs, 0), self.model.vocab as f64, &mut ops);
        all.push((1 + self.model.mtp_layers, ops));
        all
    }

    pub(crate) fn stage_plan(&self, pp: u64, vpp: u64) -> StagePlan {
        let mut stages: Vec<DistinctStage> = Vec::new();
        let split = stage_layers(self.class_of.len(), pp, vpp);
        for (index, chunks) in split.iter().enumerate() {
            let counts = self.layer_counts(chunks);
            let is_last = index + 1 == split.len();
            match stages.iter_mut().skip(1).find(|s| s.counts == counts) {
                Some(same) if !is_last => same.times += 1.0,
                _ => stages.push(DistinctStage { counts, times: 1.0, index: index as u64, is_last }),
            }
        }
        StagePlan { stages }
    }

    /// Seconds below which no choice with this layer set can be: compute and exposed exchange without idle time.
    pub(crate) fn lower_bound(&self, set: &LayerSet, pp: u64, micro_batches: u64) -> f64 {
        let counts = self.class_of.iter().fold(vec![0.0; self.layers.len()], |mut counts, &c| {
            counts[c] += 1.0;
            counts
        });
        let layers: f64 = set.classes.iter().zip(counts).map(|(c, n)| n * (c.forward + c.backward)).sum();
        layers / pp as f64 * micro_batches as f64
    }

    /// Share of the layers that full recomputation covers.
    pub(crate) fn recomputed_share(&self, c: &TrainChoice) -> f64 {
        let chunk = self.depth().div_ceil(c.mapping.pp * c.vpp).max(1);
        (c.recompute_eighths * chunk).div_ceil(8) as f64 / chunk as f64
    }

    /// Times of one stage for one micro-batch, by schedule part and by kind; `counts` are its layers by class.
    fn stage(&self, set: &LayerSet, counts: &[f64], is_last: bool, c: &TrainChoice) -> (StageTimes, [f64; 8]) {
        let recomputed = self.recomputed_share(c);
        let mut kinds = [0.0; 8];
        let mut t = StageTimes::default();
        for (class, count) in set.classes.iter().zip(counts) {
            let products = [Kind::Gemm, Kind::Experts].map(|k| class.times.backward[k as usize]);
            add_scaled(&mut kinds, &class.times.forward, *count);
            add_scaled(&mut kinds, &class.times.backward, *count);
            t.forward += count * class.forward;
            t.backward += count * class.backward;
            t.weight_gradient += 0.5 * count * products.iter().sum::<f64>();
            match c.recompute {
                Recompute::None => {}
                Recompute::Selective => {
                    let [attention, elementwise] = [Kind::Attention, Kind::Elementwise].map(|k| k as usize);
                    kinds[attention] += self.selective_attention() * count * class.times.forward[attention];
                    kinds[elementwise] += SELECTIVE_ELEMENTWISE * count * class.times.forward[elementwise];
                    t.backward += count * class.selective;
                }
                Recompute::Full => {
                    add_scaled(&mut kinds, &class.times.forward, recomputed * count);
                    t.backward += recomputed * count * class.forward;
                }
            }
        }
        if is_last {
            let logits_times = 1.0 + self.model.mtp_layers as f64;
            add_scaled(&mut kinds, &set.logits.forward, logits_times);
            add_scaled(&mut kinds, &set.logits.backward, logits_times);
            t.forward += logits_times * set.logits.forward_total();
            t.backward += logits_times * set.logits.backward_total();
        }
        (t, kinds)
    }

    /// Times of every stage for one micro-batch, for reports.
    pub(crate) fn all_stages(&self, set: &LayerSet, c: &TrainChoice) -> Vec<StageTimes> {
        let split = stage_layers(self.class_of.len(), c.mapping.pp, c.vpp);
        let times = split
            .iter()
            .enumerate()
            .map(|(index, chunks)| self.stage(set, &self.layer_counts(chunks), index + 1 == split.len(), c).0);
        times.collect()
    }

    /// Layers of a stage by class.
    fn layer_counts(&self, chunks: &[Range<usize>]) -> Vec<f64> {
        let mut counts = vec![0.0; self.layers.len()];
        for layer in chunks.iter().flat_map(Range::clone) {
            counts[self.class_of[layer]] += 1.0;
        }
        counts
    }

    /// Times for one micro-batch, by schedule part: of the slowest stage, with its seconds by kind, and of the
    /// others in the mean.
    fn stage_times(&self, set: &LayerSet, plan: &StagePlan, c: &TrainChoice) -> (StageTimes, [f64; 8], StageTimes) {
        let mut worst = (StageTimes::default(), [0.0; 8]);
        let mut all = StageTimes::default();
        for stage in &plan.stages {
            let (t, kinds) = self.stage(set, &stage.counts, stage.is_last, c);
            all.forward += stage.times * t.forward;
            all.backward += stage.times * t.backward;
            all.weight_gradient += stage.times * t.weight_gradient;
            if t.total() > worst.0.total() {
                worst = (t, kinds);
            }
        }
        let (slowest, kinds) = worst;
        let others = (c.mapping.pp.max(2) - 1) as f64;
        let mean = |sum: f64, slowest: f64| ((sum - slowest) / others).max(0.0);
        let others = StageTimes {
            forward: mean(all.forward, slowest.forward),
            backward: mean(all.backward, slowest.backward),
            weight_gradient: mean(all.weight_gradient, slowest.weight_gradient),
        };
        (slowest, kinds, others)
    }

    pub(crate) fn estimate(&self, set: &LayerSet, plan: &StagePlan, c: &TrainChoice) -> TrainEstimate {
        let m = &c.mapping;
        let micro_batches = (self.request.global_batch / (c.dp * c.mbs)).max(1);
        let n = micro_batches as f64;
        let (stage, mut kinds, others) = self.stage_times(set, plan, c);
        kinds.iter_mut().for_each(|k| *k *= n);
        let bubble = bubble_seconds(self.request.schedule, m.pp, c.vpp, others);
        let mut times = StepTimes { kinds, bubble, ..StepTimes::default() };
        times.pipeline_comm = self.pipeline_seconds(set, c) * n;
        let parameters = self.local_parameters(set, plan, c);
        let busy = (stage.forward + stage.backward) * n;
        times.data_comm = self.data_seconds(&parameters, c, n, stage);
        let shards = parameters.dense / (c.dp * m.cp) as f64 + parameters.experts / c.edp as f64;
        // The optimizer reads and writes fp32 weights and moments, reads gradients, writes bf16 weights.
        times.optimizer = 30.0 * shards / (self.cluster.hbm() * self.cal.memory) + self.cal.step_ms * 1e-3;
        let doublings = (self.request.gpus as f64 / self.cluster.gpus_per_domain as f64).log2().max(0.0);
        times.straggler = self.cal.straggler * doublings * (busy + times.bubble);
        TrainEstimate {
            times,
            memory: self.memory(set, plan, c, &parameters, micro_batches),
            stage_forward: stage.forward,
            stage_backward: stage.backward,
            micro_batches,
        }
    }

    /// Exposed seconds of stage-to-stage transfers per micro-batch, both directions.
    fn pipeline_seconds(&self, set: &LayerSet, c: &TrainChoice) -> f64 {
        let m = &c.mapping;
        if m.pp <= 1 {
            return 0.0;
        }
        let bytes = set.tokens / m.tp as f64 * self.model.hidden as f64 * 2.0;
        let local = self.strides(m).pp < self.cluster.gpus_per_domain;
        let (rate, latency) = if local {
            (self.cluster.gpu.nvlink_gbps * 0.75, self.cluster.latency_us.nvlink)
        } else {
            (self.cluster.nic_gbps * self.cal.links.network, self.cluster.latency_us.network)
        };
        let beside = c.vpp > 1 && self.software.pipeline_overlap || self.request.schedule == Schedule::DualPipe;
        let exposed = if beside { self.cal.pp_exposed } else { 1.0 };
        2.0 * exposed * c.vpp as f64 * (bytes / (rate * 1e9) + latency * 1e-6)
    }

    fn local_parameters(&self, set: &LayerSet, plan: &StagePlan, c: &TrainChoice) -> LocalParameters {
        let embedding = self.model.hidden as f64 * self.model.vocab as f64 / c.mapping.tp as f64;
        let mut largest = LocalParameters::default();
        for stage in &plan.stages {
            let mut p = LocalParameters::default();
            for (class, count) in set.classes.iter().zip(&stage.counts) {
                p.dense += count * class.dense_parameters;
                p.experts += count * class.expert_parameters;
                p.largest_layer = p.largest_layer.max(class.dense_parameters + class.expert_parameters);
            }
            p.dense += embedding
                * (f64::from(u8::from(stage.index == 0))
                    + f64::from(u8::from(stage.is_last && !(self.model.tied_embeddings && c.mapping.pp == 1))));
            if p.dense + p.experts > largest.dense + largest.experts {
                largest = p;
            }
        }
        largest
    }

    /// Exposed data-parallel traffic of a step. Gradients are reduced while the last micro-batch runs backward, weights
    /// gathered while the first one runs forward: no more can be hidden than these passes of the slowest stage last.
    fn data_seconds(&self, p: &LocalParameters, c: &TrainChoice, micro_batches: f64, stage: StageTimes) -> f64 {
        let m = &c.mapping;
        let domain = self.cluster.gpus_per_domain;
        let strides = self.strides(m);
        let nearest = if m.cp > 1 { strides.cp.min(strides.dp) } else { strides.dp };
        let dense = Span::new(c.dp * m.cp, nearest, domain);
        let experts = Span::new(c.edp, strides.edp, domain);
        let run = |op, span, bytes| collective_seconds(self.cluster, &self.cal.links, op, span, bytes);
        let gradient = match c.sharding {
            Sharding::None | Sharding::Optimizer => 4.0,
            Sharding::Full => self.cal.fsdp_gradient_bytes,
        };
        let gather =
            run(Collective::AllGather, dense, 2.0 * p.dense) + run(Collective::AllGather, experts, 2.0 * p.experts);
        let scatter = run(Collective::ReduceScatter, dense, gradient * p.dense)
            + run(Collective::ReduceScatter, experts, gradient * p.experts);
        match c.sharding {
            // An all-reduce is a reduce-scatter and an all-gather of fp32 gradients.
            Sharding::None => 2.0 * scatter - self.cal.dp_overlap * (2.0 * scatter).min(stage.backward),
            Sharding::Optimizer => {
                gather + scatter - self.cal.dp_overlap * (gather.min(stage.forward) + scatter.min(stage.backward))
            }
            // Layers are gathered in the forward and in the backward pass of every micro-batch.
            Sharding::Full => {
                let comm = (2.0 * gather + scatter) * micro_batches;
                comm - self.cal.fsdp_overlap * comm.min(stage.total() * micro_batches)
            }
        }
    }

    fn memory(
        &self,
        set: &LayerSet,
        plan: &StagePlan,
        c: &TrainChoice,
        p: &LocalParameters,
        micro_batches: u64,
    ) -> Memory {
        let m = &c.mapping;
        let schedule = self.request.schedule;
        let ways = ShardWays { dense: (c.dp * m.cp) as f64, dense_dp: c.dp as f64, experts: c.edp as f64 };
        let mut memory = memory::state(p, c.sharding, ways, weight_copies(schedule));
        let share = self.recomputed_share(c);
        let (mut activations, mut buffers) = (0.0_f64, 0.0_f64);
        for stage in &plan.stages {
            let per_layer = |class: &ClassCost| match c.recompute {
                Recompute::None | Recompute::Selective => class.activations[c.recompute as usize],
                Recompute::Full => {
                    share * class.activations[Recompute::Full as usize]
                        + (1.0 - share) * class.activations[Recompute::None as usize]
                }
            };
            let kept: f64 = set.classes.iter().zip(&stage.counts).map(|(class, n)| n * per_layer(class)).sum();
            activations = activations.max(kept * in_flight(schedule, m.pp, c.vpp, micro_batches, stage.index));
            if c.recompute == Recompute::Full {
                let working = set
                    .classes
                    .iter()
                    .zip(&stage.counts)
                    .filter(|(_, n)| **n > 0.0)
                    .map(|(class, _)| class.working_set);
                buffers = buffers.max(working.fold(0.0, f64::max));
            }
            if stage.is_last {
                // Bf16 logits and their fp32 gradient.
                buffers = buffers.max(set.tokens * self.model.vocab as f64 / m.tp as f64 * 6.0);
            }
        }
        memory.activations = activations;
        memory.buffers += buffers + FIXED_BUFFERS;
        memory.fragmentation = FRAGMENTATION * (memory.activations + memory.buffers);
        memory
    }
}

fn add_scaled(sum: &mut [f64; 8], part: &[f64; 8], factor: f64) {
    for (s, p) in sum.iter_mut().zip(part) {
        *s += factor * p;
    }
}
