//! Properties of research forms, on compiled kernels of this processor.

use moec::{host_target, runtime::Cpu};
use moec_ir::Graph;
use moec_tests::{
    forms::{Form, networks},
    gallery::{Compiled, Data, Numbers, Results, data, files, graph, run, stem},
};
use serde_json::json;
use std::sync::Arc;

const TOKENS: u64 = 13;

fn compile(graph: &Graph) -> Compiled {
    Compiled::new(graph, host_target(), Arc::new(Cpu::new(1))).unwrap_or_else(|e| panic!("{e}"))
}

/// A graph of the gallery with data.
fn of(name: &str) -> (Graph, Data) {
    let path = files("models/systems", "json").into_iter().find(|p| stem(p) == name);
    let graph = graph(&path.unwrap_or_else(|| panic!("{name} is in the gallery")));
    let tokens = moec_tests::gallery::tokens_of(&graph, TOKENS);
    let data = data(&graph, tokens, 5, Numbers::Small);
    (graph, data)
}

fn results(graph: &Graph, data: &Data) -> Results {
    compile(graph).run(data).unwrap_or_else(|e| panic!("{e}"))
}

fn with(form: &Form) -> (Graph, Data) {
    let graph = form.graph();
    let data = data(&graph, TOKENS, 5, Numbers::Small);
    (graph, data)
}

/// A node's attributes changed.
fn changed(graph: &Graph, id: &str, change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) -> Graph {
    let mut file = moec_ir::json::write_graph(graph);
    let node = file["nodes"].as_array_mut().into_iter().flatten().find(|n| n["id"] == id);
    change(node.and_then(|n| n.as_object_mut()).unwrap_or_else(|| panic!("{id} is a node")));
    moec_ir::json::read_value(&file, &moec_ir::json::Signature::default()).unwrap_or_else(|e| panic!("{e:?}"))
}

fn close(a: &[f64], b: &[f64], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let top = a.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(worst <= 2e-5 * top, "{what}: {worst:e} of {top:e}");
}

/// Ids of the filled slots, row by row.
fn chosen(ids: &[f64], rows: u64) -> Vec<Vec<i64>> {
    let slots = ids.len() / usize::try_from(rows).unwrap();
    ids.chunks(slots).map(|row| row.iter().map(|id| *id as i64).filter(|id| *id >= 0).collect()).collect()
}

fn std_router(form: Form, experts: u64, width: u64) -> Form {
    form.router(experts, 2, width).networks(width, json!(12)).mixture(json!([networks([0, experts])]))
}

