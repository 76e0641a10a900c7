//! Graphs as Graphviz text; kernels are clusters.

use crate::{Graph, NodeId, Op};
use std::fmt::Write as _;

/// The graph in the language of Graphviz.
pub fn dot(graph: &Graph) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "digraph {} {{", quoted(&graph.name));
    out.push_str("  node [shape=box, fontname=\"monospace\"];\n");
    put_nodes(&mut out, graph, "", 1);
    for (i, output) in graph.outputs.iter().enumerate() {
        let _ = writeln!(out, "  {} [label={}, shape=ellipse];", quoted(&format!("out{i}")), quoted(&output.name));
        if graph.contains(output.node) {
            let from = value_of(graph, "", output.node);
            let _ = writeln!(out, "  {} -> {};", quoted(&from), quoted(&format!("out{i}")));
        }
    }
    out.push_str("}\n");
    out
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// Identifier of the node that makes a value; for a kernel, of the last node of its body.
fn value_of(graph: &Graph, prefix: &str, id: NodeId) -> String {
    let mut path = format!("{prefix}/{}", graph.node(id).name);
    let (mut graph, mut id) = (graph, id);
    while let Op::Kernel(kernel) = &graph.node(id).op {
        let Some(output) = kernel.body.outputs.first().filter(|o| kernel.body.contains(o.node)) else { break };
        (graph, id) = (&kernel.body, output.node);
        let _ = write!(path, "/{}", graph.node(id).name);
    }
    path
}

fn put_nodes(out: &mut String, graph: &Graph, prefix: &str, depth: usize) {
    let pad = "  ".repeat(depth);
    for id in graph.order() {
        let node = graph.node(id);
        let path = format!("{prefix}/{}", node.name);
        if let Op::Kernel(kernel) = &node.op {
            let _ = writeln!(out, "{pad}subgraph {} {{", quoted(&format!("cluster{path}")));
            let label = format!("{} = kernel.{}", node.name, kernel.kind.name());
            let _ = writeln!(out, "{pad}  label={};", quoted(&label));
            put_nodes(out, &kernel.body, &path, depth + 1);
            let _ = writeln!(out, "{pad}}}");
            for (operand, input) in graph.operands(id).into_iter().zip(kernel.body.inputs()) {
                let (from, to) = (value_of(graph, prefix, operand), value_of(&kernel.body, &path, input));
                let _ = writeln!(out, "{pad}{} -> {};", quoted(&from), quoted(&to));
            }
            continue;
        }
        let ty = node.ty.as_ref().map_or_else(String::new, |ty| format!("\n{ty}"));
        let label = format!("{} = {}{ty}", node.name, node.op.name());
        let _ = writeln!(out, "{pad}{} [label={}];", quoted(&path), quoted(&label));
        for operand in graph.operands(id) {
            let _ = writeln!(out, "{pad}{} -> {};", quoted(&value_of(graph, prefix, operand)), quoted(&path));
        }
    }
}
