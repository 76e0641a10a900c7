//! Which experts rows may have, and how many.

use super::*;

#[test]
fn groups_have_equal_loads_for_any_input() {
    let (graph, _) = of("pangu_moge");
    for numbers in [Numbers::Small, Numbers::Large, Numbers::Zero] {
        let data = data(&graph, TOKENS, 3, numbers);
        let found = results(&graph, &data);
        for row in chosen(&found["topk_indices"], TOKENS) {
            let groups: Vec<i64> = row.iter().map(|e| e / 2).collect();
            assert_eq!(groups, (0..row.len() as i64).collect::<Vec<_>>(), "one of every group");
        }
    }
}

#[test]
fn a_token_of_null_experts_alone_gives_zero() {
    let form = Form::new(16)
        .input("ids", "i32", &json!(["T", 2]))
        .networks(16, json!(12))
        .node("q", "select", &["ids"], json!({"rule": "given", "experts": 6}))
        .node("r", "weigh", &["q"], json!({"const": true, "real": 4, "norm": "sum"}))
        .mixture(json!([networks([0, 4]), {"ids": [4, 6], "kind": "zero"}]))
        .output("topk_weights", "r.w");
    let (graph, mut data) = with(&form);
    let ids: Vec<i32> = (0..26).map(|i| if i < 6 { 4 + i % 2 } else { i % 6 }).collect();
    data.set_ints("ids", &ids);
    let found = results(&graph, &data);
    let rows = found["output"].chunks(16).zip(found["topk_weights"].chunks(2)).zip(ids.chunks(2));
    for ((row, weights), ids) in rows {
        let null = ids.iter().all(|id| *id >= 4);
        assert_eq!(row.iter().all(|v| *v == 0.0), null, "{ids:?}");
        let sum = weights[0] + weights[1];
        assert!((sum - if null { 0.0 } else { 1.0 }).abs() < 1e-6, "{ids:?}: {weights:?}");
    }
}

#[test]
fn top_p_selects_one_or_all_at_its_ends() {
    let of = |p: f64| {
        Form::new(16)
            .tensor("router", json!([8, 16]))
            .node("l", "linear", &["x"], json!({"w": "router"}))
            .node("s", "softmax", &["l"], json!({}))
            .node("q", "select", &["s"], json!({"rule": "topp", "p": p}))
            .output("topk_indices", "q.idx")
    };
    for (p, count) in [(0.0, 1), (1.5, 8)] {
        let (graph, data) = with(&of(p));
        let found = results(&graph, &data);
        assert!(chosen(&found["topk_indices"], TOKENS).iter().all(|row| row.len() == count), "p = {p}");
    }
}

#[test]
fn unconditional_rows_touch_the_extra_expert_alone() {
    let (graph, mut data) = of("promoe_two_step");
    let uncond: Vec<i32> = (0..data.tokens as i32).map(|t| t % 2).collect();
    let name = data.arrays.keys().find(|n| *n != "x").cloned().unwrap();
    if data.arrays[&name].ints().is_some() {
        data.set_ints(&name, &uncond);
    } else {
        data.set(&name, &uncond.iter().map(|u| *u as f32).collect::<Vec<_>>());
    }
    let found = results(&graph, &data);
    let rows = chosen(&found["topk_indices"], data.tokens);
    let extra = rows[1][0];
    for (row, u) in rows.iter().zip(&uncond) {
        assert!(if *u == 1 { row == &[extra] } else { !row.contains(&extra) }, "{rows:?}");
    }
}

#[test]
fn no_token_reaches_an_expert_of_another_modality() {
    for name in ["moma_train", "moma_inference"] {
        let (graph, data) = of(name);
        let found = results(&graph, &data);
        let class = data.arrays.iter().find(|(_, a)| a.ints().is_some()).map(|(n, _)| n.clone()).unwrap();
        let classes = data.arrays[&class].ints().unwrap().to_vec();
        let file = moec_ir::json::write_graph(&graph);
        let nodes = file["nodes"].as_array().unwrap();
        let allowed = &nodes.iter().find(|n| n.get("class_experts").is_some()).unwrap()["class_experts"];
        let rows = chosen(&found["topk_indices"], data.tokens);
        assert!(rows.iter().any(|row| !row.is_empty()));
        for (row, class) in rows.iter().zip(&classes) {
            let own = allowed[class.to_string()].as_array().unwrap();
            assert!(row.iter().all(|e| own.iter().any(|o| o.as_i64() == Some(*e))), "{name}: {row:?} of class {class}");
        }
    }
}

