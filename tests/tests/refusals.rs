//! Bad graph files: each rule of the format refuses with its code and names the node; nothing panics.

use moec_ir::{
    Diagnostic, Severity,
    json::{Signature, read_graph, read_value, write_graph},
    verify,
};
use moec_tests::draw::Draw;
use serde_json::{Value, json};
use std::path::Path;

/// Errors of a graph file.
fn findings(file: &Value) -> Vec<Diagnostic> {
    match read_graph(&file.to_string(), &Signature::default()) {
        Err(found) => found,
        Ok(graph) => verify(&graph).into_iter().filter(|d| d.severity == Severity::Error).collect(),
    }
}

/// A layer of four experts over rows of 8, with these nodes in place of the standard ones of the same id.
fn layer(changed: &[Value]) -> Value {
    let mut nodes = vec![
        json!({"id": "l", "op": "linear", "in": ["x"], "w": "router"}),
        json!({"id": "s", "op": "softmax", "in": ["l"]}),
        json!({"id": "a", "op": "adjust", "in": ["s"], "off": []}),
        json!({"id": "q", "op": "select", "in": ["a"], "rule": "topk", "k": 2}),
        json!({"id": "r", "op": "weigh", "in": ["q", "s"], "norm": "sum"}),
        json!({"id": "d", "op": "dispatch", "in": ["x", "r"]}),
        json!({"id": "e", "op": "experts", "in": ["d"],
            "bank": [{"ids": [0, 4], "kind": "ffn", "act": "silu", "gate": "g.{e}", "up": "u.{e}", "down": "d.{e}"}]}),
        json!({"id": "y", "op": "combine", "in": ["e", "r"]}),
    ];
    for node in changed {
        match nodes.iter_mut().find(|n| n["id"] == node["id"]) {
            Some(old) => *old = node.clone(),
            None => nodes.push(node.clone()),
        }
    }
    let t = |shape: Value| json!({"dtype": "f32", "shape": shape});
    json!({"format": "moec-graph-1", "nodes": nodes, "outputs": {"output": "y"},
        "inputs": {"x": t(json!(["T", 8])), "class": {"dtype": "i32", "shape": ["T"]}, "state_h_in": t(json!(["T", 3]))},
        "tensors": {"router": t(json!([4, 8])), "g.{e}": t(json!([6, 8])), "u.{e}": t(json!([6, 8])),
            "d.{e}": t(json!([8, 6])), "narrow.{e}": t(json!([7, 6])), "wide.{e}": t(json!([5, 8])),
            "a.{e}": t(json!([6, 3])), "b.{g}": t(json!([2, 8])), "c.{e}": {"dtype": "i32", "shape": [6, 8]},
            "z.{e}": t(json!([6, 3]))}})
}

fn bank(parts: Value) -> Value {
    json!({"id": "e", "op": "experts", "in": ["d"], "bank": parts})
}

