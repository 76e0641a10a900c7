//! Graph to text.

use super::{is_bare, is_word};
use crate::{
    Extent, Graph, NodeId, Op, Packing, Part, Source, Type, Weight, WeightName, ops::Input, outline::no_tensor,
};
use indexmap::IndexMap;
use serde_json::{Map, Value};
use std::fmt::Write as _;

/// Columns after which attributes stand on several lines.
const WIDTH: usize = 110;

/// The graph as text, operands before users.
pub fn print(graph: &Graph) -> String {
    let mut out = String::from("moe.graph ");
    put_at(&mut out, &graph.name);
    out.push(' ');
    if graph.batch_dependent {
        out.push_str("batch_dependent ");
    }
    put_body(&mut out, graph, None, 0);
    out.push('\n');
    out
}

fn put_at(out: &mut String, name: &str) {
    out.push('@');
    put_name(out, name, is_bare);
}

fn put_name(out: &mut String, name: &str, plain: fn(&str) -> bool) {
    if plain(name) { out.push_str(name) } else { out.push_str(&quoted(name)) }
}

fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

fn indent(out: &mut String, depth: usize) {
    out.extend(std::iter::repeat_n("  ", depth));
}

/// `{`, the weights, the nodes, the results, `}`.
fn put_body(out: &mut String, graph: &Graph, around: Option<&IndexMap<WeightName, Weight>>, depth: usize) {
    out.push_str("{\n");
    let is_shared = |(name, weight): &(&WeightName, &Weight)| around.is_some_and(|w| w.get(*name) == Some(*weight));
    let (shared, own): (Vec<_>, Vec<_>) = graph.weights.iter().partition(is_shared);
    if !shared.is_empty() {
        indent(out, depth + 1);
        let names: Vec<String> = shared.iter().map(|(name, _)| quoted(name)).collect();
        out.push_str("use ");
        out.push_str(&names.join(", "));
        out.push('\n');
    }
    if !own.is_empty() {
        indent(out, depth + 1);
        out.push_str("weights {\n");
        for (name, weight) in own {
            indent(out, depth + 2);
            put_weight(out, name, weight, depth + 2);
            out.push('\n');
        }
        indent(out, depth + 1);
        out.push_str("}\n");
    }
    for id in graph.order() {
        indent(out, depth + 1);
        put_node(out, graph, id, depth + 1);
        out.push('\n');
    }
    if !graph.outputs.is_empty() {
        indent(out, depth + 1);
        put_outputs(out, graph);
        out.push('\n');
    }
    indent(out, depth);
    out.push('}');
}

fn put_outputs(out: &mut String, graph: &Graph) {
    out.push_str("return ");
    for (i, output) in graph.outputs.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        put_name(out, &output.name, is_word);
        out.push_str(" = ");
        if graph.contains(output.node) {
            put_value(out, graph, output.node);
        } else {
            out.push_str("%\"a removed node\"");
        }
        out.push_str(match output.part {
            Part::Whole => "",
            Part::Idx => ".idx",
            Part::Weights => ".w",
        });
    }
}

fn put_value(out: &mut String, graph: &Graph, id: NodeId) {
    out.push('%');
    put_name(out, &graph.node(id).name, is_bare);
}

