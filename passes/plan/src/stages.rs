//! Layers with their time and memory, and the pipeline stages they make up.
//!
//! Layer times depend on few sizes and are computed once for each of them ([`LayerSet`]);
//! stages with equal layers are equal ([`StagePlan`]).

use crate::{
    choice::Recompute,
    collective::Span,
    layer::{Kind, LayerCx, LayerTimes, Op, host_seconds, layer_ops, logits_ops},
    mapping::Mapping,
    memory,
    pipeline::{StageTimes, stage_layers},
    train::{TrainChoice, TrainCx},
};
use std::ops::Range;

/// Share of the element-wise work that selective recomputation repeats: norms and activations, not the
/// permutation of tokens.
const SELECTIVE_ELEMENTWISE: f64 = 0.4;

/// Times and sizes of every layer class for one `(tp, cp, ep, etp, mbs)`.
pub(crate) struct LayerSet {
    pub(crate) classes: Vec<ClassCost>,
    pub(crate) logits: LayerTimes,
    /// Tokens of a micro-batch on one context-parallel rank.
    pub(crate) tokens: f64,
}

pub(crate) struct ClassCost {
    pub(crate) times: LayerTimes,
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) selective: f64,
    pub(crate) activations: [f64; 3],
    pub(crate) working_set: f64,
    pub(crate) dense_parameters: f64,
    pub(crate) expert_parameters: f64,
}

/// Distinct stages of a pipeline: what the time and memory of a choice depend on.
pub(crate) struct StagePlan {
    pub(crate) stages: Vec<DistinctStage>,
}

pub(crate) struct DistinctStage {
    pub(crate) counts: Vec<f64>,
    /// Stages with these counts.
    pub(crate) times: f64,
    pub(crate) index: u64,
    pub(crate) is_last: bool,
}

impl TrainCx<'_> {
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
    pub(crate) fn stage_times(
        &self,
        set: &LayerSet,
        plan: &StagePlan,
        c: &TrainChoice,
    ) -> (StageTimes, [f64; 8], StageTimes) {
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
}

fn add_scaled(sum: &mut [f64; 8], part: &[f64; 8], factor: f64) {
    for (s, p) in sum.iter_mut().zip(part) {
        *s += factor * p;
    }
}
