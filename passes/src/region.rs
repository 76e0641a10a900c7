//! Regions of row ops: what one row kernel can compute.
//!
//! A row op works on each row alone: its result for a row depends on that row of its operands and
//! on weights. A region is grown backwards from one value over row ops that nothing else uses.

use moec_ir::{
    Dim, Extent, Graph, NodeId, Op, Type, WeightSpec,
    ops::{Binary, BinaryFn, Ffn, LimitOn, PartKind, SelectRule, Shape, Unary, UnaryFn},
};
use std::collections::BTreeSet;

/// Elements of a matrix from which a product is a kernel of its own.
///
/// Below, reading the matrix again for each block of rows costs less than a launch and a trip of
/// the result through memory. Router matrices are larger, but their logits are used at once, and
/// gates are fused whatever their size.
const OWN_KERNEL: u64 = 4096;

/// Outputs from which a product can fill a register tile.
const TILE_OUTPUTS: u64 = 16;

/// How large products are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Products {
    /// Any product belongs to the region (gates).
    Any,
    /// Large products stay outside.
    Small,
}

/// Rows of a value that has them.
fn rows(ty: &Type) -> Option<&Dim> {
    match ty {
        Type::Tensor(tensor) => tensor.shape.first(),
        Type::Route(route) => Some(&route.rows),
        Type::Plan(_) | Type::Ragged(_) => None,
    }
}

fn elements(graph: &Graph, name: &str) -> (u64, u64) {
    let Some(weight) = graph.weights.get(name) else { return (0, 0) };
    let sizes: Vec<u64> = weight.shape.iter().map(Extent::max).collect();
    (sizes.iter().product(), sizes.first().copied().unwrap_or(0))
}

/// Whether a matrix is large enough for a kernel of its own.
pub(crate) fn is_large(graph: &Graph, name: &str) -> bool {
    let (size, outputs) = elements(graph, name);
    size >= OWN_KERNEL && outputs >= TILE_OUTPUTS
}

fn is_large_spec(graph: &Graph, spec: &WeightSpec) -> bool {
    spec.names().into_iter().any(|name| is_large(graph, name))
}

/// Whether a value is the same for all rows: weights, and what is computed from them alone.
fn is_param(graph: &Graph, id: NodeId) -> bool {
    matches!(graph.node(id).op, Op::Param(_))
}

/// Whether the weights of an elementwise op are the same for all rows.
fn weights_repeat(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    let Some(Type::Tensor(result)) = &node.ty else { return true };
    node.op.weights().into_iter().all(|name| {
        graph.weights.get(name).is_some_and(|w| {
            let first = w.shape.first().map(Extent::max);
            w.shape.len() < result.shape.len() || (w.shape.len() == result.shape.len() && first == Some(1))
        })
    })
}

/// Whether a node treats each of `rows` rows alone and can be part of a row kernel.
pub(crate) fn is_row_op(graph: &Graph, id: NodeId, products: Products) -> bool {
    let node = graph.node(id);
    let Some(ty) = &node.ty else { return false };
    let large = |name: &str| products == Products::Small && is_large(graph, name);
    let fits = match &node.op {
        // A product of a vector has no rows.
        Op::Linear(op) => operand_rank(graph, id) != Some(1) && !large(&op.w),
        Op::Unary(_) | Op::Gather(_) | Op::Adjust(_) | Op::Weigh(_) | Op::Override(_) => true,
        Op::Binary(_) => weights_repeat(graph, id),
        Op::Norm(_) | Op::Softmax(_) => {
            matches!(ty, Type::Tensor(t) if t.shape.len() >= 2) && weights_repeat(graph, id)
        }
        Op::Reduce(op) => matches!(operand_rank(graph, id), Some(rank) if axis(op.axis, rank) >= 1),
        Op::Shape(op) => match op {
            Shape::Concat { axis: a } | Shape::Slice { axis: a, .. } | Shape::Repeat { axis: a, .. } => {
                matches!(ty, Type::Route(_)) || operand_rank(graph, id).is_some_and(|rank| axis(*a, rank) >= 1)
            }
            Shape::Stack { axis: a } => operand_rank(graph, id).is_some_and(|rank| axis(*a, rank + 1) >= 1),
            Shape::Transpose { perm } => {
                operand_rank(graph, id).is_some_and(|rank| perm.first().is_some_and(|first| axis(*first, rank) == 0))
            }
            Shape::Reshape { .. } => matches!(ty, Type::Tensor(_)),
            Shape::Pad { .. } => false,
        },
        Op::Select(op) => !matches!(op.rule, SelectRule::ExpertChoice { .. }),
        Op::ProductKey(_) => true,
        Op::Ffn(op) => {
            let specs = [Some(&op.up), op.gate.as_ref(), op.down.as_ref()];
            let plain = specs.iter().flatten().all(|s| matches!(s, WeightSpec::Plain(_)));
            plain
                && operand_rank(graph, id) != Some(1)
                && !op.a8
                && !specs.into_iter().flatten().any(|s| products == Products::Small && is_large_spec(graph, s))
        }
        Op::Combine(_) => true,
        Op::Dispatch(_) => feeds_simple_bank(graph, id),
        Op::Experts(op) => op.bank.iter().all(|p| is_simple(&p.kind)),
        Op::Input(_)
        | Op::Param(_)
        | Op::Einsum(_)
        | Op::Attention(_)
        | Op::Transport(_)
        | Op::Limit(_)
        | Op::Count(_)
        | Op::Plan(_)
        | Op::Described(_)
        | Op::Collective(_)
        | Op::Kernel(_) => false,
    };
    fits && rows_agree(graph, id, ty)
}

