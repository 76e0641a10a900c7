//! LFM2 MoE: sigmoid scores in the model's type, with a bias where the config says so.

use super::{Draft, EXPERTS, TOP_K, act, build, inner, layers, sigmoid::Sigmoid, sizes};
use crate::{
    block::{Block, Shape2},
    keys::{Keys, Refused},
    layout,
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let biased = keys.flag(&["use_expert_bias"], true);
    let renormalise = keys.flag(&["norm_topk_prob"], true);
    let scale = keys.factor(&["routed_scaling_factor"], 1.0);
    let sparse = layers::first_dense(keys, &sizes.layers, &["num_dense_layers"], 2);
    keys.checked()?;
    let hidden = sizes.hidden.value;

    let block = Sigmoid {
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        shape: Shape2 { input: hidden, inner, act },
        router: "gate.weight",
        bias: biased.then_some("expert_bias"),
        logits_f32: false,
        scores_rounded: true,
        softcap: None,
        renormalise: renormalise.then_some(1e-6),
        scale,
        weights_rounded: true,
        output_scale: None,
        add_f32: false,
        glu: layout::w123("{p}experts.{e}"),
        shared: None,
    };
    let same = |ffn| ffn;
    Ok(build(hidden, &sparse, "model.layers.{i}.feed_forward.", |_, prefix| {
        block.block(Block::new(keys, hidden, prefix), same, same)
    }))
}
