//! Zaya: a router network whose state passes from layer to layer, and a class that skips.

use super::{Draft, EXPERTS, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::{
    Code, Diagnostic, Dim, Part,
    ops::{BankPart, BinaryFn, PartKind, UnaryFn, Weigh},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let state = keys.size(&["router_hidden_size"], 1, limits::SIZE).value;
    let eps = keys.real_or(&["rms_norm_eps"], 1e-5).0;
    if sizes.top_k.known && sizes.top_k.value != 1 {
        let error = Diagnostic::error(
            Code("E0202"),
            format!("{} is {}, but zaya takes one expert", sizes.top_k.key, sizes.top_k.value),
        );
        keys.errors.push(check::at(error, sizes.top_k.span, "1 is allowed"));
    }
    let sparse = layers::all(keys, &sizes.layers);
    keys.checked()?;
    let (hidden, experts) = (sizes.hidden.value, sizes.experts.value);
    let first = sparse.iter().position(|s| *s).unwrap_or(0) as u64;

    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |i, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let mut q = b.linear_biased("state", b.x, ["gate.down_proj.weight", "gate.down_proj.bias"], state, hidden);
        b.rounded(q);
        if i > first {
            let dtype = b.dtype;
            let before = b.input("prev_router_hidden_states", dtype, vec![Dim::Tokens, Dim::Const(state)]);
            b.plain("gate.router_states_scale", &[state]);
            let kept = b.with_weight("kept", BinaryFn::Mul, before, "gate.router_states_scale");
            b.rounded(kept);
            q = b.add(q, kept);
        }
        let mut z = b.rms("router_norm", q, eps, Some(("gate.router_mlp.norm.weight", state)));
        b.rounded(z);
        for layer in ["fc1", "fc2"] {
            let names = [format!("gate.router_mlp.{layer}.weight"), format!("gate.router_mlp.{layer}.bias")];
            z = b.linear_biased(layer, z, [&names[0], &names[1]], state, state);
            b.rounded(z);
            z = b.unary(&format!("{layer}_gelu"), UnaryFn::Gelu, z);
            b.rounded(z);
        }
        let logits = b.linear("logits", z, "gate.router_mlp.out_proj.weight", experts + 1, state);
        b.rounded(logits);
        let scores = b.softmax(logits);
        b.rounded(scores);
        let choice = b.biased(scores, "gate.balancing_biases", experts + 1);
        let chosen = b.topk(choice, 1);
        let route = b.weigh_rounded(chosen, scores, Weigh { real: Some(experts), ..RAW });

        let mut bank = b.glu_bank(experts, layout::fused(inner), Shape2 { input: hidden, inner, act });
        bank.push(BankPart {
            ids: [experts, experts + 1],
            base_id: experts,
            numbers: Vec::new(),
            kind: PartKind::Zero {},
        });
        let out = b.routed(b.x, route, bank);
        let mut layer = b.finish(out, route, Some(logits));
        layer.graph.output("router_hidden_states", q, Part::Whole);
        layer
    }))
}
