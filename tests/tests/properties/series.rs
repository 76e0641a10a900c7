//! Banks one behind the other.

use super::*;

#[test]
fn banks_in_series_pass_rows_on() {
    let matrices = |ids: [u64; 2], of: &str| json!({"ids": ids, "kind": "linear", "w": format!("{of}.{{e}}")});
    let biased = json!({"ids": [0, 4], "kind": "linear", "w": "second.{e}", "bias": "bias.{e}"});
    let ids = |ids: [u64; 2], kind: &str| json!({"ids": ids, "kind": kind});
    let series = [
        // Rows of which nothing comes are not read.
        [json!([matrices([0, 4], "first")]), json!([ids([0, 1], "zero"), matrices([1, 4], "second")])],
        // A row of zeros still meets the bias.
        [json!([matrices([0, 2], "first"), ids([2, 4], "zero")]), json!([biased])],
        [json!([ids([0, 1], "identity"), matrices([1, 4], "first")]), json!([biased])],
        [json!([ids([0, 4], "identity")]), json!([matrices([0, 3], "second"), ids([3, 4], "zero")])],
    ];
    for [first, second] in series {
        for attends in [false, true] {
            let mut form = Form::new(8)
                .router(4, 2, 8)
                .tensor("first.{e}", json!([8, 8]))
                .tensor("second.{e}", json!([8, 8]))
                .tensor("bias.{e}", json!([8]))
                .node("d", "dispatch", &["x", "r"], json!({}))
                .node("e1", "experts", &["d"], json!({"bank": first}));
            if attends {
                form = form.node("a", "attention", &["e1", "x", "x"], json!({}));
            }
            let form = form
                .node("e2", "experts", &[if attends { "a" } else { "e1" }], json!({"bank": second}))
                .node("y", "combine", &["e2", "r"], json!({}))
                .output("output", "y");
            let (graph, data) = with(&form);
            let expected = data.expected(&graph).unwrap();
            close(&results(&graph, &data)["output"], &expected["output"], &format!("{first} {second} {attends}"));
        }
    }
}

/// A bank of four experts of this kind, with weights of its own.
fn of_kind(form: Form, kind: &str, at: usize) -> (Form, serde_json::Value) {
    let name = |weight: &str| format!("{weight}{at}");
    let each = |weight: &str| format!("{weight}{at}.{{e}}");
    let ids = json!([0, 4]);
    match kind {
        "ffn" => (
            form.tensor(&each("gate"), json!([5, 8]))
                .tensor(&each("up"), json!([5, 8]))
                .tensor(&each("down"), json!([8, 5])),
            json!({"ids": ids, "kind": "ffn", "act": "silu", "gate": each("gate"), "up": each("up"), "down": each("down")}),
        ),
        "linear" => (form.tensor(&each("w"), json!([8, 8])), json!({"ids": ids, "kind": "linear", "w": each("w")})),
        "film" => (
            form.tensor(&each("mul"), json!([8, 8]))
                .tensor(&each("add"), json!([8, 8]))
                .tensor(&each("bias"), json!([8])),
            json!({"ids": ids, "kind": "film", "mul": each("mul"), "add": each("add"), "add_bias": each("bias")}),
        ),
        "neuron" => (
            form.tensor(&name("u"), json!([4, 8])).tensor(&name("v"), json!([4, 8])),
            json!({"ids": ids, "kind": "neuron", "act": "gelu", "u": name("u"), "v": name("v")}),
        ),
        "const" => (form.tensor(&name("c"), json!([4, 8])), json!({"ids": ids, "kind": "const", "value": name("c")})),
        plain => (form, json!({"ids": ids, "kind": plain})),
    }
}

#[test]
fn every_kind_may_stand_before_and_behind_every_other() {
    let kinds = ["ffn", "linear", "film", "neuron", "const", "identity", "zero"];
    let pairs = kinds.iter().flat_map(|a| kinds.iter().map(move |b| [*a, *b]));
    let three = [["film", "neuron", "ffn"], ["const", "film", "linear"]];
    let all = pairs.map(|pair| pair.to_vec()).chain(three.map(|three| three.to_vec()));
    for (n, series) in all.enumerate() {
        // Weights count once: before the first bank, or behind the last.
        let early = n % 3 == 0;
        let mut form = Form::new(8).router(4, 3, 8).node("e0", "dispatch", &["x", "r"], json!({"weighted": early}));
        for (at, kind) in series.iter().enumerate() {
            let (grown, part) = of_kind(form, kind, at);
            form = grown.node(&format!("e{}", at + 1), "experts", &[&format!("e{at}")], json!({"bank": [part]}));
        }
        let last = format!("e{}", series.len());
        let form = form.node("y", "combine", &[&last, "r"], json!({"weighted": !early})).output("output", "y");
        let (graph, data) = with(&form);
        let expected = data.expected(&graph).unwrap();
        // The simulator is slow; what differs between targets are the kernels, which few series show.
        let targets = if n % 4 == 1 { vec![host_target(), Target::Sm80] } else { vec![host_target()] };
        for target in targets {
            let found = Compiled::new(&graph, target, device(target)).unwrap_or_else(|e| panic!("{series:?}: {e}"));
            close(&found.run(&data).unwrap()["output"], &expected["output"], &format!("{series:?} {}", target.name()));
        }
    }
}

#[test]
fn a_series_that_has_no_kernels_is_refused_by_name() {
    let (form, film) = of_kind(Form::new(8).router(4, 2, 8), "film", 0);
    let (form, network) = of_kind(form, "ffn", 1);
    let mixed = json!([{"ids": [0, 2], "kind": "identity"}, {"ids": [2, 4], "kind": "ffn", "act": "silu", "gate": network["gate"], "up": network["up"], "down": network["down"]}]);
    let form = form
        .node("d", "dispatch", &["x", "r"], json!({}))
        .node("e1", "experts", &["d"], json!({"bank": mixed}))
        .node("a", "attention", &["e1", "x", "x"], json!({}))
        .node("e2", "experts", &["a"], json!({"bank": [film]}))
        .node("y", "combine", &["e2", "r"], json!({}))
        .output("output", "y");
    let (graph, _) = with(&form);
    let error = Compiled::new(&graph, host_target(), device(host_target())).err().expect("is refused").to_string();
    assert!(error.contains("e1") && error.contains("identity") && error.contains("in series"), "{error}");
}