/// `gate.weight: bf16[128, 2048] from "{p}gate.weight" {packing = .., view = ..}`
fn put_weight(out: &mut String, name: &str, weight: &Weight, depth: usize) {
    put_name(out, name, is_word);
    let sizes: Vec<String> = weight
        .shape
        .iter()
        .map(|extent| match extent {
            Extent::Fixed(n) => n.to_string(),
            Extent::PerExpert(n) => format!("({})", n.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
        })
        .collect();
    let _ = write!(out, ": {}[{}]", weight.dtype.name(), sizes.join(", "));
    if weight.source == Source::plain(name) {
        return;
    }
    let _ = write!(out, " from {}", quoted(&weight.source.tensor));
    let mut more = Map::new();
    if weight.source.packing != Packing::Plain {
        more.insert("packing".to_owned(), serde_json::to_value(&weight.source.packing).unwrap_or_default());
    }
    if !weight.source.view.is_empty() {
        more.insert("view".to_owned(), serde_json::to_value(&weight.source.view).unwrap_or_default());
    }
    if !more.is_empty() {
        out.push(' ');
        put_attributes(out, &more, depth);
    }
}

fn put_node(out: &mut String, graph: &Graph, id: NodeId, depth: usize) {
    let node = graph.node(id);
    put_value(out, graph, id);
    out.push_str(" = ");
    if let Op::Kernel(kernel) = &node.op {
        let _ = write!(out, "kernel.{} ", kernel.kind.name());
        put_at(out, &kernel.body.name);
        if kernel.body.batch_dependent {
            out.push_str(" batch_dependent");
        }
    } else {
        out.push_str(node.op.name());
    }
    if let Some(input) = short_input(&node.op, node.ty.as_ref()) {
        let _ = write!(out, " {}", quoted(&input.name));
    } else {
        for (i, operand) in graph.operands(id).into_iter().enumerate() {
            out.push_str(if i == 0 { " " } else { ", " });
            put_value(out, graph, operand);
        }
        let attributes = match node.op.attributes() {
            Ok(Value::Object(map)) => map,
            Ok(_) => Map::new(),
            // A number without a text form: the text does not read back, and the verifier refuses the graph.
            Err(_) => Map::from_iter([("error".to_owned(), Value::Null)]),
        };
        if !attributes.is_empty() {
            out.push(' ');
            put_attributes(out, &attributes, depth);
        }
    }
    if let Some(ty) = &node.ty {
        let _ = write!(out, " : {ty}");
    }
    if let Some(round) = node.round {
        let _ = write!(out, " round {}", round.name());
    }
    if let Op::Kernel(kernel) = &node.op {
        out.push(' ');
        put_body(out, &kernel.body, Some(&graph.weights), depth);
    }
}

/// An input whose stated type is the type behind the colon.
fn short_input<'a>(op: &'a Op, ty: Option<&Type>) -> Option<&'a Input> {
    let Op::Input(input) = op else { return None };
    let short = match ty? {
        Type::Tensor(ty) => *ty == input.ty,
        Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => input.ty == no_tensor(),
    };
    short.then_some(input)
}

/// `{k = 8, rule = "topk"}`, over several lines when the current line gets too long.
fn put_attributes(out: &mut String, map: &Map<String, Value>, depth: usize) {
    let column = out.len() - out.rfind('\n').map_or(0, |at| at + 1);
    put_json(out, &Value::Object(map.clone()), depth, WIDTH.saturating_sub(column));
}

/// A value in `room` columns, else over lines.
fn put_json(out: &mut String, value: &Value, depth: usize, room: usize) {
    let line = inline(value);
    if line.len() <= room {
        out.push_str(&line);
        return;
    }
    let below = WIDTH.saturating_sub(2 * (depth + 1));
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push_str("{\n");
            for (i, (key, value)) in map.iter().enumerate() {
                indent(out, depth + 1);
                put_name(out, key, is_word);
                out.push_str(" = ");
                put_json(out, value, depth + 1, below.saturating_sub(key.len() + 4));
                out.push_str(if i + 1 < map.len() { ",\n" } else { "\n" });
            }
            indent(out, depth);
            out.push('}');
        }
        Value::Array(items) if items.iter().any(|v| v.is_object() || v.is_array()) => {
            out.push_str("[\n");
            for (i, value) in items.iter().enumerate() {
                indent(out, depth + 1);
                put_json(out, value, depth + 1, below);
                out.push_str(if i + 1 < items.len() { ",\n" } else { "\n" });
            }
            indent(out, depth);
            out.push(']');
        }
        Value::Object(_) | Value::Array(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            out.push_str(&line);
        }
    }
}

fn inline(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut out = String::from("{");
            for (i, (key, value)) in map.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                put_name(&mut out, key, is_word);
                out.push_str(" = ");
                out.push_str(&inline(value));
            }
            out.push('}');
            out
        }
        Value::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    }
}
