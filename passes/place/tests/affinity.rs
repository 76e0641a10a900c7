//! Placement from traces: planted affinity, exactness on small cases, grouping, move plans, metrics.

use moec_place::{
    Input, Layout, Method, Options, Placement, Replicated, Trace, metrics, place, plan_moves, plan_moves_relabeled,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Planted {
    trace: Trace,
    /// `[layer][expert]`: the hidden group.
    group: Vec<Vec<usize>>,
    /// Share of transitions that stay in their group.
    share: f64,
}

/// Tokens that stay in their group of experts from layer to layer with probability `stay`.
fn planted(seed: u64, (tokens, layers): (usize, usize), (experts, groups): (usize, usize), stay: f64) -> Planted {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let size = experts / groups;
    let group: Vec<Vec<usize>> = (0..layers)
        .map(|_| {
            let mut of: Vec<usize> = (0..experts).map(|e| e / size).collect();
            for i in (1..experts).rev() {
                of.swap(i, rng.random_range(0..=i));
            }
            of
        })
        .collect();
    let (mut ids, mut kept) = (Vec::new(), 0);
    for _ in 0..tokens {
        let mut at = rng.random_range(0..groups);
        for (layer, of) in group.iter().enumerate() {
            let stays = rng.random::<f64>() < stay;
            if layer > 0 && !stays {
                at = (at + rng.random_range(1..groups)) % groups;
            }
            kept += usize::from(layer > 0 && stays);
            let nth = rng.random_range(0..size);
            ids.push((0..experts).filter(|&e| of[e] == at).nth(nth).unwrap() as i64);
        }
    }
    Planted {
        trace: Trace::from_ids(&ids, tokens, layers, 1, Some(experts)).unwrap(),
        group,
        share: kept as f64 / (tokens * (layers - 1)) as f64,
    }
}

fn options(method: Method, gpus: usize) -> Options {
    Options { method: Some(method), gpus: Some(gpus), ..Options::default() }
}

fn affinity(trace: &Trace, options: &Options) -> moec_place::AffinityPlacement {
    let Placement::Affinity(found) = place(&Input::from(trace.clone()), options).unwrap() else {
        panic!("another kind of result")
    };
    found
}

#[test]
fn planted_affinity_is_recovered_exactly() {
    for (seed, size, experts, stay) in [
        (1, (4000, 6), (16, 4), 0.9),
        (2, (4000, 8), (32, 8), 0.8),
        (3, (8000, 12), (64, 8), 0.7),
        (4, (4000, 4), (8, 2), 0.85),
        (5, (6000, 24), (64, 4), 0.6),
        (6, (3000, 5), (12, 3), 1.0),
    ] {
        let planted = planted(seed, size, experts, stay);
        let found = affinity(&planted.trace, &options(Method::Affinity, experts.1));
        assert!((found.local_share - planted.share).abs() < 1e-6, "{seed}: {} of {}", found.local_share, planted.share);
        assert!(found.local_share > found.contiguous_local_share);
        for (groups, gpus) in planted.group.iter().zip(&found.expert_to_gpu) {
            let same = |a: usize, b: usize| (groups[a] == groups[b]) == (gpus[a] == gpus[b]);
            assert!((0..experts.0).all(|a| (0..a).all(|b| same(a, b))));
        }
    }
}

#[test]
fn planted_chains_of_experts_are_recovered() {
    // Every expert has one successor: any grouping of the first layer can be followed to the last.
    let (experts, layers) = (32, 10);
    let ids: Vec<i64> = (0..3200).flat_map(|t| (0..layers).map(move |l| ((t * 7 + l * 5) % experts) as i64)).collect();
    let trace = Trace::from_ids(&ids, 3200, layers as usize, 1, None).unwrap();
    let found = affinity(&trace, &options(Method::Affinity, 8));
    assert_eq!(found.local_share, 1.0);
}

#[test]
fn nodes_come_before_gpus() {
    let planted = planted(9, (5000, 6), (32, 4), 0.95);
    let two_level = Options { nodes: Some(4), ..options(Method::Affinity, 8) };
    let found = affinity(&planted.trace, &two_level);
    assert!((found.node_share - planted.share).abs() < 1e-6);
    assert!((found.mean_cost - (2.0 - found.local_share - found.node_share)).abs() < 1e-5);
}

fn tiny(seed: u64, layers: usize, experts: usize) -> Trace {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let ids: Vec<i64> = (0..60 * layers).map(|_| rng.random_range(0..experts * experts) as i64).collect();
    let ids: Vec<i64> = ids.iter().map(|&i| (i as f64).sqrt() as i64).collect();
    Trace::from_ids(&ids, 60, layers, 1, Some(experts)).unwrap()
}

/// All ways to give `experts` experts to `gpus` GPUs; equal shares if `even`.
fn assignments(experts: usize, gpus: usize, even: bool) -> Vec<Vec<usize>> {
    let all =
        (0..gpus.pow(experts as u32)).map(|code| (0..experts).map(|e| code / gpus.pow(e as u32) % gpus).collect());
    let fits = |of: &Vec<usize>| {
        (0..gpus).all(|g| {
            let n = of.iter().filter(|&&o| o == g).count();
            if even { n == experts / gpus } else { n > 0 }
        })
    };
    all.filter(fits).collect()
}

fn local(trace: &Trace, of: &[&Vec<usize>]) -> usize {
    let step = |t: usize, l: usize| {
        let gpu = |l: usize| trace.routed(t, l).map(|e| of[l][e]).next();
        usize::from(gpu(l) == gpu(l + 1))
    };
    (0..trace.tokens()).map(|t| (0..trace.layers() - 1).map(|l| step(t, l)).sum::<usize>()).sum()
}

#[test]
fn affinity_program_and_search_equal_brute_force_on_small_cases() {
    for (seed, experts, gpus) in [(1, 4, 2), (2, 6, 2), (3, 6, 3), (4, 4, 2)] {
        let trace = tiny(seed, 3, experts);
        let all = assignments(experts, gpus, true);
        let mut best = 0;
        for a in &all {
            for b in &all {
                for c in &all {
                    best = best.max(local(&trace, &[a, b, c]));
                }
            }
        }
        let best = best as f64 / (60 * 2) as f64;
        let found = affinity(&trace, &options(Method::Affinity, gpus));
        assert!(found.local_share >= best - 0.03, "search {seed}: {} of {best}", found.local_share);
        let exact = affinity(&trace, &Options { time_limit_s: Some(3.0), ..options(Method::AffinityIlp, gpus) });
        assert!(exact.local_share >= found.local_share);
        assert!(exact.local_share <= best + 1e-6);
        assert!(exact.optimal || experts > 4, "program {seed} is not solved");
        if exact.optimal {
            assert!((exact.local_share - best).abs() < 1e-6, "program {seed}: {} of {best}", exact.local_share);
        }
    }
}

/// Least deviation over all clusterings of two layers with equal totals, by enumeration.
fn least_deviation(trace: &Trace, gpus: usize) -> f64 {
    let loads = trace.loads().unwrap();
    let all = assignments(trace.experts(), gpus, false);
    let size = |of: &Vec<usize>| (0..gpus).map(|g| of.iter().filter(|&&o| o == g).count()).collect::<Vec<_>>();
    let deviation = |load: &Vec<f64>, of: &Vec<usize>| {
        let mean = load.iter().sum::<f64>() / gpus as f64;
        let sum = |g| load.iter().zip(of).filter(|(_, o)| **o == g).map(|(l, _)| l).sum::<f64>();
        (0..gpus).map(|g| (sum(g) - mean).abs()).sum::<f64>()
    };
    let mut best: std::collections::BTreeMap<Vec<usize>, f64> = [(vec![0; gpus], 0.0)].into();
    for load in loads.layers() {
        let mut next: std::collections::BTreeMap<Vec<usize>, f64> = Default::default();
        for of in &all {
            let (size, value) = (size(of), deviation(load, of));
            for (before, so_far) in &best {
                let total: Vec<usize> = before.iter().zip(&size).map(|(a, b)| a + b).collect();
                let entry = next.entry(total).or_insert(f64::INFINITY);
                *entry = entry.min(so_far + value);
            }
        }
        best = next;
    }
    best[&vec![loads.layers().len() * loads.experts() / gpus; gpus]]
}

#[test]
fn moetuner_balances_as_brute_force_does_and_beats_random_placements_in_traffic() {
    for (seed, layers, experts, gpus) in [(1, 2, 6, 2), (2, 3, 6, 2), (3, 2, 6, 3), (4, 2, 8, 2), (5, 3, 4, 2)] {
        let trace = tiny(seed, layers, experts);
        let options = Options { time_limit_s: Some(30.0), ..options(Method::MoeTuner, gpus) };
        let Placement::MoeTuner(found) = place(&Input::from(trace.clone()), &options).unwrap() else { panic!() };
        let best = least_deviation(&trace, gpus);
        assert!(found.load_deviation >= best - 1e-5);
        assert!(found.balance_optimal, "{seed}");
        assert!((found.load_deviation - best).abs() < 1e-5, "{seed}: {} of {best}", found.load_deviation);
        assert!(found.traffic_optimal);
    }
    let planted = planted(21, (4000, 8), (32, 4), 0.9);
    let Placement::MoeTuner(found) = place(&Input::from(planted.trace.clone()), &options(Method::MoeTuner, 4)).unwrap()
    else {
        panic!()
    };
    let loads = planted.trace.loads().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..50 {
        let mut pairs = [0.0; 16];
        let mut deviation = 0.0;
        let random: Vec<Vec<usize>> = (0..8)
            .map(|_| {
                let mut of: Vec<usize> = (0..32).map(|e| e / 8).collect();
                (1..32).rev().for_each(|i| of.swap(i, rng.random_range(0..=i)));
                of
            })
            .collect();
        for (load, of) in loads.layers().iter().zip(&random) {
            let mean = load.iter().sum::<f64>() / 4.0;
            for g in 0..4 {
                let sum: f64 = load.iter().zip(of).filter(|(_, o)| **o == g).map(|(l, _)| l).sum();
                deviation += (sum - mean).abs();
            }
        }
        for t in 0..4000 {
            for l in 0..7 {
                let gpu = |l: usize| random[l][planted.trace.routed(t, l).next().unwrap()];
                if gpu(l) != gpu(l + 1) {
                    pairs[gpu(l) * 4 + gpu(l + 1)] += 1.0;
                }
            }
        }
        assert!(found.load_deviation <= deviation + 1e-6);
        assert!(found.max_pair_cost <= pairs.iter().copied().fold(0.0, f64::max));
    }
}

#[test]
fn grouping_cuts_remote_activations_of_planted_coactivation() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let of: Vec<usize> = (0..32).map(|e| (e * 7) % 32 / 8).collect();
    let mut ids = Vec::new();
    for _ in 0..2000 {
        let group = rng.random_range(0..4_usize);
        let members: Vec<i64> = (0..32).filter(|&e| of[e] == group).map(|e| e as i64).collect();
        let first = rng.random_range(0..8_usize);
        ids.extend([members[first], members[(first + 1 + rng.random_range(0..7_usize)) % 8]]);
    }
    let trace = Trace::from_ids(&ids, 2000, 1, 2, Some(32)).unwrap();
    let Placement::Grouping(found) = place(&Input::from(trace), &options(Method::Grouping, 4)).unwrap() else {
        panic!()
    };
    assert!(found.contiguous_remote_share[0] > 0.7);
    assert!(found.remote_share[0] < 0.05, "{:?}", found.remote_share);
    let mut tokens = [0; 4];
    found.token_to_gpu[0].iter().for_each(|&g| tokens[g] += 1);
    assert!(tokens.iter().all(|&n| (400..=600).contains(&n)), "{tokens:?}");
}

