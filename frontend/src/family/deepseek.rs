//! DeepSeek V1 to V3.2 and the many families that share their blocks.
//!
//! V1 and V2 take softmax scores, V2 with groups whose score is their best expert. V3 takes sigmoid
//! scores, selects with a bias that never reaches the weights, and scores groups by their two best.

use super::{Draft, Sizes, TOP_K, act, build, check_experts, inner, layers, trunk};
use crate::{
    block::{Block, MoeLayer, RAW, Shape2, bank},
    check,
    keys::{Keys, Num, Refused},
    layout, limits,
};
use moec_ir::{
    Code, Diagnostic, NodeId,
    ops::{SelectRule, UnaryFn, Weigh, WeighNorm},
};

/// Groups of experts.
#[derive(Clone, Copy)]
struct Groups {
    groups: u64,
    kept: u64,
}

/// What the blocks of this file have in common.
struct Form {
    hidden: u64,
    experts: u64,
    top_k: u64,
    inner: u64,
    act: UnaryFn,
    groups: Option<Groups>,
    renormalise: bool,
    scale: f64,
    /// Inner width of the shared experts.
    shared: Option<u64>,
    /// Clamp of the experts, and whether the shared experts have it too.
    limit: Option<f64>,
    shared_limit: bool,
}

const EXPERTS: &[&str] = &["n_routed_experts", "num_experts", "num_local_experts"];

/// Reads what all have; null experts mean a dense model, as the config class documents.
fn form(keys: &mut Keys<'_>) -> Result<(Form, Sizes, Num, Num), Refused> {
    let (hidden, layers) = trunk(keys);
    for names in [EXPERTS, TOP_K] {
        if let Some(found) = keys.quiet(names)
            && found.value.kind == crate::json::Kind::Null
        {
            keys.errors.push(
                Diagnostic::error(
                    Code("E0215"),
                    format!("nothing to compile: {} is null, which means a dense model", found.key),
                )
                .primary(found.value.span, "null")
                .help(format!("{} compiles with the values of a released model", keys.model_type)),
            );
            return Err(Refused);
        }
    }
    let experts = keys.size(EXPERTS, 1, limits::SIZE);
    let top_k = keys.size(TOP_K, 1, limits::SIZE);
    check_experts(keys, &experts, &top_k);
    let sizes = Sizes { hidden, layers, experts, top_k };
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let groups = keys.size_or(&["n_group", "num_expert_group"], 1, 1, limits::SIZE);
    let kept = keys.size_or(&["topk_group"], 1, 1, limits::SIZE);
    let scale = keys.factor(&["routed_scaling_factor"], 1.0);
    let shared = keys.size_or(&["n_shared_experts", "num_shared_experts"], 0, 0, limits::EXPERTS).value;
    let form = Form {
        hidden: sizes.hidden.value,
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        inner,
        act,
        groups: None,
        renormalise: false,
        scale,
        shared: (shared > 0).then(|| shared.saturating_mul(inner)),
        limit: None,
        shared_limit: true,
    };
    Ok((form, sizes, groups, kept))
}

/// Groups, if there are several.
fn several(keys: &mut Keys<'_>, sizes: &Sizes, groups: &Num, kept: &Num) -> Option<Groups> {
    if groups.known && groups.value <= 1 {
        return None;
    }
    check::groups(keys, &sizes.experts, groups, kept, &sizes.top_k);
    Some(Groups { groups: groups.value, kept: kept.value })
}

/// The remote code of DeepSeekMoE 16B.
pub(crate) fn read_v1(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let (mut form, sizes, _, _) = form(keys)?;
    let sparse = layers::first_dense(keys, &sizes.layers, &["first_k_dense_replace"], 0);
    form.renormalise = keys.flag(&["norm_topk_prob"], false);
    keys.choice(&["scoring_func"], (), &[("softmax", ())]);
    keys.checked()?;
    Ok(build(form.hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        let mut b = Block::new(keys, form.hidden, prefix);
        let logits = b.logits("gate.weight", form.experts);
        let scores = b.softmax(logits);
        let chosen = b.topk(scores, form.top_k);
        let norm = form.renormalise.then_some(WeighNorm::Sum);
        let eps = if form.renormalise { 1e-20 } else { 0.0 };
        let route = b.weigh_rounded(chosen, scores, Weigh { norm, eps, ..RAW });
        experts(b, &form, layout::split(), route, logits)
    }))
}

/// DeepSeek-V2: groups by their best expert, dropped ones score 0, no renormalisation.
pub(crate) fn read_v2(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let (mut form, sizes, groups, kept) = form(keys)?;
    let sparse = layers::first_dense(keys, &sizes.layers, &["first_k_dense_replace"], 0);
    // Read by the class and then not used.
    keys.ignore(&["norm_topk_prob"]);
    keys.choice(&["scoring_func"], (), &[("softmax", ())]);
    let grouped = keys.choice(&["topk_method"], false, &[("greedy", false), ("group_limited_greedy", true)]);
    if grouped {
        form.groups = several(keys, &sizes, &groups, &kept);
    }
    keys.checked()?;
    let prefix = if keys.model_type == "deepseek_ocr2" {
        "model.language_model.layers.{i}.mlp."
    } else {
        "model.layers.{i}.mlp."
    };
    Ok(build(form.hidden, &sparse, prefix, |_, prefix| {
        let mut b = Block::new(keys, form.hidden, prefix);
        let logits = b.logits_f32("gate.weight", form.experts);
        let scores = b.softmax(logits);
        let rule = match form.groups {
            Some(g) => SelectRule::GroupLimited {
                groups: g.groups,
                group_top: 1,
                keep_groups: g.kept,
                k: form.top_k,
                dropped: Some(0.0),
            },
            None => SelectRule::Topk { k: form.top_k },
        };
        let chosen = b.select(scores, rule);
        let route = b.weigh(chosen, scores, Weigh { scale: form.scale, ..RAW });
        experts(b, &form, layout::split(), route, logits)
    }))
}

