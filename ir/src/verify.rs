//! Rules of whole graphs. The rules of single operations are their type rules.
//!
//! One function for each rule, one code for each rule:
//! no cycle (I0003), unique names (I0004), results that exist (I0007), nesting (I0008), types
//! (I0033 where a stated type is wrong), at most k forced experts (I0015), weights applied once
//! (I0021), scores that are not negative (I0022, a warning), padding (I0024), batch dependence
//! (I0028), states (I0029), kernel bodies (I0032), finite attributes (I0034).

use crate::{
    Diagnostic, Dim, Graph, NodeId, Op, Part, Type, codes,
    infer::axis_of,
    ops::{Range, SelectRule, Shape, WeighFn, WeighNorm},
};
use std::collections::BTreeSet;

/// Kernels inside kernels.
pub(crate) const MAX_DEPTH: usize = 64;

/// Checks a graph. Errors come first; warnings follow.
pub fn verify(graph: &Graph) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    check(graph, true, 0, &mut found);
    found.sort_by_key(|d| d.severity);
    found
}

/// Nodes that make results of a row depend on the other rows of the batch; kernels count by their body.
pub fn batch_dependent_nodes(graph: &Graph) -> Vec<NodeId> {
    graph.order().into_iter().filter(|n| graph.node(*n).op.is_batch_dependent()).collect()
}

fn check(graph: &Graph, whole: bool, depth: usize, found: &mut Vec<Diagnostic>) {
    if depth > MAX_DEPTH {
        found.push(Diagnostic::error(codes::DEPTH, format!("more than {MAX_DEPTH} kernels inside each other")));
        return;
    }
    unique_names(graph, found);
    if graph.order().len() < graph.len() {
        found.push(cycle(graph));
        return;
    }
    outputs(graph, whole, found);
    finite_attributes(graph, found);
    let mut typed = graph.clone();
    if whole {
        if let Err(errors) = typed.infer() {
            found.extend(errors);
        }
        stated_types(graph, &typed, found);
    }
    for id in typed.order() {
        forced_experts(&typed, id, found);
        weighted_once(&typed, id, found);
        negative_scores(&typed, id, found);
        if whole {
            padding(&typed, id, found);
        }
        if let Op::Kernel(kernel) = &typed.node(id).op {
            kernel_round(&typed, id, found);
            let at = found.len();
            check(&kernel.body, false, depth + 1, found);
            for inner in found.iter_mut().skip(at) {
                inner.message = format!("kernel `{}`: {}", typed.node(id).name, inner.message);
            }
        }
    }
    if whole {
        batch_flag(graph, found);
        states(&typed, found);
    }
}

