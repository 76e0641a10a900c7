//! Pangu Pro MoE: one expert in each group, each weight times a learned factor.

use super::{Draft, EXPERTS, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Num, Refused},
    layout::{self, viewed},
    limits,
};
use moec_ir::{
    Code, Diagnostic, View,
    ops::{SelectRule, Weigh},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["shared_expert_intermediate_size"], 0, 0, limits::SIZE).value;
    let scale = keys.factor(&["routed_scaling_factor"], 1.0);
    if keys.flag(&["router_enable_expert_bias"], false) {
        keys.errors.push(Diagnostic::error(
            Code("E0212"),
            "router_enable_expert_bias is true, which Pangu Pro was not released with",
        ));
    }
    let sparse = layers::sparse_step(keys, &sizes.layers);
    let one = Num { value: sizes.top_k.value, ..sizes.top_k.clone() };
    check::groups(keys, &sizes.experts, &sizes.top_k, &one, &one);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("gate.weight", experts);
        let scores = b.softmax(logits);
        b.rounded(scores);
        let chosen = b.select(scores, SelectRule::GroupTopk { groups: k, k: 1 });
        let dtype = b.dtype;
        b.weight(
            "router_scale",
            dtype,
            &[experts],
            viewed("{p}router_scale", vec![View::Reshape { shape: vec![experts] }]),
        );
        let route =
            b.weigh_rounded(chosen, scores, Weigh { expert_scale: Some("router_scale".to_owned()), scale, ..RAW });
        let bank = b.glu_bank(experts, layout::split(), Shape2 { input: hidden, inner, act });
        let mut out = b.routed(b.x, route, bank);
        if shared > 0 {
            let shared = b.shared("shared_expert", shared, act);
            out = b.add(out, shared);
        }
        b.finish(out, route, Some(logits))
    }))
}
