//! What a composed form costs beside the same layer written as one plain mixture.

use crate::{
    forms::{EXPERTS, Form, INNER, TOP_K, WIDTH, networks, plain},
    gallery::{Compiled, Data, Numbers, data, run},
};
use moec::{
    Target, host_target,
    runtime::{Cpu, Sim},
};
use moec_ir::Graph;
use moec_sim::Counts;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Instant};

/// Tokens of a run.
pub const TOKENS: u64 = 32;

/// A form and what it is held against.
pub struct Pair {
    /// What is special about the composed form.
    pub name: &'static str,
    /// The composed form.
    pub composed: Form,
    /// The same arithmetic as a plain layer.
    pub plain: Form,
}

/// Forms whose arithmetic is that of a plain layer.
pub fn pairs() -> Vec<Pair> {
    let pair = |name, composed| Pair { name, composed, plain: plain() };
    let base = || Form::new(WIDTH);
    let glu = |form: Form| form.networks(WIDTH, json!(INNER)).mixture(json!([networks([0, EXPERTS])]));
    let router_of = |form: Form, x: &str| {
        form.tensor("router", json!([EXPERTS, WIDTH])).node("l", "linear", &[x], json!({"w": "router"}))
    };
    let router = |form: Form| router_of(form, "x");
    // Four experts more, without weights, that are switched off.
    let with_spares = |bank: Value| {
        base()
            .tensor("router", json!([EXPERTS + 4, WIDTH]))
            .networks(WIDTH, json!(INNER))
            .node("l", "linear", &["x"], json!({"w": "router"}))
            .node("s", "softmax", &["l"], json!({}))
            .node("a", "adjust", &["s"], json!({"off": [8, 9, 10, 11]}))
            .node("q", "select", &["a"], json!({"rule": "topk", "k": TOP_K}))
            .node("r", "weigh", &["q", "s"], json!({"norm": "sum"}))
            .mixture(bank)
    };
    // Nobody uses the last four experts: they are of this kind, or as the others.
    let spares = |name, kind: &str| Pair {
        name,
        composed: with_spares(json!([networks([0, EXPERTS]), {"ids": [8, 12], "kind": kind}])),
        plain: with_spares(json!([networks([0, 12])])),
    };
    vec![
        pair(
            "bank in two parts",
            base()
                .router(EXPERTS, TOP_K, WIDTH)
                .networks(WIDTH, json!(INNER))
                .mixture(json!([networks([0, 3]), networks([3, EXPERTS])])),
        ),
        pair(
            "widths given per expert",
            base()
                .router(EXPERTS, TOP_K, WIDTH)
                .networks(WIDTH, json!(vec![INNER; 8]))
                .mixture(json!([networks([0, EXPERTS])])),
        ),
        pair(
            "logits rewired by a vector",
            glu(router(base())
                .tensor("delta", json!([EXPERTS]))
                .node("a", "adjust", &["l"], json!({"add": "delta"}))
                .node("s", "softmax", &["a"], json!({}))
                .node("q", "select", &["s"], json!({"rule": "topk", "k": TOP_K}))
                .node("r", "weigh", &["q", "s"], json!({"norm": "sum"}))),
        ),
        pair(
            "the same number from every group",
            glu(router(base())
                .node("s", "softmax", &["l"], json!({}))
                .node("q", "select", &["s"], json!({"rule": "group_topk", "groups": TOP_K, "k": 1}))
                .node("r", "weigh", &["q", "s"], json!({"norm": "sum"}))),
        ),
        pair(
            "softmax over the selected logits",
            glu(router(base()).node("q", "select", &["l"], json!({"rule": "topk", "k": TOP_K})).node(
                "r",
                "weigh",
                &["q", "l"],
                json!({"fn": "softmax"}),
            )),
        ),
        pair(
            "slices of one dense network",
            base()
                .router(EXPERTS, TOP_K, WIDTH)
                .tensor("gate", json!([EXPERTS * INNER, WIDTH]))
                .tensor("up", json!([EXPERTS * INNER, WIDTH]))
                .tensor("down", json!([WIDTH, EXPERTS * INNER]))
                .mixture(json!([{"ids": [0, EXPERTS], "kind": "ffn", "act": "silu",
                    "gate": {"slice": "gate", "axis": 0, "n": EXPERTS}, "up": {"slice": "up", "axis": 0, "n": EXPERTS},
                    "down": {"slice": "down", "axis": 1, "n": EXPERTS}}])),
        ),
        pair(
            "index sets over one pool",
            base()
                .router(EXPERTS, TOP_K, WIDTH)
                .tensor("gate", json!([2 * INNER, WIDTH]))
                .tensor("up", json!([2 * INNER, WIDTH]))
                .tensor("down", json!([WIDTH, 2 * INNER]))
                .typed("ids.{e}", "i32", json!([INNER]))
                .mixture(json!([{"ids": [0, EXPERTS], "kind": "ffn", "act": "silu",
                    "gate": {"take": "gate", "ids": "ids.{e}", "axis": 0},
                    "up": {"take": "up", "ids": "ids.{e}", "axis": 0},
                    "down": {"take": "down", "ids": "ids.{e}", "axis": 1}}])),
        ),
        spares("null experts that nobody uses", "zero"),
        pair("weights on the experts' inputs", {
            let form = base().router(EXPERTS, TOP_K, WIDTH).networks(WIDTH, json!(INNER));
            form.node("d", "dispatch", &["x", "r"], json!({"weighted": true}))
                .node("e", "experts", &["d"], json!({"bank": [networks([0, EXPERTS])]}))
                .node("y", "combine", &["e", "r"], json!({"weighted": false}))
                .output("output", "y")
        }),
        spares("identity experts that nobody uses", "identity"),
        pair(
            "a route from an earlier value",
            glu(router_of(base().input("before", "f32", &json!(["T", WIDTH])), "before")
                .node("s", "softmax", &["l"], json!({}))
                .node("q", "select", &["s"], json!({"rule": "topk", "k": TOP_K}))
                .node("r", "weigh", &["q", "s"], json!({"norm": "sum"}))),
        ),
        pair("a loop of one pass", {
            base()
                .tensor("router.0", json!([EXPERTS, WIDTH]))
                .networks(WIDTH, json!(INNER))
                .node(
                    "y",
                    "loop",
                    &[],
                    json!({"n": 1, "carry": "x", "next": "c", "body": [
                    {"id": "l", "op": "linear", "in": ["x"], "w": "router.{i}"},
                    {"id": "s", "op": "softmax", "in": ["l"]},
                    {"id": "q", "op": "select", "in": ["s"], "rule": "topk", "k": TOP_K},
                    {"id": "r", "op": "weigh", "in": ["q", "s"], "norm": "sum"},
                    {"id": "d", "op": "dispatch", "in": ["x", "r"]},
                    {"id": "e", "op": "experts", "in": ["d"], "bank": [networks([0, EXPERTS])]},
                    {"id": "c", "op": "combine", "in": ["e", "r"]}]}),
                )
                .output("output", "y")
        }),
    ]
}

