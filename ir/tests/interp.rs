//! Corner cases of values: ties, NaN, forbidden experts, empty experts, rounding, split kernels.

mod support;

use indexmap::IndexMap;
use moec_ir::{
    Graph,
    interp::{Array, Options, Rounding, interpret},
    parse, verify,
};
use support::Invented;

const NAN: f64 = f64::NAN;
const NEG: f64 = f64::NEG_INFINITY;

fn graph(nodes: &str) -> Graph {
    let mut graph = parse(&format!("moe.graph @g batch_dependent {{ {nodes} }}")).unwrap_or_else(|e| panic!("{e:?}"));
    graph.infer().unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(verify(&graph).iter().filter(|d| d.code.0 != "I0022").count(), 0, "{:?}", verify(&graph));
    graph
}

fn run(graph: &Graph, inputs: &[(&str, Array)], rounding: Rounding) -> Result<IndexMap<String, Array>, String> {
    let inputs = inputs.iter().map(|(n, a)| ((*n).to_owned(), a.clone())).collect();
    interpret(graph, &inputs, &Invented, Options { rounding, ..Options::default() }).map_err(|e| e.to_string())
}

/// Ids that a rule selects from one row of scores.
fn ids(rule: &str, scores: &[f64]) -> Vec<i64> {
    let n = scores.len();
    let text = format!("%s = input \"s\" : f32[T, {n}] %q = select %s {{{rule}}} return ids = %q.idx");
    let out = run(&graph(&text), &[("s", Array::f64(vec![1, n], scores.to_vec()))], Rounding::Exact).unwrap();
    out["ids"].ints().unwrap().to_vec()
}

#[test]
fn selection_rules() {
    assert_eq!(ids("rule = \"topk\", k = 2", &[1.0, 3.0, 3.0, 2.0]), [1, 2]);
    assert_eq!(ids("rule = \"topk\", k = 3", &[0.0, -0.0, 0.0]), [0, 1, 2]);
    assert_eq!(ids("rule = \"topk\", k = 3", &[NAN, 1.0, NEG, f64::INFINITY]), [3, 1, 0]);
    assert_eq!(ids("rule = \"all\"", &[2.0, NEG, 5.0]), [0, 2, -1]);
    assert_eq!(ids("rule = \"rank\", ranks = [1]", &[1.0, 3.0, 2.0]), [2]);
    assert_eq!(ids("rule = \"topp\", p = 0.5", &[0.5, 0.3, 0.2]), [0, 1, -1]);
    assert_eq!(ids("rule = \"topp\", p = 0.5, strict = false", &[0.5, 0.3, 0.2]), [0, -1, -1]);
    assert_eq!(ids("rule = \"topp\", p = 2.0, max_k = 2", &[0.5, 0.3, 0.2]), [0, 1]);
    assert_eq!(ids("rule = \"threshold\", tau = 9.0, min_k = 1, max_k = 2", &[0.5, 0.7, 0.2]), [1, -1]);
    assert_eq!(ids("rule = \"threshold\", quantile = 0.5, strict = false", &[1.0, 4.0, 2.0, 3.0]), [1, 3, -1, -1]);
    assert_eq!(ids("rule = \"group_topk\", groups = 2, k = 1", &[1.0, 2.0, 9.0, 8.0]), [1, 2]);
    let limited = "rule = \"group_limited\", groups = 2, keep_groups = 1, k = 2";
    assert_eq!(ids(limited, &[5.0, 0.0, 4.0, 4.0]), [0, 1]);
    assert_eq!(ids(&format!("{limited}, group_top = 2"), &[5.0, 0.0, 4.0, 4.0]), [2, 3]);
    // Dropped groups count as 0, so a negative score of a kept group loses against them.
    assert_eq!(ids(&format!("{limited}, dropped = 0.0"), &[5.0, -1.0, 4.0, 4.0]), [0, 2]);
}

#[test]
fn experts_choose_rows() {
    let text =
        "%s = input \"s\" : f32[T, 2] %q = select %s {rule = \"expert_choice\", factor = 0.5} return ids = %q.idx";
    let scores = Array::f64(vec![3, 2], vec![1.0, 5.0, 2.0, NEG, 3.0, 4.0]);
    let out = run(&graph(text), &[("s", scores)], Rounding::Exact).unwrap();
    assert_eq!(out["ids"].ints().unwrap(), [1, -1, 0, -1, 0, -1]);
}

