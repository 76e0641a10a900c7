//! DBRX: softmax in the model's type, weights divided by their p-norm, experts stacked by rows.

use super::{Draft, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout,
};
use moec_ir::{
    Code, Diagnostic,
    ops::{Weigh, WeighNorm},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    keys.enter("attn_config");
    keys.enter("ffn_config");
    keys.ignore(&["attn_config", "ffn_config", "ffn_act_fn"]);
    let sizes = sizes(keys, &["moe_num_experts"], &["moe_top_k"]);
    let inner = inner(keys, &["ffn_hidden_size"], &sizes).value;
    keys.enter("ffn_act_fn");
    let act = act(keys, &["name"]);
    let norm = norm(keys);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    let sparse = vec![true; layers::count(&sizes.layers)];
    Ok(build(hidden, &sparse, "transformer.blocks.{i}.ffn.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("router.layer.weight", experts);
        let scores = b.softmax(logits);
        b.rounded(scores);
        let chosen = b.topk(scores, k);
        let route = b.weigh_rounded(chosen, scores, Weigh { norm, ..RAW });
        let bank = b.glu_bank(experts, layout::expert_rows(inner), Shape2 { input: hidden, inner, act });
        let out = b.routed(b.x, route, bank);
        b.finish(out, route, Some(logits))
    }))
}

/// `moe_normalize_expert_weights`: the order of the norm, as an integer or a float.
fn norm(keys: &mut Keys<'_>) -> Option<WeighNorm> {
    let name = &["moe_normalize_expert_weights"];
    let span = keys.quiet(name).map(|f| f.value.span);
    let order = match span {
        None => 1.0,
        Some(_) => keys.real(name)?,
    };
    if order == 1.0 {
        return Some(WeighNorm::L1);
    }
    if order == 2.0 {
        return Some(WeighNorm::L2);
    }
    let error = Diagnostic::error(
        Code("E0212"),
        format!("moe_normalize_expert_weights is {order}, expected the order of a norm"),
    )
    .help("known: 1, 2, null");
    keys.errors.push(check::at(error, span, "no such norm"));
    None
}
