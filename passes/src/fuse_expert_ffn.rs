//! Fuse expert networks into two grouped products.
//!
//! Before: `dispatch`, and a bank of feed-forward experts.
//! After: `kernel.up` (gather, gate and up products, activation) and `kernel.down`.
//! A bank of single matrices needs one kernel only.

use crate::{Changed, Pass, PassCx, region};
use moec_ir::{
    Graph, NodeId, Op,
    ops::{BankPart, Experts, Ffn, KernelKind, LinearBank, PartKind},
};

pub(crate) const PASS: Pass =
    Pass { name: "fuse-expert-ffn", about: "fuse gate, up and activation; split off the down product", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if !graph.contains(id) || !is_bank(graph, id) {
            continue;
        }
        fuse(graph, id, cx);
        changed = Changed::Yes;
    }
    changed
}

/// A bank of experts with matrices over rows that were dispatched or are in sorted order.
fn is_bank(graph: &Graph, id: NodeId) -> bool {
    match &graph.node(id).op {
        Op::Experts(op) => op.bank.iter().any(|p| matches!(p.kind, PartKind::Ffn(_) | PartKind::Linear(_))),
        _ => false,
    }
}

/// The parts of a bank, each mapped.
fn map(bank: &[BankPart], part: impl Fn(&PartKind) -> PartKind) -> Experts {
    Experts { bank: bank.iter().map(|p| BankPart { kind: part(&p.kind), ..p.clone() }).collect() }
}

fn fuse(graph: &mut Graph, id: NodeId, cx: &PassCx<'_>) {
    let Op::Experts(op) = graph.node(id).op.clone() else { return };
    let Some(rows) = graph.operands(id).first().copied() else { return };
    let gathers = matches!(graph.node(rows).op, Op::Dispatch(_)) && graph.users(rows).len() == 1;
    let networks = op.bank.iter().any(|p| matches!(&p.kind, PartKind::Ffn(ffn) if ffn.down.is_some()));
    if !networks {
        let nodes = if gathers { vec![rows, id] } else { vec![id] };
        let kind = if gathers { KernelKind::Up } else { KernelKind::Down };
        outline(graph, &nodes, kind, cx);
        return;
    }
    if let Some(other) = op.bank.iter().find(|p| !matches!(p.kind, PartKind::Ffn(_) | PartKind::Zero {})) {
        cx.remark(graph, id, format!("not fused: experts {}.. are no networks", other.ids[0]));
        return;
    }
    let inner = map(&op.bank, |kind| match kind {
        PartKind::Ffn(ffn) => PartKind::Ffn(Box::new(Ffn { down: None, down_bias: None, ..(**ffn).clone() })),
        other => other.clone(),
    });
    let outer = map(&op.bank, |kind| match kind {
        PartKind::Ffn(ffn) => match &ffn.down {
            // A product with rounded activations is a network without activation.
            Some(down) if ffn.a8 => PartKind::Ffn(Box::new(region::product(down, None, true))),
            Some(down) => PartKind::Linear(LinearBank { w: down.clone(), bias: ffn.down_bias.clone() }),
            None => PartKind::Identity {},
        },
        other => other.clone(),
    });
    let up = graph.add("", Op::Experts(inner), &[rows]);
    let down = graph.add("", Op::Experts(outer), &[up]);
    let round = graph.node(id).round;
    graph.set_round(down, round);
    graph.replace_uses(id, down);
    graph.remove(id);
    let nodes = if gathers { vec![rows, up] } else { vec![up] };
    outline(graph, &nodes, KernelKind::Up, cx);
    outline(graph, &[down], KernelKind::Down, cx);
}

fn outline(graph: &mut Graph, nodes: &[NodeId], kind: KernelKind, cx: &PassCx<'_>) {
    match graph.outline(nodes, kind, kind.name()) {
        Ok(kernel) => {
            cx.remark(graph, kernel, format!("grouped product over the rows of each expert ({})", kind.name()))
        }
        Err(error) => {
            if let Some(node) = nodes.last() {
                cx.remark(graph, *node, format!("not fused: {error}"));
            }
        }
    }
}