#[test]
fn weights_of_slots() {
    let of = |scores: [f64; 4], attributes: &str| {
        let text = format!(
            "%s = input \"s\" : f32[T, 4] %q = select %s {{rule = \"topk\", k = 3}} %r = weigh %q, %s {{{attributes}}} return w = %r.w"
        );
        let scores = Array::f64(vec![1, 4], scores.to_vec());
        run(&graph(&text), &[("s", scores)], Rounding::Exact).unwrap()["w"].floats()
    };
    // NaN in a row makes all of it NaN, with a floor of the norm and without one.
    for attributes in ["norm = \"sum\"", "norm = \"sum\", floor = 1e-12"] {
        assert!(of([1.0, NAN, 2.0, NEG], attributes).iter().all(|w| w.is_nan()), "{attributes}");
    }
    let weights = |attributes: &str| of([3.0, NEG, -4.0, NEG], attributes);
    assert_eq!(weights("norm = \"l1\""), [3.0 / 7.0, -4.0 / 7.0, 0.0]);
    assert_eq!(weights("norm = \"l2\", scale = 2.0"), [1.2, -1.6, 0.0]);
    // A sum that is not above 0 gives no weights.
    assert_eq!(weights("norm = \"sum\""), [0.0, 0.0, 0.0]);
    assert_eq!(weights("norm = \"l1\", floor = 14.0"), [3.0 / 14.0, -4.0 / 14.0, 0.0]);
    assert_eq!(weights("const = true, real = 2"), [1.0, 0.0, 0.0]);
    let soft = weights("fn = \"softmax\"");
    assert!((soft[0] + soft[1] - 1.0).abs() < 1e-15 && soft[2] == 0.0);
}

