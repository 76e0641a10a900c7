//! Forms that become a plainer one at the end of what they can be.

use super::*;
use serde_json::Value;

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
fn a_network_without_neurons_gives_zeros() {
    let forms = [
        Form::new(16).tensor("up", json!([0, 16])).tensor("down", json!([5, 0])).tensor("bias", json!([5])).node(
            "y",
            "ffn",
            &["x"],
            json!({"act": "gelu", "up": "up", "down": "down", "down_bias": "bias"}),
        ),
        Form::new(16).tensor("up", json!([0, 16])).tensor("down", json!([20, 16])).typed("ids", "i32", json!([0])).node(
            "y",
            "ffn",
            &["x"],
            json!({"act": "silu", "gate": "up", "up": {"take": "down", "ids": "ids", "axis": 0}, "down": {"take": "down", "ids": "ids", "axis": 1}}),
        ),
    ];
    for (form, width) in forms.into_iter().zip([5, 20]) {
        let (graph, data) = with(&form.output("output", "y"));
        for target in [host_target(), Target::Sm90a] {
            let found = Compiled::new(&graph, target, device(target)).unwrap().run(&data).unwrap();
            assert_eq!(found["output"], vec![0.0; TOKENS as usize * width], "{}", target.name());
        }
    }
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

/// A layer that takes all of its experts, whose matrices are parts of `w1` and `w2` (axis 0 and 1), beside the dense layer
/// of these two.
fn beside_dense(experts: u64, inner: u64, act: &str, part: impl Fn(&str, u64) -> Value) -> Form {
    let bank = json!([{"ids": [0, experts], "kind": "ffn", "act": act, "up": part("w1", 0), "down": part("w2", 1)}]);
    Form::new(16)
        .tensor("router", json!([experts, 16]))
        .tensor("w1", json!([inner, 16]))
        .tensor("w2", json!([16, inner]))
        .node("l", "linear", &["x"], json!({"w": "router"}))
        .node("q", "select", &["l"], json!({"rule": "all"}))
        .node("r", "weigh", &["q"], json!({"const": true}))
        .mixture(bank)
        .node("dense", "ffn", &["x"], json!({"act": act, "up": "w1", "down": "w2"}))
        .output("dense", "dense")
}

#[test]
fn all_slices_are_the_dense_layer() {
    let (graph, data) = with(&beside_dense(4, 32, "gelu", |w, axis| json!({"slice": w, "axis": axis, "n": 4})));
    let found = results(&graph, &data);
    close(&found["output"], &found["dense"], "slices and dense");
}

#[test]
fn disjoint_sets_of_neurons_are_the_dense_layer() {
    let form = beside_dense(2, 8, "silu", |w, axis| json!({"take": w, "ids": "set.{e}", "axis": axis}));
    let (graph, mut data) = with(&form.typed("set.{e}", "i32", json!([4])));
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
        moec_tests::gallery::check(&form.graph(), host_target(), Arc::new(Cpu::new(1)), &[4, 0]).expect("agrees");
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
fn numbers_for_all_rows_may_have_an_axis_for_rows() {
    // The row of numbers has rank 2, as the tensor, and the sum still is over the axis inside its rows.
    let best = Form::new(6).node("m", "reduce", &["x"], json!({"fn": "max", "axis": 0, "keep": true})).node(
        "d",
        "binary",
        &["x", "m"],
        json!({"fn": "sub"}),
    );
    let weight = Form::new(6).tensor("w", json!([1, 6])).node("d", "binary", &["x"], json!({"fn": "mul", "w": "w"}));
    for form in [best, weight] {
        let form =
            form.node("y", "reduce", &["d"], json!({"fn": "sum", "axis": 1, "keep": true})).output("output", "y");
        moec_tests::gallery::check(&form.graph(), host_target(), Arc::new(Cpu::new(1)), &[TOKENS, 0]).expect("agrees");
    }
}

#[test]
fn a_capacity_of_none_reads_no_row() {
    let form = |rule: serde_json::Value, limit: Option<u64>| {
        let form =
            Form::new(16).batch().tensor("router", json!([4, 16])).node("l", "linear", &["x"], json!({"w": "router"}));
        let form = form.node("s", "select", &["l"], rule);
        let (form, route) = match limit {
            Some(n) => (form.node("c", "limit", &["s"], json!({"capacity": n})), "c"),
            None => (form, "s"),
        };
        form.node("r", "weigh", &[route, "l"], json!({})).networks(16, json!(12)).mixture(json!([networks([0, 4])]))
    };
    let forms =
        [form(json!({"rule": "expert_choice", "capacity": 0}), None), form(json!({"rule": "topk", "k": 2}), Some(0))];
    for form in forms {
        for target in [Target::Sm80, Target::Sm90a] {
            let sim = Arc::new(Sim::new(moec_sim::Options::default()));
            moec_tests::gallery::check(&form.graph(), target, sim, &[5, 0]).expect("agrees, without a finding");
        }
    }
}

#[test]
fn a_product_of_a_vector_is_that_of_a_row() {
    let of = |shape: serde_json::Value, sum: &[&str]| {
        Form::new(6)
            .input("v", "f32", &shape)
            .tensor("w", json!([6, 6]))
            .tensor("b", json!([6]))
            .node("a", "linear", &["v"], json!({"w": "w", "b": "b"}))
            .node("f", "ffn", &["a"], json!({"act": "silu", "up": "w", "down": "w"}))
            .node("y", "binary", sum, json!({"fn": "mul"}))
            .output("output", "y")
    };
    let (vector, row) = (of(json!([6]), &["x", "f"]), of(json!([1, 6]), &["x", "f"]));
    let [vector, row] = [vector, row].map(|form| {
        let (graph, data) = with(&form);
        results(&graph, &data).remove("output").expect("a result")
    });
    assert!(vector.iter().any(|v| *v != 0.0));
    close(&vector, &row, "a vector");
}

#[test]
fn parts_come_in_any_order() {
    let form = |bank: serde_json::Value| Form::new(16).router(6, 3, 16).networks(16, json!(12)).mixture(bank);
    let same = json!({"ids": [4, 5], "kind": "identity"});
    let none = json!({"ids": [5, 6], "kind": "zero"});
    let [sorted, mixed] = [json!([networks([0, 4]), same, none]), json!([none, same, networks([0, 4])])].map(|bank| {
        let (graph, data) = with(&form(bank));
        results(&graph, &data)
    });
    assert_eq!(sorted, mixed);
}

#[test]
fn either_factor_may_belong_to_the_group() {
    let form = |up: serde_json::Value| {
        let bank = json!([{"ids": [0, 4], "kind": "ffn", "act": "silu", "up": up, "down": "down.{e}"}]);
        let form = Form::new(16).router(4, 2, 16).tensor("down.{e}", json!([16, 12]));
        form.tensor("own.{e}", json!([5, 16])).tensor("shared.{g}", json!([12, 5])).mixture(bank)
    };
    let graph = form(json!({"mul": ["shared.{g}", "own.{e}"], "group": [1, 0, 0, 1]})).graph();
    moec_tests::gallery::check(&graph, host_target(), Arc::new(Cpu::new(1)), &[TOKENS, 0]).expect("agrees");
    let swapped = form(json!({"mul": ["shared.{g}", "own.{e}"], "group": [0, 1, 1, 0]}));
    let (other, data) = with(&swapped);
    assert_ne!(results(&graph, &data)["output"], results(&other, &data)["output"]);
}

#[test]
fn integers_count_as_numbers() {
    let form = |dtype: &str| {
        Form::default()
            .input("x", dtype, &json!(["T", 16]))
            .router(4, 2, 16)
            .networks(16, json!(12))
            .tensor("wide", json!([64, 16]))
            .node("big", "linear", &["x"], json!({"w": "wide"}))
            .node("best", "reduce", &["x"], json!({"fn": "max", "axis": 0}))
            .node("f", "ffn", &["x"], json!({"act": "silu", "up": "wide", "down": "back"}))
            .tensor("back", json!([16, 64]))
            .node("heads", "shape", &["x"], json!({"fn": "reshape", "to": [-1, 2, 8]}))
            .node("read", "attention", &["heads", "heads", "heads"], json!({}))
            .node("top", "select", &["x"], json!({"rule": "topk", "k": 3}))
            .node("own", "weigh", &["top", "x"], json!({"fn": "softmax"}))
            .mixture(json!([networks([0, 4])]))
            .output("big", "big")
            .output("best", "best")
            .output("f", "f")
            .output("read", "read")
            .output("own", "own.w")
    };
    let [(ints, mut whole), (floats, mut data)] = ["i32", "f32"].map(|dtype| with(&form(dtype)));
    let values: Vec<i32> = (0..TOKENS as i32 * 16).map(|i| i * 7 % 5 - 2).collect();
    whole.set_ints("x", &values);
    data.set("x", &values.iter().map(|v| *v as f32).collect::<Vec<_>>());
    assert_eq!(results(&ints, &whole), results(&floats, &data));
}
