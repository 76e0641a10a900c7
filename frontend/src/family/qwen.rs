//! The Qwen mixtures and their relatives: softmax, then the best, renormalised if asked.
//!
//! Qwen2-MoE, Qwen3-Next, Qwen3.5 and Qwen4 add a shared expert with a sigmoid gate.

use super::{Draft, EXPERTS, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, MoeLayer, RAW, Shape2},
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::{
    Code, Diagnostic, NodeId,
    ops::{BinaryFn, UnaryFn, Weigh, WeighNorm},
};

/// A block of this family.
struct Form {
    hidden: u64,
    experts: u64,
    top_k: u64,
    inner: u64,
    act: UnaryFn,
    renormalise: bool,
    /// Width of the gated shared expert.
    shared: Option<u64>,
    /// Experts are stored stacked and transposed.
    transposed: bool,
}

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let kind = keys.model_type.clone();
    let gated_shared = matches!(
        kind.as_str(),
        "qwen2_moe" | "qwen3_next" | "qwen3_5_moe" | "qwen3_5_moe_text" | "qwen4_exp" | "qwen4_exp_text"
    );
    let always = matches!(kind.as_str(), "qwen3_5_moe" | "qwen3_5_moe_text" | "qwen3_vl_moe" | "qwen3_vl_moe_text");
    let by_default = kind == "mellum" || kind == "qwen3_next" || kind.starts_with("qwen4") || kind == "qwen3_omni_moe";
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let renormalise = keys.flag(&["norm_topk_prob"], by_default);
    let sparse = layers::sparse_step(keys, &sizes.layers);
    let shared = gated_shared.then(|| keys.size(&["shared_expert_intermediate_size"], 1, limits::SIZE).value);
    keys.checked()?;

    let form = Form {
        hidden: sizes.hidden.value,
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        inner,
        act,
        renormalise: renormalise || always,
        shared,
        transposed: kind.starts_with("qwen3_vl_moe"),
    };
    if kind == "qwen3_omni_moe" {
        keys.warnings.push(
            Diagnostic::warning(Code("W0204"), "only the thinker is compiled; the talker is a second model")
                .help("put talker_config.text_config into a config.json of its own with model_type qwen3_next"),
        );
    }
    let prefix = match kind.as_str() {
        "qwen3_vl_moe" | "qwen3_5_moe" | "qwen4_exp" => "model.language_model.layers.{i}.mlp.",
        "qwen3_omni_moe" => "thinker.model.layers.{i}.mlp.",
        _ => "model.layers.{i}.mlp.",
    };
    Ok(build(form.hidden, &sparse, prefix, |_, prefix| block(keys, &form, prefix)))
}

/// OLMoE and FlexOlmo: experts as wide as `intermediate_size`, every layer a mixture.
pub(crate) fn read_olmoe(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["intermediate_size", "moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let renormalise = keys.flag(&["norm_topk_prob"], false);
    let sparse = layers::all(keys, &sizes.layers);
    keys.checked()?;
    let form = Form {
        hidden: sizes.hidden.value,
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        inner,
        act,
        renormalise,
        shared: None,
        transposed: false,
    };
    Ok(build(form.hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| block(keys, &form, prefix)))
}

fn block(keys: &Keys<'_>, form: &Form, prefix: String) -> MoeLayer {
    let mut b = Block::new(keys, form.hidden, prefix);
    let logits = b.logits("gate.weight", form.experts);
    let scores = b.softmax(logits);
    let chosen = b.topk(scores, form.top_k);
    let norm = form.renormalise.then_some(WeighNorm::Sum);
    let route = b.weigh_rounded(chosen, scores, Weigh { norm, ..RAW });
    let glu = if form.transposed { layout::fused_transposed(form.inner) } else { layout::split() };
    let bank = b.glu_bank(form.experts, glu, Shape2 { input: form.hidden, inner: form.inner, act: form.act });
    let mut out = b.routed(b.x, route, bank);
    if let Some(width) = form.shared {
        let shared = gated_shared(&mut b, width, form.act);
        out = b.add(out, shared);
    }
    b.finish(out, route, Some(logits))
}

/// `sigmoid(x g^T) * S(x)`, the sigmoid in the model's type.
fn gated_shared(b: &mut Block, width: u64, act: UnaryFn) -> NodeId {
    let shared = b.shared("shared_expert", width, act);
    let gate = b.linear("shared_logit", b.x, "shared_expert_gate.weight", 1, b.hidden);
    b.rounded(gate);
    let gate = b.unary("shared_gate", UnaryFn::Sigmoid, gate);
    b.rounded(gate);
    let gated = b.binary("gated", BinaryFn::Mul, shared, gate);
    b.rounded(gated)
}
