//! How text looks, and what can become a kernel.

use moec_ir::{Graph, NodeId, OutlineError, ops::KernelKind, parse, print, verify};

const LAYER: &str = r#"moe.graph @layer {
  weights {
    gate.weight: bf16[2, 64] from "{p}gate.weight"
    "experts.{e}.up": bf16[(32, 16), 64] from "{p}up" {packing = "plain", view = ["expert", {slice = {axis = 0, start = 0, len = 32, step = 2}}]}
    "experts.{e}.down": bf16[64, (32, 16)]
  }
  %x = input "x" : bf16[T, 64]
  %l = linear %x {w = "gate.weight"} round bf16
  %s = softmax %l
  %q = select %s {rule = "topk", k = 1}
  %r = weigh %q, %s
  %d = dispatch %x, %r
  %e = experts %d {bank = [{ids = [0, 2], kind = "ffn", act = "silu", up = "experts.{e}.up", down = "experts.{e}.down"}]}
  %y = combine %e, %r round bf16
  return output = %y, topk_indices = %r.idx
}"#;

fn layer() -> Graph {
    let mut graph = parse(LAYER).unwrap();
    graph.infer().unwrap();
    graph
}

fn nodes(graph: &Graph, names: &[&str]) -> Vec<NodeId> {
    names.iter().map(|n| graph.find(n).unwrap()).collect()
}

#[test]
fn a_kernel_prints_with_its_body() {
    let mut graph = layer();
    graph.outline(&nodes(&graph, &["l", "s", "q", "r"]), KernelKind::Gate, "g").unwrap();
    assert_eq!(verify(&graph), vec![]);
    insta::assert_snapshot!(print(&graph), @r#"
moe.graph @layer {
  weights {
    gate.weight: bf16[2, 64] from "{p}gate.weight"
    "experts.{e}.up": bf16[(32, 16), 64] from "{p}up" {
      view = ["expert", {slice = {axis = 0, start = 0, len = 32, step = 2}}]
    }
    "experts.{e}.down": bf16[64, (32, 16)]
  }
  %x = input "x" : bf16[T, 64]
  %g = kernel.gate @g %x : route[T, 1 of 2, weighted] {
    use "gate.weight"
    %x = input "x" : bf16[T, 64]
    %l = linear %x {w = "gate.weight"} : bf16[T, 2] round bf16
    %s = softmax %l : f32[T, 2]
    %q = select %s {rule = "topk", k = 1} : route[T, 1 of 2]
    %r = weigh %q, %s : route[T, 1 of 2, weighted]
    return result = %r
  }
  %d = dispatch %x, %g : rows[T, 1 of 2, weighted; bf16[64]]
  %e = experts %d {
    bank = [{ids = [0, 2], kind = "ffn", up = "experts.{e}.up", down = "experts.{e}.down", act = "silu"}]
  } : rows[T, 1 of 2, weighted; bf16[64]]
  %y = combine %e, %g : bf16[T, 64] round bf16
  return output = %y, topk_indices = %g.idx
}
"#);
}

#[test]
fn regions_that_are_no_kernel_are_refused() {
    let mut graph = layer();
    let before = print(&graph);
    let mut outline = |names: &[&str]| {
        let nodes = nodes(&graph, names);
        graph.outline(&nodes, KernelKind::Rows, "k").unwrap_err()
    };
    assert_eq!(outline(&[]), OutlineError::NoNodes);
    assert_eq!(outline(&["x"]), OutlineError::Input("x".to_owned()));
    assert_eq!(outline(&["s", "q"]), OutlineError::Results(vec!["s".to_owned(), "q".to_owned()]));
    assert_eq!(outline(&["l", "q"]), OutlineError::Results(vec!["l".to_owned(), "q".to_owned()]));
    assert_eq!(outline(&["q", "r", "y"]), OutlineError::Results(vec!["r".to_owned(), "y".to_owned()]));
    assert_eq!(print(&graph), before);
    let dead = parse(
        "moe.graph @g { %x = input \"x\" : f32[T] %a = unary %x {fn = \"relu\"} %b = unary %a {fn = \"relu\"} %c = unary %b {fn = \"relu\"} return b = %b, a = %a }",
    );
    let mut dead = dead.unwrap();
    let ends = nodes(&dead, &["a", "c"]);
    let found = dead.outline(&ends, KernelKind::Rows, "k");
    assert_eq!(found, Err(OutlineError::NotConvex { outside: "b".to_owned() }));
    let x = graph.find("x").unwrap();
    assert_eq!(graph.inline(x), Err(OutlineError::NotAKernel("x".to_owned())));
}
