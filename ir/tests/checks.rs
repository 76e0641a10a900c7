//! What is refused, with which code: one bad form for each rule.

use moec_ir::{
    Graph, Op, Severity,
    json::{Signature, read_graph},
    parse, print, verify,
};
use serde_json::{Value, json};

const WEIGHTS: &str = r#"
  weights {
    gate: f32[8, 16]
    wide: f32[8, 17]
    bias: f32[8]
    scale: f32[7]
    table: i32[5, 2]
    theta: f32[8, 16]
    "up.{e}": f32[12, 16]
    "down.{e}": f32[16, 12]
    "down7.{e}": f32[7, 12]
    "narrow.{e}": f32[16, 11]
    "codes.{e}": i32[12, 16]
    "scale.{e}": f32[12, 3]
    "a.{e}": f32[12, 4]
    "b.{g}": f32[5, 16]
  }
  %x = input "x" : f32[T, 16]
  %ids = input "ids" : i32[T]
"#;

const ROUTER: &str = r#"
  %l = linear %x {w = "gate"}
  %s = softmax %l
  %q = select %s {rule = "topk", k = 2}
  %r = weigh %q, %s {norm = "sum"}
  %d = dispatch %x, %r
"#;

/// Codes and messages for a graph with these nodes; the last value is the result.
fn findings(nodes: &str) -> String {
    let text = format!("moe.graph @g {{ {WEIGHTS} {nodes}\n return output = %y }}");
    match parse(&text) {
        Err(found) => format!("{} {}", found.code.0, found.message),
        Ok(graph) => {
            let all: Vec<String> =
                verify(&graph).iter().map(|d| format!("{:?} {} {}", d.severity, d.code.0, d.message)).collect();
            all.join("\n")
        }
    }
}

#[track_caller]
fn refused(code: &str, words: &[&str], nodes: &str) {
    let found = findings(nodes);
    assert!(found.contains(code), "{nodes}\n{found}");
    for word in words {
        assert!(found.contains(word), "no `{word}` in: {found}");
    }
}

#[track_caller]
fn accepted(nodes: &str) {
    assert_eq!(findings(nodes), "", "{nodes}");
}

