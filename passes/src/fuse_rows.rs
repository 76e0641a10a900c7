//! Fuse the remaining row ops into as few kernels as possible.
//!
//! Before: chains of elementwise ops, norms, small products. After: one `kernel.rows` per value
//! that leaves its chain.

use crate::{
    Changed, Pass, PassCx,
    region::{self, Products},
};
use moec_ir::{Graph, NodeId, Op, ops::KernelKind};

pub(crate) const PASS: Pass = Pass { name: "fuse-rows", about: "fuse chains of the remaining row ops", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    while let Some((sink, nodes)) = find(graph) {
        let count = nodes.len();
        match graph.outline(&nodes, KernelKind::Rows, "rows") {
            Ok(kernel) => {
                cx.remark(graph, kernel, format!("{count} ops fused"));
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

fn find(graph: &Graph) -> Option<(NodeId, Vec<NodeId>)> {
    graph.order().into_iter().rev().find_map(|id| {
        if matches!(graph.node(id).op, Op::Kernel(_)) {
            return None;
        }
        let nodes = region::grow(graph, id, Products::Small);
        (!nodes.is_empty()).then_some((id, nodes))
    })
}
