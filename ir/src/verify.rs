//! Rules of whole graphs.

use crate::{Diagnostic, Graph, NodeId, codes};

/// The finding for a graph with a cycle, spelled out.
pub(crate) fn cycle(graph: &Graph) -> Diagnostic {
    let ordered: std::collections::BTreeSet<NodeId> = graph.order().into_iter().collect();
    let mut path: Vec<NodeId> = Vec::new();
    let mut at = graph.ids().into_iter().find(|n| !ordered.contains(n));
    // A node that is left out has an operand that is left out, so the walk ends on a node seen before.
    while let Some(id) = at {
        if let Some(start) = path.iter().position(|n| *n == id) {
            path.drain(..start);
            break;
        }
        path.push(id);
        at = graph.operands(id).into_iter().find(|n| !ordered.contains(n));
    }
    let mut names: Vec<&str> = path.iter().rev().map(|n| graph.node(*n).name.as_str()).collect();
    if let Some(first) = names.first().copied() {
        names.push(first);
    }
    Diagnostic::error(codes::CYCLE, format!("values depend on each other: {}", names.join(" -> ")))
}