/// DeepSeek-V3 and the families with its block.
pub(crate) fn read_v3(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let kind = keys.model_type.clone();
    let (mut form, sizes, groups, kept) = form(keys)?;
    let dense = match kind.as_str() {
        "deepseek_v3" | "deepseek_v32" | "glm_moe_dsa" | "kimi_k25" => 3,
        "glm4_moe" | "glm4v_moe" | "glm4v_moe_text" | "axk1" | "kimi_k2" => 1,
        _ => 0,
    };
    let sparse = layers::first_dense(keys, &sizes.layers, &["first_k_dense_replace"], dense);
    form.renormalise = keys.flag(&["norm_topk_prob", "moe_renormalize"], kind != "dots1");
    // dots1 writes its selection method under this name.
    keys.choice(&["scoring_func", "moe_router_activation_func"], (), &[("sigmoid", ()), ("noaux_tc", ())]);
    keys.choice(&["topk_method"], (), &[("noaux_tc", ())]);
    form.groups = several(keys, &sizes, &groups, &kept);
    if matches!(kind.as_str(), "glm5_next" | "glm5_next_text" | "hy_v4") {
        form.limit = keys.real(&["swiglu_limit"]).filter(|c| *c > 0.0);
        form.shared_limit = kind != "hy_v4";
    }
    if kind == "mimo_v2_flash" {
        form.shared = None;
    }
    keys.checked()?;

    let bias = if kind == "exaone_moe" { "e_score_correction_bias" } else { "gate.e_score_correction_bias" };
    let dropped = (kind == "axk2").then_some(0.0);
    let prefix = match kind.as_str() {
        "kimi_k25" => "language_model.model.layers.{i}.mlp.",
        "glm4v_moe" | "glm5_next" => "model.language_model.layers.{i}.mlp.",
        "kimi_linear" => "model.layers.{i}.block_sparse_moe.",
        _ => "model.layers.{i}.mlp.",
    };
    Ok(build(form.hidden, &sparse, prefix, |_, prefix| {
        let mut b = Block::new(keys, form.hidden, prefix);
        let logits = b.logits_f32("gate.weight", form.experts);
        let scores = b.unary("scores", UnaryFn::Sigmoid, logits);
        let choice = b.biased(scores, bias, form.experts);
        let rule = match form.groups {
            Some(g) => {
                SelectRule::GroupLimited { groups: g.groups, group_top: 2, keep_groups: g.kept, k: form.top_k, dropped }
            }
            None => SelectRule::Topk { k: form.top_k },
        };
        let chosen = b.select(choice, rule);
        let norm = form.renormalise.then_some(WeighNorm::Sum);
        let eps = if form.renormalise { 1e-20 } else { 0.0 };
        let route = b.weigh(chosen, scores, Weigh { norm, eps, scale: form.scale, ..RAW });
        let glu = match kind.as_str() {
            "hy_v4" => layout::fused(form.inner),
            "kimi_linear" => layout::w123("{p}experts.{e}"),
            _ => layout::split(),
        };
        experts(b, &form, glu, route, logits)
    }))
}

/// Mistral 4: softmax in the model's type, groups by their two best, dropped ones score 0.
pub(crate) fn read_mistral4(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let (mut form, sizes, groups, kept) = form(keys)?;
    let sparse = layers::first_dense(keys, &sizes.layers, &["first_k_dense_replace"], 0);
    form.renormalise = keys.flag(&["norm_topk_prob"], true);
    form.groups = several(keys, &sizes, &groups, &kept);
    keys.checked()?;
    Ok(build(form.hidden, &sparse, "model.layers.{i}.mlp.", |_, prefix| {
        let mut b = Block::new(keys, form.hidden, prefix);
        let logits = b.logits("gate.weight", form.experts);
        let scores = b.softmax(logits);
        b.rounded(scores);
        let rule = match form.groups {
            Some(g) => SelectRule::GroupLimited {
                groups: g.groups,
                group_top: 2,
                keep_groups: g.kept,
                k: form.top_k,
                dropped: Some(0.0),
            },
            None => SelectRule::Topk { k: form.top_k },
        };
        let chosen = b.select(scores, rule);
        let norm = form.renormalise.then_some(WeighNorm::Sum);
        let eps = if form.renormalise { 1e-20 } else { 0.0 };
        let route = b.weigh_rounded(chosen, scores, Weigh { norm, eps, scale: form.scale, ..RAW });
        experts(b, &form, layout::fused(form.inner), route, logits)
    }))
}

/// Routed experts plus the plain shared experts.
fn experts(mut b: Block, form: &Form, glu: layout::Glu, route: NodeId, logits: NodeId) -> MoeLayer {
    let mut ffn = b.glu("experts.{e}", glu, Shape2 { input: form.hidden, inner: form.inner, act: form.act });
    ffn.limit = form.limit;
    let mut out = b.routed(b.x, route, bank(form.experts, ffn));
    if let Some(width) = form.shared {
        let shape = Shape2 { input: form.hidden, inner: width, act: form.act };
        let mut ffn = b.glu("shared_experts", layout::proj("{p}shared_experts"), shape);
        ffn.limit = form.limit.filter(|_| form.shared_limit);
        let shared = b.ffn("shared", b.x, ffn);
        out = b.add(out, shared);
    }
    b.finish(out, route, Some(logits))
}
