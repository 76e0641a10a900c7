//! Physical slots and what follows from them: replica tables and GPU loads.

use crate::error::{Code, PlaceError};
use crate::loads::Loads;
use serde::Serialize;

/// Largest replica table (`layers x experts x most replicas`) that is written out.
const MAX_TABLE: usize = 1 << 28;

/// One layer's slots, GPU after GPU: the expert in each, and which replica of it that is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slots {
    pub(crate) expert: Vec<usize>,
    pub(crate) replica: Vec<usize>,
    /// Slots of each GPU where they differ; empty where all GPUs have the same number.
    pub(crate) per_gpu: Vec<usize>,
}

impl Slots {
    /// Slots from the experts of each GPU; replicas are numbered in slot order.
    pub(crate) fn from_gpus(gpus: &[Vec<usize>], experts: usize) -> Self {
        let mut seen = vec![0; experts];
        let mut slots = Slots::default();
        for &expert in gpus.iter().flatten() {
            slots.expert.push(expert);
            slots.replica.push(seen[expert]);
            seen[expert] += 1;
        }
        slots.per_gpu = gpus.iter().map(Vec::len).collect();
        slots
    }

    /// Sum of `share(expert)` over the slots of each of `gpus` GPUs.
    fn sums(&self, gpus: usize, share: impl Fn(usize) -> f64) -> Vec<f64> {
        let even = vec![self.expert.len() / gpus; gpus];
        let sizes = if self.per_gpu.is_empty() { &even } else { &self.per_gpu };
        let mut slots = self.expert.iter();
        let sum = |&size: &usize| slots.by_ref().take(size).map(|&expert| share(expert)).sum();
        sizes.iter().map(sum).collect()
    }
}

/// A placement with replicas, in the vocabulary of EPLB; serialises with these keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Replicated {
    /// `[layer][slot]`: the expert in each physical slot, GPU after GPU. All GPUs have the same number of slots,
    /// except with MoETuner, whose layers differ (its `expert_to_gpu` says where).
    pub phy2log: Vec<Vec<usize>>,
    /// `[layer][expert][replica]`: the slots of each expert, padded with -1.
    pub log2phy: Vec<Vec<Vec<i64>>>,
    /// `[layer][expert]`: number of replicas.
    pub logcnt: Vec<Vec<usize>>,
    /// `[layer][gpu]`: sum over the slots of load / replicas, rounded to 6 places.
    pub gpu_load: Vec<Vec<f64>>,
    /// `[layer]`: largest GPU load over the mean, rounded to 6 places.
    pub max_over_mean: Vec<f64>,
    /// The same for contiguous placement without replicas; `None` when experts do not divide over GPUs.
    pub contiguous_no_replica_max_over_mean: Option<Vec<f64>>,
}

impl Replicated {
    /// Tables and loads of `slots` (one entry per layer). Every expert has at least one slot.
    pub(crate) fn new(loads: &Loads, gpus: usize, slots: Vec<Slots>) -> Result<Self, PlaceError> {
        let experts = loads.experts();
        let logcnt: Vec<Vec<usize>> = slots
            .iter()
            .map(|layer| {
                let mut count = vec![0; experts];
                layer.expert.iter().for_each(|&expert| count[expert] += 1);
                count
            })
            .collect();
        let most = logcnt.iter().flatten().copied().max().unwrap_or(0);
        if slots.len().saturating_mul(experts).saturating_mul(most) > MAX_TABLE {
            return Err(PlaceError::new(
                Code::TooLarge,
                format!("the replica table needs {} x {experts} x {most} entries", slots.len()),
                "place fewer layers at once, or ask for fewer replicas",
            ));
        }
        let mut log2phy = vec![vec![vec![-1_i64; most]; experts]; slots.len()];
        for (table, layer) in log2phy.iter_mut().zip(&slots) {
            for (slot, (&expert, &replica)) in layer.expert.iter().zip(&layer.replica).enumerate() {
                table[expert][replica] = slot as i64;
            }
        }
        let gpu_load: Vec<Vec<f64>> = (loads.layers().iter().zip(&slots).zip(&logcnt))
            .map(|((load, layer), count)| layer.sums(gpus, |expert| load[expert] / count[expert] as f64))
            .collect();
        Ok(Replicated {
            max_over_mean: gpu_load.iter().map(|layer| round6(max_over_mean(layer))).collect(),
            gpu_load: gpu_load.iter().map(|layer| layer.iter().map(|&load| round6(load)).collect()).collect(),
            contiguous_no_replica_max_over_mean: contiguous(loads, gpus),
            phy2log: slots.into_iter().map(|layer| layer.expert).collect(),
            log2phy,
            logcnt,
        })
    }
}

/// Largest over mean; 1 when there is no load at all.
pub fn max_over_mean(loads: &[f64]) -> f64 {
    let total: f64 = loads.iter().sum();
    if total <= 0.0 {
        return 1.0;
    }
    let max = loads.iter().copied().fold(0.0, f64::max);
    max * loads.len() as f64 / total
}

/// Rounds to six decimal places, as the published vectors are.
pub(crate) fn round6(value: f64) -> f64 {
    format!("{value:.6}").parse().unwrap_or(value)
}

fn contiguous(loads: &Loads, gpus: usize) -> Option<Vec<f64>> {
    if !loads.experts().is_multiple_of(gpus) {
        return None;
    }
    let per_gpu = loads.experts() / gpus;
    let layer = |load: &Vec<f64>| {
        let sums: Vec<f64> = load.chunks(per_gpu).map(|chunk| chunk.iter().sum()).collect();
        round6(max_over_mean(&sums))
    };
    Some(loads.layers().iter().map(layer).collect())
}
