//! Doge: product keys over experts of rank one, beside a dense network.
//!
//! The `[T, 2K]` logits are read again as `[2, T, K]`, so a token is routed by logits of others.

use super::{Draft, TOP_K, act, build, trunk};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::{
    Code, Diagnostic, Op, Source,
    ops::{BankPart, Neuron, PartKind, ProductKey, Shape, Weigh, WeighFn, WeighNorm},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let (hidden, layers) = trunk(keys);
    let experts = keys.size(&["num_experts"], 1, limits::NEURONS);
    let top_k = keys.size(TOP_K, 1, limits::SIZE);
    check::top_k(keys, &top_k, &experts);
    check::limit(keys, &top_k, limits::EXPERTS, "experts of a token");
    let inner = keys.size(&["intermediate_size"], 1, limits::SIZE);
    let one = crate::keys::Num { value: 1, ..inner.clone() };
    check::volume(keys, &experts, &one, &hidden);
    let act = act(keys, &["hidden_act"]);
    let renormalise = keys.flag(&["norm_topk_prob"], false);
    let side = experts.value.isqrt();
    if experts.known && side * side != experts.value {
        let error = Diagnostic::error(
            Code("E0202"),
            format!("num_experts is {}, but product keys need a square number", experts.value),
        );
        let error = error.help(format!("the nearest squares are {} and {}", side * side, (side + 1) * (side + 1)));
        keys.errors.push(check::at(error, experts.span, "not a square"));
    }
    if !keys.flag(&["is_moe"], false) {
        let error = Diagnostic::error(Code("E0215"), "nothing to compile: is_moe is false, so every layer is dense");
        let span = keys.quiet(&["is_moe"]).map(|f| f.value.span);
        keys.errors.push(check::at(error, span, "no mixture"));
    }
    keys.checked()?;
    let (hidden, experts, k, inner) = (hidden.value, experts.value, top_k.value, inner.value);
    let columns = i64::try_from(side).unwrap_or(i64::MAX);

    let sparse = vec![true; super::layers::count(&layers)];
    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("router_gate.weight", side * 2);
        let read_again = b.shape("read_again", Shape::Reshape { to: vec![2, -1, columns] }, &[logits]);
        let mut half = |name: &str, at: i64| {
            let half = b.shape(name, Shape::Slice { axis: 0, range: [at, at + 1].into() }, &[read_again]);
            b.shape(name, Shape::Reshape { to: vec![-1, columns] }, &[half])
        };
        let (x, y) = (half("first", 0), half("second", 1));
        let chosen = b.op("chosen", Op::ProductKey(ProductKey::Scores { k }), &[x, y]);
        let norm = renormalise.then_some(WeighNorm::Sum);
        let route = b.op("route", Op::Weigh(Weigh { function: WeighFn::Softmax, norm, ..RAW }), &[chosen]);
        b.rounded(route);

        let dtype = b.dtype;
        for name in ["down_embed", "up_embed"] {
            b.weight(name, dtype, &[experts, hidden], Source::plain(format!("{{p}}{name}.weight")));
        }
        let neurons = Neuron { u: "down_embed".to_owned(), v: "up_embed".to_owned(), act };
        let routed = b.routed(
            b.x,
            route,
            vec![BankPart { ids: [0, experts], base_id: 0, numbers: Vec::new(), kind: PartKind::Neuron(neurons) }],
        );
        let shape = Shape2 { input: hidden, inner, act };
        let dense = layout::plain("{p}gate_proj.weight", "{p}up_proj.weight", "{p}down_proj.weight");
        let dense = b.glu("dense", dense, shape);
        let dense = b.ffn("shared", b.x, dense);
        let out = b.add(dense, routed);
        b.graph.batch_dependent = true;
        b.finish(out, route, Some(logits))
    }))
}
