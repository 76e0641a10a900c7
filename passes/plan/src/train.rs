//! Time and memory of a training step for one choice.
//!
//! Layers and stages are computed once for each of few sizes (`stages`); what depends
//! on the pipeline, recomputation and sharding is added per choice, in well under a
//! microsecond, which makes searches cheap.

use crate::{
    calibration::{Software, TrainCalibration},
    choice::{Recompute, Request, Schedule, Sharding},
    cluster::Cluster,
    collective::{Collective, Span, collective_seconds},
    groups::Strides,
    mapping::{DEFAULT_ORDER, Mapping},
    memory::{self, FIXED_BUFFERS, FRAGMENTATION, LocalParameters, Memory, ShardWays},
    model::{Layer, ModelShape},
    pipeline::{StageTimes, bubble_seconds, in_flight, weight_copies},
    stages::{ClassCost, LayerSet, StagePlan},
};

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
    /// Forward and backward by [`Kind`](crate::layer::Kind), recomputation included.
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

/// A model, machine and job, ready to be evaluated at many choices.
pub(crate) struct TrainCx<'a> {
    pub(crate) model: &'a ModelShape,
    pub(crate) cluster: &'a Cluster,
    pub(crate) cal: &'a TrainCalibration,
    pub(crate) software: Software,
    pub(crate) request: &'a Request,
    pub(crate) layers: Vec<Layer>,
    pub(crate) class_of: Vec<usize>,
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
    pub(crate) fn strides(&self, m: &Mapping) -> Strides {
        let default = Strides::in_default_order(self.request.gpus, m);
        if self.default_order() {
            default
        } else {
            Strides::new(self.request.gpus, m, &self.request.order).unwrap_or(default)
        }
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
