//! Properties of research forms, on compiled kernels of this processor.

use moec::{
    Target, host_target,
    runtime::{Cpu, Device, Sim},
};
use moec_ir::Graph;
use moec_tests::{
    forms::{Form, networks},
    gallery::{Compiled, Data, Numbers, Results, data, files, graph, run, stem},
};
use serde_json::json;
use std::sync::Arc;

mod calls;
mod choice;
mod places;
mod plain;
mod series;
mod spelled;

const TOKENS: u64 = 13;

/// The processor, or the simulator for targets that it has not.
fn device(target: Target) -> Arc<dyn Device> {
    if target.is_gpu() { Arc::new(Sim::new(moec_sim::Options::default())) } else { Arc::new(Cpu::new(1)) }
}

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