fn slots(gpus: usize, method: Method, seed: u64) -> Replicated {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let loads = (0..3).map(|_| (0..16).map(|_| f64::from(rng.random_range(1..900_u32))).collect()).collect();
    let input = Input::from(moec_place::Loads::new(loads).unwrap());
    let options = Options { replicas: Some(24), ..options(method, gpus) };
    place(&input, &options).unwrap().replicated().unwrap().clone()
}

#[test]
fn move_plans_are_minimal_and_end_in_the_new_layout() {
    for (from, to) in [(4, 4), (4, 8), (8, 4), (4, 6), (6, 4)] {
        let old = Layout::from_slots(&slots(from, Method::Eplb, 1).phy2log, from).unwrap();
        let new = Layout::from_slots(&slots(to, Method::Balance, 2).phy2log, to).unwrap();
        let plan = plan_moves(&old, &new).unwrap();
        let mut after = plan.apply(&old);
        let mut missing = 0;
        for (layer, want) in new.layers().iter().enumerate() {
            for (gpu, experts) in want.iter().enumerate() {
                let had = old.layers()[layer].get(gpu).cloned().unwrap_or_default();
                missing += experts.difference(&had).count();
                assert_eq!(&after.layers()[layer][gpu], experts);
            }
            assert!(after.layers()[layer][to..].iter().all(|held| held.is_empty()));
        }
        assert_eq!(plan.moves.len(), missing);
        assert_eq!(plan.bytes_moved(10), 10 * missing as u64);
        for step in &plan.moves {
            assert!(old.layers()[step.layer][step.from].contains(&step.expert));
        }

        let relabeled = plan_moves_relabeled(&old, &new).unwrap();
        assert!(relabeled.moves.len() <= plan.moves.len());
        after = relabeled.apply(&old);
        for (layer, want) in new.layers().iter().enumerate() {
            for (gpu, experts) in want.iter().enumerate() {
                assert_eq!(&after.layers()[layer][relabeled.device_of_gpu[gpu]], experts);
            }
        }
        assert!(plan_moves(&old, &old).unwrap().moves.is_empty());
    }
}

