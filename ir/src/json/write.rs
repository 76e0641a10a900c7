//! Graph to graph JSON.

use super::{FORMAT, named_operands};
use crate::{Graph, NodeId, Op, Part, ops::ProductKey};
use indexmap::IndexMap;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// The graph as JSON, with the shapes of inputs and weights. Kernels are written as the ops that they stand for.
pub fn write_graph(graph: &Graph) -> Value {
    let mut graph = graph.clone();
    graph.inline_all();
    let names = names(&graph);
    let mut nodes = Vec::new();
    let mut inputs = Map::new();
    for id in graph.order() {
        let node = graph.node(id);
        if let Op::Input(input) = &node.op {
            inputs.insert(input.name.clone(), json!(input.ty));
            continue;
        }
        nodes.push(Value::Object(write_node(&graph, id, &names)));
    }
    let outputs: Map<String, Value> = graph
        .outputs
        .iter()
        .map(|o| {
            let suffix = match o.part {
                Part::Whole => "",
                Part::Idx => ".idx",
                Part::Weights => ".w",
            };
            (o.name.clone(), Value::String(format!("{}{suffix}", name_of(&names, o.node))))
        })
        .collect();
    let tensors: Map<String, Value> =
        graph.weights.iter().map(|(n, w)| (n.clone(), json!({"dtype": w.dtype, "shape": w.shape}))).collect();
    let mut file = Map::new();
    file.insert("format".to_owned(), json!(FORMAT));
    file.insert("name".to_owned(), json!(graph.name));
    if graph.batch_dependent {
        file.insert("batch_dependent".to_owned(), Value::Bool(true));
    }
    file.insert("inputs".to_owned(), Value::Object(inputs));
    file.insert("tensors".to_owned(), Value::Object(tensors));
    file.insert("nodes".to_owned(), Value::Array(nodes));
    file.insert("outputs".to_owned(), Value::Object(outputs));
    Value::Object(file)
}

fn name_of(names: &IndexMap<NodeId, String>, id: NodeId) -> &str {
    names.get(&id).map_or("", String::as_str)
}

/// Names without dots, which mark parts of routes in the JSON; inputs keep their interface name.
fn names(graph: &Graph) -> IndexMap<NodeId, String> {
    let mut names = IndexMap::new();
    let mut taken = BTreeSet::new();
    for id in graph.order() {
        if let Op::Input(input) = &graph.node(id).op {
            taken.insert(input.name.clone());
            names.insert(id, input.name.clone());
        }
    }
    for id in graph.order() {
        let node = graph.node(id);
        if matches!(node.op, Op::Input(_)) {
            continue;
        }
        let stem = node.name.replace('.', "_");
        let name = if taken.contains(&stem) {
            (1u64..).map(|i| format!("{stem}_{i}")).find(|n| !taken.contains(n)).unwrap_or_default()
        } else {
            stem
        };
        taken.insert(name.clone());
        names.insert(id, name);
    }
    names
}

fn write_node(graph: &Graph, id: NodeId, names: &IndexMap<NodeId, String>) -> Map<String, Value> {
    let node = graph.node(id);
    let mut attributes = match node.op.attributes() {
        Ok(Value::Object(map)) => map,
        Ok(_) | Err(_) => Map::new(),
    };
    let mut operands: Vec<&str> = graph.operands(id).into_iter().map(|o| name_of(names, o)).collect();
    let tucker = matches!(node.op, Op::ProductKey(ProductKey::Tucker { .. }));
    // Operands that the JSON names in attributes stand last, in the order of the list.
    for named in named_operands(node.op.name(), tucker).iter().rev() {
        let present = match (named.flag, &node.op) {
            (Some(flag), _) => attributes.get(flag) == Some(&Value::Bool(true)),
            (None, Op::Adjust(op)) => op.class_experts.is_some(),
            (None, Op::Attention(op)) => op.block.is_some(),
            (None, _) => true,
        };
        if let (true, Some(name)) = (present, if present { operands.pop() } else { None }) {
            attributes.insert(named.key.to_owned(), Value::String(name.to_owned()));
        }
    }
    let mut map = Map::new();
    map.insert("id".to_owned(), json!(name_of(names, id)));
    map.insert("op".to_owned(), json!(node.op.name()));
    if !operands.is_empty() {
        map.insert("in".to_owned(), json!(operands));
    }
    map.extend(attributes);
    if let Some(round) = node.round {
        map.insert("round".to_owned(), json!(round));
    }
    map
}
