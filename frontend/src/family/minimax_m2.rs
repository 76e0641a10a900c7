//! MiniMax M2 and M3: sigmoid scores with a bias; M3 clamps its experts and has a shared one.

use super::{
    Draft, TOP_K, act, build, inner, layers,
    sigmoid::{Shared, Sigmoid},
    sizes,
};
use crate::{
    block::{Block, Shape2},
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::ops::Ffn;

/// Clamped gates of M3.
struct Clamp {
    alpha: f64,
    limit: f64,
}

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let third = keys.model_type.starts_with("minimax_m3");
    let sizes = sizes(keys, &["num_local_experts", "num_experts"], TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let biased = keys.flag(&["use_routing_bias"], true);
    keys.choice(&["scoring_func"], (), &[("sigmoid", ())]);
    let shared = keys.size_or(&["shared_intermediate_size"], 0, 0, limits::SIZE).value;
    let scale = if third { keys.factor(&["routed_scaling_factor"], 1.0) } else { 1.0 };
    let clamp = if third {
        let alpha = keys.real_or(&["swiglu_alpha"], 1.702).0;
        Some(Clamp { alpha, limit: keys.real_or(&["swiglu_limit"], 7.0).0 })
    } else {
        None
    };
    let sparse = layers::first_dense(keys, &sizes.layers, &["first_k_dense_replace"], 0);
    keys.checked()?;
    let hidden = sizes.hidden.value;

    let prefix = match keys.model_type.as_str() {
        "minimax_m3_vl" => "language_model.model.layers.{i}.block_sparse_moe.",
        _ => "model.layers.{i}.block_sparse_moe.",
    };
    let block = Sigmoid {
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        shape: Shape2 { input: hidden, inner, act },
        router: "gate.weight",
        bias: biased.then_some("e_score_correction_bias"),
        logits_f32: false,
        scores_rounded: false,
        softcap: None,
        renormalise: Some(0.0),
        scale: 1.0,
        weights_rounded: false,
        output_scale: third.then_some(scale),
        add_f32: false,
        glu: layout::w123("{p}experts.{e}"),
        shared: (shared > 0).then(|| Shared {
            name: "shared_experts",
            glu: layout::proj("{p}shared_experts"),
            inner: shared,
        }),
    };
    let clamped = |ffn: Ffn| match &clamp {
        Some(c) => Ffn { limit: Some(c.limit), alpha: Some(c.alpha), up_add: 1.0, ..ffn },
        None => ffn,
    };
    Ok(build(hidden, &sparse, prefix, |_, prefix| block.block(Block::new(keys, hidden, prefix), clamped, clamped)))
}
