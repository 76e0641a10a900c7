//! Laguna: sigmoid scores with a bias and a soft cap; the routed output is scaled, not the weights.

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
use moec_ir::{Code, Diagnostic};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["shared_expert_intermediate_size"], 0, 0, limits::SIZE).value;
    let scale = keys.factor(&["moe_routed_scaling_factor"], 1.0);
    let softcap = keys.real(&["moe_router_logit_softcapping"]).filter(|c| *c > 0.0);
    if keys.flag(&["moe_apply_router_weight_on_input"], false) {
        let span = keys.quiet(&["moe_apply_router_weight_on_input"]).map(|f| f.value.span).unwrap_or_default();
        keys.errors.push(
            Diagnostic::error(
                Code("E0212"),
                "moe_apply_router_weight_on_input is true, which laguna was not released with",
            )
            .primary(span, "not known")
            .help("known: false"),
        );
    }
    let sparse = layers::sparse_step(keys, &sizes.layers);
    keys.checked()?;
    let hidden = sizes.hidden.value;

    let block = Sigmoid {
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        shape: Shape2 { input: hidden, inner, act },
        router: "gate.weight",
        bias: Some("experts.e_score_correction_bias"),
        logits_f32: false,
        scores_rounded: false,
        softcap,
        renormalise: Some(0.0),
        scale: 1.0,
        weights_rounded: true,
        output_scale: Some(scale),
        add_f32: false,
        glu: layout::split(),
        shared: (shared > 0).then(|| Shared {
            name: "shared_expert",
            glu: layout::proj("{p}shared_expert"),
            inner: shared,
        }),
    };
    let same = |ffn| ffn;
    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        block.block(Block::new(keys, hidden, prefix), same, same)
    }))
}
