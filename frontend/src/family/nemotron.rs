//! Nemotron-H: the V3 router over experts without gate, optionally in a latent width.

use super::{Draft, TOP_K, act_or, build, check_experts, layers};
use crate::{
    block::{Block, RAW, bank, ungated},
    check,
    json::Kind,
    keys::{Keys, Num, Refused},
    limits,
};
use moec_ir::{
    Code, Diagnostic, Source, WeightSpec,
    ops::{Ffn, SelectRule, UnaryFn, Weigh, WeighNorm},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let hidden = keys.size(&["hidden_size"], 1, limits::SIZE);
    let sparse = pattern(keys);
    let experts = keys.size(&["n_routed_experts", "num_experts"], 1, limits::SIZE);
    let top_k = keys.size(TOP_K, 1, limits::SIZE);
    check_experts(keys, &experts, &top_k);
    let inner = keys.size(&["moe_intermediate_size"], 1, limits::SIZE);
    let latent = keys.optional(&["moe_latent_size"], 1, limits::SIZE);
    check::volume(keys, &experts, &inner, latent.as_ref().unwrap_or(&hidden));
    let shared = keys.size_or(&["n_shared_experts"], 1, 0, limits::EXPERTS).value;
    let shared_inner = keys.size_or(&["moe_shared_expert_intermediate_size"], inner.value, 1, limits::SIZE).value;
    let act = act_or(keys, &["mlp_hidden_act"], UnaryFn::Relu2);
    let groups = keys.size_or(&["n_group"], 1, 1, limits::SIZE);
    let kept = keys.size_or(&["topk_group"], 1, 1, limits::SIZE);
    if groups.value > 1 {
        check::groups(keys, &experts, &groups, &kept, &top_k);
    }
    let renormalise = keys.flag(&["norm_topk_prob"], true);
    let scale = keys.factor(&["routed_scaling_factor"], 1.0);
    keys.checked()?;
    let (hidden, experts, k, inner) = (hidden.value, experts.value, top_k.value, inner.value);
    let latent = latent.map(|n| n.value);

    Ok(build(hidden, &sparse, "backbone.layers.{i}.mixer.", |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits_f32("gate.weight", experts);
        let scores = b.unary("scores", UnaryFn::Sigmoid, logits);
        let choice = b.biased(scores, "gate.e_score_correction_bias", experts);
        let rule = if groups.value > 1 {
            SelectRule::GroupLimited { groups: groups.value, group_top: 2, keep_groups: kept.value, k, dropped: None }
        } else {
            SelectRule::Topk { k }
        };
        let chosen = b.select(choice, rule);
        let norm = renormalise.then_some(WeighNorm::Sum);
        let eps = if renormalise { 1e-20 } else { 0.0 };
        let route = b.weigh(chosen, scores, Weigh { norm, eps, scale, ..RAW });

        let network = |b: &mut Block, name: &str, input: u64, inner: u64| {
            let mut matrix = |part: &str, shape: [u64; 2]| {
                b.quantised(&format!("{name}.{part}"), &shape, Source::plain(format!("{{p}}{name}.{part}.weight")));
                format!("{name}.{part}")
            };
            let up = matrix("up_proj", [inner, input]);
            let down = Some(WeightSpec::Plain(matrix("down_proj", [input, inner])));
            Ffn { down, act: Some(act), ..ungated(&up) }
        };
        // The router and the shared expert see the full width.
        let mut x = b.x;
        if let Some(width) = latent {
            x = b.linear("latent", x, "fc1_latent_proj.weight", width, hidden);
            b.rounded(x);
        }
        let ffn = network(&mut b, "experts.{e}", latent.unwrap_or(hidden), inner);
        let mut out = b.routed(x, route, bank(experts, ffn));
        if let Some(width) = latent {
            out = b.linear("widened", out, "fc2_latent_proj.weight", hidden, width);
            b.rounded(out);
        }
        if shared > 0 {
            let ffn = network(&mut b, "shared_experts", hidden, shared_inner);
            let shared = b.ffn("shared", b.x, ffn);
            out = b.add(out, shared);
        }
        b.finish(out, route, Some(logits))
    }))
}

/// Which layers are mixtures: words in `layers_block_type`, or letters in `hybrid_override_pattern`.
fn pattern(keys: &mut Keys<'_>) -> Vec<bool> {
    let words = keys.list(&["layers_block_type"]);
    let letters = keys.text(&["hybrid_override_pattern"]);
    keys.ignore(&["num_hidden_layers"]);
    let limit = |keys: &mut Keys<'_>, n: usize, span| {
        let number = Num { value: n as u64, span: Some(span), key: "the number of layers".to_owned(), known: true };
        check::limit(keys, &number, limits::LAYERS, "layers");
    };
    if let Some((items, found)) = words {
        limit(keys, items.len(), found.value.span);
        return items
            .iter()
            .take(layers::MOST)
            .map(|item| matches!(&item.kind, Kind::String(word) if word == "moe"))
            .collect();
    }
    if let Some((text, found)) = letters {
        limit(keys, text.len(), found.value.span);
        if let Some(odd) = text.chars().find(|c| !"ME*-".contains(*c)) {
            let shown = crate::json::cut(&odd.to_string());
            keys.errors.push(
                Diagnostic::error(Code("E0214"), format!("hybrid_override_pattern holds `{shown}`"))
                    .primary(found.value.span, "unknown kind of layer")
                    .help("known: M (state space), E (mixture), * (attention), - (dense)"),
            );
        }
        return text.chars().take(layers::MOST).map(|c| c == 'E').collect();
    }
    keys.missing(&["layers_block_type", "hybrid_override_pattern"]);
    Vec::new()
}
