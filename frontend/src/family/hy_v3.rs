//! Hunyuan 3: sigmoid scores in 32 bits with a bias, and a shared network.

use super::{
    Draft, EXPERTS, TOP_K, act, build, inner, layers,
    sigmoid::{Shared, Sigmoid},
    sizes,
};
use crate::{
    block::{Block, Shape2},
    keys::{Keys, Refused},
    layout, limits,
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["moe_intermediate_size", "expert_hidden_dim"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["num_shared_experts"], 0, 0, limits::EXPERTS).value.saturating_mul(inner);
    let scale = keys.factor(&["router_scaling_factor"], 1.0);
    let add_f32 = keys.flag(&["enable_moe_fp32_combine"], true);
    keys.ignore(&["moe_router_enable_expert_bias", "moe_router_use_sigmoid", "route_norm"]);
    let sparse = layers::first_dense(keys, &sizes.layers, &["first_k_dense_replace"], 0);
    keys.checked()?;
    let hidden = sizes.hidden.value;

    let block = Sigmoid {
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        shape: Shape2 { input: hidden, inner, act },
        router: "router.gate.weight",
        bias: Some("expert_bias"),
        logits_f32: true,
        scores_rounded: false,
        softcap: None,
        renormalise: Some(1e-20),
        scale,
        weights_rounded: false,
        output_scale: None,
        add_f32,
        glu: layout::split(),
        shared: (shared > 0).then(|| Shared { name: "shared_mlp", glu: layout::proj("{p}shared_mlp"), inner: shared }),
    };
    let same = |ffn| ffn;
    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        block.block(Block::new(keys, hidden, prefix), same, same)
    }))
}
