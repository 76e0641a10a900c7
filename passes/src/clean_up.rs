//! Remove ops that nothing uses and ops that change nothing.
//!
//! Needs nothing; leaves every value that reaches an output.

use crate::{Changed, Pass, PassCx};
use moec_ir::{
    Graph, NodeId, Op,
    ops::{BinaryFn, UnaryFn},
};

pub(crate) const PASS: Pass = Pass { name: "clean-up", about: "remove unused ops and ops that change nothing", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if let Some(operand) = same_as(graph, id) {
            cx.remark(graph, id, "changes nothing");
            graph.replace_uses(id, operand);
            changed = Changed::Yes;
        }
    }
    for id in graph.order().into_iter().rev() {
        let unused = graph.users(id).is_empty() && !graph.is_output(id);
        // Inputs belong to the interface.
        if unused && !matches!(graph.node(id).op, Op::Input(_)) {
            graph.remove(id);
            changed = Changed::Yes;
        }
    }
    changed
}

/// The operand that a node equals.
fn same_as(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let node = graph.node(id);
    let operand = graph.operands(id).first().copied()?;
    let neutral = match &node.op {
        Op::Unary(op) => op.function == UnaryFn::Identity,
        Op::Binary(op) => match (op.function, op.c) {
            (BinaryFn::Add | BinaryFn::Sub, Some(c)) => c == 0.0,
            (BinaryFn::Mul | BinaryFn::Div, Some(c)) => c == 1.0,
            (BinaryFn::Max | BinaryFn::Min | BinaryFn::Gt | BinaryFn::Ge, Some(_)) | (_, None) => false,
        },
        _ => false,
    };
    (neutral && node.round.is_none() && node.ty == graph.node(operand).ty).then_some(operand)
}