#[test]
fn relabeling_finds_that_two_layouts_differ_by_names_only() {
    let old = vec![vec![0, 1, 2, 3, 4, 5, 6, 7]];
    let new = vec![vec![6, 7, 0, 1, 4, 5, 2, 3]];
    let [old, new] = [old, new].map(|phy| Layout::from_slots(&phy, 4).unwrap());
    assert_eq!(plan_moves(&old, &new).unwrap().moves.len(), 6);
    let plan = plan_moves_relabeled(&old, &new).unwrap();
    assert!(plan.moves.is_empty());
    assert_eq!(plan.device_of_gpu, [3, 0, 2, 1]);
}

#[test]
fn one_expert_per_rank_gives_the_other_ranks_to_replicas() {
    let mut load: Vec<f64> = (0..256).map(|e| 1e5 / f64::from(e + 1)).collect();
    load.extend([2e5; 1]);
    let input = Input::from(moec_place::Loads::new(vec![load]).unwrap());
    let placed = place(&input, &options(Method::OnePerRank, 320)).unwrap();
    let slots = placed.replicated().unwrap();
    assert!(slots.phy2log[0][..257].iter().copied().eq(0..257));
    assert_eq!(slots.logcnt[0].iter().sum::<usize>(), 320);
    assert!(slots.logcnt[0][256] > slots.logcnt[0][0]);
    assert_eq!(slots.gpu_load[0].len(), 320);
}

