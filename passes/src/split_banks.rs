//! Split banks that mix experts with matrices and simple experts.
//!
//! Before: one bank with feed-forward experts and identity, constant or one-neuron experts.
//! After: a bank with matrices, whose rows are moved, and a simple bank, which a combine computes
//! in place; both are added. Null experts cost nothing in either.

use crate::{Changed, Pass, PassCx, region};
use moec_ir::{
    Graph, NodeId, Op,
    ops::{BankPart, Binary, BinaryFn, Combine, Dispatch, Experts, PartKind},
};

pub(crate) const PASS: Pass =
    Pass { name: "split-banks", about: "separate experts that need no matrix product from those that do", run };

struct Mixed {
    dispatch: NodeId,
    experts: NodeId,
    combine: NodeId,
}

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if let Some(mixed) = find(graph, id) {
            cx.remark(graph, mixed.experts, "simple experts are computed by the combine");
            split(graph, &mixed);
            changed = Changed::Yes;
        }
    }
    changed
}

fn find(graph: &Graph, id: NodeId) -> Option<Mixed> {
    if !graph.contains(id) {
        return None;
    }
    let Op::Experts(op) = &graph.node(id).op else { return None };
    let heavy = op.bank.iter().any(|p| !region::is_simple(&p.kind));
    let simple = op.bank.iter().any(|p| region::is_simple(&p.kind) && !matches!(p.kind, PartKind::Zero {}));
    let (users, dispatch) = (graph.users(id), *graph.operands(id).first()?);
    let [combine] = users.as_slice() else { return None };
    let plain = matches!(&graph.node(dispatch).op, Op::Dispatch(d) if !d.weighted && d.repeat == 1);
    (heavy && simple && plain && matches!(graph.node(*combine).op, Op::Combine(_))).then_some(Mixed {
        dispatch,
        experts: id,
        combine: *combine,
    })
}

/// The bank with every part for which `keep` is false replaced by zero.
fn only(bank: &[BankPart], keep: impl Fn(&PartKind) -> bool) -> Experts {
    let bank = bank
        .iter()
        .map(|p| BankPart { kind: if keep(&p.kind) { p.kind.clone() } else { PartKind::Zero {} }, ..p.clone() })
        .collect();
    Experts { bank }
}

fn split(graph: &mut Graph, mixed: &Mixed) {
    let Op::Experts(op) = graph.node(mixed.experts).op.clone() else { return };
    let Op::Combine(combine) = graph.node(mixed.combine).op.clone() else { return };
    let dispatched = graph.operands(mixed.dispatch);
    let Some(route) = graph.operands(mixed.combine).get(1).copied() else { return };
    let round = graph.node(mixed.combine).round;
    let mut chain = |name: &str, experts: Experts| {
        let moved = graph.add("", Op::Dispatch(Dispatch { repeat: 1, weighted: false }), &dispatched);
        let through = graph.add(name, Op::Experts(experts), &[moved]);
        graph.add("", Op::Combine(Combine { repeat: 1, weighted: combine.weighted }), &[through, route])
    };
    let heavy = chain("heavy", only(&op.bank, |k| !region::is_simple(k)));
    let simple = chain("simple", only(&op.bank, region::is_simple));
    let sum = graph.add("", Op::Binary(Binary { function: BinaryFn::Add, w: None, c: None }), &[heavy, simple]);
    graph.set_round(sum, round);
    graph.replace_uses(mixed.combine, sum);
    for id in [mixed.combine, mixed.experts, mixed.dispatch] {
        graph.remove(id);
    }
}