#[test]
fn every_check_names_its_node() {
    let ffn = |ids: [u64; 2]| json!({"ids": ids, "kind": "ffn", "act": "silu", "up": "u.{e}", "down": "d.{e}"});
    let select = |rule: Value| {
        let mut node = json!({"id": "q", "op": "select", "in": ["a"]});
        node.as_object_mut().unwrap().extend(rule.as_object().unwrap().clone());
        node
    };
    let with = |mut part: Value, key: &str, value: Value| {
        part[key] = value;
        part
    };
    let cases: Vec<(&str, &str, Vec<Value>)> = vec![
        // 1: parts cover the experts once, and have one output width.
        ("I0017", "e", vec![bank(json!([ffn([0, 3])]))]),
        ("I0017", "e", vec![bank(json!([ffn([0, 3]), ffn([2, 4])]))]),
        ("I0017", "e", vec![bank(json!([ffn([0, 5])]))]),
        ("I0018", "e", vec![bank(json!([ffn([0, 2]), with(ffn([2, 4]), "down", json!("narrow.{e}"))]))]),
        // 2: k, groups, ranks, forced experts.
        ("I0012", "q", vec![select(json!({"rule": "topk", "k": 5}))]),
        ("I0012", "q", vec![select(json!({"rule": "group_topk", "groups": 2, "k": 3}))]),
        ("I0013", "q", vec![select(json!({"rule": "group_topk", "groups": 3, "k": 1}))]),
        ("I0014", "q", vec![select(json!({"rule": "group_limited", "groups": 2, "keep_groups": 3, "k": 1}))]),
        ("I0014", "q", vec![select(json!({"rule": "group_limited", "groups": 2, "keep_groups": 1, "k": 3}))]),
        ("I0015", "a", vec![json!({"id": "a", "op": "adjust", "in": ["s"], "on": [0, 1, 2]})]),
        ("I0015", "a", vec![json!({"id": "a", "op": "adjust", "in": ["s"], "on": [1], "off": [1]})]),
        ("I0015", "a", vec![json!({"id": "a", "op": "adjust", "in": ["s"], "off": [4]})]),
        ("I0016", "q", vec![select(json!({"rule": "rank", "ranks": [1, 1]}))]),
        ("I0016", "q", vec![select(json!({"rule": "rank", "ranks": [4]}))]),
        // 3: classes.
        (
            "I0019",
            "a",
            vec![json!({"id": "a", "op": "adjust", "in": ["s"], "class": "class", "class_experts": {"0": [7]}})],
        ),
        ("I0006", "a", vec![json!({"id": "a", "op": "adjust", "in": ["s"], "class": "class"})]),
        // 4: weights of routes.
        ("I0020", "y", vec![json!({"id": "y", "op": "combine", "in": ["e", "q"]})]),
        ("I0021", "y", vec![json!({"id": "d", "op": "dispatch", "in": ["x", "r"], "weighted": true})]),
        // 6: repeat and pad.
        ("I0023", "d", vec![json!({"id": "d", "op": "dispatch", "in": ["x", "r"], "repeat": 2})]),
        ("I0023", "y", vec![json!({"id": "y", "op": "combine", "in": ["e", "r"], "repeat": 2})]),
        ("I0024", "y", vec![json!({"id": "y", "op": "shape", "in": ["x"], "fn": "pad", "multiple": 4})]),
        // 7: shapes of experts and of factors.
        ("I0025", "e", vec![bank(json!([with(ffn([0, 4]), "gate", json!("wide.{e}"))]))]),
        ("I0025", "e", vec![bank(json!([with(ffn([0, 4]), "up", json!("wide.{e}"))]))]),
        ("I0006", "e", vec![bank(json!([with(with(ffn([0, 4]), "gate", json!("g.{e}")), "limit", json!(-1.5))]))]),
        (
            "I0026",
            "e",
            vec![bank(json!([with(ffn([0, 4]), "up", json!({"mul": ["a.{e}", "b.{g}"], "group": [0, 0, 0, 0]}))]))],
        ),
        (
            "I0027",
            "e",
            vec![bank(json!([with(
                ffn([0, 4]),
                "up",
                json!({"codes": "c.{e}", "scale": "z.{e}", "zero": "z.{e}", "group_size": 3})
            )]))],
        ),
        // 8: batch dependence.
        ("I0028", "q", vec![select(json!({"rule": "expert_choice", "capacity": 2}))]),
        (
            "I0028",
            "a",
            vec![json!({"id": "a", "op": "transport", "in": ["s"], "kind": "sinkhorn", "xi": 1.0, "iters": 2})],
        ),
        // Kinds of values, names, operations, attributes.
        ("I0010", "r", vec![json!({"id": "r", "op": "weigh", "in": ["s"]})]),
        ("I0004", "y", vec![json!({"id": "y", "op": "combine", "in": ["e", "nobody"]})]),
        ("I0002", "s", vec![json!({"id": "s", "op": "softmax", "in": ["l", "l"]})]),
        ("I0005", "s", vec![json!({"id": "s", "op": "softmix", "in": ["l"]})]),
        ("I0006", "s", vec![json!({"id": "s", "op": "softmax", "in": ["l"], "tempo": 2})]),
        ("I0006", "s", vec![json!({"id": "s", "op": "softmax", "in": ["l"], "temp": "warm"})]),
        ("I0006", "s", vec![json!({"id": "s", "op": "softmax", "in": ["l"], "temp": null})]),
        ("I0006", "q", vec![select(json!({"rule": "topk", "k": -1}))]),
        ("I0006", "q", vec![select(json!({"rule": "topk", "k": 1.5}))]),
        ("I0006", "q", vec![select(json!({"rule": "all", "k": 1}))]),
        ("I0034", "s", vec![json!({"id": "s", "op": "softmax", "in": ["l"], "temp": 0})]),
    ];
    for (code, node, changed) in cases {
        let found = findings(&layer(&changed));
        let named = found.iter().any(|d| d.code.0 == code && d.message.contains(&format!("node `{node}`")));
        assert!(named, "{code} at `{node}` is due for {changed:?}: {found:?}");
    }
    assert!(findings(&layer(&[])).is_empty(), "{:?}", findings(&layer(&[])));
    // 9: states.
    let mut file =
        layer(&[json!({"id": "h", "op": "shape", "in": ["state_h_in"], "fn": "slice", "axis": 1, "range": [0, 2]})]);
    file["outputs"]["state_h"] = json!("h");
    assert!(findings(&file).iter().any(|d| d.code.0 == "I0029" && d.message.contains("state_h")));
    // 5 is a warning.
    let file = layer(&[json!({"id": "r", "op": "weigh", "in": ["q", "l"], "norm": "sum"})]);
    let graph = read_graph(&file.to_string(), &Signature::default()).unwrap();
    let found = verify(&graph);
    assert!(found.iter().any(|d| d.code.0 == "I0022" && d.message.contains("node `r`")), "{found:?}");
}

