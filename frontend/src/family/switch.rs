//! Switch Transformers: one expert of two layers, chosen in 32 bits; no token is dropped.
//!
//! The capacity of the published rule never binds in the reference implementation.

use super::{Draft, act_or, layer_count, layers};
use crate::{
    block::{Block, MoeLayer, RAW, bank, ungated},
    check,
    keys::{Keys, Num, Refused},
    limits,
};
use moec_ir::{
    DType, Op, Source, WeightSpec,
    ops::{Ffn, Linear, UnaryFn},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let hidden = keys.size(&["d_model"], 1, limits::SIZE);
    let inner = keys.size(&["d_ff"], 1, limits::SIZE);
    let experts = keys.size(&["num_experts"], 1, limits::SIZE);
    check::limit(keys, &experts, limits::EXPERTS, "experts");
    check::volume(keys, &experts, &inner, &hidden);
    let encoder = layer_count(keys, &["num_layers"]);
    let decoder = keys.size_or(&["num_decoder_layers"], encoder.value, 0, limits::LAYERS);
    let projection = keys.text(&["feed_forward_proj"]).map(|(text, _)| text);
    let gated = keys.flag(&["is_gated_act"], false) || projection.is_some_and(|p| p.starts_with("gated-"));
    let act = match projection {
        Some("gated-gelu") => UnaryFn::GeluTanh,
        Some(_) | None => act_or(keys, &["dense_act_fn"], UnaryFn::Relu),
    };
    let act = match projection.map(|p| p.strip_prefix("gated-").unwrap_or(p)) {
        Some("silu" | "swish") => UnaryFn::Silu,
        _ => act,
    };
    keys.ignore(&["dense_act_fn", "encoder_sparse_step", "decoder_sparse_step"]);
    let router = keys.choice(
        &["router_dtype"],
        DType::F32,
        &[("float32", DType::F32), ("bfloat16", DType::Bf16), ("float16", DType::F16)],
    );
    let biased = keys.flag(&["router_bias"], false);
    let mut sparse = sparse(keys, &encoder, "num_sparse_encoder_layers");
    let of_decoder = self::sparse(keys, &decoder, "num_sparse_decoder_layers");
    keys.checked()?;
    let (hidden, inner, experts) = (hidden.value, inner.value, experts.value);

    let split = sparse.len();
    sparse.extend(of_decoder);
    let block = |prefix: String| -> MoeLayer {
        let mut b = Block::new(keys, hidden, prefix);
        let name = "router.classifier.weight";
        b.weight(name, router, &[experts, hidden], Source::plain(format!("{{p}}{name}")));
        let bias = biased.then(|| {
            b.weight("router.classifier.bias", router, &[experts], Source::plain("{p}router.classifier.bias"));
            "router.classifier.bias".to_owned()
        });
        let logits = b.op("logits", Op::Linear(Linear { w: name.to_owned(), b: bias }), &[b.x]);
        b.rounded_to(logits, router);
        let scores = b.softmax(logits);
        b.rounded(scores);
        let chosen = b.topk(scores, 1);
        let route = b.weigh_rounded(chosen, scores, RAW);
        let mut matrix = |name: &str, shape: [u64; 2]| {
            let short = format!("experts.{{e}}.{name}");
            b.quantised(&short, &shape, Source::plain(format!("{{p}}experts.expert_{{e}}.{name}.weight")));
            short
        };
        let down = Some(WeightSpec::Plain(matrix("wo", [hidden, inner])));
        let ffn = if gated {
            let gate = Some(WeightSpec::Plain(matrix("wi_0", [inner, hidden])));
            Ffn { gate, down, act: Some(act), ..ungated(&matrix("wi_1", [inner, hidden])) }
        } else {
            Ffn { down, act: Some(act), ..ungated(&matrix("wi", [inner, hidden])) }
        };
        let out = b.routed(b.x, route, bank(experts, ffn));
        b.finish(out, route, Some(logits))
    };
    let layers = sparse
        .iter()
        .enumerate()
        .map(|(i, sparse)| {
            let prefix = if i < split {
                format!("encoder.block.{i}.layer.1.mlp.")
            } else {
                format!("decoder.block.{}.layer.2.mlp.", i - split)
            };
            sparse.then(|| block(prefix))
        })
        .collect();
    Ok(Draft { hidden, layers })
}

/// Every `step`-th layer, where the step follows from the number of sparse layers.
fn sparse(keys: &mut Keys<'_>, layers: &Num, name: &str) -> Vec<bool> {
    let sparse = keys.size_or(&[name], 3, 0, limits::LAYERS).value;
    let step = layers.value.checked_div(sparse).unwrap_or(0);
    (0..layers::count(layers) as u64).map(|i| step > 0 && (step == 1 || i % step == 1)).collect()
}
