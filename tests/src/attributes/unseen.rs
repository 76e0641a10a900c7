//! Why a change may rightly show in no result.

use super::{Mutant, same_graph};
use moec_ir::{Graph, Node, NodeId, Op, Type, ops::Shape};

/// A rule by which a change has no effect whatever the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The value is the default, or means the same: both graphs are equal.
    SameGraph,
    /// A permission, which changes no value.
    Permission,
    /// Another change of the same attribute of the same operation does show.
    Inactive,
    /// `round` of values that the narrow type holds exactly: counts, signs and comparisons.
    Exact,
    /// `base_id` of experts whose weights have no number in their names.
    NoWeights,
    /// Experts beyond `real` have weight 0: it does not matter what they give.
    Weightless,
    /// The same axis, counted from the other end.
    SameAxis,
    /// Another unit of padding that gives as many rows.
    SameRows,
    /// `bits` says how codes are stored: more of them change no value, and fewer are refused with the codes.
    Storage,
    /// `strict` counts where a score meets its bound exactly, which random data never do. `tests/properties/choice.rs` has
    /// such data.
    Tie,
    /// `min_k` counts where no score passes. `tests/properties/choice.rs` has such data.
    Floor,
}

/// The rule that holds for a change, if one does.
pub(super) fn reason(before: &Graph, after: &Graph, mutant: &Mutant) -> Option<Reason> {
    if mutant.attribute == "batch_dependent" && mutant.node.is_empty() {
        return Some(Reason::Permission);
    }
    let seen = |name: &str| mutant.place.split(' ').any(|n| n == name);
    match mutant.attribute.as_str() {
        "base_id" if names(before, mutant).is_some_and(|names| !names.iter().any(|name| name.contains("{e}"))) => {
            return Some(Reason::NoWeights);
        }
        "kind" if seen("experts") && weightless(before, mutant) => return Some(Reason::Weightless),
        "axis" if same_axis(before, after, mutant) => return Some(Reason::SameAxis),
        "multiple" if same_shapes(before, after, mutant) => return Some(Reason::SameRows),
        "round" if ["count", "sign", "gt", "ge"].into_iter().any(seen) => return Some(Reason::Exact),
        "bits" => return Some(Reason::Storage),
        "strict" => return Some(Reason::Tie),
        "min_k" => return Some(Reason::Floor),
        _ => {}
    }
    same_graph(before, after).then_some(Reason::SameGraph)
}

/// The node of a mutant.
fn node<'g>(graph: &'g Graph, mutant: &Mutant) -> Option<(NodeId, &'g Node)> {
    graph.ids().into_iter().map(|id| (id, graph.node(id))).find(|(_, node)| node.name == mutant.node)
}

/// Names of the weights of the bank part that a mutant changes.
fn names(graph: &Graph, mutant: &Mutant) -> Option<Vec<String>> {
    let Op::Experts(experts) = &node(graph, mutant)?.1.op else { return None };
    let part = experts.bank.get(mutant.part?)?;
    Some(part.specs().into_iter().flat_map(|(_, spec)| spec.names()).cloned().collect())
}

/// Whether the bank part that a mutant changes has only experts to which every route of the graph gives weight 0.
fn weightless(graph: &Graph, mutant: &Mutant) -> bool {
    let Some((_, Node { op: Op::Experts(experts), .. })) = node(graph, mutant) else { return false };
    let Some(part) = mutant.part.and_then(|i| experts.bank.get(i)) else { return false };
    let real = |id| match &graph.node(id).op {
        Op::Weigh(weigh) => Some(weigh.real.is_some_and(|real| part.ids[0] >= real)),
        _ => None,
    };
    graph.ids().into_iter().filter_map(real).all(|beyond| beyond)
}

/// Whether both axes are the same one of the operand.
fn same_axis(before: &Graph, after: &Graph, mutant: &Mutant) -> bool {
    let axis = |graph: &Graph| match node(graph, mutant)?.1.op {
        Op::Reduce(ref reduce) => Some(reduce.axis),
        Op::Shape(Shape::Concat { axis } | Shape::Slice { axis, .. } | Shape::Repeat { axis, .. }) => Some(axis),
        _ => None,
    };
    let operand = node(before, mutant).and_then(|(id, _)| before.operands(id).first().copied());
    let rank = operand.and_then(|id| match typed(before).node(id).ty.clone() {
        Some(Type::Tensor(ty)) => i64::try_from(ty.shape.len()).ok(),
        Some(Type::Route(_) | Type::Plan(_) | Type::Ragged(_)) | None => None,
    });
    match (axis(before), axis(after), rank) {
        (Some(a), Some(b), Some(rank)) => a.rem_euclid(rank) == b.rem_euclid(rank),
        (_, _, _) => false,
    }
}

/// Whether the node has the same type in both graphs.
fn same_shapes(before: &Graph, after: &Graph, mutant: &Mutant) -> bool {
    let ty = |graph: &Graph| node(&typed(graph), mutant).and_then(|(_, node)| node.ty.clone());
    ty(before) == ty(after)
}

/// The graph with the type of every node.
pub(super) fn typed(graph: &Graph) -> Graph {
    let mut graph = graph.clone();
    // It was verified before.
    let _ = graph.infer();
    graph
}
