//! Llama 4: the sigmoid of the best logits scales the expert's input, not its output.

use super::{Draft, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::{
    Op,
    ops::{Combine, Dispatch, Experts, Weigh, WeighFn},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, &["num_local_experts", "num_experts"], TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let step = keys.size_or(&["interleave_moe_layer_step"], 1, 0, limits::SIZE).value;
    let listed = layers::indices(keys, "moe_layers", &sizes.layers);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);
    let sparse: Vec<bool> = (0..layers::count(&sizes.layers) as u64)
        .map(|i| match &listed {
            Some(listed) => listed.contains(&i),
            None => step > 0 && (i + 1).is_multiple_of(step),
        })
        .collect();

    let prefix = match keys.model_type.as_str() {
        "llama4" => "language_model.model.layers.{i}.feed_forward.",
        _ => "model.layers.{i}.feed_forward.",
    };
    Ok(build(hidden, &sparse, prefix, |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("router.weight", experts);
        let chosen = b.topk(logits, k);
        let route = b.weigh_rounded(chosen, logits, Weigh { function: WeighFn::Sigmoid, ..RAW });
        let bank = b.glu_bank(experts, layout::fused_transposed(inner), Shape2 { input: hidden, inner, act });
        let rows = b.op("rows", Op::Dispatch(Dispatch { repeat: 1, weighted: true }), &[b.x, route]);
        b.rounded(rows);
        let done = b.op("done", Op::Experts(Experts { bank }), &[rows]);
        b.rounded(done);
        let routed = b.op("routed", Op::Combine(Combine { repeat: 1, weighted: false }), &[done, route]);
        b.rounded(routed);
        let shared = b.shared("shared_expert", inner, act);
        let out = b.add(routed, shared);
        b.finish(out, route, Some(logits))
    }))
}