#[test]
fn a_capacity_is_never_exceeded_and_a_large_one_is_none() {
    let of = |capacity: Option<u64>| {
        let form = Form::new(16)
            .tensor("router", json!([4, 16]))
            .networks(16, json!(12))
            .node("l", "linear", &["x"], json!({"w": "router"}))
            .node("s", "softmax", &["l"], json!({}))
            .node("q", "select", &["s"], json!({"rule": "topk", "k": 2}));
        let form = match capacity {
            Some(capacity) => form.node("c", "limit", &["q"], json!({"capacity": capacity})).node(
                "r",
                "weigh",
                &["c", "s"],
                json!({"norm": "sum"}),
            ),
            None => form.node("r", "weigh", &["q", "s"], json!({"norm": "sum"})),
        };
        form.mixture(json!([networks([0, 4])])).node("n", "count", &["r"], json!({})).output("count", "n").batch()
    };
    let (free, data) = with(&of(None));
    let free = results(&free, &data);
    let (wide, data) = with(&of(Some(TOKENS)));
    assert_eq!(results(&wide, &data)["output"], free["output"]);
    for capacity in [0, 1, 3] {
        let (graph, data) = with(&of(Some(capacity)));
        let found = results(&graph, &data);
        assert!(found["count"].iter().all(|n| *n <= capacity as f64), "{:?}", found["count"]);
    }
}

#[test]
fn transport_plans_have_their_sums() {
    let of = |attributes: serde_json::Value| {
        Form::default()
            .input("s", "f32", &json!(["T", 4]))
            .node("p", "transport", &["s"], attributes)
            .output("output", "p")
            .batch()
    };
    let sums = |plan: &[f64]| {
        let rows: Vec<f64> = plan.chunks(4).map(|r| r.iter().sum()).collect();
        let columns: Vec<f64> = (0..4).map(|e| plan.chunks(4).map(|r| r[e]).sum()).collect();
        (rows, columns)
    };
    let (graph, data) = with(&of(json!({"kind": "sinkhorn", "xi": 0.7, "iters": 200})));
    let (rows, columns) = sums(&results(&graph, &data)["output"]);
    assert!(rows.iter().all(|s| (s - 1.0).abs() < 1e-4), "{rows:?}");
    assert!(columns.iter().all(|s| (s - TOKENS as f64 / 4.0).abs() < 1e-3), "{columns:?}");
    let attributes = json!({"kind": "sparse", "capacity": 5, "gamma": 0.5, "steps": 300, "eta": 0.2});
    let (graph, data) = with(&of(attributes));
    let plan = &results(&graph, &data)["output"];
    let (_, columns) = sums(plan);
    assert!(columns.iter().all(|s| (s - 1.0).abs() < 1e-5), "{columns:?}");
    for e in 0..4 {
        assert!(plan.chunks(4).filter(|row| row[e] > 0.0).count() <= 5);
    }
}

#[test]
fn an_unknown_class_or_id_is_refused() {
    let (graph, mut data) = of("moma_inference");
    let class = data.arrays.iter().find(|(_, a)| a.ints().is_some()).map(|(n, _)| n.clone()).unwrap();
    let layer = compile(&graph);
    let layer = layer.layer(&data).unwrap();
    let mut classes = vec![0; data.tokens as usize];
    classes[3] = 77;
    data.set_ints(&class, &classes);
    let error = run(&layer, &data).unwrap_err().to_string();
    assert!(error.contains("entry 3 is 77") && error.contains("class"), "{error}");
    let (graph, mut data) = of("thor_random");
    let ids = data.arrays.iter().find(|(_, a)| a.ints().is_some()).map(|(n, _)| n.clone()).unwrap();
    let layer = compile(&graph);
    let layer = layer.layer(&data).unwrap();
    let size = data.arrays[&ids].ints().unwrap().len();
    data.set_ints(&ids, &vec![99; size]);
    assert!(run(&layer, &data).unwrap_err().to_string().contains("entry 0 is 99"));
}

#[test]
fn a_bound_that_is_met_exactly_counts_unless_strict() {
    // All scores are equal, 1/8 each: four of them make 1/2, and every one meets 1/8.
    let of = |rule: serde_json::Value| {
        let form = Form::new(16)
            .tensor("router", json!([8, 16]))
            .node("l", "linear", &["x"], json!({"w": "router"}))
            .node("s", "softmax", &["l"], json!({}))
            .node("q", "select", &["s"], rule)
            .output("topk_indices", "q.idx");
        let graph = form.graph();
        let data = data(&graph, TOKENS, 5, Numbers::Zero);
        let rows = chosen(&results(&graph, &data)["topk_indices"], TOKENS);
        assert!(rows.iter().all(|row| *row == rows[0]));
        rows[0].len()
    };
    assert_eq!(of(json!({"rule": "topp", "p": 0.5})), 5);
    assert_eq!(of(json!({"rule": "topp", "p": 0.5, "strict": false})), 4);
    assert_eq!(of(json!({"rule": "threshold", "tau": 0.125})), 0);
    assert_eq!(of(json!({"rule": "threshold", "tau": 0.125, "strict": false})), 8);
    assert_eq!(of(json!({"rule": "threshold", "quantile": 0.5, "strict": false})), 8);
    // None passes: the floor decides.
    assert_eq!(of(json!({"rule": "threshold", "tau": 0.125, "min_k": 1})), 1);
    assert_eq!(of(json!({"rule": "threshold", "quantile": 1.0, "min_k": 1})), 1);
    assert_eq!(of(json!({"rule": "threshold", "quantile": 1.0, "min_k": 0})), 0);
}

