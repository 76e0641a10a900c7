//! What inputs of integers may hold. A kernel cannot stop at a value that makes no sense, so the host looks first.

use super::memory::Memory;
use moec_abi::Domain;
use moec_ir::{
    Graph, NodeId, Op, Type,
    ops::{Adjust, Select, SelectRule, Shape},
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

/// Least number of tokens for which every range of an axis whose size depends on them lies inside of it.
pub(super) fn least_tokens(graph: &Graph) -> u64 {
    let of_node = |id: NodeId| -> Option<u64> {
        let op = &graph.node(id).op;
        if let Op::Kernel(kernel) = op {
            return Some(least_tokens(&kernel.body));
        }
        let Op::Shape(Shape::Slice { axis, range }) = op else { return None };
        let Some(Type::Tensor(x)) = &graph.node(*graph.operands(id).first()?).ty else { return None };
        let at = if *axis < 0 { axis.checked_add(i64::try_from(x.shape.len()).ok()?)? } else { *axis };
        let size = x.shape.get(usize::try_from(at).ok()?)?;
        let inside = |tokens: u64| size.eval(tokens).is_none_or(|n| range.steps(Some(n)).is_some());
        // Sizes grow with the tokens.
        let (mut low, mut high) = (0, 1 << 40);
        while low < high {
            let middle = (low + high) / 2;
            if inside(middle) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Some(low)
    };
    graph.ids().into_iter().filter_map(of_node).max().unwrap_or(0)
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
