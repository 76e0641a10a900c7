//! Mixtral and MiniMax-Text-01: softmax, then the best, always renormalised.
//!
//! MiniMax's scaled residual around the block is the layer's, not the block's.

use super::{Draft, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    keys::{Keys, Refused},
    layout,
};
use moec_ir::ops::{Weigh, WeighNorm};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, &["num_local_experts", "num_experts"], TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let sparse = layers::all(keys, &sizes.layers);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    Ok(build(hidden, &sparse, "model.layers.{i}.block_sparse_moe.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("gate.weight", experts);
        let scores = b.softmax(logits);
        let chosen = b.topk(scores, k);
        let route = b.weigh(chosen, scores, Weigh { norm: Some(WeighNorm::Sum), ..RAW });
        let bank = b.glu_bank(experts, layout::w123("{p}experts.{e}"), Shape2 { input: hidden, inner, act });
        let out = b.routed(b.x, route, bank);
        b.finish(out, route, Some(logits))
    }))
}
