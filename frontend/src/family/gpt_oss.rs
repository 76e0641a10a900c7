//! gpt-oss and the OpenAI privacy filter: the best logits, softmax over them, clamped experts.

use super::{Draft, TOP_K, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2, bank},
    check,
    keys::{Keys, Num, Quant, Refused},
    layout::{self, Glu, every_second, slice, viewed},
};
use moec_ir::{
    Code, Diagnostic, View, WeightSpec,
    ops::{BinaryFn, Ffn, UnaryFn, Weigh, WeighFn},
};

/// Slope of the gate's sigmoid.
const ALPHA: f64 = 1.702;
/// Clamp of the class when the config is silent.
const LIMIT: f64 = 7.0;

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let filter = keys.model_type == "openai_privacy_filter";
    let sizes = sizes(keys, &["num_local_experts", "num_experts"], TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes);
    let limit = keys.real(&["swiglu_limit"]).unwrap_or(LIMIT);
    // The class fixes its activation.
    keys.ignore(&["hidden_act", "swiglu_alpha"]);
    let packed = matches!(keys.quant, Some(Quant::Mxfp4));
    if packed {
        keys.quant = None;
        whole_blocks(keys, &inner);
        whole_blocks(keys, &sizes.hidden);
    } else if keys.quant.is_some() {
        keys.errors.push(Diagnostic::error(Code("E0213"), "gpt_oss is read in bfloat16 or mxfp4, not in fp8"));
    }
    keys.checked()?;
    let (hidden, experts, k, inner) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value, inner.value);
    let (glu, stride) = match (filter, packed) {
        (_, true) => (layout::mxfp4(inner), 2),
        (true, false) => (layout::fused_transposed(inner), 1),
        (false, false) => (layout::interleaved_columns(inner), 2),
    };

    let sparse = vec![true; layers::count(&sizes.layers)];
    Ok(build(hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.linear_biased("logits", b.x, ["router.weight", "router.bias"], experts, hidden);
        let softmax = Weigh { function: WeighFn::Softmax, ..RAW };
        let ffn = clamped(&mut b, glu.clone(), stride, Shape2 { input: hidden, inner, act: UnaryFn::Silu }, limit);
        if filter {
            // Divided by k here and multiplied at the end; the sum is in 32 bits.
            let chosen = b.topk(logits, k);
            #[expect(clippy::cast_precision_loss, reason = "k is at most 4096")]
            let route = b.weigh(chosen, logits, Weigh { scale: 1.0 / k as f64, ..softmax });
            let out = b.routed(b.x, route, bank(experts, ffn));
            #[expect(clippy::cast_precision_loss, reason = "k is at most 4096")]
            let out = b.constant("scaled", BinaryFn::Mul, out, k as f64);
            b.rounded(out);
            return b.finish(out, route, Some(logits));
        }
        b.rounded(logits);
        let chosen = b.topk(logits, k);
        let route = b.weigh_rounded(chosen, logits, softmax);
        let out = b.routed(b.x, route, bank(experts, ffn));
        b.finish(out, route, Some(logits))
    }))
}

/// `(clamp(u) + 1) * min(g) * sigmoid(alpha g)` with biases on all three matrices.
fn clamped(b: &mut Block, glu: Glu, stride: u64, shape: Shape2, limit: f64) -> Ffn {
    let Shape2 { input, inner, .. } = shape;
    let half = |second: bool| match (stride, second) {
        (2, _) => every_second(0, u64::from(second), inner),
        (_, false) => slice(0, 0, inner),
        (_, true) => slice(0, inner, inner),
    };
    let dtype = b.dtype;
    for (name, n, view) in [
        ("gate_bias", inner, vec![View::Expert, half(false)]),
        ("up_bias", inner, vec![View::Expert, half(true)]),
        ("down_bias", input, vec![View::Expert]),
    ] {
        let tensor = if name == "down_bias" { "{p}experts.down_proj_bias" } else { "{p}experts.gate_up_proj_bias" };
        b.weight(&format!("experts.{{e}}.{name}"), dtype, &[n], viewed(tensor, view));
    }
    let bias = |name: &str| Some(WeightSpec::Plain(format!("experts.{{e}}.{name}")));
    Ffn {
        gate_bias: bias("gate_bias"),
        up_bias: bias("up_bias"),
        down_bias: bias("down_bias"),
        limit: Some(limit),
        alpha: Some(ALPHA),
        up_add: 1.0,
        ..b.glu("experts.{e}", glu, shape)
    }
}

/// `E0213`: MXFP4 stores blocks of 32.
fn whole_blocks(keys: &mut Keys<'_>, side: &Num) {
    if side.known && !side.value.is_multiple_of(32) {
        let error = Diagnostic::error(
            Code("E0213"),
            format!("{} is {}, which mxfp4 blocks of 32 do not divide", side.key, side.value),
        );
        keys.errors.push(check::at(error, side.span, "not a multiple of 32"));
    }
}
