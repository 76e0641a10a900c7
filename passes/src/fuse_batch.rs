//! Give every op that is left a kernel of its own.
//!
//! Before: ops that need the whole batch, move elements across rows, or have no rows at all.
//! After: one `kernel.batch` (`kernel.attention`) for each; results that no kernel writes (inputs
//! and second names of a value) are copied.

use crate::{Changed, Pass, PassCx};
use moec_ir::{
    Graph, NodeId, Op, Type,
    ops::{KernelKind, Shape, Unary, UnaryFn},
};

pub(crate) const PASS: Pass =
    Pass { name: "fuse-batch", about: "a kernel for each op that needs the whole batch", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = copy_outputs(graph);
    for id in graph.order() {
        let op = &graph.node(id).op;
        if matches!(op, Op::Input(_) | Op::Kernel(_)) {
            continue;
        }
        // Slots side by side are rows.
        let joins = matches!(op, Op::Shape(Shape::Concat { .. }))
            && graph.operands(id).iter().all(|o| matches!(graph.node(*o).ty, Some(Type::Route(_))));
        let kind = if matches!(op, Op::Attention(_)) {
            KernelKind::Attention
        } else if joins {
            KernelKind::Rows
        } else {
            KernelKind::Batch
        };
        let name = graph.node(id).name.clone();
        match graph.outline(&[id], kind, name) {
            Ok(kernel) => {
                cx.remark(graph, kernel, format!("kernel of its own ({})", kind.name()));
                changed = Changed::Yes;
            }
            Err(error) => cx.remark(graph, id, format!("not outlined: {error}")),
        }
    }
    changed
}

/// Gives results that have no memory of their own a copy.
fn copy_outputs(graph: &mut Graph) -> Changed {
    let mut changed = Changed::No;
    for at in 0..graph.outputs.len() {
        let (node, part) = (graph.outputs[at].node, graph.outputs[at].part);
        let again = graph.outputs[..at].iter().any(|o| o.node == node && o.part == part);
        let shared = again || matches!(graph.node(node).op, Op::Input(_));
        if shared && let Some(copy) = copy(graph, node) {
            graph.outputs[at].node = copy;
            changed = Changed::Yes;
        }
    }
    changed
}

fn copy(graph: &mut Graph, node: NodeId) -> Option<NodeId> {
    let op = match graph.node(node).ty.as_ref()? {
        Type::Tensor(ty) if ty.dtype.is_float() => Op::Unary(Unary { function: UnaryFn::Identity }),
        Type::Tensor(ty) => {
            let perm = (0..).take(ty.shape.len()).collect();
            Op::Shape(Shape::Transpose { perm })
        }
        Type::Route(_) => Op::Shape(Shape::Concat { axis: 1 }),
        Type::Plan(_) | Type::Ragged(_) => return None,
    };
    let name = graph.node(node).name.clone();
    let round = graph.node(node).round;
    let copy = graph.add(name, op, &[node]);
    graph.set_round(copy, round);
    Some(copy)
}
