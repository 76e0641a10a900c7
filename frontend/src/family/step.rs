//! Step-3: sigmoid scores with a bias, clamps after the activation, limits per layer.

use super::{
    Draft, TOP_K, act, build, inner, layers,
    sigmoid::{Shared, Sigmoid},
    sizes,
};
use crate::{
    block::{Block, Shape2},
    keys::{Keys, Num, Refused},
    layout::{self, Glu, viewed},
    limits,
};
use moec_ir::{
    Code, Diagnostic, View,
    ops::{Ffn, LimitOn},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, &["n_routed_experts", "moe_num_experts", "num_experts"], &[TOP_K, &["moe_top_k"]].concat());
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let shared = keys.size_or(&["share_expert_dim"], 0, 0, limits::SIZE).value;
    let scale = keys.factor(&["moe_router_scaling_factor"], 1.0);
    keys.choice(&["moe_router_activation"], (), &[("sigmoid", ())]);
    keys.ignore(&["use_moe", "need_fp32_gate", "norm_expert_weight", "use_moe_router_bias", "moe_every_n_layer"]);
    let clamps = reals(keys, "swiglu_limits", &sizes.layers);
    let shared_clamps = reals(keys, "swiglu_limits_shared", &sizes.layers);
    let sparse = enumerated(keys, &sizes.layers);
    keys.checked()?;
    let hidden = sizes.hidden.value;

    let part = |name: &str| viewed(format!("{{p}}moe.{name}.weight"), vec![View::Expert]);
    let block = Sigmoid {
        experts: sizes.experts.value,
        top_k: sizes.top_k.value,
        shape: Shape2 { input: hidden, inner, act },
        router: "moe.gate.weight",
        bias: Some("moe.router_bias"),
        logits_f32: false,
        scores_rounded: false,
        softcap: None,
        renormalise: Some(0.0),
        scale: 1.0,
        weights_rounded: false,
        output_scale: Some(scale),
        add_f32: false,
        glu: Glu { gate: part("gate_proj"), up: part("up_proj"), down: part("down_proj") },
        shared: (shared > 0).then(|| Shared {
            name: "share_expert",
            glu: layout::proj("{p}share_expert"),
            inner: shared,
        }),
    };
    let prefix = if keys.model_type == "step3p7" { "model.language_model.layers.{i}." } else { "model.layers.{i}." };
    Ok(build(hidden, &sparse, prefix, |i, prefix| {
        let at = usize::try_from(i).unwrap_or(usize::MAX);
        let clamp = |limits: &[f64]| limits.get(at).copied().filter(|c| *c != 0.0);
        let with = |limit: Option<f64>| {
            move |ffn: Ffn| Ffn { limit, limit_on: if limit.is_some() { LimitOn::Act } else { LimitOn::Gate }, ..ffn }
        };
        block.block(Block::new(keys, hidden, prefix), with(clamp(&clamps)), with(clamp(&shared_clamps)))
    }))
}

/// A list of limits, one for each layer; empty without.
fn reals(keys: &mut Keys<'_>, name: &str, layers: &Num) -> Vec<f64> {
    let Some((items, found)) = keys.list(&[name]) else { return Vec::new() };
    if layers.known && (items.len() as u64) < layers.value {
        keys.errors.push(
            Diagnostic::error(Code("E0214"), format!("{name} has {} entries for {} layers", items.len(), layers.value))
                .primary(found.value.span, "one entry for each layer is needed"),
        );
    }
    let null = |item: &crate::json::Value| item.kind == crate::json::Kind::Null;
    items.iter().map(|item| if null(item) { 0.0 } else { keys.real_of(name, item).unwrap_or(0.0) }).collect()
}

/// `mlp_layer_types`, or `moe_layers_enum`: numbers in a string, as in `"3,4,5"`.
fn enumerated(keys: &mut Keys<'_>, layers: &Num) -> Vec<bool> {
    let listed = keys.text(&["moe_layers_enum"]);
    let by_types = layers::all(keys, layers);
    let Some((text, found)) = listed else { return by_types };
    let numbers: Vec<Option<u64>> =
        text.split(',').map(|n| n.trim().parse().ok().filter(|n| !layers.known || *n < layers.value)).collect();
    if numbers.iter().any(Option::is_none) {
        keys.errors.push(
            Diagnostic::error(Code("E0214"), "moe_layers_enum names a layer that is not there")
                .primary(found.value.span, format!("layers are 0 to {}", layers.value.saturating_sub(1))),
        );
    }
    if keys.quiet(&["mlp_layer_types"]).is_some() {
        return by_types;
    }
    (0..layers::count(layers) as u64).map(|i| numbers.contains(&Some(i))).collect()
}
