//! Jamba: softmax, then the best, never renormalised; every `expert_layer_period`-th layer.

use super::{Draft, EXPERTS, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    keys::{Keys, Refused},
    layout, limits,
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let period = keys.size_or(&["expert_layer_period"], 2, 1, limits::SIZE).value;
    let offset = keys.size_or(&["expert_layer_offset"], 1, 0, limits::SIZE).value;
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);
    let sparse: Vec<bool> = (0..layers::count(&sizes.layers) as u64)
        .map(|i| experts > 1 && i.abs_diff(offset).is_multiple_of(period))
        .collect();

    Ok(build(hidden, &sparse, "model.layers.{i}.feed_forward.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("router.weight", experts);
        let scores = b.softmax(logits);
        let chosen = b.topk(scores, k);
        let route = b.weigh_rounded(chosen, scores, RAW);
        let bank = b.glu_bank(experts, layout::split(), Shape2 { input: hidden, inner, act });
        let out = b.routed(b.x, route, bank);
        b.finish(out, route, Some(logits))
    }))
}
