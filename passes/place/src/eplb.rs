//! EPLB: expert replication and packing, hierarchical or global.
//!
//! Follows deepseek-ai/EPLB: pack expert groups onto nodes, replicate the most loaded experts of each node,
//! pack the replicas onto the node's GPUs. Arithmetic is `f32`, as published, so that placements agree slot by
//! slot. Ties go to the lowest pack and to the lowest expert; equal items to pack come in the order of the
//! published sort ([`crate::introsort`]).

use crate::introsort::falling_order;
use crate::layout::Slots;
use crate::options::Cluster;

/// Position of each item: its pack and its rank inside the pack.
struct Packing {
    pack: Vec<usize>,
    rank: Vec<usize>,
}

/// Places one layer. `cluster` has passed [`Cluster::hierarchy`]: with one node this is the global policy.
pub(crate) fn place_layer(load: &[f64], cluster: &Cluster) -> Slots {
    let load: Vec<f32> = load.iter().map(|&l| l as f32).collect();
    let groups_per_node = cluster.groups / cluster.nodes;
    let group_size = load.len() / cluster.groups;
    let group_load: Vec<f32> = load.chunks(group_size).map(|group| group.iter().sum()).collect();
    let groups = balanced_packing(&group_load, cluster.nodes);

    // Experts in node order: each group moves as a block to its place on its node.
    let mut node_order = vec![0; load.len()];
    for (expert, _) in load.iter().enumerate() {
        let group = expert / group_size;
        let place = groups.pack[group] * groups_per_node + groups.rank[group];
        node_order[place * group_size + expert % group_size] = expert;
    }

    let mut slots = Slots::default();
    for experts in node_order.chunks(load.len() / cluster.nodes) {
        let loads: Vec<f32> = experts.iter().map(|&expert| load[expert]).collect();
        let node = place_node(&loads, cluster.slots / cluster.nodes, cluster.gpus / cluster.nodes);
        slots.expert.extend(node.expert.iter().map(|&local| experts[local]));
        slots.replica.extend(node.replica);
    }
    slots
}

/// Replicates the experts of one node into `n_slots` and packs them onto `n_gpus`; ids are local to the node.
fn place_node(load: &[f32], n_slots: usize, n_gpus: usize) -> Slots {
    let (expert, replica, count) = replicate(load, n_slots);
    let share: Vec<f32> = expert.iter().map(|&e| load[e] / count[e] as f32).collect();
    let packing = balanced_packing(&share, n_gpus);
    let per_gpu = n_slots / n_gpus;
    let mut slots = Slots { expert: vec![0; n_slots], replica: vec![0; n_slots], per_gpu: Vec::new() };
    for slot in 0..n_slots {
        let place = packing.pack[slot] * per_gpu + packing.rank[slot];
        slots.expert[place] = expert[slot];
        slots.replica[place] = replica[slot];
    }
    slots
}

/// One slot per expert, then each further slot to the expert with the largest load per replica.
fn replicate(load: &[f32], n_slots: usize) -> (Vec<usize>, Vec<usize>, Vec<usize>) {
    let mut expert: Vec<usize> = (0..load.len()).collect();
    let mut replica = vec![0; load.len()];
    let mut count = vec![1_usize; load.len()];
    while expert.len() < n_slots {
        let mut hottest = 0;
        for e in 1..load.len() {
            if load[e] / count[e] as f32 > load[hottest] / count[hottest] as f32 {
                hottest = e;
            }
        }
        expert.push(hottest);
        replica.push(count[hottest]);
        count[hottest] += 1;
    }
    (expert, replica, count)
}

/// Items by falling weight, each to the lightest pack that still has room.
fn balanced_packing(weight: &[f32], n_packs: usize) -> Packing {
    let room = weight.len() / n_packs;
    let mut packing = Packing { pack: (0..weight.len()).collect(), rank: vec![0; weight.len()] };
    if room == 1 {
        return packing;
    }
    let mut pack_weight = vec![0.0_f32; n_packs];
    let mut pack_items = vec![0; n_packs];
    for item in falling_order(weight) {
        let open = (0..n_packs).filter(|&pack| pack_items[pack] < room);
        let lightest = open.min_by(|&a, &b| pack_weight[a].total_cmp(&pack_weight[b]));
        // There are exactly `room * n_packs` items, so a pack is always open.
        let Some(pack) = lightest else { break };
        packing.pack[item] = pack;
        packing.rank[item] = pack_items[pack];
        pack_weight[pack] += weight[item];
        pack_items[pack] += 1;
    }
    packing
}
