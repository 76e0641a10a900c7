//! Gemma 4 and DiffusionGemma: routed by the residual stream, with norms around the experts.
//!
//! The block is the mixture branch: the dense branch beside it and the norms after the sum are the
//! layer's.

use super::{Draft, EXPERTS, act_or, build, inner, layers, sizes, trunk};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout,
};
use moec_ir::{
    Code, Diagnostic,
    ops::{BinaryFn, UnaryFn, Weigh, WeighNorm},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    if !keys.flag(&["enable_moe_block"], keys.model_type.starts_with("diffusion")) {
        let _ = trunk(keys);
        keys.ignore(&["num_experts", "top_k_experts", "moe_intermediate_size"]);
        let error =
            Diagnostic::error(Code("E0215"), "nothing to compile: enable_moe_block is false, so every layer is dense");
        let span = keys.quiet(&["enable_moe_block"]).map(|f| f.value.span);
        keys.errors.push(check::at(error, span, "no mixture"));
        return Err(Refused);
    }
    let sizes = sizes(keys, EXPERTS, &["top_k_experts", "num_experts_per_tok"]);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act_or(keys, &["hidden_activation", "hidden_act"], UnaryFn::GeluTanh);
    let eps = keys.real_or(&["rms_norm_eps"], 1e-6).0;
    let sparse = layers::all(keys, &sizes.layers);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    let prefix =
        if keys.model_type == "gemma4_text" { "model.layers.{i}." } else { "model.language_model.layers.{i}." };
    Ok(build(hidden, &sparse, prefix, |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let normed = b.rms("router_norm", b.x, eps, None);
        b.plain("router.scale", &[hidden]);
        let scaled = b.with_weight("router_scaled", BinaryFn::Mul, normed, "router.scale");
        #[expect(clippy::cast_precision_loss, reason = "widths lie below 2^31")]
        let z = b.constant("router_input", BinaryFn::Mul, scaled, (hidden as f64).powf(-0.5));
        b.rounded(z);
        let logits = b.linear("logits", z, "router.proj.weight", experts, hidden);
        b.rounded(logits);
        let scores = b.softmax(logits);
        let chosen = b.topk(scores, k);
        b.plain("router.per_expert_scale", &[experts]);
        let weigh =
            Weigh { norm: Some(WeighNorm::Sum), expert_scale: Some("router.per_expert_scale".to_owned()), ..RAW };
        let route = b.weigh(chosen, scores, weigh);

        let input = b.rms("expert_input", b.x, eps, Some(("pre_feedforward_layernorm_2.weight", hidden)));
        b.rounded(input);
        let bank = b.glu_bank(experts, layout::fused(inner), Shape2 { input: hidden, inner, act });
        let routed = b.routed(input, route, bank);
        let out = b.rms("normed", routed, eps, Some(("post_feedforward_layernorm_2.weight", hidden)));
        b.rounded(out);
        b.finish(out, route, Some(scores))
    }))
}
