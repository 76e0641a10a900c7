//! What a call is given beside its rows: arguments, and state from the call before.

use super::*;

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
fn a_layer_may_have_any_name() {
    let (mut graph, data) = with(&std_router(Form::new(16), 8, 16));
    let plain = results(&graph, &data);
    for name in ["top-k 0.5", "1/ä", "", "..", "a\"b"] {
        graph.name = name.into();
        for target in [host_target(), Target::Sm90a] {
            let layer = Compiled::new(&graph, target, device(target)).unwrap_or_else(|e| panic!("`{name}`: {e}"));
            close(&layer.run(&data).unwrap()["output"], &plain["output"], name);
        }
    }
}
