//! One expert per rank, the other ranks hold replicas (CloudMatrix384, arXiv 2506.12708, EP320).
//!
//! Ranks hold a single slot: first every expert once, in order, then replicas of the experts with the largest
//! load per replica. Shared experts, which every token uses, are experts like others to this plan: give their
//! load as further columns.

use crate::balance::water_fill;
use crate::layout::Slots;

/// Places one layer on `ranks` ranks; needs `ranks >= load.len()`.
pub(crate) fn place_layer(load: &[f64], ranks: usize) -> Slots {
    let count = water_fill(load, ranks);
    let mut slots = Slots { expert: (0..load.len()).collect(), replica: vec![0; load.len()], per_gpu: Vec::new() };
    for (expert, &replicas) in count.iter().enumerate() {
        for replica in 1..replicas {
            slots.expert.push(expert);
            slots.replica.push(replica);
        }
    }
    slots
}