/// What a layer does on the simulator, and its launches.
///
/// # Panics
/// When it does not compile or run.
pub fn counts(graph: &Graph, target: Target, data: &Data) -> (Counts, usize) {
    let sim = Arc::new(Sim::new(moec_sim::Options { check: false, ..moec_sim::Options::default() }));
    let compiled = Compiled::new(graph, target, Arc::clone(&sim) as _).unwrap_or_else(|e| panic!("{e}"));
    let layer = compiled.layer(data).unwrap_or_else(|e| panic!("{e}"));
    run(&layer, data).unwrap_or_else(|e| panic!("{e}"));
    (sim.take_counts().total, compiled.program().launches.len())
}

/// Times that weights are bound anew: where they lie in memory decides how they meet in caches.
const BINDINGS: usize = 12;
/// Calls of each layer with one binding.
const CALLS: usize = 150;

/// Seconds of a call of each graph on one core: the shortest of many calls in turn, so that neither what else the
/// machine does nor the place of the weights counts.
///
/// # Panics
/// When one does not compile or run.
pub fn seconds(graphs: [(&Graph, &Data); 2]) -> [f64; 2] {
    let compiled = graphs.map(|(graph, data)| {
        let compiled = Compiled::new(graph, host_target(), Arc::new(Cpu::new(1))).unwrap_or_else(|e| panic!("{e}"));
        (compiled, data)
    });
    let mut least = [f64::INFINITY; 2];
    // Earlier bindings keep their memory, so that later ones get another.
    let mut bound = Vec::new();
    for _ in 0..BINDINGS {
        bound.push(compiled.each_ref().map(|(c, data)| c.layer(data).unwrap_or_else(|e| panic!("{e}"))));
        let Some(layers) = bound.last() else { continue };
        for call in 0..CALLS {
            for i in 0..layers.len() {
                // Each is first as often as second.
                let i = (i + call) % layers.len();
                let start = Instant::now();
                run(&layers[i], graphs[i].1).unwrap_or_else(|e| panic!("{e}"));
                least[i] = least[i].min(start.elapsed().as_secs_f64());
            }
        }
    }
    least
}

/// The table of counts, as it stands in `docs/lowering.md`, and the largest ratio of instructions or bytes.
pub fn table() -> (String, f64) {
    let mut worst = 0f64;
    let mut table = String::from(
        "| form | instructions | of plain | bytes | of plain | launches | plain |\n| --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let of = |form: &Form| {
        let graph = form.graph();
        counts(&graph, Target::Sm80, &data(&graph, TOKENS, 1, Numbers::Small))
    };
    // Most plain layers are the same.
    let mut known = BTreeMap::new();
    for pair in pairs() {
        let (p, plain_launches) = known.entry(pair.plain.json().to_string()).or_insert_with(|| of(&pair.plain));
        let (c, launches) = of(&pair.composed);
        let bytes = |c: &Counts| c.global_bytes_read + c.global_bytes_written;
        let instructions = c.warp_instructions as f64 / p.warp_instructions as f64;
        let moved = bytes(&c) as f64 / bytes(p) as f64;
        worst = worst.max(instructions).max(moved);
        let _ = writeln!(
            table,
            "| {} | {} | {:.3} | {} | {:.3} | {launches} | {plain_launches} |",
            pair.name,
            c.warp_instructions,
            instructions,
            bytes(&c),
            moved,
        );
    }
    (table, worst)
}
