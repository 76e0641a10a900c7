//! Fuse logits, scores, selection and weights into one kernel per route.
//!
//! Before: a product, a softmax, a sort and a normalisation, each a trip through memory.
//! After: one `kernel.gate` from the router's input to the route.
//! Left outside: values that something else uses as well, since they would be computed twice.

use crate::{
    Changed, Pass, PassCx,
    region::{self, Products},
};
use moec_ir::{Graph, NodeId, Op, Type, ops::KernelKind};

pub(crate) const PASS: Pass =
    Pass { name: "fuse-gating", about: "fuse logits, scores, selection and weights into one gate", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    while let Some((sink, nodes)) = find(graph) {
        let count = nodes.len();
        match graph.outline(&nodes, KernelKind::Gate, "gate") {
            Ok(kernel) => {
                cx.remark(graph, kernel, format!("{count} ops fused into one gate"));
                changed = Changed::Yes;
            }
            Err(error) => {
                cx.remark(graph, sink, format!("not fused: {error}"));
                return changed;
            }
        }
    }
    changed
}

/// A route that leaves the router: it is used by something that is no row op of the router.
fn find(graph: &Graph) -> Option<(NodeId, Vec<NodeId>)> {
    graph.order().into_iter().rev().find_map(|id| {
        let node = graph.node(id);
        if !matches!(node.ty, Some(Type::Route(_))) || matches!(node.op, Op::Kernel(_) | Op::Input(_)) {
            return None;
        }
        let nodes = region::grow(graph, id, Products::Any);
        (!nodes.is_empty()).then_some((id, nodes))
    })
}