#[test]
fn no_rewiring_is_the_base_model_bit_for_bit() {
    let (base, base_data) = with(&std_router(Form::new(16), 8, 16));
    let rewired = Form::new(16)
        .tensor("router", json!([8, 16]))
        .input("state_delta_in", "f32", &json!([1, 8]))
        .networks(16, json!(12))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("a", "binary", &["l", "state_delta_in"], json!({"fn": "add"}))
        .node("s", "softmax", &["a"], json!({}))
        .node("q", "select", &["s"], json!({"rule": "topk", "k": 2}))
        .node("r", "weigh", &["q", "s"], json!({"norm": "sum"}))
        .mixture(json!([networks([0, 8])]));
    let (rewired, mut data) = with(&rewired);
    let layer = compile(&rewired);
    let layer = layer.layer(&data).unwrap();
    data.set("state_delta_in", &[0.0; 8]);
    let base = results(&base, &base_data);
    assert_eq!(run(&layer, &data).unwrap()["output"], base["output"]);
    // The vector is a buffer: another one needs no other code.
    data.set("state_delta_in", &[9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let other = run(&layer, &data).unwrap();
    assert_ne!(other["output"], base["output"]);
    let expected = data.expected(&rewired).unwrap();
    close(&other["output"], &expected["output"], "another vector");
}

#[test]
fn no_forced_expert_is_the_base_model_bit_for_bit() {
    let (graph, data) = of("tunable_experts");
    let adjust = graph.order().into_iter().find(|id| graph.node(*id).op.name() == "adjust").unwrap();
    let name = graph.node(adjust).name.clone();
    let none = changed(&graph, &name, |node| {
        node.shift_remove("on");
        node.shift_remove("off");
    });
    let mut base = none.clone();
    let (adjust, scores) = (base.find(&name).unwrap(), base.operands(base.find(&name).unwrap())[0]);
    base.replace_uses(adjust, scores);
    base.remove(adjust);
    assert_eq!(results(&none, &data), results(&base, &data));
    assert_ne!(results(&graph, &data), results(&base, &data));
}

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
fn all_slices_are_the_dense_layer() {
    let slice = |w: &str, axis: u64| json!({"slice": w, "axis": axis, "n": 4});
    let form = Form::new(16)
        .tensor("router", json!([4, 16]))
        .tensor("w1", json!([32, 16]))
        .tensor("w2", json!([16, 32]))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("q", "select", &["l"], json!({"rule": "all"}))
        .node("r", "weigh", &["q"], json!({"const": true}))
        .mixture(json!([{"ids": [0, 4], "kind": "ffn", "act": "gelu", "up": slice("w1", 0), "down": slice("w2", 1)}]))
        .node("dense", "ffn", &["x"], json!({"act": "gelu", "up": "w1", "down": "w2"}))
        .output("dense", "dense");
    let (graph, data) = with(&form);
    let found = results(&graph, &data);
    close(&found["output"], &found["dense"], "slices and dense");
}

#[test]
fn disjoint_sets_of_neurons_are_the_dense_layer() {
    let take = |w: &str, axis: u64| json!({"take": w, "ids": "set.{e}", "axis": axis});
    let form = Form::new(16)
        .tensor("router", json!([2, 16]))
        .tensor("w1", json!([8, 16]))
        .tensor("w2", json!([16, 8]))
        .typed("set.{e}", "i32", json!([4]))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("q", "select", &["l"], json!({"rule": "all"}))
        .node("r", "weigh", &["q"], json!({"const": true}))
        .mixture(json!([{"ids": [0, 2], "kind": "ffn", "act": "silu", "up": take("w1", 0), "down": take("w2", 1)}]))
        .node("dense", "ffn", &["x"], json!({"act": "silu", "up": "w1", "down": "w2"}))
        .output("dense", "dense");
    let (graph, mut data) = with(&form);
    data.set_weight_ints("set.0", &[6, 1, 3, 4]);
    data.set_weight_ints("set.1", &[0, 7, 5, 2]);
    let found = results(&graph, &data);
    close(&found["output"], &found["dense"], "sets and dense");
}

#[test]
fn width_zero_gives_zero() {
    let form = Form::new(16)
        .input("ids", "i32", &json!(["T", 1]))
        .networks(16, json!([12, 0, 5, 0]))
        .node("q", "select", &["ids"], json!({"rule": "given", "experts": 4}))
        .node("r", "weigh", &["q"], json!({"const": true}))
        .mixture(json!([networks([0, 4])]));
    let (graph, mut data) = with(&form);
    let ids: Vec<i32> = (0..13).map(|i| i % 4).collect();
    data.set_ints("ids", &ids);
    let found = results(&graph, &data);
    for (row, id) in found["output"].chunks(16).zip(&ids) {
        assert_eq!(row.iter().all(|v| *v == 0.0), id % 2 == 1, "expert {id}");
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
fn an_identity_graph_of_tokens_is_the_plain_router() {
    let form = Form::default()
        .input("x", "f32", &json!([8, 16]))
        .input("graph", "f32", &json!([8, 8]))
        .tensor("router", json!([4, 16]))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("p", "softmax", &["l"], json!({}))
        .node("m", "einsum", &["graph", "p"], json!({"eq": "tu,ue->te"}))
        .node("q", "select", &["m"], json!({"rule": "topk", "k": 2}))
        .node("r", "weigh", &["q", "m"], json!({"norm": "sum"}))
        .node("q0", "select", &["p"], json!({"rule": "topk", "k": 2}))
        .node("r0", "weigh", &["q0", "p"], json!({"norm": "sum"}))
        .output("ids", "r.idx")
        .output("weights", "r.w")
        .output("plain_ids", "r0.idx")
        .output("plain_weights", "r0.w");
    let graph = form.graph();
    let mut data = data(&graph, 8, 5, Numbers::Small);
    let identity: Vec<f32> = (0..64).map(|i| if i / 8 == i % 8 { 1.0 } else { 0.0 }).collect();
    data.set("graph", &identity);
    let found = results(&graph, &data);
    assert_eq!(found["ids"], found["plain_ids"]);
    close(&found["weights"], &found["plain_weights"], "weights");
}

#[test]
fn all_blocks_are_full_attention() {
    let form = |blocks: u64| {
        Form::default()
            .input("q", "f32", &json!([16, 2, 8]))
            .input("k", "f32", &json!([16, 2, 8]))
            .input("v", "f32", &json!([16, 2, 8]))
            .input("scores", "f32", &json!([32, 4]))
            .node("a", "adjust", &["scores"], json!({"causal_block": 4, "tokens": 16}))
            .node("r", "select", &["a"], json!({"rule": "topk", "k": blocks}))
            .node("y", "attention", &["q", "k", "v"], json!({"blocks": "r", "block": 4}))
            .node("full", "attention", &["q", "k", "v"], json!({}))
            .output("output", "y")
            .output("full", "full")
    };
    let found = |blocks| {
        let graph = form(blocks).graph();
        let data = data(&graph, 16, 5, Numbers::Small);
        results(&graph, &data)
    };
    let all = found(4);
    close(&all["output"], &all["full"], "all blocks");
    let some = found(2);
    assert_ne!(some["output"], some["full"]);
}

#[test]
fn momentum_and_scalings_of_zero_leave_the_rest() {
    let (graph, mut data) = of("momentum_smoe");
    let state = data.arrays.keys().find(|n| n.starts_with("state_")).cloned().unwrap();
    let size = data.input(&state).len();
    let layer = compile(&graph);
    let layer = layer.layer(&data).unwrap();
    data.set(&state, &vec![0.0; size]);
    let first = run(&layer, &data).unwrap();
    let name = state.strip_suffix("_in").unwrap();
    // From a state of zero the step is the layer's own output: x - y.
    let step: Vec<f64> = data.input("x").iter().zip(&first["output"]).map(|(x, y)| f64::from(*x) - y).collect();
    close(&step, &first[name], "the first step");
    let (graph, mut data) = of("x_lora");
    let scalings = data.arrays.keys().find(|n| *n != "x").cloned().unwrap();
    let size = data.input(&scalings).len();
    data.set(&scalings, &vec![0.0; size]);
    let found = results(&graph, &data);
    let base = graph.order().into_iter().find(|id| graph.node(*id).op.name() == "linear").unwrap();
    let mut plain = graph.clone();
    plain.outputs.clear();
    plain.output("output", base, moec_ir::Part::Whole);
    assert_eq!(found["output"], results(&plain, &data)["output"], "no adapter, no change");
}

#[test]
fn state_flows_from_call_to_call() {
    for name in ["rmoe_gru", "momentum_smoe", "adam_smoe", "task_memory"] {
        let (graph, mut data) = of(name);
        let layer = compile(&graph);
        let layer = layer.layer(&data).unwrap();
        let states: Vec<String> = data.arrays.keys().filter(|n| n.starts_with("state_")).cloned().collect();
        assert!(!states.is_empty(), "{name} has a state");
        let mut seen = Vec::new();
        for call in 0..3 {
            let expected = data.expected(&graph).unwrap();
            let found = run(&layer, &data).unwrap();
            moec_tests::gallery::agree(&graph, &found, &expected)
                .unwrap_or_else(|e| panic!("{name}, call {call}: {e}"));
            for state in &states {
                let next: Vec<f32> = found[state.strip_suffix("_in").unwrap()].iter().map(|v| *v as f32).collect();
                data.set(state, &next);
            }
            seen.push(found["output"].clone());
        }
        assert!(seen[0] != seen[1] && seen[1] != seen[2], "{name}: the state has no effect");
    }
}

#[test]
fn the_selection_bias_is_a_buffer() {
    let form = Form::new(16)
        .tensor("router", json!([4, 16]))
        .input("state_bias_in", "f32", &json!([1, 4]))
        .input("rate", "f32", &json!([1, 1]))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("s", "unary", &["l"], json!({"fn": "sigmoid"}))
        .node("b", "binary", &["s", "state_bias_in"], json!({"fn": "add"}))
        .node("q", "select", &["b"], json!({"rule": "topk", "k": 1}))
        .node("n", "count", &["q"], json!({}))
        .node("m", "reduce", &["n"], json!({"fn": "mean", "axis": 0, "keep": true}))
        .node("d", "binary", &["m", "n"], json!({"fn": "sub"}))
        .node("g", "unary", &["d"], json!({"fn": "sign"}))
        .node("h", "shape", &["g"], json!({"fn": "reshape", "to": [1, 4]}))
        .node("u", "binary", &["h", "rate"], json!({"fn": "mul"}))
        .node("z", "binary", &["u", "state_bias_in"], json!({"fn": "add"}))
        .output("count", "n")
        .output("state_bias", "z");
    let graph = form.graph();
    let mut data = data(&graph, 256, 5, Numbers::Small);
    let layer = compile(&graph);
    let layer = layer.layer(&data).unwrap();
    data.set("state_bias_in", &[1.5, 0.0, 0.0, -0.5]);
    let imbalance = |counts: &[f64]| counts.iter().copied().fold(0.0, f64::max) / 64.0;
    let mut first = 0.0;
    let mut last = 0.0;
    for step in 0..1000 {
        // The step size is an argument too.
        data.set("rate", &[if step < 300 { 0.02 } else { 0.001 }]);
        let found = run(&layer, &data).unwrap();
        last = imbalance(&found["count"]);
        if step == 0 {
            first = last;
        }
        let next: Vec<f32> = found["state_bias"].iter().map(|v| *v as f32).collect();
        data.set("state_bias_in", &next);
    }
    assert!(first > 3.0 && last < 1.1, "{first} {last}");
}

#[test]
fn expert_sets_shrink_as_the_temperature_falls() {
    let of = |temp: f64| {
        Form::new(16)
            .tensor("router", json!([8, 16]))
            .input("noise", "f32", &json!(["T", 8]))
            .node("l", "linear", &["x"], json!({"w": "router"}))
            .node("z", "binary", &["l", "noise"], json!({"fn": "add"}))
            .node("g", "softmax", &["z"], json!({"temp": temp}))
            .node("q", "select", &["g"], json!({"rule": "threshold", "tau": 0.001}))
            .output("topk_indices", "q.idx")
    };
    let counts = |temp| -> usize {
        let (graph, data) = with(&of(temp));
        chosen(&results(&graph, &data)["topk_indices"], TOKENS).iter().map(Vec::len).sum()
    };
    let found: Vec<usize> = [4.0, 1.0, 0.3, 0.05].into_iter().map(counts).collect();
    assert!(found.windows(2).all(|w| w[0] >= w[1]) && found[0] > found[3], "{found:?}");
}

#[test]
fn a_loop_of_one_pass_is_the_plain_layer() {
    let nodes = |c: &str| {
        json!([{"id": "l", "op": "linear", "in": [c], "w": "router"},
            {"id": "s", "op": "softmax", "in": ["l"]},
            {"id": "q", "op": "select", "in": ["s"], "rule": "topk", "k": 2},
            {"id": "r", "op": "weigh", "in": ["q", "s"], "norm": "sum"},
            {"id": "d", "op": "dispatch", "in": [c, "r"]},
            {"id": "e", "op": "experts", "in": ["d"], "bank": [networks([0, 8])]},
            {"id": "y", "op": "combine", "in": ["e", "r"]}])
    };
    let (plain, plain_data) = with(&std_router(Form::new(16), 8, 16));
    let looped = Form::new(16)
        .tensor("router", json!([8, 16]))
        .networks(16, json!(12))
        .node("o", "loop", &[], json!({"n": 1, "carry": "x", "next": "y", "body": nodes("x")}))
        .output("output", "o");
    let (looped, data) = with(&looped);
    assert_eq!(results(&looped, &data)["output"], results(&plain, &plain_data)["output"]);
}

#[test]
fn vectors_of_one_leave_the_main_experts() {
    let (graph, mut data) = of("compressed_experts");
    let file = moec_ir::json::write_graph(&graph);
    let table = graph.weights.keys().find(|n| n.contains("theta")).cloned().unwrap();
    let size: u64 = graph.weights[&table].shape.iter().map(moec_ir::Extent::max).product();
    data.set_weight(&table, &vec![1.0; usize::try_from(size).unwrap()]);
    let found = results(&graph, &data);
    // The main experts alone: the product with the vectors' sum is left out.
    let product = file["nodes"].as_array().unwrap().iter().find(|n| n["op"] == "binary" && n["fn"] == "mul").unwrap();
    let (product, x) = (graph.find(product["id"].as_str().unwrap()).unwrap(), graph.find("x").unwrap());
    let mut main = graph.clone();
    main.replace_uses(product, x);
    let alone = results(&main, &data);
    close(&found["output"], &alone["output"], "theta = 1");
}

#[test]
fn the_number_of_experts_is_an_argument() {
    let form = Form::new(16)
        .tensor("router", json!([8, 16]))
        .tensor("bias", json!([8]))
        .input("k", "i32", &json!([1]))
        .networks(16, json!(12))
        .node("l", "linear", &["x"], json!({"w": "router", "b": "bias"}))
        .node("q", "select", &["l"], json!({"rule": "topk", "k": 8, "bound": "k"}))
        .node("r", "weigh", &["q", "l"], json!({"fn": "softmax"}))
        .mixture(json!([networks([0, 8])]))
        .output("topk_indices", "r.idx");
    let (graph, mut data) = with(&form);
    let layer = compile(&graph);
    let layer = layer.layer(&data).unwrap();
    for k in [1, 2, 5, 8, 0, 9] {
        data.set_ints("k", &[k]);
        let found = run(&layer, &data).unwrap();
        let expected = data.expected(&graph).unwrap();
        moec_tests::gallery::agree(&graph, &found, &expected).unwrap_or_else(|e| panic!("k = {k}: {e}"));
        assert!(chosen(&found["topk_indices"], TOKENS).iter().all(|row| row.len() == k.min(8) as usize));
    }
}

#[test]
fn the_probability_mass_is_an_argument() {
    let form = Form::new(16)
        .tensor("router", json!([8, 16]))
        .input("p", "f32", &json!([1]))
        .networks(16, json!(12))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("s", "softmax", &["l"], json!({}))
        .node("q", "select", &["s"], json!({"rule": "topp", "p": 2.0, "bound": "p"}))
        .node("r", "weigh", &["q", "s"], json!({}))
        .mixture(json!([networks([0, 8])]))
        .output("topk_indices", "r.idx");
    let (graph, mut data) = with(&form);
    let layer = compile(&graph);
    let layer = layer.layer(&data).unwrap();
    let mut counts = Vec::new();
    for p in [0.0, 0.3, 0.6, 0.9, 1.5] {
        data.set("p", &[p]);
        let found = run(&layer, &data).unwrap();
        let expected = data.expected(&graph).unwrap();
        moec_tests::gallery::agree(&graph, &found, &expected).unwrap_or_else(|e| panic!("p = {p}: {e}"));
        counts.push(chosen(&found["topk_indices"], TOKENS).iter().map(Vec::len).sum::<usize>());
    }
    assert!(counts.windows(2).all(|w| w[0] <= w[1]), "{counts:?}");
    assert_eq!((counts[0], counts[4]), (TOKENS as usize, 8 * TOKENS as usize));
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
fn a_value_may_be_used_whole_and_row_by_row() {
    // `a` has rows; `x` and what follows from it stand against its last axes, whole for each of its rows.
    let form = || {
        Form::default()
            .input("x", "f32", &json!([4, 3]))
            .node("a", "shape", &["x"], json!({"fn": "reshape", "to": [4, 1, 3]}))
            .output("output", "y")
    };
    let act = |form: Form, id: &str, x: &str| form.node(id, "unary", &[x], json!({"fn": "silu"}));
    let binary = |form: Form, id: &str, x: &[&str]| form.node(id, "binary", x, json!({"fn": "mul"}));
    let forms = [
        binary(form(), "y", &["a", "x"]),
        binary(act(form(), "s", "x"), "y", &["s", "a"]),
        binary(binary(act(act(form(), "s", "a"), "u", "x"), "v", &["s", "u"]), "y", &["v", "x"]),
    ];
    for form in forms {
        moec_tests::gallery::check(&form.graph(), host_target(), Arc::new(Cpu::new(1)), 4).expect("agrees");
    }
}

#[test]
fn segments_of_one_token_are_the_layer_of_tokens() {
    let layer = |form: Form, x: &str| {
        form.tensor("router", json!([4, 16]))
            .networks(16, json!(12))
            .node("l", "linear", &[x], json!({"w": "router"}))
            .node("s", "softmax", &["l"], json!({}))
            .node("q", "select", &["s"], json!({"rule": "topk", "k": 1}))
            .node("r", "weigh", &["q", "s"], json!({}))
            .node("d", "dispatch", &[x, "r"], json!({}))
            .node("e", "experts", &["d"], json!({"bank": [networks([0, 4])]}))
            .node("y", "combine", &["e", "r"], json!({}))
    };
    let base = || Form::default().input("x", "f32", &json!([TOKENS, 16]));
    let plain = layer(base(), "x").output("output", "y");
    let segments = base().node("p", "shape", &["x"], json!({"fn": "pad", "multiple": 1})).node(
        "v",
        "shape",
        &["p"],
        json!({"fn": "reshape", "to": [-1, 16]}),
    );
    let segments = layer(segments, "v")
        .node("f", "shape", &["y"], json!({"fn": "reshape", "to": [-1, 16]}))
        .node("z", "shape", &["f"], json!({"fn": "slice", "axis": 0, "range": [0, TOKENS]}))
        .output("output", "z");
    let [plain, segments] = [plain, segments].map(|form| {
        let (graph, data) = with(&form);
        results(&graph, &data)
    });
    close(&segments["output"], &plain["output"], "segments of one token");
}

#[test]
fn experts_of_a_step_are_one_network() {
    // The route of a step is the same for all its tokens: its experts side by side are a dense network.
    let (tokens, width, inner, chosen) = (6usize, 8usize, 5usize, [2, 0]);
    let routed = Form::default()
        .input("x", "f32", &json!([tokens, width]))
        .input("ids", "i32", &json!([1, 2]))
        .tensor("up.{e}", json!([inner, width]))
        .tensor("down.{e}", json!([width, inner]))
        .node("q", "select", &["ids"], json!({"rule": "given", "experts": 4}))
        .node("r", "weigh", &["q"], json!({"const": true, "scale": 0.5}))
        .node("d", "dispatch", &["x", "r"], json!({"repeat": tokens}))
        .node(
            "e",
            "experts",
            &["d"],
            json!({"bank": [{"ids": [0, 4], "kind": "ffn", "act": "gelu", "up": "up.{e}", "down": "down.{e}"}]}),
        )
        .node("y", "combine", &["e", "r"], json!({"repeat": tokens}))
        .output("output", "y");
    let dense = Form::default()
        .input("x", "f32", &json!([tokens, width]))
        .tensor("up", json!([2 * inner, width]))
        .tensor("down", json!([width, 2 * inner]))
        .node("y", "ffn", &["x"], json!({"act": "gelu", "up": "up", "down": "down"}))
        .output("output", "y");
    let [(routed, mut steps), (dense, mut fused)] = [routed, dense].map(|form| {
        let graph = form.graph();
        let data = data(&graph, tokens as u64, 5, Numbers::Small);
        (graph, data)
    });
    steps.set_ints("ids", &chosen);
    let of = |part: &str, e: i32| steps.weights.0[&format!("{part}.{e}")].floats();
    let up: Vec<f32> = chosen.iter().flat_map(|e| of("up", *e)).map(|v| v as f32).collect();
    let row = |e: i32, r: usize| of("down", e)[r * inner..(r + 1) * inner].to_vec();
    let down: Vec<f32> =
        (0..width).flat_map(|r| chosen.map(|e| row(e, r)).concat()).map(|v| (v * 0.5) as f32).collect();
    fused.set_weight("up", &up);
    fused.set_weight("down", &down);
    close(&results(&routed, &steps)["output"], &results(&dense, &fused)["output"], "experts of a step");
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
