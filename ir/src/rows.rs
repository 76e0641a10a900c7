//! Which operands of an op are the same for all rows of its result.

use crate::{Dim, Graph, NodeId, Op, Type, ops::ProductKey};

/// Whether an operand is repeated along the rows of a value of this shape.
fn is_repeated(operand: &Type, shape: &[Dim]) -> bool {
    match operand {
        Type::Tensor(tensor) => {
            let one = Some(&Dim::Const(1));
            let known = tensor.shape.iter().all(|d| d.known().is_some());
            known && (tensor.shape.len() < shape.len() || (tensor.shape.first() == one && shape.first() != one))
        }
        Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => false,
    }
}

impl Graph {
    /// Whether operand `i` of a node is the same for all rows of the result: a value without rows, or with one.
    pub fn is_shared_by_rows(&self, node: NodeId, i: usize) -> bool {
        let operands = self.operands(node);
        let Some(operand) = operands.get(i).and_then(|o| self.node(*o).ty.as_ref()) else { return false };
        let result = match &self.node(node).ty {
            Some(Type::Tensor(ty)) => ty.shape.as_slice(),
            Some(Type::Route(_) | Type::Plan(_) | Type::Ragged(_)) | None => &[],
        };
        match &self.node(node).op {
            Op::Binary(_) => is_repeated(operand, result),
            // The mask comes last.
            Op::Adjust(op) => op.mask && i > 0 && i + 1 == operands.len() && is_repeated(operand, result),
            Op::ProductKey(ProductKey::Tucker { .. }) => i >= 2,
            // The bound.
            Op::Select(_) => i == 1,
            Op::ProductKey(ProductKey::Sum { .. } | ProductKey::Scores { .. })
            | Op::Shape(_)
            | Op::Input(_)
            | Op::Param(_)
            | Op::Linear(_)
            | Op::Unary(_)
            | Op::Norm(_)
            | Op::Softmax(_)
            | Op::Einsum(_)
            | Op::Reduce(_)
            | Op::Gather(_)
            | Op::Attention(_)
            | Op::Transport(_)
            | Op::Limit(_)
            | Op::Weigh(_)
            | Op::Override(_)
            | Op::Count(_)
            | Op::Dispatch(_)
            | Op::Experts(_)
            | Op::Combine(_)
            | Op::Ffn(_)
            | Op::Plan(_)
            | Op::Described(_)
            | Op::Collective(_)
            | Op::Kernel(_) => false,
        }
    }
}
