//! Remove ops that nothing uses and ops that change nothing, and turn integers into numbers where they are read so.
//!
//! Needs nothing; leaves every value that reaches an output.

use crate::{Changed, Pass, PassCx};
use moec_ir::{
    Graph, NodeId, Op, Type,
    ops::{BinaryFn, SelectRule, Unary, UnaryFn},
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
    for id in graph.order() {
        if let Some(new) = to_numbers(graph, id) {
            cx.remark(graph, new, "reads integers as numbers");
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

/// Converts integers that a node computes with; the node that stands for it then.
fn to_numbers(graph: &mut Graph, id: NodeId) -> Option<NodeId> {
    let node = graph.node(id).clone();
    let integers =
        |graph: &Graph, id: NodeId| matches!(&graph.node(id).ty, Some(Type::Tensor(t)) if !t.dtype.is_float());
    let mut operands = graph.operands(id);
    let mut converted = false;
    for (i, operand) in operands.iter_mut().enumerate() {
        if integers(graph, *operand) && wants_numbers(&node.op, i) {
            *operand = graph.add("", Op::Unary(Unary { function: UnaryFn::Identity }), &[*operand]);
            converted = true;
        }
    }
    if !converted {
        return None;
    }
    let new = graph.add("", node.op, &operands);
    graph.set_round(new, node.round);
    graph.replace_uses(id, new);
    graph.remove(id);
    graph.rename(new, node.name);
    Some(new)
}

/// Whether an op computes with operand `i`. Elementwise functions take integers as they are.
fn wants_numbers(op: &Op, i: usize) -> bool {
    match op {
        Op::Linear(_)
        | Op::Norm(_)
        | Op::Softmax(_)
        | Op::Einsum(_)
        | Op::Reduce(_)
        | Op::Attention(_)
        | Op::Transport(_)
        | Op::ProductKey(_)
        | Op::Limit(_)
        | Op::Weigh(_)
        | Op::Dispatch(_)
        | Op::Ffn(_) => true,
        // The second operand is the class.
        Op::Adjust(op) => i != 1 || op.class_experts.is_none(),
        Op::Select(op) => i == 0 && !matches!(op.rule, SelectRule::Given { .. }),
        Op::Input(_)
        | Op::Param(_)
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Shape(_)
        | Op::Gather(_)
        | Op::Override(_)
        | Op::Count(_)
        | Op::Experts(_)
        | Op::Combine(_)
        | Op::Plan(_)
        | Op::Described(_)
        | Op::Collective(_)
        | Op::Kernel(_) => false,
    }
}
