//! AFMoE (Trinity): sigmoid scores with a bias, always renormalised, scaled by `route_scale`.

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
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["num_shared_experts"], 0, 0, limits::EXPERTS).value.saturating_mul(inner);
    let scale = keys.factor(&["route_scale"], 1.0);
    keys.choice(&["score_func"], (), &[("sigmoid", ())]);
    // Read by the class and then not used.
    keys.ignore(&[
        "route_norm",
        "n_group",
        "topk_group",
        "num_expert_groups",
        "num_limited_groups",
        "load_balance_coeff",
        "use_grouped_mm",
    ]);
    let sparse = layers::first_dense(keys, &sizes.layers, &["num_dense_layers"], 0);
    keys.checked()?;
    let hidden = sizes.hidden.value;

    let block = Sigmoid {
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        shape: Shape2 { input: hidden, inner, act },
        router: "router.gate.weight",
        bias: Some("expert_bias"),
        logits_f32: false,
        scores_rounded: false,
        softcap: None,
        renormalise: Some(1e-20),
        scale,
        weights_rounded: false,
        output_scale: None,
        add_f32: false,
        glu: layout::split(),
        shared: (shared > 0).then(|| Shared {
            name: "shared_experts",
            glu: layout::proj("{p}shared_experts"),
            inner: shared,
        }),
    };
    let same = |ffn| ffn;
    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        block.block(Block::new(keys, hidden, prefix), same, same)
    }))
}