#[test]
fn operands_and_shapes() {
    accepted(r#"%y = linear %x {w = "gate", b = "bias"}"#);
    refused("I0002", &["`y`", "0 operands", "takes 1"], r#"%y = linear {w = "gate"}"#);
    refused("I0004", &["%z"], r#"%y = unary %z {fn = "relu"}"#);
    refused("I0004", &["defined twice"], r#"%x = unary %x {fn = "relu"} %y = unary %x {fn = "relu"}"#);
    refused("I0005", &["`linea`"], r#"%y = linea %x {w = "gate"}"#);
    refused("I0006", &["nope"], r#"%y = linear %x {w = "gate", nope = 1}"#);
    refused("I0009", &["`gone`"], r#"%y = linear %x {w = "gone"}"#);
    refused("I0010", &["must be a route", "tensor"], "%y = count %x");
    refused("I0011", &["17", "16"], r#"%y = linear %x {w = "wide"}"#);
    refused("I0011", &["[T, 16]", "[8]"], r#"%y = binary %x {fn = "add", w = "bias"}"#);
    refused(
        "I0011",
        &["element by element"],
        r#"%t = shape %x {fn = "slice", axis = 0, range = [0, 8]} %y = binary %x, %t {fn = "add"}"#,
    );
    refused("I0031", &["`te->tt`", "twice"], r#"%y = einsum %x {eq = "te->tt"}"#);
    refused("I0031", &["`z`"], r#"%y = einsum %x {eq = "te->z"}"#);
    refused("I0031", &["no place"], r#"%y = einsum %x, %x {eq = "t...,t...->t"}"#);
    refused("I0031", &["`.` is no axis"], r#"%y = einsum %x {eq = "...a...->a"}"#);
    refused("I0031", &["`tab`", "[T, 16]"], r#"%y = einsum %x {eq = "tab...->t..."}"#);
    refused("I0002", &["1 operands", "2"], r#"%y = einsum %x {eq = "...,...->..."}"#);
    let slice = |range: &str| format!(r#"%y = shape %x {{fn = "slice", axis = 1, range = {range}}}"#);
    accepted(&slice("[1, 16, 3]"));
    accepted(&slice("[-1, -17, -1]"));
    accepted(&slice("[16, 16]"));
    for outside in ["[1, 17]", "[-2, 2]", "[-17, -1]", "[3, 2]", "[2, 3, -1]", "[15, -2, -1]"] {
        refused("I0011", &["of axis 1, which has 16 entries"], &slice(outside));
    }
    refused("I0006", &["[start, end, step]"], &slice("[0, 4, 0]"));
    refused("I0006", &["[start, end, step]"], &slice("[4]"));
    refused("I0011", &["axis 0, which has T"], r#"%y = shape %x {fn = "slice", axis = 0, range = [-2, -1]}"#);
    refused("I0034", &["`perm`"], r#"%y = shape %x {fn = "transpose", perm = [1, -1]}"#);
    refused("I0030", &[], r#"%y = shape %x {fn = "reshape", to = [9223372036854775807, 4, -1]}"#);
    refused("I0034", &["temp"], r#"%y = softmax %x {temp = 0.0}"#);
    refused("I0033", &["stated as f32[T, 9]"], r#"%y = linear %x {w = "gate"} : f32[T, 9]"#);
}

#[test]
fn sizes_in_t() {
    accepted(
        r#"%p = shape %x {fn = "reshape", to = [-1, 4]} : f32[4*T, 4] %y = shape %p {fn = "reshape", to = [-1, 16]} : f32[T, 16]"#,
    );
    accepted(
        r#"%p = shape %x {fn = "pad", multiple = 4} : f32[4*ceil(T / 4), 16]
        %s = shape %p {fn = "reshape", to = [-1, 64]} : f32[ceil(T / 4), 64]
        %b = shape %s {fn = "reshape", to = [-1, 16]} : f32[4*ceil(T / 4), 16]
        %y = shape %b {fn = "slice", axis = 0, range = [0, 3]} : f32[3, 16]"#,
    );
    accepted(r#"%y = einsum %x, %x {eq = "td,ud->tu"} : f32[T, T]"#);
    accepted(r#"%y = shape %x, %x {fn = "concat", axis = 0} : f32[2*T, 16]"#);
    accepted(r#"%y = shape %x, %x, %x {fn = "stack", axis = -1} : f32[T, 16, 3]"#);
    accepted(r#"%y = shape %x {fn = "transpose", perm = [1, 0]} : f32[16, T]"#);
    accepted(r#"%y = shape %x {fn = "transpose", perm = [-1, 0]} : f32[16, T]"#);
    accepted(r#"%y = shape %x {fn = "slice", axis = 1, range = [-3, -16, -5]} : f32[T, 3]"#);
    accepted(r#"%y = gather %ids {w = "table"} : i32[T, 2]"#);
    accepted(r#"%y = einsum %x, %x {eq = "...d,...d->..."} : f32[T]"#);
    accepted(r#"%y = einsum %x, %x {eq = "td,ud"} : f32[T, T]"#);
    accepted(r#"%y = einsum %x {eq = "da"} : f32[16, T]"#);
}

#[test]
fn routers() {
    let select = |rule: &str| format!("%l = linear %x {{w = \"gate\"}} %q = select %l {{{rule}}} %y = count %q");
    accepted(&select(r#"rule = "topk", k = 8"#));
    refused("I0012", &["k is 9", "8 experts"], &select(r#"rule = "topk", k = 9"#));
    refused("I0012", &["k is 3", "2 experts in a group"], &select(r#"rule = "group_topk", groups = 4, k = 3"#));
    refused("I0013", &["3 groups", "8 experts"], &select(r#"rule = "group_topk", groups = 3, k = 1"#));
    refused("I0014", &["5", "4 groups"], &select(r#"rule = "group_limited", groups = 4, keep_groups = 5, k = 1"#));
    refused(
        "I0014",
        &["k is 3", "2 experts"],
        &select(r#"rule = "group_limited", groups = 4, keep_groups = 1, k = 3"#),
    );
    refused("I0016", &["rank 8"], &select(r#"rule = "rank", ranks = [0, 8]"#));
    refused("I0016", &["rank 1", "twice"], &select(r#"rule = "rank", ranks = [1, 1]"#));
    refused("I0028", &["`q`"], &select(r#"rule = "expert_choice", capacity = 4"#));
    refused("I0006", &["`k`"], &select(r#"rule = "all", k = 2"#));
    let adjust = |attributes: &str, operands: &str| {
        format!(
            "%l = linear %x {{w = \"gate\"}} %a = adjust %l{operands} {{{attributes}}} %q = select %a {{rule = \"topk\", k = 1}} %y = count %q"
        )
    };
    refused("I0015", &["forces 2", "selects 1"], &adjust("on = [1, 2]", ""));
    refused("I0015", &["expert 3"], &adjust("on = [3], off = [3]", ""));
    refused("I0015", &["expert 8 of 8"], &adjust("off = [8]", ""));
    refused("I0019", &["class 1", "expert 9"], &adjust("class_experts = {\"0\" = [1], \"1\" = [9]}", ", %ids"));
    refused("I0019", &["`text`"], &adjust("class_experts = {text = [1]}", ", %ids"));
    let weigh = |attributes: &str| {
        format!(
            "%l = linear %x {{w = \"gate\"}} %q = select %l {{rule = \"topk\", k = 2}} %r = weigh %q, %l {{{attributes}}} %y = count %r"
        )
    };
    refused("Warning I0022", &["`l`"], &weigh(r#"norm = "sum""#));
    accepted(&weigh(r#"norm = "sum", fn = "sigmoid""#));
    refused("I0011", &["[7]", "[8]"], &weigh(r#"expert_scale = "scale""#));
    refused("I0006", &["drop_below"], &weigh("drop_rows = true").replace("%q, %l", "%q, %l, %q"));
}

#[test]
fn experts_and_combine() {
    let bank = |parts: &str| format!("{ROUTER} %e = experts %d {{bank = [{parts}]}} %y = combine %e, %r");
    let part =
        |ids: &str, more: &str| format!("{{ids = {ids}, kind = \"ffn\", act = \"silu\", up = \"up.{{e}}\", {more}}}");
    let down = "down = \"down.{e}\"";
    accepted(&bank(&part("[0, 8]", down)));
    accepted(&bank(&format!("{}, {{ids = [4, 8], kind = \"zero\"}}", part("[0, 4]", down))));
    accepted(&bank(&format!("{}, {{ids = [4, 8], kind = \"identity\"}}", part("[0, 4]", down))));
    refused("I0017", &["7 experts", "8"], &bank(&part("[0, 7]", down)));
    refused(
        "I0017",
        &["starts at expert 5", "ends at 4"],
        &bank(&format!("{}, {}", part("[0, 4]", down), part("[5, 8]", down))),
    );
    refused(
        "I0018",
        &["[16]", "[7]"],
        &bank(&format!("{}, {}", part("[0, 4]", down), part("[4, 8]", "down = \"down7.{e}\""))),
    );
    refused("I0025", &["[16, 11]", "12"], &bank(&part("[0, 8]", "down = \"narrow.{e}\"")));
    refused("I0025", &["[12, 16]", "[16, 12]"], &bank(&part("[0, 8]", "down = \"down.{e}\", gate = \"down.{e}\"")));
    refused(
        "I0026",
        &["[12, 4]", "[5, 16]"],
        &bank(
            &part("[0, 8]", down)
                .replace("\"up.{e}\"", "{mul = [\"a.{e}\", \"b.{g}\"], group = [0, 0, 0, 0, 0, 0, 0, 0]}"),
        ),
    );
    refused(
        "I0027",
        &["groups of 5", "[12, 16]"],
        &bank(&part("[0, 8]", down).replace(
            "\"up.{e}\"",
            "{codes = \"codes.{e}\", scale = \"scale.{e}\", zero = \"scale.{e}\", group_size = 5}",
        )),
    );
    refused("I0006", &["act"], &bank(&part("[0, 8]", down).replace("act = \"silu\", ", "")));
    refused("I0020", &["no weights"], &format!("{ROUTER} %y = combine %d, %q"));
    refused("I0021", &["`d2`"], &format!("{ROUTER} %d2 = dispatch %x, %r {{weighted = true}} %y = combine %d2, %r"));
    accepted(&format!("{ROUTER} %d2 = dispatch %x, %r {{weighted = true}} %y = combine %d2, %r {{weighted = false}}"));
    refused("I0023", &["repeat 2", "T"], &format!("{ROUTER} %y = dispatch %x, %r {{repeat = 2}}"));
}

#[test]
fn whole_graphs() {
    refused("I0024", &["`p`", "`output`"], r#"%p = shape %x {fn = "pad", multiple = 4} %y = unary %p {fn = "relu"}"#);
    refused(
        "I0024",
        &["`p`", "`output`"],
        r#"%p = shape %x {fn = "pad", multiple = 4} %y = shape %p {fn = "slice", axis = 1, range = [0, 8]}"#,
    );
    let seven = r#"%t = shape %x {fn = "slice", axis = 0, range = [0, 7]} %p = shape %t {fn = "pad", multiple = 4}"#;
    let back = |to: &str, range: &str| {
        let cut = format!(r#"%y = shape %c {{fn = "slice", axis = 0, range = {range}}}"#);
        format!(r#"{seven} %c = shape %p {{fn = "reshape", to = {to}}} {cut}"#)
    };
    accepted(&back("[-1, 16]", "[0, 7]"));
    accepted(&back("[-1, 64]", "[0, 1]"));
    accepted(&back("[-1, 16]", "[6, -1, -2]").replace("-1, -2", "0, -2"));
    refused("I0024", &["`p`", "`y`", "8 rows", "7 are given"], &back("[-1, 16]", "[0, 8]"));
    refused("I0024", &["`p`", "`y`"], &back("[-1, 64]", "[0, 2]"));
    refused("I0024", &["`p`", "`y`"], &back("[-1, 16]", "[7, 0, -1]"));
    refused("I0007", &["Idx", "f32[T, 16]"], r#"%y = unary %x {fn = "relu"} : f32[T, 16] return a = %y.idx"#);
    let state = "moe.graph @g { %x = input \"state_h_in\" : f32[T, 4] %y = shape %x {fn = \"reshape\", to = [-1, 2]} return state_h = %y }";
    let found = verify(&parse(state).unwrap());
    assert_eq!((found.len(), found[0].code.0), (1, "I0029"), "{found:?}");
}

#[test]
fn cycles_are_spelled_out() {
    let text = "moe.graph @g { %x = input \"x\" : f32[T, 4] %a = unary %x {fn = \"relu\"} %b = unary %a {fn = \"relu\"} %c = unary %b {fn = \"relu\"} return y = %c }";
    let mut graph = parse(text).unwrap();
    let find = |name: &str| graph.find(name).unwrap();
    let (a, c) = (find("a"), find("c"));
    graph.replace_uses(a, c);
    let found = verify(&graph);
    assert_eq!((found[0].code.0, found[0].message.as_str()), ("I0003", "values depend on each other: c -> b -> c"));
    assert_eq!(graph.infer().unwrap_err()[0].code.0, "I0003");
}

#[test]
fn text_errors_have_a_place() {
    let place = |text: &str| {
        let found = parse(text).unwrap_err();
        let span = found.labels[0].span;
        (found.code.0, text[span.start..span.end].to_owned(), found.message, found.help)
    };
    let (code, at, message, help) = place("moe.graph @g { %x = input \"x\" : f32[T] %y = unry %x {fn = \"relu\"} }");
    assert_eq!((code, at.as_str()), ("I0005", "unry"));
    assert_eq!(message, "there is no operation `unry`");
    assert_eq!(help.as_deref(), Some("the nearest name is `unary`"));
    let (code, at, ..) = place("moe.graph @g { %x = input \"x\" : f32[T] %y = unary %z {fn = \"relu\"} }");
    assert_eq!((code, at.as_str()), ("I0004", "%z"));
    let (code, at, ..) = place("moe.graph @g { %x = input \"x\" : f33[T] }");
    assert_eq!((code, at.as_str()), ("I0001", "f33"));
    let (code, at, ..) = place("moe.graph @g { %x = input \"x\" : f32[T] %y = softmax %x {temp = \"warm\"} }");
    assert_eq!((code, at.as_str()), ("I0006", "{temp = \"warm\"}"));
    for text in ["", "moe.graph", "moe.graph @g", "moe.graph @g {", "moe.graph @g { % }", "moe.graph @g {} x", "\u{e9}"]
    {
        assert_eq!(parse(text).unwrap_err().code.0, "I0001", "{text}");
    }
}

#[test]
fn deep_nesting_is_refused() {
    let open = |n: usize| {
        let head = "%k = kernel.rows @k {".repeat(n);
        format!("moe.graph @g {{ {head} {} }}", "}".repeat(n))
    };
    assert!(parse(&open(64)).is_ok());
    assert_eq!(parse(&open(65)).unwrap_err().code.0, "I0008");
    assert_eq!(parse(&open(200_000)).unwrap_err().code.0, "I0008");
    let list = format!("moe.graph @g {{ %x = param {{w = {} }} }}", "[".repeat(200_000));
    assert_eq!(parse(&list).unwrap_err().code.0, "I0008");
    let mut found = verify(&parse(&open(64)).unwrap());
    found.retain(|d| d.severity == Severity::Error);
    assert!(!found.is_empty());
}

#[test]
fn long_graphs_read_in_linear_time() {
    let nodes = std::env::var("MOEC_NODES").ok().and_then(|n| n.parse().ok()).unwrap_or(50_000);
    let mut text = String::from("moe.graph @long {\n  %v0 = input \"x\" : f32[T, 4]\n");
    for i in 1..=nodes {
        text.push_str(&format!("  %v{i} = unary %v{} {{fn = \"relu\"}} : f32[T, 4]\n", i - 1));
    }
    text.push_str(&format!("  return output = %v{nodes}\n}}\n"));
    let graph = parse(&text).unwrap();
    assert_eq!(graph.len(), nodes + 1);
    assert_eq!(print(&graph), text);
}

/// A valid node of each operation, so that one more attribute is the only thing wrong.
fn examples() -> Vec<(&'static str, Value)> {
    let ffn = json!({"up": "u", "down": "d", "act": "silu"});
    let part = |kind: &str, more: Value| {
        let mut part = json!({"ids": [0, 8], "kind": kind});
        part.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"bank": [part]})
    };
    vec![
        ("input", json!({"name": "x", "type": {"dtype": "f32", "shape": ["T"]}})),
        ("param", json!({"w": "w"})),
        ("collective", json!({"kind": "all_gather", "group": {"name": "etp", "ranks": [0, 1], "at": 0}})),
        (
            "collective",
            json!({"kind": "all_to_all", "group": {"name": "ep", "ranks": [0], "at": 0}, "experts": [[0, 1]]}),
        ),
        ("linear", json!({"w": "w"})),
        ("unary", json!({"fn": "relu"})),
        ("binary", json!({"fn": "add"})),
        ("norm", json!({"kind": "rms"})),
        ("softmax", json!({})),
        ("einsum", json!({"eq": "a->a"})),
        ("reduce", json!({"fn": "sum", "axis": 0})),
        ("shape", json!({"fn": "concat", "axis": 0})),
        ("shape", json!({"fn": "slice", "axis": 0, "range": [0, 1]})),
        ("shape", json!({"fn": "reshape", "to": [1]})),
        ("shape", json!({"fn": "transpose", "perm": [0]})),
        ("shape", json!({"fn": "repeat", "n": 2, "axis": 0})),
        ("shape", json!({"fn": "pad", "multiple": 2})),
        ("shape", json!({"fn": "stack", "axis": 0})),
        ("gather", json!({"w": "w"})),
        ("attention", json!({})),
        ("adjust", json!({"add": "b"})),
        ("transport", json!({"kind": "sinkhorn", "xi": 0.5, "iters": 3})),
        ("transport", json!({"kind": "sparse", "capacity": 2, "gamma": 1.0, "steps": 3, "eta": 0.5})),
        ("select", json!({"rule": "topk", "k": 1})),
        ("select", json!({"rule": "rank", "ranks": [0]})),
        ("select", json!({"rule": "all"})),
        ("select", json!({"rule": "topp", "p": 0.5})),
        ("select", json!({"rule": "threshold", "tau": 0.5})),
        ("select", json!({"rule": "group_topk", "groups": 2, "k": 1})),
        ("select", json!({"rule": "group_limited", "groups": 2, "keep_groups": 1, "k": 1})),
        ("select", json!({"rule": "expert_choice", "capacity": 1})),
        ("select", json!({"rule": "given", "experts": 4})),
        ("product_key", json!({"kind": "sum", "k1": "a", "k2": "b", "k": 1})),
        ("product_key", json!({"kind": "scores", "k": 1})),
        ("product_key", json!({"kind": "tucker", "core": "c", "u": "u", "v": "v", "k": 1})),
        ("limit", json!({"capacity": 1})),
        ("weigh", json!({"norm": "sum"})),
        ("override", json!({"expert": 0, "experts": 1})),
        ("count", json!({})),
        ("dispatch", json!({})),
        ("combine", json!({})),
        ("plan", json!({})),
        ("described", json!({"kind": "norm", "width": 1, "parameters": 1, "flops_per_token": 1})),
        ("ffn", ffn.clone()),
        ("experts", part("ffn", ffn)),
        ("experts", part("linear", json!({"w": "w"}))),
        ("experts", part("film", json!({"mul": "m", "add": "a"}))),
        ("experts", part("const", json!({"value": "v"}))),
        ("experts", part("neuron", json!({"u": "u", "v": "v", "act": "gelu"}))),
        ("experts", part("identity", json!({}))),
        ("experts", part("zero", json!({}))),
        ("ffn", json!({"down": "d", "act": "silu", "up": {"mul": ["a", "b"], "group": [0]}})),
        ("ffn", json!({"down": "d", "act": "silu", "up": {"base": "w", "a": "a", "b": "b", "scale": 2.0}})),
        ("ffn", json!({"down": "d", "act": "silu", "up": {"codes": "c", "scale": "s"}})),
        ("ffn", json!({"down": "d", "act": "silu", "up": {"codes": "c", "scale": "s", "zero": "z", "group_size": 4}})),
        ("ffn", json!({"down": "d", "act": "silu", "up": {"slice": "w", "axis": 0, "n": 2}})),
        ("ffn", json!({"down": "d", "act": "silu", "up": {"take": "w", "ids": "i", "axis": 0}})),
    ]
}

/// The value with `zzz` added to one of its objects, for each object.
fn spoilt(value: &Value) -> Vec<Value> {
    let mut all = Vec::new();
    match value {
        Value::Object(map) => {
            let mut one = map.clone();
            one.insert("zzz".to_owned(), json!(1));
            all.push(Value::Object(one));
            for (key, inner) in map {
                for changed in spoilt(inner) {
                    let mut one = map.clone();
                    one.insert(key.clone(), changed);
                    all.push(Value::Object(one));
                }
            }
        }
        Value::Array(items) => {
            for (i, inner) in items.iter().enumerate() {
                for changed in spoilt(inner) {
                    let mut one = items.clone();
                    one[i] = changed;
                    all.push(Value::Array(one));
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    all
}

#[test]
fn unknown_attributes_are_refused_everywhere() {
    let examples = examples();
    for name in Op::NAMES {
        assert!(examples.iter().any(|(op, _)| op == name), "no example of {name}");
    }
    for (name, attributes) in examples {
        let op = Op::from_attributes(name, attributes.clone()).unwrap();
        let op = op.unwrap_or_else(|e| panic!("{name} {attributes}: {e}"));
        assert_eq!(Op::from_attributes(name, op.attributes().unwrap()).unwrap().unwrap(), op);
        for bad in spoilt(&attributes) {
            assert!(Op::from_attributes(name, bad.clone()).unwrap().is_err(), "{name} takes {bad}");
        }
    }
}

#[test]
fn infinite_attributes_are_refused() {
    let mut graph = Graph::new("g");
    let softmax = moec_ir::ops::Softmax { temp: f64::INFINITY };
    let x = parse("moe.graph @g { %x = input \"x\" : f32[T, 2] }").unwrap();
    let x = graph.add("x", x.node(x.ids()[0]).op.clone(), &[]);
    let y = graph.add("y", Op::Softmax(softmax), &[x]);
    graph.output("y", y, moec_ir::Part::Whole);
    assert!(verify(&graph).iter().any(|d| d.code.0 == "I0034"));
    assert!(parse(&print(&graph)).is_err());
}

fn json_error(nodes: Value, more: Value) -> String {
    let mut file = json!({"format": "moec-graph-1", "nodes": nodes, "outputs": {"output": "y"},
        "inputs": {"x": {"dtype": "f32", "shape": ["T", 4]}},
        "tensors": {"w": {"dtype": "f32", "shape": [3, 4]}, "e.{e}.up": {"dtype": "f32", "shape": [[5, 0], 4]}}});
    file.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    match read_graph(&file.to_string(), &Signature::default()) {
        Ok(graph) => print(&graph),
        Err(found) => found.iter().map(|d| format!("{} {}", d.code.0, d.message)).collect::<Vec<_>>().join("\n"),
    }
}

#[test]
fn json_errors_name_the_node() {
    let linear = json!([{"id": "y", "op": "linear", "in": ["x"], "w": "w"}]);
    assert!(json_error(linear.clone(), json!({})).contains("%y = linear %x"));
    let bad = |node: Value| json_error(json!([node]), json!({}));
    assert!(bad(json!({"id": "y", "op": "linnear", "in": ["x"]})).contains("I0005 node `y` (linnear)"));
    assert!(bad(json!({"id": "y", "op": "linear", "in": ["z"], "w": "w"})).contains("I0004 node `y` (linear): `z`"));
    assert!(bad(json!({"id": "y", "op": "linear", "in": ["x"], "w": "v"})).contains("I0041 node `y`"));
    assert!(bad(json!({"id": "y", "op": "linear", "in": ["x"], "w": "w", "q": 1})).contains("I0006 node `y` (linear)"));
    assert!(bad(json!({"id": "y", "op": "adjust", "in": ["x"], "class": "x"})).contains("class_experts"));
    assert!(
        bad(json!({"id": "y", "op": "attention", "in": ["x", "x", "x"], "blocks": "x"}))
            .contains("`blocks` needs `block`")
    );
    assert!(bad(json!({"id": "z", "op": "linear", "in": ["x"], "w": "w"})).contains("I0007 output `output`"));
    assert!(bad(json!({"op": "linear"})).contains("I0040"));
    let conv =
        bad(json!({"id": "y", "op": "experts", "in": ["x"], "bank": [{"ids": [0, 8], "kind": "conv", "w": "w"}]}));
    assert!(conv.contains("I0042 node `y` (experts): `kind`: convolution"), "{conv}");
    assert!(json_error(linear.clone(), json!({"extra": 1})).contains("I0040"));
    assert!(json_error(linear, json!({"format": "moec-graph-2"})).contains("I0040"));
    let huge = json!({"id": "y", "op": "loop", "n": 1_000_000_000_000u64, "carry": "x", "next": "x", "body": []});
    assert!(bad(huge).contains("I0034"));
    assert!(read_graph("{", &Signature::default()).unwrap_err()[0].code.0 == "I0040");
}

#[test]
fn loops_unroll_with_their_carry() {
    let body = json!([{"id": "a", "op": "linear", "in": ["c"], "w": "w{i}"}, {"id": "b", "op": "binary", "in": ["a", "x"], "fn": "add"}]);
    let nodes = json!([{"id": "c", "op": "unary", "in": ["x"], "fn": "relu"},
        {"id": "o", "op": "loop", "n": 2, "carry": "c", "next": "b", "body": body},
        {"id": "y", "op": "binary", "in": ["o", "c"], "fn": "add"}]);
    let square = json!({"dtype": "f32", "shape": [4, 4]});
    let text = json_error(nodes, json!({"tensors": {"w0": square, "w1": square}}));
    assert!(text.contains("%a_0 = linear %c {w = \"w0\"}"), "{text}");
    assert!(text.contains("%a_1 = linear %b_0 {w = \"w1\"}"), "{text}");
    assert!(text.contains("%y = binary %b_1, %b_1"), "{text}");
}
