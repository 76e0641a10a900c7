//! SmallThinker: routed by the stream that enters the layer, before attention.
//!
//! The block takes that stream as `router_hidden_states`, so the experts are known early.

use super::{Draft, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    keys::{Keys, Refused},
    layout,
};
use moec_ir::{
    Code, Diagnostic, Dim,
    ops::{UnaryFn, Weigh, WeighFn, WeighNorm},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, &["moe_num_primary_experts"], &["moe_num_active_primary_experts"]);
    let inner = inner(keys, &["moe_ffn_hidden_size"], &sizes).value;
    let softmax = keys.flag(&["moe_primary_router_apply_softmax"], false);
    let early = keys.flag(&["moe_enable_early_router"], true);
    if keys.flag(&["moe_enable_secondary_experts"], false) {
        keys.errors.push(Diagnostic::error(
            Code("E0212"),
            "moe_enable_secondary_experts is true, which smallthinker was not released with",
        ));
    }
    keys.ignore(&["moe_num_secondary_experts", "moe_secondary_expert_size", "norm_topk_prob"]);
    let layout_list = keys.per_layer(&["moe_layer_layout"], Some(1), sizes.layers.value, 0, 1);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    let sparse: Vec<bool> = (0..layers::count(&sizes.layers) as u64).map(|i| layout_list.of(i).value == 1).collect();
    Ok(build(hidden, &sparse, "model.layers.{i}.block_sparse_moe.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let dtype = b.dtype;
        let seen =
            if early { b.input("router_hidden_states", dtype, vec![Dim::Tokens, Dim::Const(hidden)]) } else { b.x };
        let logits = b.linear("logits", seen, "primary_router.weight", experts, hidden);
        b.rounded(logits);
        let chosen = b.topk(logits, k);
        let weigh = if softmax {
            Weigh { function: WeighFn::Softmax, ..RAW }
        } else {
            Weigh { function: WeighFn::Sigmoid, norm: Some(WeighNorm::Sum), ..RAW }
        };
        let route = b.weigh_rounded(chosen, logits, weigh);
        let glu = layout::plain("{p}experts.{e}.gate.weight", "{p}experts.{e}.up.weight", "{p}experts.{e}.down.weight");
        let bank = b.glu_bank(experts, glu, Shape2 { input: hidden, inner, act: UnaryFn::Relu });
        let out = b.routed(b.x, route, bank);
        b.finish(out, route, Some(logits))
    }))
}
