//! Multiply by a matrix that all experts share once per token.
//!
//! Before: experts whose `down` is `W + s B_e A_e` with one `W`. After: `W` times the weighted sum of the inner
//! activations, which is one row per token, plus a bank of the low-rank parts alone. (The same matrices behind `gate`
//! and `up` see the token itself; there the product kernels share them.)

use crate::{Changed, Pass, PassCx};
use moec_ir::{
    Extent, Graph, NodeId, Op, WeightSpec,
    ops::{BankPart, Binary, BinaryFn, Experts, Ffn, Linear, LinearBank, PartKind},
};

pub(crate) const PASS: Pass =
    Pass { name: "share-base", about: "the matrix that low-rank experts share, once per token", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        let Some((base, scale, combine)) = shared(graph, id) else { continue };
        cx.remark(graph, id, format!("`{base}` is multiplied once per token"));
        share(graph, id, &base, scale, combine);
        changed = Changed::Yes;
    }
    changed
}

/// Parts of the `down` matrix of a network, if it is a base with a low-rank part that can be taken out.
fn adapted(graph: &Graph, ffn: &Ffn) -> Option<(String, f64)> {
    let Some(WeightSpec::Base { base, a, scale, .. }) = &ffn.down else { return None };
    let weight = graph.weights.get(base)?;
    let by_expert = base.contains("{e}")
        || weight.source.tensor.contains("{e}")
        || weight.source.view.iter().any(|v| matches!(v, moec_ir::View::Expert | moec_ir::View::ExpertRows { .. }));
    let fixed = |x: &Extent| if let Extent::Fixed(n) = x { Some(*n) } else { None };
    let sizes = weight.shape.iter().map(fixed).collect::<Option<Vec<u64>>>()?;
    let rank = graph.weights.get(a)?.shape.first().map(Extent::max)?;
    let [n, k] = sizes[..] else { return None };
    let less = rank.saturating_mul(n.saturating_add(k)) < n.saturating_mul(k);
    // A bias is not scaled.
    let plain = ffn.down_bias.is_none() || *scale == 1.0;
    (!by_expert && !ffn.a8 && less && plain).then(|| (base.clone(), *scale))
}

/// The shared base of a bank, its scale, and the combine behind it.
fn shared(graph: &Graph, id: NodeId) -> Option<(String, f64, NodeId)> {
    if !graph.contains(id) {
        return None;
    }
    let Op::Experts(op) = &graph.node(id).op else { return None };
    let [combine] = graph.users(id)[..] else { return None };
    if graph.is_output(id) || !matches!(graph.node(combine).op, Op::Combine(_)) {
        return None;
    }
    let mut found = None;
    for part in &op.bank {
        let own = match &part.kind {
            PartKind::Ffn(ffn) => Some(adapted(graph, ffn)?),
            PartKind::Zero {} => None,
            PartKind::Linear(_)
            | PartKind::Film(_)
            | PartKind::Const { .. }
            | PartKind::Neuron(_)
            | PartKind::Identity {} => return None,
        };
        match (&found, own) {
            (_, None) => {}
            (None, own) => found = own,
            (Some(found), Some(own)) if *found == own => {}
            (Some(_), Some(_)) => return None,
        }
    }
    found.map(|(base, scale)| (base, scale, combine))
}

/// The bank with every network replaced.
fn map(bank: &[BankPart], network: impl Fn(&BankPart, &Ffn) -> PartKind) -> Experts {
    let kind = |part: &BankPart| match &part.kind {
        PartKind::Ffn(ffn) => network(part, ffn),
        other => other.clone(),
    };
    Experts { bank: bank.iter().map(|p| BankPart { kind: kind(p), ..p.clone() }).collect() }
}

fn share(graph: &mut Graph, id: NodeId, base: &str, scale: f64, combine: NodeId) {
    let (Op::Experts(op), sum) = (graph.node(id).op.clone(), graph.node(combine).op.clone()) else { return };
    let (Some(rows), Some(route)) = (graph.operands(id).first().copied(), graph.operands(combine).get(1).copied())
    else {
        return;
    };
    let inner = map(&op.bank, |_, ffn| PartKind::Ffn(Box::new(Ffn { down: None, down_bias: None, ..ffn.clone() })));
    let low = map(&op.bank, |part, ffn| match &ffn.down {
        Some(WeightSpec::Base { a, b, .. }) => {
            let end = part.all_numbers().max().map_or(0, |n| n + 1);
            let w = WeightSpec::Mul { mul: [b.clone(), a.clone()], group: (0..end).collect() };
            PartKind::Linear(LinearBank { w, bias: ffn.down_bias.clone() })
        }
        _ => PartKind::Zero {},
    });
    let binary = |function, c| Op::Binary(Binary { function, w: None, c });
    let inner = graph.add("inner", Op::Experts(inner), &[rows]);
    let tokens = graph.add("", sum.clone(), &[inner, route]);
    let whole = graph.add("base", Op::Linear(Linear { w: base.to_owned(), b: None }), &[tokens]);
    let low = graph.add("low_rank", Op::Experts(low), &[inner]);
    let mut part = graph.add("", sum, &[low, route]);
    if scale != 1.0 {
        part = graph.add("", binary(BinaryFn::Mul, Some(scale)), &[part]);
    }
    let total = graph.add("", binary(BinaryFn::Add, None), &[whole, part]);
    let round = graph.node(combine).round;
    graph.set_round(total, round);
    graph.replace_uses(combine, total);
    for node in [combine, id] {
        graph.remove(node);
    }
}
