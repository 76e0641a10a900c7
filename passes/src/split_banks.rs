//! Split banks that mix kinds of experts, and feature-wise modulation into two products.
//!
//! Before: one bank with feed-forward experts, single matrices, modulations and identity, constant
//! or one-neuron experts. After: a bank for each kind, whose sums are added: those with matrices
//! move rows, the simple ones are computed by a combine in place. Null experts cost nothing.
//! A modulation `M x * x + A x` is linear in its products, and all slots of a token see the same
//! `x`: its sum over slots is `x` times the sum of the `M x`, plus the sum of the `A x`.

use crate::{Changed, Pass, PassCx};
use moec_ir::{
    Graph, NodeId, Op,
    ops::{BankPart, Binary, BinaryFn, Dispatch, Experts, Film, LinearBank, PartKind},
};

pub(crate) const PASS: Pass =
    Pass { name: "split-banks", about: "separate kinds of experts that are computed in different ways", run };

/// Ways to compute an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Simple,
    Network,
    Matrix,
    Film,
}

fn way(kind: &PartKind) -> Option<Way> {
    match kind {
        PartKind::Ffn(_) => Some(Way::Network),
        PartKind::Linear(_) => Some(Way::Matrix),
        PartKind::Film(_) => Some(Way::Film),
        PartKind::Const { .. } | PartKind::Neuron(_) | PartKind::Identity {} => Some(Way::Simple),
        PartKind::Zero {} => None,
    }
}

struct Mixed {
    dispatch: NodeId,
    experts: NodeId,
    combine: NodeId,
    ways: Vec<Way>,
}

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if let Some(mixed) = find(graph, id) {
            let simple = mixed.ways.contains(&Way::Simple);
            let text = if simple { "simple experts are computed by the combine" } else { "a bank for each kind" };
            cx.remark(graph, mixed.experts, text);
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
    let ways: Vec<Way> = [Way::Network, Way::Matrix, Way::Film, Way::Simple]
        .into_iter()
        .filter(|w| op.bank.iter().any(|p| way(&p.kind) == Some(*w)))
        .collect();
    let (users, dispatch) = (graph.users(id), *graph.operands(id).first()?);
    let [combine] = users[..] else { return None };
    let between = matches!(graph.node(dispatch).op, Op::Dispatch(_)) && !graph.is_output(id);
    // Inner activations beside whole rows are padded to the row: apart, the widths would differ.
    let padded = op.bank.iter().any(|p| matches!(&p.kind, PartKind::Ffn(ffn) if ffn.down.is_none()));
    let mixed = ways.len() > 1 && !padded || ways.contains(&Way::Film);
    (mixed && between && matches!(graph.node(combine).op, Op::Combine(_))).then_some(Mixed {
        dispatch,
        experts: id,
        combine,
        ways,
    })
}

/// The bank with every part of which nothing is `kept` replaced by zero.
fn only(bank: &[BankPart], kept: impl Fn(&PartKind) -> Option<PartKind>) -> Experts {
    let part = |p: &BankPart| BankPart { kind: kept(&p.kind).unwrap_or(PartKind::Zero {}), ..p.clone() };
    Experts { bank: bank.iter().map(part).collect() }
}

fn film(kind: &PartKind, bank: impl Fn(&Film) -> LinearBank) -> Option<PartKind> {
    match kind {
        PartKind::Film(film) => Some(PartKind::Linear(bank(film))),
        PartKind::Ffn(_)
        | PartKind::Linear(_)
        | PartKind::Const { .. }
        | PartKind::Neuron(_)
        | PartKind::Identity {}
        | PartKind::Zero {} => None,
    }
}

fn split(graph: &mut Graph, mixed: &Mixed) {
    let (Op::Experts(op), dispatch, combine) = (
        graph.node(mixed.experts).op.clone(),
        graph.node(mixed.dispatch).op.clone(),
        graph.node(mixed.combine).op.clone(),
    ) else {
        return;
    };
    let dispatched = graph.operands(mixed.dispatch);
    let (Some(x), Some(route)) = (dispatched.first().copied(), graph.operands(mixed.combine).get(1).copied()) else {
        return;
    };
    let binary = |function| Op::Binary(Binary { function, w: None, c: None });
    let through = |graph: &mut Graph, name: &str, experts: Experts, combine: &Op| {
        let moved = graph.add("", dispatch.clone(), &dispatched);
        let rows = graph.add(name, Op::Experts(experts), &[moved]);
        graph.add("", combine.clone(), &[rows, route])
    };
    let chain = |graph: &mut Graph, name: &str, experts: Experts| through(graph, name, experts, &combine);
    let mut sum = None;
    for own in &mixed.ways {
        let part = match own {
            Way::Network | Way::Matrix | Way::Simple => {
                let name = match own {
                    Way::Simple => "simple",
                    Way::Network | Way::Matrix | Way::Film => "heavy",
                };
                let bank = only(&op.bank, |kind| (way(kind) == Some(*own)).then(|| kind.clone()));
                chain(graph, name, bank)
            }
            Way::Film => {
                let linear = |w: &moec_ir::WeightSpec, bias: &Option<moec_ir::WeightSpec>| LinearBank {
                    w: w.clone(),
                    bias: bias.clone(),
                };
                let mul = only(&op.bank, |kind| film(kind, |f| linear(&f.mul, &f.mul_bias)));
                let add = only(&op.bank, |kind| film(kind, |f| linear(&f.add, &f.add_bias)));
                // The factor meets the row as the expert sees it: weighted rows carry their weight once more.
                let mut scaling = combine.clone();
                if let (Op::Dispatch(Dispatch { weighted: true, .. }), Op::Combine(combine)) = (&dispatch, &mut scaling)
                {
                    combine.weighted = true;
                }
                let (mul, add) = (through(graph, "mul", mul, &scaling), chain(graph, "add", add));
                let scaled = graph.add("", binary(BinaryFn::Mul), &[x, mul]);
                graph.add("", binary(BinaryFn::Add), &[scaled, add])
            }
        };
        sum = Some(match sum {
            None => part,
            Some(sum) => graph.add("", binary(BinaryFn::Add), &[sum, part]),
        });
    }
    let Some(sum) = sum else { return };
    let round = graph.node(mixed.combine).round;
    graph.set_round(sum, round);
    graph.replace_uses(mixed.combine, sum);
    for id in [mixed.combine, mixed.experts, mixed.dispatch] {
        graph.remove(id);
    }
}