/// A product with a composed matrix, or with rounded activations: a network that is its first product alone.
pub(crate) fn product(w: &WeightSpec, bias: Option<&WeightSpec>, a8: bool) -> Ffn {
    Ffn {
        gate: None,
        gate_bias: None,
        up: w.clone(),
        up_bias: bias.cloned(),
        down: None,
        down_bias: None,
        act: Some(UnaryFn::Identity),
        packed: false,
        a8,
        limit: None,
        limit_on: LimitOn::Gate,
        alpha: None,
        up_add: 0.0,
    }
}

/// Zeros as many as the rows of `x`, and `width` to a row where that is another: no sign is above 1.
pub(crate) fn zeros(graph: &mut Graph, x: NodeId, width: Option<u64>) -> NodeId {
    let sign = graph.add("", Op::Unary(Unary { function: UnaryFn::Sign }), &[x]);
    let above = Binary { function: BinaryFn::Gt, w: None, c: Some(1.0) };
    let zeros = graph.add("", Op::Binary(above), &[sign]);
    let Some(n) = width else { return zeros };
    let column = graph.add("", Op::Shape(Shape::Slice { axis: -1, range: [0, 1].into() }), &[zeros]);
    graph.add("", Op::Shape(Shape::Repeat { n, axis: -1 }), &[column])
}

/// Whether experts of this kind need no matrix product.
pub(crate) const fn is_simple(kind: &PartKind) -> bool {
    match kind {
        PartKind::Const { .. } | PartKind::Neuron(_) | PartKind::Identity {} | PartKind::Zero {} => true,
        PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) => false,
    }
}

fn feeds_simple_bank(graph: &Graph, id: NodeId) -> bool {
    graph
        .users(id)
        .iter()
        .all(|user| matches!(&graph.node(*user).op, Op::Experts(op) if op.bank.iter().all(|p| is_simple(&p.kind))))
}

fn operand_rank(graph: &Graph, id: NodeId) -> Option<usize> {
    match graph.operands(id).first().and_then(|o| graph.node(*o).ty.as_ref()) {
        Some(Type::Tensor(tensor)) => Some(tensor.shape.len()),
        Some(Type::Route(_) | Type::Plan(_) | Type::Ragged(_)) | None => None,
    }
}

fn axis(axis: i64, rank: usize) -> i64 {
    if axis < 0 { axis + i64::try_from(rank).unwrap_or(0) } else { axis }
}

/// Operands and result have the same rows, and rows of known size.
fn rows_agree(graph: &Graph, id: NodeId, ty: &Type) -> bool {
    let known = |ty: &Type| match ty {
        Type::Tensor(tensor) => tensor.shape.iter().skip(1).all(|d| d.known().is_some()),
        Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => true,
    };
    if matches!(graph.node(id).op, Op::Combine(_) | Op::Dispatch(_) | Op::Experts(_)) {
        // Rows of a route may cover several tokens; the emitter knows how.
        return known(ty);
    }
    let Some(own) = rows(ty) else { return false };
    known(ty)
        && graph.operands(id).iter().enumerate().all(|(i, operand)| {
            graph.node(*operand).ty.as_ref().is_some_and(|ty| {
                graph.is_shared_by_rows(id, i) || (rows(ty) == Some(own) && known(ty) && !is_param(graph, *operand))
            })
        })
}

/// Row ops that compute `sink` and are used by nothing else, `sink` included; empty if it is no row op.
pub(crate) fn grow(graph: &Graph, sink: NodeId, products: Products) -> Vec<NodeId> {
    if !is_row_op(graph, sink, products) {
        return Vec::new();
    }
    let mut inside = BTreeSet::from([sink]);
    let own = graph.node(sink).ty.as_ref().and_then(rows).cloned();
    // A route may cover several tokens with a row; it is computed elsewhere then.
    let same_rows = |id: NodeId| match graph.node(id).ty.as_ref() {
        Some(ty @ (Type::Tensor(_) | Type::Route(_))) => rows(ty) == own.as_ref(),
        Some(Type::Plan(_) | Type::Ragged(_)) => true,
        None => false,
    };
    // Users come after their operands, so one pass against the order sees all users first.
    for id in graph.order().into_iter().rev() {
        let users = graph.users(id);
        let only_here = !users.is_empty() && users.iter().all(|u| inside.contains(u)) && !graph.is_output(id);
        let row_op = || {
            same_rows(id)
                && is_row_op(graph, id, products)
                && !uses(graph, id, &inside).contains(&true)
                && reads_alike(graph, id, &inside)
        };
        if only_here && (is_param(graph, id) || row_op()) {
            inside.insert(id);
        }
    }
    inside.into_iter().collect()
}

/// How nodes inside use a value: whole for each of their rows (true), or row by row.
fn uses(graph: &Graph, id: NodeId, inside: &BTreeSet<NodeId>) -> Vec<bool> {
    let mut uses = Vec::new();
    for user in graph.users(id).into_iter().filter(|user| inside.contains(user)) {
        for (i, operand) in graph.operands(user).into_iter().enumerate() {
            if operand == id {
                uses.push(graph.is_shared_by_rows(user, i));
            }
        }
    }
    uses
}

/// Whether a node reads every operand as those inside read it: a kernel reads a value whole, or row by row.
fn reads_alike(graph: &Graph, id: NodeId, inside: &BTreeSet<NodeId>) -> bool {
    graph.operands(id).into_iter().enumerate().all(|(i, operand)| {
        let whole = graph.is_shared_by_rows(id, i);
        uses(graph, operand, inside).into_iter().all(|other| other == whole)
    })
}
