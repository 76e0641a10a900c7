//! Inkling: the shared experts stand in the router and take part in the renormalisation.
//!
//! They are the last experts of the bank, chosen by every token. Their weights multiply their
//! activations before a down projection without bias, which is the same as after it.

use super::{Draft, EXPERTS, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2, no_change},
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::{
    Source,
    ops::{Adjust, BankPart, BinaryFn, PartKind, Shape, UnaryFn, Weigh, WeighNorm},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, EXPERTS, TOP_K);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["n_shared_experts"], 2, 0, limits::EXPERTS).value;
    let scale = keys.factor(&["route_scale"], 1.0);
    keys.ignore(&["shared_expert_sink", "rms_norm_eps_moe_gate"]);
    let sparse = layers::all(keys, &sizes.layers);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);
    let all = experts + shared;

    let prefix = match keys.model_type.as_str() {
        "inkling_mm_model" => "model.language_model.layers.{i}.mlp.",
        _ => "model.layers.{i}.mlp.",
    };
    Ok(build(hidden, &sparse, prefix, |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("gate.weight", all);
        let scores = b.unary("scores", UnaryFn::Sigmoid, logits);
        let range = |from: u64, to: u64| Shape::Slice {
            axis: -1,
            range: [from, to].map(|n| i64::try_from(n).unwrap_or(i64::MAX)).into(),
        };
        let routed = b.shape("routed_scores", range(0, experts), &[scores]);
        let mut choice = b.biased(routed, "gate.bias", experts);
        if shared > 0 {
            let always = b.shape("shared_scores", range(experts, all), &[scores]);
            choice = b.shape("choice", Shape::Concat { axis: -1 }, &[choice, always]);
            choice = b.adjust("choice", Adjust { on: (experts..all).collect(), ..no_change() }, &[choice]);
        }
        let chosen = b.topk(choice, k + shared);
        let route = b.weigh_rounded(chosen, scores, Weigh { norm: Some(WeighNorm::Sum), scale, ..RAW });

        let shape = Shape2 { input: hidden, inner, act };
        let glu = layout::interleaved_rows("{p}experts.w13_weight", "{p}experts.w2_weight", inner);
        let mut bank = b.glu_bank(experts, glu, shape);
        if shared > 0 {
            let glu = layout::interleaved_rows(
                "{p}shared_experts.shared_w13_weight",
                "{p}shared_experts.shared_w2_weight",
                inner,
            );
            let ffn = b.glu("shared_experts.{e}", glu, shape);
            bank.push(BankPart {
                ids: [experts, all],
                base_id: experts,
                numbers: Vec::new(),
                kind: PartKind::Ffn(Box::new(ffn)),
            });
        }
        let out = b.routed(b.x, route, bank);
        let dtype = b.dtype;
        b.weight("gate.global_scale", dtype, &[1], Source::plain("{p}gate.global_scale"));
        let out = b.with_weight("scaled", BinaryFn::Mul, out, "gate.global_scale");
        b.rounded(out);
        b.finish(out, route, Some(logits))
    }))
}
