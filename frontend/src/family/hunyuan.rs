//! Hunyuan A13B: softmax, then the best, always renormalised, plus a plain shared network.
//!
//! The router weight is stored in 32 bits; cast to the model's type, its logits have that type.

use super::{Draft, act, build, layers, trunk};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::{
    Code, Diagnostic,
    ops::{Weigh, WeighNorm},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let (hidden, layers) = trunk(keys);
    let n = layers.value;
    let experts = keys.per_layer(&["num_experts"], None, n, 1, limits::SIZE);
    let top_k = keys.per_layer(&["moe_topk", "num_experts_per_tok"], None, n, 1, limits::SIZE);
    let inner = keys.size(&["intermediate_size"], 1, limits::SIZE);
    let widths = keys.per_layer(&["moe_intermediate_size"], Some(inner.value), n, 1, limits::SIZE);
    keys.per_layer(&["num_shared_expert"], Some(1), n, 0, limits::EXPERTS);
    let dense = keys.size_or(&["moe_layer_num_skipped"], 0, 0, limits::SIZE).value;
    let act = act(keys, &["hidden_act"]);
    // The class renormalises whatever this says.
    keys.ignore(&["norm_topk_prob", "use_mixed_mlp_moe", "routed_scaling_factor"]);
    for i in 0..layers::count(&layers) as u64 {
        let (experts, top_k) = (experts.of(i), top_k.of(i));
        if i == 0 {
            check::one_expert(keys, top_k, experts);
        }
        let before = keys.errors.len();
        check::limit(keys, experts, limits::EXPERTS, "experts");
        check::top_k(keys, top_k, experts);
        if keys.errors.len() > before {
            break;
        }
    }
    check::volume(keys, experts.of(0), &inner, &hidden);
    if let Some(span) = widths.of(0).span
        && widths.of(0).value != inner.value
    {
        keys.warnings.push(
            Diagnostic::warning(
                Code("W0204"),
                format!("moe_intermediate_size is not used; experts are {} wide", inner.value),
            )
            .primary(span, "not used")
            .note("the reference class takes intermediate_size for experts and the shared network"),
        );
    }
    keys.checked()?;
    let (hidden, inner) = (hidden.value, inner.value);
    let sparse: Vec<bool> = (0..layers::count(&layers) as u64).map(|i| i >= dense).collect();

    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |i, prefix| {
        let (experts, k) = (experts.of(i).value, top_k.of(i).value);
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("gate.wg.weight", experts);
        let scores = b.softmax(logits);
        let chosen = b.topk(scores, k);
        let route = b.weigh_rounded(chosen, scores, Weigh { norm: Some(WeighNorm::Sum), ..RAW });
        let bank = b.glu_bank(experts, layout::split(), Shape2 { input: hidden, inner, act });
        let routed = b.routed(b.x, route, bank);
        let shared = b.shared("shared_mlp", inner, act);
        let out = b.add(routed, shared);
        b.finish(out, route, Some(logits))
    }))
}