/// The finding for a graph with a cycle, spelled out.
pub(crate) fn cycle(graph: &Graph) -> Diagnostic {
    let ordered: BTreeSet<NodeId> = graph.order().into_iter().collect();
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

fn at(graph: &Graph, id: NodeId) -> String {
    let node = graph.node(id);
    format!("node `{}` ({})", node.name, node.op.name())
}

fn unique_names(graph: &Graph, found: &mut Vec<Diagnostic>) {
    let mut seen = BTreeSet::new();
    let mut interface = BTreeSet::new();
    for id in graph.ids() {
        let node = graph.node(id);
        if !seen.insert(node.name.as_str()) {
            found.push(Diagnostic::error(codes::NAME, format!("two nodes are called `{}`", node.name)));
        }
        if let Op::Input(input) = &node.op
            && !interface.insert(input.name.as_str())
        {
            found.push(Diagnostic::error(codes::NAME, format!("two inputs are called `{}`", input.name)));
        }
    }
}

/// Outputs name values of the graph, and parts that those have. A kernel body returns any value.
fn outputs(graph: &Graph, whole: bool, found: &mut Vec<Diagnostic>) {
    let mut names = BTreeSet::new();
    for output in &graph.outputs {
        let name = &output.name;
        if !names.insert(name.as_str()) {
            found.push(Diagnostic::error(codes::OUTPUT, format!("two outputs are called `{name}`")));
        }
        if !graph.contains(output.node) {
            found.push(Diagnostic::error(codes::OUTPUT, format!("output `{name}` names no value of the graph")));
            continue;
        }
        let node = graph.node(output.node);
        let Some(ty) = &node.ty else { continue };
        let fits = match (output.part, ty) {
            (Part::Whole, Type::Tensor(_)) | (Part::Idx, Type::Route(_)) => true,
            (Part::Whole, Type::Route(_) | Type::Plan(_) | Type::Ragged(_)) => !whole,
            (Part::Weights, Type::Route(route)) => route.weighted,
            (Part::Idx | Part::Weights, Type::Tensor(_) | Type::Plan(_) | Type::Ragged(_)) => false,
        };
        if !fits {
            let text = format!("output `{name}` asks for {:?} of `{}`, which is {ty}", output.part, node.name);
            found.push(Diagnostic::error(codes::OUTPUT, text));
        }
    }
    if graph.outputs.is_empty() {
        found.push(Diagnostic::error(codes::OUTPUT, format!("graph `{}` has no output", graph.name)));
    }
}

fn finite_attributes(graph: &Graph, found: &mut Vec<Diagnostic>) {
    for id in graph.ids() {
        if let Err(error) = graph.node(id).op.attributes() {
            found.push(
                Diagnostic::error(codes::VALUE, format!("{}: {error}", at(graph, id))).about(&graph.node(id).name),
            );
        }
    }
}

/// A type that is stated must be the computed one.
fn stated_types(graph: &Graph, typed: &Graph, found: &mut Vec<Diagnostic>) {
    for id in graph.order() {
        if let (Some(stated), Some(computed)) = (&graph.node(id).ty, &typed.node(id).ty)
            && stated != computed
        {
            let text = format!("{}: stated as {stated}, it is {computed}", at(graph, id));
            found.push(Diagnostic::error(codes::TYPE, text).about(&graph.node(id).name));
        }
    }
}

/// Rule 2: at most k experts are forced.
fn forced_experts(graph: &Graph, id: NodeId, found: &mut Vec<Diagnostic>) {
    let Op::Adjust(adjust) = &graph.node(id).op else { return };
    let forced: BTreeSet<u64> = adjust.on.iter().copied().collect();
    for user in graph.users(id) {
        let Op::Select(select) = &graph.node(user).op else { continue };
        let k = match &select.rule {
            SelectRule::Topk { k } | SelectRule::GroupLimited { k, .. } => *k,
            SelectRule::GroupTopk { groups, k } => groups.saturating_mul(*k),
            SelectRule::Rank { .. }
            | SelectRule::All
            | SelectRule::Topp { .. }
            | SelectRule::Threshold { .. }
            | SelectRule::ExpertChoice { .. }
            | SelectRule::Given { .. } => continue,
        };
        if forced.len() as u64 > k {
            let text = format!(
                "{}: `on` forces {} experts, `{}` selects {k}",
                at(graph, id),
                forced.len(),
                graph.node(user).name
            );
            found.push(Diagnostic::error(codes::ON_OFF, text).about(&graph.node(id).name));
        }
    }
}

/// Rule 4: a weighted dispatch goes with an unweighted combine.
fn weighted_once(graph: &Graph, id: NodeId, found: &mut Vec<Diagnostic>) {
    let Op::Combine(combine) = &graph.node(id).op else { return };
    let mut rows = graph.operands(id).first().copied();
    while let Some(node) = rows {
        match &graph.node(node).op {
            Op::Dispatch(dispatch) if dispatch.weighted && combine.weighted => {
                let text = format!("{}: `{}` has applied the weights already", at(graph, id), graph.node(node).name);
                let help = "set `weighted` to false in one of them";
                found.push(Diagnostic::error(codes::WEIGHTED_TWICE, text).about(&graph.node(id).name).help(help));
                return;
            }
            Op::Experts(_) | Op::Attention(_) | Op::Collective(_) => rows = graph.operands(node).first().copied(),
            Op::Dispatch(_)
            | Op::Input(_)
            | Op::Param(_)
            | Op::Linear(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Norm(_)
            | Op::Softmax(_)
            | Op::Einsum(_)
            | Op::Reduce(_)
            | Op::Shape(_)
            | Op::Gather(_)
            | Op::Adjust(_)
            | Op::Transport(_)
            | Op::Select(_)
            | Op::ProductKey(_)
            | Op::Limit(_)
            | Op::Weigh(_)
            | Op::Override(_)
            | Op::Count(_)
            | Op::Combine(_)
            | Op::Ffn(_)
            | Op::Plan(_)
            | Op::Described(_)
            | Op::Kernel(_) => return,
        }
    }
}

/// Rule 5: a sum of scores straight from a product may be negative or 0.
fn negative_scores(graph: &Graph, id: NodeId, found: &mut Vec<Diagnostic>) {
    let Op::Weigh(weigh) = &graph.node(id).op else { return };
    let operands = graph.operands(id);
    if weigh.norm != Some(WeighNorm::Sum)
        || weigh.function != WeighFn::None
        || weigh.constant
        || !weigh.has_scores(operands.len())
    {
        return;
    }
    let Some(scores) = operands.get(1) else { return };
    if matches!(graph.node(*scores).op, Op::Linear(_) | Op::Einsum(_)) {
        let text = format!(
            "{}: divides by the sum of `{}`, which comes straight from a product and may be negative",
            at(graph, id),
            graph.node(*scores).name
        );
        let help = "put a `softmax` or a `sigmoid` in front, or set `fn`";
        found.push(Diagnostic::warning(codes::NEGATIVE_SCORES, text).about(&graph.node(id).name).help(help));
    }
}

/// Rule 6: padded rows come back through `slice`, so no path of row-by-row ops leads to a result without one.
fn padding(graph: &Graph, id: NodeId, found: &mut Vec<Diagnostic>) {
    if !matches!(graph.node(id).op, Op::Shape(Shape::Pad { .. })) || pads_nothing(graph, id) {
        return;
    }
    let mut open = vec![id];
    let mut seen = BTreeSet::from([id]);
    while let Some(node) = open.pop() {
        if let Some(output) = graph.outputs.iter().find(|o| o.node == node && o.part == Part::Whole) {
            let text = format!("{}: output `{}` holds padded rows", at(graph, id), output.name);
            let help = "bring the rows back with `slice`";
            found.push(Diagnostic::error(codes::PAD, text).about(&graph.node(id).name).help(help));
            return;
        }
        for user in graph.users(node) {
            if let Op::Shape(Shape::Slice { axis, range }) = &graph.node(user).op
                && (of_rows(graph, node, *axis) || shape_of(graph, node).first() != shape_of(graph, id).first())
            {
                if of_rows(graph, node, *axis)
                    && let Some((kept, rows)) = keeps_padding(graph, id, node, *range)
                {
                    let text =
                        format!("{}: {} keeps {kept} rows, of which {rows} are given", at(graph, id), at(graph, user));
                    let help = "end the range at the rows that are given";
                    found.push(Diagnostic::error(codes::PAD, text).about(&graph.node(id).name).help(help));
                }
                continue;
            }
            let keeps_rows = match &graph.node(user).op {
                Op::Einsum(_)
                | Op::Reduce(_)
                | Op::Attention(_)
                | Op::Count(_)
                | Op::Gather(_)
                | Op::Described(_)
                | Op::Collective(_)
                | Op::Kernel(_)
                | Op::Input(_)
                | Op::Param(_) => false,
                Op::Shape(_)
                | Op::Linear(_)
                | Op::Unary(_)
                | Op::Binary(_)
                | Op::Norm(_)
                | Op::Softmax(_)
                | Op::Adjust(_)
                | Op::Transport(_)
                | Op::Select(_)
                | Op::ProductKey(_)
                | Op::Limit(_)
                | Op::Weigh(_)
                | Op::Override(_)
                | Op::Dispatch(_)
                | Op::Experts(_)
                | Op::Combine(_)
                | Op::Ffn(_)
                | Op::Plan(_) => true,
            };
            if keeps_rows && seen.insert(user) {
                open.push(user);
            }
        }
    }
}

fn shape_of(graph: &Graph, id: NodeId) -> &[Dim] {
    graph.node(id).ty.as_ref().and_then(Type::tensor).map_or(&[], |ty| &ty.shape)
}

/// Whether an axis of a value is that of its rows.
fn of_rows(graph: &Graph, id: NodeId, axis: i64) -> bool {
    axis_of(axis, shape_of(graph, id).len()).is_ok_and(|axis| axis == 0)
}

/// Rows up to the last that a slice of the padded rows keeps, and those that were given, where these are fewer. Of rows
/// that were joined or cut since, all have the same share.
fn keeps_padding(graph: &Graph, pad: NodeId, sliced: NodeId, range: Range) -> Option<(u64, u64)> {
    let rows = |id: NodeId| shape_of(graph, id).first().and_then(Dim::known);
    let (given, padded, all) = (rows(*graph.operands(pad).first()?)?, rows(pad)?, rows(sliced)?);
    let [start, step] = range.steps(Some(all))?;
    let last = step.checked_mul(i64::try_from(range.entries()?.checked_sub(1)?).ok()?)?.checked_add(start)?;
    let end = u64::try_from(start.max(last)).ok()?.checked_add(1)?;
    (end.checked_mul(padded)? > given.checked_mul(all)?).then_some((end, given))
}

/// Whether the rows are a multiple already.
fn pads_nothing(graph: &Graph, id: NodeId) -> bool {
    let operand = graph.operands(id).first().and_then(|o| graph.node(*o).ty.clone());
    operand.is_some() && operand == graph.node(id).ty
}

fn kernel_round(graph: &Graph, id: NodeId, found: &mut Vec<Diagnostic>) {
    if graph.node(id).round.is_some() {
        let text = format!("{}: a kernel rounds inside its body, not outside", at(graph, id));
        found.push(Diagnostic::error(codes::KERNEL, text).about(&graph.node(id).name));
    }
}

/// Rule 8: a batch-dependent operation needs the flag.
fn batch_flag(graph: &Graph, found: &mut Vec<Diagnostic>) {
    if graph.batch_dependent {
        return;
    }
    for id in batch_dependent_nodes(graph) {
        let text = format!("{}: the result of a row depends on the other rows of the batch", at(graph, id));
        let help = "say so with `batch_dependent` on the graph, or use an operation that works row by row";
        found.push(Diagnostic::error(codes::BATCH, text).about(&graph.node(id).name).help(help));
    }
}

/// Rule 9: input `state_<n>_in` and output `state_<n>` have the same shape.
fn states(graph: &Graph, found: &mut Vec<Diagnostic>) {
    for id in graph.inputs() {
        let Op::Input(input) = &graph.node(id).op else { continue };
        let state = input.name.strip_suffix("_in").filter(|name| name.starts_with("state_"));
        let Some(output) = graph.outputs.iter().find(|o| Some(o.name.as_str()) == state) else { continue };
        if !graph.contains(output.node) {
            continue;
        }
        let Some(ty) = &graph.node(output.node).ty else { continue };
        if ty.tensor().map(|t| &t.shape) != Some(&input.ty.shape) {
            let text = format!("input `{}` is {}, output `{}` is {ty}", input.name, input.ty, output.name);
            found.push(Diagnostic::error(codes::STATE, text));
        }
    }
}