#[test]
fn routing_consistency_of_constant_and_random_traces() {
    let constant: Vec<i64> = [3, 5].repeat(64);
    assert_eq!(metrics::srp(&constant, 2, 8, 16).unwrap(), 1.0);
    assert_eq!(metrics::sch(&constant, 2, 8, 16, 2).unwrap(), 1.0);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let random: Vec<i64> = (0..4000).map(|_| rng.random_range(0..8_i64)).collect();
    // One of eight experts at random: the least threshold wins, and F1 = 2 p / (1 + p) with p = 1/8 at most doubles.
    let found = metrics::srp(&random, 1, 8, 16).unwrap();
    assert!((0.2..0.35).contains(&found), "{found}");
    let cached = metrics::sch_online(&random, 1, 8, 16, 4).unwrap();
    assert!((0.5..0.95).contains(&cached), "{cached}");
    assert_eq!(metrics::sch_online(&random, 1, 8, 16, 8).unwrap(), (4000.0 - 8.0) / 4000.0);
}

#[test]
fn a_report_covers_every_layer() {
    let planted = planted(2, (300, 3), (8, 2), 0.9);
    let report = metrics::report(&planted.trace).unwrap();
    assert_eq!(report.len(), 3);
    assert_eq!(report[0].load.iter().sum::<u64>(), 300);
    assert!(report[0].affinity_to_next.is_some() && report[2].affinity_to_next.is_none());
    assert!(report.iter().all(|layer| layer.coactivated.is_empty()));
}

#[test]
fn json_lines_of_each_form_give_the_same_trace() {
    let by_token = "[[3, 1], [0, 2]]\n[[2, 0], [1, 3]]\n";
    let by_object = "{\"experts\": [[3, 1], [0, 2]]}\n\n{\"experts\": [[2, 0], [1, 3]], \"text\": \"x\"}";
    let by_layer = r#"{"token": 1, "layer": 0, "experts": [2, 0]}
        {"token": 0, "layer": 1, "experts": [0, 2]}
        {"token": 0, "layer": 0, "experts": [3, 1]}
        {"token": 1, "layer": 1, "experts": [1, 3]}"#;
    let [a, b, c] = [by_token, by_object, by_layer].map(|text| Trace::from_jsonl(text, None).unwrap());
    assert_eq!(a, b);
    assert_eq!(a, c);
    let layers: [(&[i64], usize); 2] = [(&[3, 1, 2, 0], 2), (&[0, 2, 1, 3], 2)];
    assert_eq!(a, Trace::from_layers(&layers, None).unwrap());
    assert_eq!((a.experts(), a.tokens(), a.layers(), a.top_k()), (4, 2, 2, 2));
}

#[test]
fn planted_affinity_of_a_large_model_is_recovered() {
    for (size, experts) in [((4000, 32), (64, 8)), ((8000, 20), (128, 32))] {
        let planted = planted(31, size, experts, 0.8);
        let start = std::time::Instant::now();
        let found = affinity(&planted.trace, &options(Method::Affinity, experts.1));
        println!("{experts:?} {size:?}: {} of {} in {:?}", found.local_share, planted.share, start.elapsed());
        assert!((found.local_share - planted.share).abs() < 1e-6, "{} of {}", found.local_share, planted.share);
    }
}
