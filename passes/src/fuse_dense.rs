//! Give large products of all rows kernels of their own: shared experts, projections.
//!
//! Before: `ffn` and `linear` ops. After: `kernel.dense` with the activation fused into the first
//! product of a feed-forward network. Small products stay for the row kernels.

use crate::{Changed, Pass, PassCx, region};
use moec_ir::{
    Graph, NodeId, Op, WeightSpec,
    ops::{Ffn, KernelKind, Linear},
};

pub(crate) const PASS: Pass =
    Pass { name: "fuse-dense", about: "shared experts and large projections as products of all rows", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        let fused = match graph.node(id).op.clone() {
            Op::Ffn(ffn) => network(graph, id, &ffn, cx),
            Op::Linear(linear) if region::is_large(graph, &linear.w) => outline(graph, id, cx),
            _ => false,
        };
        if fused {
            changed = Changed::Yes;
        }
    }
    changed
}

/// Splits a feed-forward network into two products.
fn network(graph: &mut Graph, id: NodeId, ffn: &Ffn, cx: &PassCx<'_>) -> bool {
    let plain = |spec: &WeightSpec| match spec {
        WeightSpec::Plain(name) => Some(name.clone()),
        WeightSpec::Mul { .. }
        | WeightSpec::Base { .. }
        | WeightSpec::Grouped { .. }
        | WeightSpec::Ternary { .. }
        | WeightSpec::Slice { .. }
        | WeightSpec::Take { .. } => None,
    };
    let (Some(x), Some(down)) = (graph.operands(id).first().copied(), ffn.down.as_ref().and_then(plain)) else {
        cx.remark(graph, id, "not fused: the down matrix is composed");
        return false;
    };
    let bias = match &ffn.down_bias {
        None => None,
        Some(spec) => match plain(spec) {
            Some(name) => Some(name),
            None => return false,
        },
    };
    let large = [Some(&ffn.up), ffn.gate.as_ref(), ffn.down.as_ref()];
    if !large.into_iter().flatten().filter_map(plain).any(|name| region::is_large(graph, &name)) {
        return false;
    }
    let inner = Ffn { down: None, down_bias: None, ..ffn.clone() };
    let up = graph.add("", Op::Ffn(Box::new(inner)), &[x]);
    let out = graph.add("", Op::Linear(Linear { w: down, b: bias }), &[up]);
    let round = graph.node(id).round;
    graph.set_round(out, round);
    graph.replace_uses(id, out);
    graph.remove(id);
    outline(graph, up, cx) && outline(graph, out, cx)
}

fn outline(graph: &mut Graph, id: NodeId, cx: &PassCx<'_>) -> bool {
    match graph.outline(&[id], KernelKind::Dense, "dense") {
        Ok(kernel) => {
            cx.remark(graph, kernel, "product of all rows");
            true
        }
        Err(error) => {
            cx.remark(graph, id, format!("not fused: {error}"));
            false
        }
    }
}
