//! LongCat-Flash: softmax with a selection bias, never renormalised; some experts do nothing.

use super::{Draft, act, build, inner, layers};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::ops::{BankPart, PartKind, Weigh};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let hidden = keys.size(&["hidden_size"], 1, limits::SIZE);
    // Layers come in pairs with one mixture; num_hidden_layers counts both halves.
    let pairs = if keys.quiet(&["num_layers"]).is_some() { "num_layers" } else { "num_hidden_layers" };
    keys.ignore(&["num_hidden_layers"]);
    let layers = super::layer_count(keys, &[pairs]);
    let mut experts = keys.size(&["n_routed_experts"], 1, limits::SIZE);
    let real = experts.value;
    let identity = keys.size_or(&["zero_expert_num"], 0, 0, limits::SIZE);
    check::limit(keys, &experts, limits::EXPERTS, "experts");
    check::limit(keys, &identity, limits::EXPERTS, "identity experts");
    experts.value = experts.value.saturating_add(identity.value);
    let top_k = keys.size(&["moe_topk", "num_experts_per_tok"], 1, limits::SIZE);
    check::top_k(keys, &top_k, &experts);
    experts.value = real;
    let sizes = super::Sizes { hidden, layers, experts, top_k };
    let inner = inner(keys, &["expert_ffn_hidden_size", "moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let scale = keys.factor(&["routed_scaling_factor"], 1.0);
    keys.choice(&["zero_expert_type"], (), &[("identity", ())]);
    keys.ignore(&["router_bias", "norm_topk_prob", "router_dtype", "topk_method"]);
    keys.checked()?;
    let (hidden, k) = (sizes.hidden.value, sizes.top_k.value);
    let all = real + identity.value;

    let sparse = vec![true; layers::count(&sizes.layers)];
    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits_f32("router.classifier.weight", all);
        let scores = b.softmax(logits);
        let choice = b.biased(scores, "router.e_score_correction_bias", all);
        let chosen = b.topk(choice, k);
        let route = b.weigh(chosen, scores, Weigh { scale, ..RAW });
        let mut bank = b.glu_bank(real, layout::split(), Shape2 { input: hidden, inner, act });
        if all > real {
            bank.push(BankPart { ids: [real, all], base_id: real, numbers: Vec::new(), kind: PartKind::Identity {} });
        }
        let out = b.routed(b.x, route, bank);
        b.finish(out, route, Some(logits))
    }))
}