#[test]
fn a_batch_without_experts_gives_zero() {
    let base = || {
        Form::default()
            .input("x", "f32", &json!([3, 8]))
            .input("c", "f32", &json!([1, 8]))
            .tensor("router", json!([4, 8]))
            .networks(8, json!(12))
            .node("l", "linear", &["c"], json!({"w": "router"}))
    };
    let weighed = |form: Form| form.node("r", "weigh", &["q", "l"], json!({"fn": "softmax"}));
    let chosen = |form: Form, x: &str| form.node("q", "select", &[x], json!({"rule": "topk", "k": 2}));
    let masked = base().input("mask", "f32", &json!([1, 4])).node("a", "adjust", &["l"], json!({"mask": "mask"}));
    let given = base().input("ids", "i32", &json!([1, 2]));
    let dropped = chosen(base(), "l").node("p", "softmax", &["l"], json!({})).input("c2", "f32", &json!([1, 1]));
    let forms = [
        weighed(chosen(masked, "a")),
        weighed(base().node("q", "select", &["l"], json!({"rule": "threshold", "tau": 1000.0, "max_k": 2}))),
        given.node("q", "select", &["ids"], json!({"rule": "given", "experts": 4})).node(
            "r",
            "weigh",
            &["q"],
            json!({"const": true}),
        ),
        dropped
            .node("i", "select", &["c2"], json!({"rule": "expert_choice", "capacity": 1}))
            .node("r", "weigh", &["q", "p"], json!({"drop_below": 0.4, "drop_rows": "i"}))
            .batch(),
    ];
    for form in forms {
        let graph = form
            .node("d", "dispatch", &["x", "r"], json!({"repeat": 3}))
            .node("e", "experts", &["d"], json!({"bank": [networks([0, 4])]}))
            .node("y", "combine", &["e", "r"], json!({"repeat": 3}))
            .output("output", "y")
            .graph();
        let mut data = data(&graph, 3, 5, Numbers::Small);
        if data.arrays.contains_key("mask") {
            data.set("mask", &[-1.0; 4]);
        }
        if data.arrays.contains_key("ids") {
            data.set_ints("ids", &[-1, -1]);
        }
        // The simulator says whether rows that nobody wrote are read.
        let sim = Arc::new(moec::runtime::Sim::new(moec_sim::Options::default()));
        let compiled = Compiled::new(&graph, moec::Target::Sm80, sim).unwrap_or_else(|e| panic!("{e}"));
        let found = compiled.run(&data).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(found["output"], vec![0.0; 24]);
    }
}

#[test]
fn a_group_with_too_few_scores_can_be_kept() {
    let form = Form::new(16)
        .tensor("router", json!([4, 16]))
        .networks(16, json!(12))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("a", "adjust", &["l"], json!({"off": [2]}))
        .node(
            "q",
            "select",
            &["a"],
            json!({"rule": "group_limited", "groups": 2, "group_top": 2, "keep_groups": 2, "k": 2}),
        )
        .node("r", "weigh", &["q", "l"], json!({"fn": "sigmoid"}))
        .mixture(json!([networks([0, 4])]));
    let graph = form.graph();
    moec_tests::gallery::check(&graph, host_target(), Arc::new(Cpu::new(1)), &[TOKENS, 0]).expect("agrees");
    // Both groups are kept, so the expert beside the one that is switched off is chosen by some row.
    let (graph, data) = with(&form.output("idx", "r.idx"));
    assert!(chosen(&results(&graph, &data)["idx"], TOKENS).iter().flatten().any(|id| *id == 3));
}

#[test]
fn a_layer_whose_experts_are_all_forbidden_gives_zeros() {
    let rules = [json!({"rule": "topk", "k": 2}), json!({"rule": "all"})];
    for rule in rules {
        let form = Form::new(16)
            .tensor("router", json!([4, 16]))
            .networks(16, json!(12))
            .node("l", "linear", &["x"], json!({"w": "router"}))
            .node("a", "adjust", &["l"], json!({"off": [0, 1, 2, 3]}))
            .node("q", "select", &["a"], rule)
            .node("r", "weigh", &["q", "l"], json!({"fn": "softmax"}))
            .mixture(json!([networks([0, 4])]));
        let (graph, data) = with(&form);
        for target in [host_target(), Target::Sm80, Target::Sm90a] {
            // No row is written: the simulator reports whoever reads one.
            let found = Compiled::new(&graph, target, device(target)).unwrap().run(&data).unwrap();
            assert!(found["output"].iter().all(|v| *v == 0.0), "{}", target.name());
        }
    }
}
