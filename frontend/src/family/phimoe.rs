//! Phi-3.5-MoE: the sparse mixer, two single choices with a masked softmax each.
//!
//! With `m` the best logit among those that are left, `f_i = max(|L_i|, m)` and the mask
//! `(m - L_i) / f_i > 2 eps`, the weight of the best is `1 / sum exp(L_i - m)` over what is not
//! masked. The second choice leaves out the first expert, but measures with all logits.

use super::{Draft, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout,
};
use moec_ir::{
    Code, Diagnostic, NodeId,
    ops::{Adjust, BinaryFn, ReduceFn, SelectRule, Shape, UnaryFn},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, &["num_local_experts", "num_experts"], TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let eps = keys.real_or(&["router_jitter_noise"], 0.01).0;
    let sparse = layers::all(keys, &sizes.layers);
    if sizes.top_k.known && sizes.top_k.value != 2 {
        let error = Diagnostic::error(
            Code("E0202"),
            format!("{} is {}, but phimoe takes two experts", sizes.top_k.key, sizes.top_k.value),
        );
        keys.errors.push(check::at(error, sizes.top_k.span, "2 is allowed"));
    }
    keys.checked()?;
    let (hidden, experts) = (sizes.hidden.value, sizes.experts.value);

    Ok(build(hidden, &sparse, "model.layers.{i}.block_sparse_moe.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("gate.weight", experts);
        let best = b.reduce("best", ReduceFn::Max, logits);
        let size = b.unary("size", UnaryFn::Abs, logits);
        let first = {
            let terms = terms(&mut b, logits, size, best, eps);
            let sum = b.reduce("sum", ReduceFn::Sum, terms);
            slot(&mut b, logits, best, sum, 0)
        };
        let second = {
            let (next, below, tied) = second_best(&mut b, logits, best);
            // Terms of the logits below the best, and of all but one of those tied with it.
            let terms = terms(&mut b, logits, size, next, eps);
            let terms = b.binary("others", BinaryFn::Mul, terms, below);
            let sum = b.reduce("sum", ReduceFn::Sum, terms);
            let sum = b.binary("sum", BinaryFn::Add, sum, tied);
            slot(&mut b, logits, next, sum, 1)
        };
        let route = b.shape("route", Shape::Concat { axis: 1 }, &[first, second]);
        let bank = b.glu_bank(experts, layout::w123("{p}experts.{e}"), Shape2 { input: hidden, inner, act });
        let out = b.routed(b.x, route, bank);
        b.finish(out, route, Some(logits))
    }))
}

/// `exp(L - m)` where not masked, else 0; logits above `m` count as `m`.
fn terms(b: &mut Block, logits: NodeId, size: NodeId, m: NodeId, eps: f64) -> NodeId {
    let scale = b.binary("scale", BinaryFn::Max, size, m);
    let gap = b.binary("gap", BinaryFn::Sub, m, logits);
    let relative = b.binary("relative", BinaryFn::Div, gap, scale);
    b.rounded(relative);
    let relative = b.unary("relative", UnaryFn::Neg, relative);
    let kept = b.constant("kept", BinaryFn::Ge, relative, -2.0 * eps);
    let gap = b.constant("gap", BinaryFn::Max, gap, 0.0);
    let gap = b.unary("gap", UnaryFn::Neg, gap);
    let powers = b.unary("powers", UnaryFn::Exp, gap);
    b.binary("terms", BinaryFn::Mul, powers, kept)
}

/// The second best logit, which logits lie below the best, and how many others tie with the best.
fn second_best(b: &mut Block, logits: NodeId, best: NodeId) -> (NodeId, NodeId, NodeId) {
    let below = b.binary("below", BinaryFn::Gt, best, logits);
    let masked = b.adjust("rest", Adjust { mask: true, ..crate::block::no_change() }, &[logits, below]);
    let rest = b.reduce("rest", ReduceFn::Max, masked);
    // Finite even when all logits are equal, so that a product with 0 is 0.
    let rest = b.constant("rest", BinaryFn::Max, rest, f64::from(f32::MIN));
    let ties = b.binary("ties", BinaryFn::Ge, logits, best);
    let ties = b.reduce("ties", ReduceFn::Sum, ties);
    let others = b.constant("others_tied", BinaryFn::Sub, ties, 1.0);
    let is_tied = b.constant("is_tied", BinaryFn::Ge, others, 1.0);
    // next = rest + is_tied * (best - rest)
    let step = b.binary("step", BinaryFn::Sub, best, rest);
    let step = b.binary("step", BinaryFn::Mul, step, is_tied);
    let tied = b.binary("tied", BinaryFn::Mul, others, is_tied);
    let next = b.binary("next", BinaryFn::Add, rest, step);
    (next, below, tied)
}

/// The expert of this rank, with weight `exp(L - m) / sum`.
fn slot(b: &mut Block, logits: NodeId, m: NodeId, sum: NodeId, rank: u64) -> NodeId {
    let gap = b.binary("gap", BinaryFn::Sub, logits, m);
    let powers = b.unary("powers", UnaryFn::Exp, gap);
    let scores = b.binary("scores", BinaryFn::Div, powers, sum);
    b.rounded(scores);
    let chosen = b.select(logits, SelectRule::Rank { ranks: vec![rank] });
    b.weigh_rounded(chosen, scores, RAW)
}
