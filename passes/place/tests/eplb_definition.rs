//! EPLB against its definition, written out plainly, on odd sizes without ties.

use moec_place::{Input, Loads, Method, Options, place};

/// Pack and position of every item: heaviest first, each to the lightest pack with room, the lowest on a tie.
fn packed(weight: &[f32], packs: usize) -> Vec<(usize, usize)> {
    let room = weight.len() / packs;
    if room == 1 {
        return (0..weight.len()).map(|item| (item, 0)).collect();
    }
    let mut order: Vec<usize> = (0..weight.len()).collect();
    order.sort_by(|a, b| weight[*b].total_cmp(&weight[*a]));
    let (mut load, mut count) = (vec![0.0_f32; packs], vec![0; packs]);
    let mut at = vec![(0, 0); weight.len()];
    for item in order {
        let open = (0..packs).filter(|&p| count[p] < room);
        let pack = open.min_by(|&a, &b| load[a].total_cmp(&load[b]).then(a.cmp(&b))).unwrap();
        at[item] = (pack, count[pack]);
        load[pack] += weight[item];
        count[pack] += 1;
    }
    at
}

/// Expert in every slot.
fn by_definition(weight: &[f32], slots: usize, groups: usize, nodes: usize, gpus: usize) -> Vec<usize> {
    let (groups, nodes) = if groups.is_multiple_of(nodes) { (groups, nodes) } else { (1, 1) };
    let experts = weight.len();
    let (size, per_node) = (experts / groups, experts / nodes);
    let of_group: Vec<f32> = weight.chunks(size).map(|c| c.iter().sum()).collect();
    // Experts in the order of their nodes.
    let mut expert_at = vec![0; experts];
    for (group, (node, place)) in packed(&of_group, nodes).into_iter().enumerate() {
        for i in 0..size {
            expert_at[(node * (groups / nodes) + place) * size + i] = group * size + i;
        }
    }
    let mut all = Vec::new();
    for node in 0..nodes {
        let own = &expert_at[node * per_node..(node + 1) * per_node];
        let mut copies = vec![1.0_f32; per_node];
        let mut slot: Vec<usize> = (0..per_node).collect();
        for _ in per_node..slots / nodes {
            let each = |e: usize| weight[own[e]] / copies[e];
            let most = (0..per_node).rev().max_by(|&a, &b| each(a).total_cmp(&each(b))).unwrap();
            copies[most] += 1.0;
            slot.push(most);
        }
        let load: Vec<f32> = slot.iter().map(|&e| weight[own[e]] / copies[e]).collect();
        let (local_gpus, per_gpu) = (gpus / nodes, slots / gpus);
        let mut placed = vec![0; slots / nodes];
        for (item, (gpu, place)) in packed(&load, local_gpus).into_iter().enumerate() {
            placed[gpu * per_gpu + place] = own[slot[item]];
        }
        all.extend(placed);
    }
    all
}

#[test]
fn every_slot_holds_the_expert_of_the_definition() {
    let mut state = 5_u64;
    let mut next = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    for _ in 0..600 {
        let (nodes, local_gpus, groups_per_node, size) = (1 + next(4), 1 + next(5), 1 + next(3), 1 + next(6));
        let (gpus, experts) = (nodes * local_gpus, nodes * groups_per_node * size);
        let slots = gpus * (experts.div_ceil(gpus) + next(4));
        let global = next(3) == 0 && nodes > 1;
        let groups = if global { 1 } else { nodes * groups_per_node };
        let load: Vec<f64> = (0..experts).map(|_| (1 + next(1 << 20)) as f64).collect();
        let weight: Vec<f32> = load.iter().map(|&l| l as f32).collect();
        let options = Options {
            method: Some(Method::Eplb),
            gpus: Some(gpus),
            nodes: Some(nodes),
            groups: Some(groups),
            replicas: Some(slots),
            ..Options::default()
        };
        let found = place(&Input::from(Loads::new(vec![load]).unwrap()), &options).unwrap();
        assert_eq!(
            found.replicated().unwrap().phy2log[0],
            by_definition(&weight, slots, groups, nodes, gpus),
            "{experts} experts, {slots} slots, {groups} groups, {nodes} nodes, {gpus} GPUs"
        );
    }
}
