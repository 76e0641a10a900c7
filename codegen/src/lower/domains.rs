//! What inputs of integers may hold, and which sizes there may be. A kernel cannot stop at a value that makes no sense,
//! so the host looks first.

use super::memory::{Memory, dim};
use moec_abi::{Domain, Expr, Fit};
use moec_ir::{
    Dim, Graph, NodeId, Op, Type,
    ops::{Adjust, Reduce, ReduceFn, Select, SelectRule, Shape},
};

/// The domains of all inputs that ops read as classes or ids.
pub(super) fn of_inputs(graph: &Graph, memory: &Memory) -> Vec<Domain> {
    let mut domains = Vec::new();
    for input in graph.inputs() {
        let Some(buffer) = memory.place(input).and_then(super::memory::Place::data) else { continue };
        for user in graph.users(input) {
            let Op::Kernel(kernel) = &graph.node(user).op else { continue };
            let inner = kernel.body.inputs();
            let places = graph.operands(user).into_iter().zip(inner).filter(|(outer, _)| *outer == input);
            for (_, inner) in places {
                for reader in kernel.body.users(inner) {
                    if let Some((what, ranges)) = of_reader(&kernel.body, reader, inner) {
                        let what = format!("node `{}`: {what}", kernel.body.node(reader).name);
                        domains.push(Domain { buffer, what, ranges });
                    }
                }
            }
        }
    }
    domains
}

/// The sizes that ops have no meaning for otherwise, where they depend on the number of tokens.
pub(super) fn sizes(graph: &Graph) -> Vec<Fit> {
    let mut fits = Vec::new();
    for id in graph.ids() {
        let node = graph.node(id);
        if let Op::Kernel(kernel) = &node.op {
            fits.extend(sizes(&kernel.body));
            continue;
        }
        let Some(Type::Tensor(x)) = graph.operands(id).first().and_then(|o| graph.node(*o).ty.as_ref()) else {
            continue;
        };
        let Some(fit) = of_op(&node.op, &x.shape) else { continue };
        if fit.size.known().is_none() {
            fits.push(Fit { what: format!("node `{}`: {}", node.name, fit.what), ..fit });
        }
    }
    fits
}

/// What an op needs of a size of its first operand.
fn of_op(op: &Op, shape: &[Dim]) -> Option<Fit> {
    let volume = |dims: &[Dim]| dims.iter().fold(Expr::Const(1), |n, d| n.times(dim(d)));
    let any = |size: Expr| Fit { what: String::new(), size, least: 0, most: u64::MAX, multiple: 1 };
    let at = |axis: i64| usize::try_from(if axis < 0 { axis + i64::try_from(shape.len()).ok()? } else { axis }).ok();
    if let Op::Shape(Shape::Slice { axis, range }) = op {
        let size = shape.get(at(*axis)?)?;
        return Some(Fit {
            what: format!("entries {range} of an axis of {size}"),
            least: range.reach(),
            ..any(dim(size))
        });
    }
    if let Op::Shape(Shape::Reshape { to }) = op {
        let row = to.iter().filter_map(|n| u64::try_from(*n).ok()).try_fold(1, u64::checked_mul)?;
        let elements = shape.iter().cloned().try_fold(Dim::Const(1), Dim::mul)?;
        let what = format!("a reshape of {elements} elements to {to:?}, whose open size must be whole");
        return Some(Fit { what, multiple: row.max(1), ..any(volume(shape)) });
    }
    if let Op::Reduce(Reduce { function: ReduceFn::Max | ReduceFn::Min, axis, .. }) = op {
        let mut others = shape.to_vec();
        let size = others.remove(at(*axis)?);
        let results = volume(&others).eval(0) != Some(0);
        let what = format!("the largest or smallest along an axis of {size}");
        return results.then(|| Fit { what, least: 1, ..any(dim(&size)) });
    }
    if let Op::Adjust(Adjust { causal_block: Some(block), tokens: Some(tokens), .. }) = op {
        let (blocks, rows) = shape.split_last()?;
        let keys = blocks.known()?.checked_mul(*block)?;
        let what = format!("{blocks} blocks of {block} keys");
        return (*tokens > keys).then(|| Fit { what, most: keys, ..any(volume(rows)) });
    }
    None
}

/// What the reader takes the value for, and which values it has a meaning for.
fn of_reader(body: &Graph, reader: NodeId, value: NodeId) -> Option<(&'static str, Vec<[i64; 2]>)> {
    let last = |n: u64| i64::try_from(n).unwrap_or(i64::MAX) - 1;
    let op = &body.node(reader).op;
    if let Op::Adjust(Adjust { class_experts: Some(classes), .. }) = op {
        let is_class = body.operands(reader).get(1) == Some(&value);
        let classes = || runs(classes.keys().filter_map(|k| k.parse().ok()).collect());
        return is_class.then(|| ("a class that is in `class_experts`", classes()));
    }
    if let Op::Gather(gather) = op {
        let rows = body.weights.get(&gather.w)?.shape.first()?.max();
        return Some(("a row of the table", vec![[0, last(rows)]]));
    }
    if let Op::Select(Select { rule: SelectRule::Given { experts }, .. }) = op {
        return Some(("an expert, or -1 for none", vec![[-1, last(*experts)]]));
    }
    None
}

/// Values as ranges.
fn runs(mut values: Vec<i64>) -> Vec<[i64; 2]> {
    values.sort_unstable();
    let mut ranges: Vec<[i64; 2]> = Vec::new();
    for value in values {
        match ranges.last_mut() {
            Some([_, end]) if end.checked_add(1) == Some(value) => *end = value,
            Some([_, end]) if *end == value => {}
            Some(_) | None => ranges.push([value, value]),
        }
    }
    ranges
}
