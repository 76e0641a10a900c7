//! ERNIE 4.5: softmax in 32 bits, selection with a bias, weights divided by at least a floor.
//!
//! The vision-language form has a second router and bank for vision tokens; one route serves both,
//! with the experts of the other kind forbidden.

use super::{Draft, act, build, check_experts, layers, trunk};
use crate::{
    block::{Block, MoeLayer, RAW, Shape2, bank, no_change},
    check,
    json::Kind,
    keys::{Keys, Num, Refused},
    layout::{self, viewed},
    limits,
};
use indexmap::IndexMap;
use moec_ir::{
    DType, Dim, NodeId, Op, Source, View, WeightSpec,
    ops::{Adjust, BankPart, Linear, PartKind, Shape, UnaryFn, Weigh, WeighNorm},
};

struct Form {
    hidden: u64,
    experts: u64,
    top_k: u64,
    /// Width of text experts, and of vision experts.
    inner: [u64; 2],
    shared: u64,
    act: UnaryFn,
    floor: f64,
    biases: bool,
}

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let vision = keys.model_type.starts_with("ernie4_5_vl");
    let (hidden, layers) = trunk(keys);
    // One number, or one for text and one for vision.
    let pair = if vision { 2 } else { 1 };
    let experts = keys.per_layer(&["moe_num_experts"], None, pair, 1, limits::SIZE);
    let top_k = keys.size(&["moe_k"], 1, limits::SIZE);
    check_experts(keys, experts.first(), &top_k);
    let inner = keys.per_layer(&["moe_intermediate_size"], None, pair, 1, limits::SIZE);
    check::volume(keys, experts.first(), inner.first(), &hidden);
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["moe_num_shared_experts"], 0, 0, limits::EXPERTS).value;
    let floor = keys.real_or(&["moe_norm_min"], 1e-12).0;
    let biases = keys.flag(&["use_bias"], false);
    keys.ignore(&[
        "moe_use_aux_free",
        "moe_gate",
        "moe_group",
        "moe_multimodal_dispatch_use_allgather",
        "moe_dense_experts_token_type_id",
        "moe_aux_loss_lambda",
        "moe_z_loss_lambda",
        "moe_orthogonal_loss_lambda",
        "moe_group_orthogonal_loss",
        "moe_all_to_all_dropout",
        "moe_reverse_token_drop",
        "moe_use_hard_gate",
        "moe_fuse_experts",
        "moe_norm_gate_logits",
    ]);
    let sparse = interval(keys, &layers);
    keys.checked()?;
    let form = Form {
        hidden: hidden.value,
        experts: experts.first().value,
        top_k: top_k.value,
        inner: [inner.of(0).value, inner.of(1).value],
        shared: shared.saturating_mul(inner.first().value),
        act,
        floor,
        biases,
    };
    let prefix = match keys.model_type.as_str() {
        "ernie4_5_vl_moe" => "model.language_model.layers.{i}.mlp.",
        _ => "model.layers.{i}.mlp.",
    };
    Ok(build(form.hidden, &sparse, prefix, |_, prefix| {
        let b = Block::new(keys, form.hidden, prefix);
        if vision { vision_block(b, &form) } else { text_block(b, &form) }
    }))
}

fn text_block(mut b: Block, form: &Form) -> MoeLayer {
    b.weight("gate.weight", DType::F32, &[form.experts, form.hidden], Source::plain("{p}gate.weight"));
    let logits = b.op("logits", Op::Linear(Linear { w: "gate.weight".to_owned(), b: None }), &[b.x]);
    let scores = b.softmax(logits);
    let choice = bias(&mut b, scores, form.experts, 1);
    let chosen = b.topk(choice, form.top_k);
    let route = b.weigh_rounded(chosen, scores, floored(form));
    let shape = Shape2 { input: form.hidden, inner: form.inner[0], act: form.act };
    let bank = b.glu_bank(form.experts, layout::split(), shape);
    let routed = b.routed(b.x, route, bank);
    let out = with_shared(&mut b, form, routed);
    b.finish(out, route, Some(logits))
}

