//! Give large products of all rows kernels of their own: shared experts, projections.
//!
//! Before: `ffn` and `linear` ops. After: `kernel.dense` with the activation fused into the first
//! product of a feed-forward network. Small products stay for the row kernels.

use crate::{
    Changed, Pass, PassCx,
    region::{self, Products},
};
use moec_ir::{
    Graph, NodeId, Op, WeightSpec,
    ops::{Ffn, KernelKind, Linear},
};

pub(crate) const PASS: Pass =
    Pass { name: "fuse-dense", about: "shared experts and large projections as products of all rows", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        let fused = if let Op::Ffn(ffn) = graph.node(id).op.clone() {
            network(graph, id, &ffn, cx)
        } else if let Op::Linear(linear) = &graph.node(id).op {
            let own = region::is_large(graph, &linear.w) || !region::is_row_op(graph, id, Products::Small);
            own && outline(graph, id, cx)
        } else {
            false
        };
        if fused {
            changed = Changed::Yes;
        }
    }
    changed
}

/// Splits a feed-forward network into two products, unless a row kernel can compute it.
fn network(graph: &mut Graph, id: NodeId, ffn: &Ffn, cx: &PassCx<'_>) -> bool {
    if region::is_row_op(graph, id, Products::Small) {
        return false;
    }
    let (Some(x), Some(down)) = (graph.operands(id).first().copied(), ffn.down.as_ref()) else {
        return outline(graph, id, cx);
    };
    let second = match (down, &ffn.down_bias) {
        (WeightSpec::Plain(w), None) if !ffn.a8 => Op::Linear(Linear { w: w.clone(), b: None }),
        (WeightSpec::Plain(w), Some(WeightSpec::Plain(b))) if !ffn.a8 => {
            Op::Linear(Linear { w: w.clone(), b: Some(b.clone()) })
        }
        // Rounded activations take no bias.
        (down, bias) => Op::Ffn(Box::new(region::product(down, bias.as_ref().filter(|_| !ffn.a8), ffn.a8))),
    };
    let inner = Ffn { down: None, down_bias: None, ..ffn.clone() };
    let up = graph.add("", Op::Ffn(Box::new(inner)), &[x]);
    let out = graph.add("", second, &[up]);
    let round = graph.node(id).round;
    graph.set_round(out, round);
    graph.replace_uses(id, out);
    graph.remove(id);
    let first = outline(graph, up, cx);
    // The second product reads what the first kernel gives, whose type is not known yet.
    first && graph.infer().is_ok() && outline(graph, out, cx)
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
