//! Fuse the weighted sum of expert rows with what follows it row by row.
//!
//! Before: `combine`, then additions of shared experts, scales, norms.
//! After: one `kernel.combine` that reads each expert row once and writes the layer's output once.

use crate::{
    Changed, Pass, PassCx,
    region::{self, Products},
};
use moec_ir::{Graph, NodeId, Op, ops::KernelKind};

pub(crate) const PASS: Pass =
    Pass { name: "fuse-combine", about: "fuse weighted sums of expert rows with the row ops behind them", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    while let Some((sink, nodes)) = find(graph) {
        let count = nodes.len();
        match graph.outline(&nodes, KernelKind::Combine, "combine") {
            Ok(kernel) => {
                cx.remark(graph, kernel, format!("{count} ops fused into one combine"));
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

/// The last row op whose region holds a combine.
fn find(graph: &Graph) -> Option<(NodeId, Vec<NodeId>)> {
    graph.order().into_iter().rev().find_map(|id| {
        let nodes = region::grow(graph, id, Products::Small);
        nodes.iter().any(|n| matches!(graph.node(*n).op, Op::Combine(_))).then_some((id, nodes))
    })
}