#[test]
fn capacity_takes_first_choices_first() {
    let text = "%s = input \"s\" : f32[T, 2] %q = select %s {rule = \"topk\", k = 2} %n = weigh %q, %s {}
        %a = limit %n {capacity = 1} %b = limit %n, %s {fraction = 0.4, priority = \"score\"}
        return a = %a.idx, b = %b.idx, w = %b.w";
    let scores = Array::f64(vec![2, 2], vec![2.0, 1.0, 3.0, 1.0]);
    let out = run(&graph(text), &[("s", scores)], Rounding::Exact).unwrap();
    assert_eq!(out["a"].ints().unwrap(), [0, 1, -1, -1]);
    assert_eq!(out["b"].ints().unwrap(), [-1, -1, 0, 1]);
    assert_eq!(out["w"].floats(), [0.0, 0.0, 3.0, 1.0]);
}

#[test]
fn routes_join_slot_by_slot() {
    let text = "%s = input \"s\" : f32[T, 3] %a = select %s {rule = \"rank\", ranks = [0]} %b = select %s {rule = \"rank\", ranks = [2]}
        %v = weigh %a, %s {} %w = weigh %b, %s {} %r = shape %v, %w {fn = \"concat\", axis = 1} return i = %r.idx, w = %r.w";
    let out = run(&graph(text), &[("s", Array::f64(vec![1, 3], vec![1.0, 2.0, 3.0]))], Rounding::Exact).unwrap();
    assert_eq!((out["i"].ints().unwrap(), out["w"].floats()), (&[2, 0][..], vec![3.0, 1.0]));
}

#[test]
fn wrong_data_is_an_error() {
    let class = "%s = input \"s\" : f32[T, 2] %c = input \"c\" : i32[T] %a = adjust %s, %c {class_experts = {\"0\" = [1]}} return a = %a";
    let scores = || Array::f64(vec![1, 2], vec![1.0, 2.0]);
    let good = run(&graph(class), &[("s", scores()), ("c", Array::i64(vec![1], vec![0]))], Rounding::Exact).unwrap();
    assert_eq!(good["a"].floats(), [NEG, 2.0]);
    let bad = run(&graph(class), &[("s", scores()), ("c", Array::i64(vec![1], vec![7]))], Rounding::Exact);
    assert_eq!(bad.unwrap_err(), "node `a` (adjust): class 7 of row 0 is not in `class_experts`");
    let table = "weights { t: f32[3, 2] } %i = input \"i\" : i64[T] %y = gather %i {w = \"t\"} return y = %y";
    let bad = run(&graph(table), &[("i", Array::i64(vec![2], vec![2, 3]))], Rounding::Exact);
    assert_eq!(bad.unwrap_err(), "node `y` (gather): id 3 is outside the table `t` of 3 rows");
    let given = "%i = input \"i\" : i64[T] %q = select %i {rule = \"given\", experts = 2} return q = %q.idx";
    assert!(run(&graph(given), &[("i", Array::i64(vec![1], vec![2]))], Rounding::Exact).is_err());
    assert!(run(&graph(given), &[], Rounding::Exact).unwrap_err().contains("`i`"));
    let blocks = "%s = input \"s\" : f32[T, 2] %a = adjust %s {causal_block = 1, tokens = 5} return a = %a";
    let rows = Array::f64(vec![3, 2], vec![0.0; 6]);
    assert!(run(&graph(blocks), &[("s", rows)], Rounding::Exact).is_err());
    let fold = "%s = input \"s\" : f32[T, 2] %y = shape %s {fn = \"reshape\", to = [-1, 4]} return y = %y";
    assert!(run(&graph(fold), &[("s", Array::f64(vec![3, 2], vec![0.0; 6]))], Rounding::Exact).is_err());
}

#[test]
fn values_are_rounded_where_the_model_rounds() {
    let text = "%x = input \"x\" : f32[T] %a = binary %x {fn = \"add\", c = 0.001} : f32[T] %y = binary %a {fn = \"mul\", c = 3.0} : bf16[T] round bf16 return y = %y";
    let x = || Array::f64(vec![1], vec![1.0]);
    assert_eq!(run(&graph(text), &[("x", x())], Rounding::Exact).unwrap()["y"].floats(), [1.001 * 3.0]);
    assert_eq!(run(&graph(text), &[("x", x())], Rounding::Model).unwrap()["y"].floats(), [3.0]);
}

/// One mixture, whole and split into the inner activations and the down product.
#[test]
fn split_banks_give_the_value_of_whole_ones() {
    let router = "weights { g: f32[4, 6] \"up.{e}\": f32[(3, 0, 5), 6] \"gate.{e}\": f32[(3, 0, 5), 6] \"down.{e}\": f32[6, (3, 0, 5)] \"b.{e}\": f32[6] }
        %x = input \"x\" : f32[T, 6] %l = linear %x {w = \"g\"} %s = softmax %l
        %q = select %s {rule = \"topk\", k = 3} %r = weigh %q, %s {} %p = plan %r %d = dispatch %x, %p";
    let inner = "ids = [0, 3], kind = \"ffn\", act = \"silu\", up = \"up.{e}\", gate = \"gate.{e}\", limit = 0.3, limit_on = \"act\"";
    let whole = format!(
        "{router} %e = experts %d {{bank = [{{{inner}, down = \"down.{{e}}\"}}, {{ids = [3, 4], kind = \"zero\"}}]}} %y = combine %e, %r return y = %y"
    );
    let split = format!(
        "{router} %h = experts %d {{bank = [{{{inner}}}, {{ids = [3, 4], kind = \"zero\"}}]}} : rows[T, 3 of 4, weighted; f32[5]]
        %e = experts %h {{bank = [{{ids = [0, 3], kind = \"linear\", w = \"down.{{e}}\"}}, {{ids = [3, 4], kind = \"zero\"}}]}}
        %y = combine %e, %r return y = %y"
    );
    let x = Array::f64(vec![5, 6], (0..30).map(|i| f64::from(i % 7) - 3.0).collect());
    let run = |text: &str| run(&graph(text), &[("x", x.clone())], Rounding::Exact).unwrap()["y"].clone();
    assert_eq!(run(&whole), run(&split));
    assert!(run(&whole).floats().iter().any(|v| v.abs() > 1e-3));
}

#[test]
fn no_tokens_give_no_rows() {
    let text = "weights { g: f32[4, 6] \"u.{e}\": f32[2, 6] \"d.{e}\": f32[6, 2] } %x = input \"x\" : f32[T, 6] %l = linear %x {w = \"g\"}
        %q = select %l {rule = \"topk\", k = 1} %r = weigh %q, %l {fn = \"softmax\"} %d = dispatch %x, %r
        %e = experts %d {bank = [{ids = [0, 4], kind = \"ffn\", act = \"relu\", up = \"u.{e}\", down = \"d.{e}\"}]} %y = combine %e, %r return y = %y";
    let out = run(&graph(text), &[("x", Array::f64(vec![0, 6], vec![]))], Rounding::Exact).unwrap();
    assert_eq!(out["y"].shape, [0, 6]);
}

#[test]
fn costs_count_products_and_bytes() {
    let graph = graph(
        "weights { w: bf16[8, 4] \"u.{e}\": bf16[2, 4] \"d.{e}\": bf16[4, 2] } %x = input \"x\" : bf16[T, 4] %l = linear %x {w = \"w\"}
        %s = softmax %l %q = select %s {rule = \"topk\", k = 2} %r = weigh %q, %s {} %d = dispatch %x, %r
        %e = experts %d {bank = [{ids = [0, 8], kind = \"ffn\", act = \"relu\", up = \"u.{e}\", down = \"d.{e}\"}]} %y = combine %e, %r return y = %y",
    );
    let of = |name: &str, tokens| moec_ir::cost(&graph, graph.find(name).unwrap(), tokens).unwrap();
    let linear = of("l", 10);
    assert_eq!(
        (linear.flops, linear.weight_bytes, linear.activation_bytes),
        (2 * 10 * 32, 64, 10 * 4 * 2 + 10 * 8 * 4)
    );
    let experts = of("e", 10);
    assert_eq!(experts.flops, 2 * 16 * 20);
    // With many tokens every expert is read, with one token two of eight.
    assert_eq!(of("e", 100_000).weight_bytes, 8 * 16 * 2);
    assert_eq!(of("e", 1).weight_bytes, 2 * 16 * 2);
}