#[test]
fn what_is_left_out_is_named_with_its_reason() {
    let cases = [
        ("conv1d", "convolution"),
        ("key_conv", "convolution"),
        ("depthwise_convolution", "convolution"),
        ("load_balance_loss", "losses"),
        ("z_loss", "losses"),
        ("grad", "gradients"),
        ("update", "updates"),
        ("contrast", "contrast of logits"),
        ("data_selection", "Union-of-Experts"),
        ("residual_attention", "LaTtE-Flow"),
        ("gumbel", "random numbers"),
        ("all_to_all", "communication"),
    ];
    for (op, reason) in cases {
        let found = findings(&layer(&[json!({"id": "s", "op": op, "in": ["l"]})]));
        assert_eq!(found.len(), 1, "{op}: {found:?}");
        let message = &found[0].message;
        assert!(found[0].code.0 == "I0042" && message.contains("node `s`"), "{op}: {found:?}");
        assert!(message.contains(op) && message.contains(reason), "{op}: {message}");
        assert!(found[0].help.is_some(), "{op} has no next step");
    }
    let neuron = json!({"ids": [0, 4], "kind": "neuron", "u": "router", "v": "router", "act": "gelu", "shuffle": true});
    let found = findings(&layer(&[bank(json!([neuron]))]));
    assert!(found[0].code.0 == "I0042" && found[0].message.contains("UltraMemV2"), "{found:?}");
}

#[test]
fn a_key_or_a_name_stands_once() {
    let text = layer(&[]).to_string().replacen("\"k\":2", "\"k\":2,\"k\":3", 1);
    let found = read_graph(&text, &Signature::default()).unwrap_err();
    assert!(found[0].code.0 == "I0040" && found[0].message.contains("`k` stands twice"), "{found:?}");
    let mut file = layer(&[]);
    let nodes = file["nodes"].as_array_mut().unwrap();
    nodes.push(json!({"id": "s", "op": "softmax", "in": ["l"]}));
    let found = findings(&file);
    assert!(found[0].code.0 == "I0004" && found[0].message.contains("node `s`"), "{found:?}");
    // A value that depends on itself cannot be written: nodes name earlier ones only.
    let found = findings(&layer(&[json!({"id": "s", "op": "softmax", "in": ["s"]})]));
    assert!(found[0].code.0 == "I0004" && found[0].message.contains("no earlier node"), "{found:?}");
}

/// Graph files of the gallery.
fn gallery() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/systems");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    files.retain(|f| f.extension().is_some_and(|e| e == "json"));
    files.into_iter().map(|f| std::fs::read_to_string(f).unwrap()).collect()
}

/// Values that fit nowhere, or anywhere.
fn odd(draw: &mut Draw) -> Value {
    let all = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1u64 << 40),
        json!(1e308),
        json!(-0.5),
        json!(""),
        json!("x"),
        json!("T"),
        json!("{e}{g}{i}"),
        json!("r.idx"),
        json!([]),
        json!([[0, u64::MAX]]),
        json!({}),
        json!({"mul": ["x", "x"], "group": []}),
    ];
    all[draw.place(all.len())].clone()
}

/// Changes one value somewhere inside.
fn spoil(value: &mut Value, draw: &mut Draw) {
    let count = match value {
        Value::Array(items) => items.len(),
        Value::Object(map) => map.len(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    };
    if count == 0 || draw.place(8) == 0 {
        *value = odd(draw);
        return;
    }
    let at = draw.place(count);
    match value {
        Value::Array(items) => match draw.place(10) {
            0 => {
                items.remove(at);
            }
            1 => items.insert(at, items[at].clone()),
            2 => items.swap(0, at),
            _ => spoil(&mut items[at], draw),
        },
        Value::Object(map) => {
            let key = map.keys().nth(at).unwrap().clone();
            if draw.place(12) == 0 {
                map.remove(&key);
            } else {
                spoil(&mut map[&key], draw);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Reads and checks; what is read is written and read again. Only a panic is a failure.
fn survive(text: &str) {
    let Ok(graph) = read_graph(text, &Signature::default()) else { return };
    let errors = verify(&graph).iter().any(|d| d.severity == Severity::Error);
    if !errors {
        let again = read_value(&write_graph(&graph), &Signature::default());
        assert!(again.is_ok(), "what was read cannot be read again: {again:?}\n{text}");
    }
}

#[test]
fn spoilt_files_are_refused_or_read_but_never_panic() {
    let rounds: usize = std::env::var("MOEC_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let mut draw = Draw(7);
    for text in gallery() {
        let whole: Value = serde_json::from_str(&text).unwrap();
        for _ in 0..rounds {
            let mut file = whole.clone();
            for _ in 0..=draw.place(3) {
                spoil(&mut file, &mut draw);
            }
            survive(&file.to_string());
            let mut bytes = text.clone().into_bytes();
            for _ in 0..=draw.place(4) {
                let at = draw.place(bytes.len());
                match draw.place(4) {
                    0 => bytes[at] = draw.place(256) as u8,
                    1 => {
                        bytes.remove(at);
                    }
                    2 => bytes.insert(at, b"0123456789\"{}[],:-e."[draw.place(20)]),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            survive(&String::from_utf8_lossy(&bytes));
        }
    }
}
