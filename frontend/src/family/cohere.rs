//! Cohere2 MoE: the best logits, softmax or sigmoid of them, shared experts added or averaged.

use super::{Draft, EXPERTS, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::ops::{BinaryFn, Weigh, WeighFn, WeighNorm};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let function = keys.choice(
        &["expert_selection_fn"],
        WeighFn::Softmax,
        &[("softmax", WeighFn::Softmax), ("sigmoid", WeighFn::Sigmoid)],
    );
    let renormalise = keys.flag(&["norm_topk_prob"], true) && function == WeighFn::Sigmoid;
    let shared = keys.size_or(&["num_shared_experts"], 0, 0, limits::EXPERTS).value;
    let average = keys.choice(&["shared_expert_combination_strategy"], true, &[("average", true), ("sum", false)]);
    let sparse = layers::first_dense(keys, &sizes.layers, &["first_k_dense_replace"], 0);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("gate.weight", experts);
        let chosen = b.topk(logits, k);
        let norm = renormalise.then_some(WeighNorm::Sum);
        let route = b.weigh_rounded(chosen, logits, Weigh { function, norm, ..RAW });
        let bank = b.glu_bank(experts, layout::split(), Shape2 { input: hidden, inner, act });
        let mut out = b.routed(b.x, route, bank);
        if shared > 0 {
            let shared = b.shared("shared_experts", inner.saturating_mul(shared), act);
            out = b.add(out, shared);
            if average {
                out = b.constant("average", BinaryFn::Mul, out, 0.5);
                b.rounded(out);
            }
        }
        b.finish(out, route, Some(logits))
    }))
}
