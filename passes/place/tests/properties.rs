//! Properties of placements over random sizes and loads.

use moec_place::{Code, Input, Loads, Method, Options, Placement, Trace, lower_bound, place};
use proptest::prelude::*;

/// Nodes, GPUs per node, groups per node, experts per group, slots per GPU, loads of two layers.
fn grouped() -> impl Strategy<Value = (Options, Vec<Vec<f64>>)> {
    (1_usize..4, 1_usize..5, 1_usize..4, 1_usize..6)
        .prop_flat_map(|(nodes, gpus, groups, size)| {
            let experts = nodes * groups * size;
            let least = experts.div_ceil(nodes * gpus);
            let loads = prop::collection::vec(prop::collection::vec(0_u32..5000, experts), 1..3);
            (Just((nodes, gpus, groups)), least..least + 4, loads)
        })
        .prop_map(|((nodes, gpus, groups), per_gpu, loads)| {
            let options = Options {
                gpus: Some(nodes * gpus),
                nodes: Some(nodes),
                groups: Some(nodes * groups),
                replicas: Some(nodes * gpus * per_gpu),
                ..Options::default()
            };
            (options, loads.into_iter().map(|l| l.into_iter().map(f64::from).collect()).collect())
        })
}

/// Every expert placed, replica counts add up, tables agree, groups stay on a node.
fn check_slots(options: &Options, loads: &[Vec<f64>], placement: &Placement) -> Result<(), TestCaseError> {
    let slots = placement.replicated().unwrap();
    let (gpus, nodes) = (options.gpus.unwrap(), options.nodes.unwrap());
    let (replicas, groups) = (options.replicas.unwrap(), options.groups.unwrap());
    for (layer, load) in loads.iter().enumerate() {
        let phy = &slots.phy2log[layer];
        prop_assert_eq!(phy.len(), replicas);
        prop_assert!(slots.logcnt[layer].iter().all(|&c| c >= 1));
        prop_assert_eq!(slots.logcnt[layer].iter().sum::<usize>(), replicas);
        for (expert, places) in slots.log2phy[layer].iter().enumerate() {
            let named: Vec<usize> = places.iter().filter(|&&s| s >= 0).map(|&s| s as usize).collect();
            prop_assert_eq!(named.len(), slots.logcnt[layer][expert]);
            prop_assert!(named.iter().all(|&slot| phy[slot] == expert));
        }
        for group in 0..groups {
            let size = load.len() / groups;
            let of_group = |slot: &usize| phy[*slot] / size == group;
            let on: Vec<usize> = (0..replicas).filter(of_group).map(|s| s / (replicas / nodes)).collect();
            prop_assert!(on.windows(2).all(|w| w[0] == w[1]), "group {} on nodes {:?}", group, on);
        }
        prop_assert_eq!(slots.gpu_load[layer].len(), gpus);
        let total: f64 = slots.gpu_load[layer].iter().sum();
        prop_assert!((total - load.iter().sum::<f64>()).abs() < 1e-3);
        let peak = slots.gpu_load[layer].iter().copied().fold(0.0, f64::max);
        prop_assert!(peak >= lower_bound(load, gpus, replicas) - 1e-3);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn eplb_places_every_expert_and_keeps_groups_on_a_node((options, loads) in grouped()) {
        let input = Input::from(Loads::new(loads.clone()).unwrap());
        let found = place(&input, &Options { method: Some(Method::Eplb), ..options.clone() }).unwrap();
        check_slots(&options, &loads, &found)?;
    }

    #[test]
    fn balance_places_every_expert_and_keeps_groups_on_a_node((options, loads) in grouped()) {
        let input = Input::from(Loads::new(loads.clone()).unwrap());
        let found = place(&input, &Options { method: Some(Method::Balance), ..options.clone() }).unwrap();
        check_slots(&options, &loads, &found)?;
        prop_assert_eq!(&found, &place(&input, &Options { method: Some(Method::Balance), ..options }).unwrap());
    }

    #[test]
    fn least_loaded_computes_every_token_once(
        (gpus, load) in (1_usize..6, 1_usize..4)
            .prop_flat_map(|(g, per)| (Just(g), prop::collection::vec(0_u32..3000, g * per))),
        paper in any::<bool>(),
        min_tokens in 1_u64..600,
        alpha in 1.0_f64..2.0,
    ) {
        let tokens: Vec<u64> = load.iter().map(|&l| u64::from(l)).collect();
        let input = Input::from(Loads::new(vec![load.iter().map(|&l| f64::from(l)).collect()]).unwrap());
        let method = if paper { Method::LeastLoadedPaper } else { Method::LeastLoaded };
        let options = Options {
            method: Some(method), gpus: Some(gpus), alpha: Some(alpha), min_tokens: Some(min_tokens),
            ..Options::default()
        };
        let Placement::LeastLoaded(plan) = place(&input, &options).unwrap() else { unreachable!() };
        let mut on_gpu = vec![0; gpus];
        for (expert, &count) in tokens.iter().enumerate() {
            let mut next = 0;
            for &(gpu, first, end) in plan.assignments.get(&expert).map_or(&[][..], |ranges| &ranges[..]) {
                prop_assert_eq!(first, next);
                prop_assert!(end > first);
                on_gpu[gpu] += end - first;
                next = end;
            }
            prop_assert_eq!(next, count);
        }
        prop_assert_eq!(&on_gpu, &plan.gpu_load);
        if plan.native_max_over_mean < 1.0 + 1e-9 {
            prop_assert!(plan.weight_transfers.is_empty());
        }
    }

    #[test]
    fn a_trace_places_every_expert_once(
        (gpus, per_gpu, layers, k) in (1_usize..4, 1_usize..4, 1_usize..4, 1_usize..3),
        seed in any::<u64>(),
    ) {
        let experts = gpus * per_gpu;
        let k = k.min(experts);
        let mut state = seed;
        let mut next = || { state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); (state >> 33) as usize };
        let ids: Vec<i64> = (0..40 * layers).flat_map(|_| { let e = next(); (0..k).map(move |i| ((e + i) % experts) as i64).collect::<Vec<_>>() }).collect();
        let input = Input::from(Trace::from_ids(&ids, 40, layers, k, Some(experts)).unwrap());
        for method in [Method::Affinity, Method::MoeTuner, Method::Grouping] {
            let options = Options { method: Some(method), gpus: Some(gpus), time_limit_s: Some(0.05), ..Options::default() };
            let found = place(&input, &options).unwrap();
            let slots = found.replicated().unwrap();
            for layer in 0..layers {
                let mut placed = slots.phy2log[layer].clone();
                placed.sort_unstable();
                prop_assert!(placed.into_iter().eq(0..experts));
                prop_assert_eq!(slots.gpu_load[layer].iter().sum::<f64>(), (40 * k) as f64);
            }
        }
    }

    #[test]
    fn no_text_makes_the_readers_panic(text in "[\\[\\]{}\":,0-9a-z.\\- \n]{0,60}") {
        let _ = Input::from_json(&text);
        let _ = Input::from_jsonl(&text);
    }

    #[test]
    fn no_sizes_make_placement_panic(
        sizes in prop::collection::vec(prop::option::of(0_usize..9), 5),
        method in 0_usize..10,
        load in prop::collection::vec(prop::collection::vec(0.0_f64..9.0, 4), 1..3),
    ) {
        let options = Options {
            method: Some(Method::ALL[method]), gpus: sizes[0], nodes: sizes[1], replicas: sizes[2], groups: sizes[3],
            experts_per_gpu: sizes[4], time_limit_s: Some(0.01), ..Options::default()
        };
        if let Err(error) = place(&Input::from(Loads::new(load).unwrap()), &options) {
            prop_assert!(!error.help.is_empty());
            prop_assert!(Code::ALL.contains(&error.code));
        }
    }
}