fn vision_block(mut b: Block, form: &Form) -> MoeLayer {
    let all = form.experts * 2;
    let kinds = b.input("moe_mm_token_type_ids", DType::I32, vec![Dim::Tokens]);
    let mut router = |name: &str| {
        // Stored as in times out.
        b.weight(name, DType::F32, &[form.experts, form.hidden], viewed(format!("{{p}}{name}"), vec![View::Transpose]));
        let logits = b.op("logits", Op::Linear(Linear { w: name.to_owned(), b: None }), &[b.x]);
        (logits, b.softmax(logits))
    };
    let (text_logits, text) = router("gate.weight");
    let (vision_logits, vision) = router("gate.weight_1");
    let logits = b.shape("logits_of_both", Shape::Concat { axis: -1 }, &[text_logits, vision_logits]);
    let scores = b.shape("scores_of_both", Shape::Concat { axis: -1 }, &[text, vision]);
    let choice = bias(&mut b, scores, form.experts, 2);
    // Types 1 and 2 are images and videos.
    let classes = ["0", "1", "2"].map(|kind| {
        let experts = if kind == "0" { 0..form.experts } else { form.experts..all };
        (kind.to_owned(), experts.collect())
    });
    let allowed = Adjust { class_experts: Some(IndexMap::from(classes)), ..no_change() };
    let choice = b.adjust("allowed", allowed, &[choice, kinds]);
    let chosen = b.topk(choice, form.top_k);
    let route = b.weigh_rounded(chosen, scores, floored(form));

    let shape = |inner| Shape2 { input: form.hidden, inner, act: form.act };
    let text = b.glu("experts.{e}", layout::split(), shape(form.inner[0]));
    let vision = b.glu("vision_experts.{e}", layout::split(), shape(form.inner[1]));
    let mut parts = bank(form.experts, text);
    parts.push(BankPart {
        ids: [form.experts, all],
        base_id: 0,
        numbers: Vec::new(),
        kind: PartKind::Ffn(Box::new(vision)),
    });
    let routed = b.routed(b.x, route, parts);
    let out = with_shared(&mut b, form, routed);
    b.finish(out, route, Some(logits))
}

/// Scores plus `moe_statics.e_score_correction_bias`, stored as `[kinds, experts]`.
fn bias(b: &mut Block, scores: NodeId, experts: u64, kinds: u64) -> NodeId {
    let name = "moe_statics.e_score_correction_bias";
    let n = experts * kinds;
    b.weight(name, DType::F32, &[n], viewed(format!("{{p}}{name}"), vec![View::Reshape { shape: vec![n] }]));
    b.adjust("choice", Adjust { add: Some(name.to_owned()), ..no_change() }, &[scores])
}

fn floored(form: &Form) -> Weigh {
    Weigh { norm: Some(WeighNorm::Sum), floor: form.floor, ..RAW }
}

fn with_shared(b: &mut Block, form: &Form, routed: NodeId) -> NodeId {
    if form.shared == 0 {
        return routed;
    }
    let shape = Shape2 { input: form.hidden, inner: form.shared, act: form.act };
    let mut ffn = b.glu("shared_experts", layout::proj("{p}shared_experts"), shape);
    if form.biases {
        let mut bias = |part: &str, n: u64| {
            let name = format!("shared_experts.{part}.bias");
            b.plain(&name, &[n]);
            Some(WeightSpec::Plain(name))
        };
        ffn.gate_bias = bias("gate_proj", form.shared);
        ffn.up_bias = bias("up_proj", form.shared);
        ffn.down_bias = bias("down_proj", form.hidden);
    }
    let shared = b.ffn("shared", b.x, ffn);
    b.add(routed, shared)
}

/// Every `moe_layer_interval`-th layer between start and end.
fn interval(keys: &mut Keys<'_>, layers: &Num) -> Vec<bool> {
    let every = keys.size_or(&["moe_layer_interval"], 1, 1, limits::SIZE).value;
    let start = bound(keys, "moe_layer_start_index", 0);
    let last = layers.value.saturating_sub(1);
    let end = bound(keys, "moe_layer_end_index", last);
    if let Some(words) = layers::listed(keys, layers) {
        return words.iter().map(|word| word != "dense").collect();
    }
    (0..layers::count(layers) as u64).map(|i| (i + 1).is_multiple_of(every) && start <= i && i <= end).collect()
}

/// A layer number; -1 is the default, and of a pair the text model's counts.
fn bound(keys: &mut Keys<'_>, name: &str, default: u64) -> u64 {
    let Some(found) = keys.find(&[name]) else { return default };
    let value = found.value.array().and_then(<[_]>::first).unwrap_or(found.value);
    match &value.kind {
        Kind::Null => default,
        Kind::Number(n) if n == "-1" => default,
        Kind::Number(_) | Kind::Bool(_) | Kind::NotFinite(_) | Kind::String(_) | Kind::Array(_) | Kind::Object(_) => {
            keys.whole(name, value, 0, limits::SIZE).value
        }
    }
}
