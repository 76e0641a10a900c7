//! Aria: the best logits, softmax over them in the model's type, experts stored in times out.

use super::{Draft, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::ops::{Weigh, WeighFn};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, &["moe_num_experts"], &["moe_topk"]);
    let inner = inner(keys, &["intermediate_size", "moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["moe_num_shared_experts"], 2, 0, limits::EXPERTS).value;
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    let prefix =
        if keys.model_type == "aria" { "language_model.model.layers.{i}.mlp." } else { "model.layers.{i}.mlp." };
    let sparse = vec![true; layers::count(&sizes.layers)];
    Ok(build(hidden, &sparse, prefix, |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("router.weight", experts);
        let chosen = b.topk(logits, k);
        let route = b.weigh_rounded(chosen, logits, Weigh { function: WeighFn::Softmax, ..RAW });
        let glu = layout::stacked_transposed("{p}experts.fc1.weight", "{p}experts.fc2.weight", inner);
        let bank = b.glu_bank(experts, glu, Shape2 { input: hidden, inner, act });
        let mut out = b.routed(b.x, route, bank);
        if shared > 0 {
            let shared = b.shared("shared_experts", inner.saturating_mul(shared), act);
            out = b.add(out, shared);
        }
        b.finish(out, route, Some(logits))
    }))
}
