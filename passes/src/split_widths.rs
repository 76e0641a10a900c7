//! Split banks whose experts differ in width, or in the bits of their codes, into parts of equal ones.
//!
//! Before: one bank part with tensors of different sizes. After: a part for each run of experts
//! with equal sizes, so that the work of an expert is proportional to its width. Experts without
//! neurons become null experts, and a network of all rows without neurons becomes zeros.

use crate::{Changed, Pass, PassCx, region};
use moec_ir::{
    Dim, Extent, Graph, NodeId, Op, Type, WeightSpec,
    ops::{BankPart, Experts, Ffn, PartKind},
    stored_bits,
};

pub(crate) const PASS: Pass =
    Pass { name: "split-widths", about: "a bank part for each run of experts with equal widths", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if let Some(width) = no_neurons(graph, id) {
            cx.remark(graph, id, "has no neurons and gives 0");
            let (x, round) = (graph.operands(id)[0], graph.node(id).round);
            let zeros = region::zeros(graph, x, Some(width));
            graph.set_round(zeros, round);
            graph.replace_uses(id, zeros);
            graph.remove(id);
            changed = Changed::Yes;
            continue;
        }
        let Op::Experts(op) = &graph.node(id).op else { continue };
        let bank: Vec<BankPart> = op.bank.iter().flat_map(|part| split(graph, part)).collect();
        if bank.len() > op.bank.len() || bank.iter().zip(&op.bank).any(|(a, b)| a != b) {
            cx.remark(graph, id, format!("{} parts of equal widths", bank.len()));
            graph.node_mut(id).op = Op::Experts(Experts { bank });
            changed = Changed::Yes;
        }
    }
    changed
}

/// Sizes of everything that expert `e` (counted inside the part) uses.
fn sizes(graph: &Graph, part: &BankPart, e: usize) -> Vec<Option<u64>> {
    let mut found = Vec::new();
    for (_, spec) in part.specs() {
        // Codes of one part are stored in the same number of bits.
        if let WeightSpec::Grouped { bits, .. } = spec {
            found.push(bits.get(e).map(|bits| stored_bits(*bits)));
        }
        for name in spec.names() {
            let at = match spec {
                WeightSpec::Mul { group, .. } => {
                    let g = group.get(e).copied().unwrap_or_default();
                    usize::try_from(WeightSpec::entry(name, e as u64, g)).unwrap_or(e)
                }
                WeightSpec::Plain(_)
                | WeightSpec::Base { .. }
                | WeightSpec::Grouped { .. }
                | WeightSpec::Ternary { .. }
                | WeightSpec::Slice { .. }
                | WeightSpec::Take { .. } => e,
            };
            if let Some(weight) = graph.weights.get(name) {
                found.extend(weight.shape.iter().map(|x| x.of(at)));
            }
        }
    }
    found
}

/// Width of the result of a network of all rows that has no neurons.
fn no_neurons(graph: &Graph, id: NodeId) -> Option<u64> {
    let Op::Ffn(ffn) = &graph.node(id).op else { return None };
    let Some(Type::Tensor(ty)) = &graph.node(id).ty else { return None };
    let width = ty.shape.last().and_then(Dim::known)?;
    (ffn.down.is_some() && is_empty(graph, ffn, 0)).then_some(width)
}

/// Whether a network has no neurons, as that of expert `e`.
fn is_empty(graph: &Graph, ffn: &Ffn, e: usize) -> bool {
    let rows = |name: &String, axis: usize| {
        graph.weights.get(name).and_then(|w| w.shape.get(axis)).and_then(|x: &Extent| x.of(e))
    };
    let inner = match &ffn.up {
        WeightSpec::Plain(name)
        | WeightSpec::Mul { mul: [name, _], .. }
        | WeightSpec::Base { base: name, .. }
        | WeightSpec::Grouped { codes: name, .. }
        | WeightSpec::Ternary { codes: name, .. }
        | WeightSpec::Slice { slice: name, .. } => rows(name, 0),
        WeightSpec::Take { ids, axis: 0, .. } => rows(ids, 0),
        WeightSpec::Take { take, .. } => rows(take, 0),
    };
    inner == Some(0)
}

fn split(graph: &Graph, part: &BankPart) -> Vec<BankPart> {
    match part.kind {
        PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) => {}
        PartKind::Const { .. } | PartKind::Neuron(_) | PartKind::Identity {} | PartKind::Zero {} => {
            return vec![part.clone()];
        }
    }
    let mut parts: Vec<(Vec<Option<u64>>, BankPart)> = Vec::new();
    for id in part.ids[0]..part.ids[1] {
        let e = usize::try_from(part.number(id)).unwrap_or(usize::MAX);
        let own = sizes(graph, part, e);
        match parts.last_mut() {
            Some((sizes, run)) if *sizes == own => run.ids[1] = id + 1,
            Some(_) | None => {
                let empty = matches!(&part.kind, PartKind::Ffn(ffn) if is_empty(graph, ffn, e));
                let kind = if empty { PartKind::Zero {} } else { part.kind.clone() };
                parts.push((own, BankPart { ids: [id, id + 1], kind, ..part.clone() }));
            }
        }
    }
    parts.into_iter().map(|(_, part)| part).collect()
}
