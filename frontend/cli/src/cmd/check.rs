//! `moec check`: read and check everything, write nothing.

use crate::{args::Check, context::Context, failure::Failure, wanted};
use moec::frontend::{Form, LayerKind};
use serde_json::json;

/// Prints what the model is.
pub(crate) fn run(cx: &Context, args: &Check) -> Result<(), Failure> {
    let source = wanted::model(cx, &args.model)?;
    let model = &source.model;
    let moe = model.layers.iter().filter(|l| matches!(l.kind, LayerKind::Moe { .. })).count();
    if cx.is_json() {
        let forms: Vec<_> = model.forms.iter().map(form_json).collect();
        return cx.json(&json!({
            "schema": 1, "model": model.name, "family": model.family, "dtype": model.dtype, "hidden": model.hidden,
            "layers": model.layers.len(), "moe_layers": moe, "forms": forms, "warnings": model.warnings.len(),
        }));
    }
    let mut out = format!(
        "{}: {} layers, {moe} with experts, in {} form{}\n",
        model.family,
        model.layers.len(),
        model.forms.len(),
        if model.forms.len() == 1 { "" } else { "s" }
    );
    for form in &model.forms {
        let f = form.facts();
        out.push_str(&format!(
            "  layers {}: {} experts, top {}, {} -> {}, shared {}, {:.1} M weights, {:.1} MFLOP a token\n",
            ranges(&form.layers),
            f.experts,
            f.top_k,
            f.expert_input,
            f.expert_inner,
            f.shared_inner,
            f.parameters as f64 / 1e6,
            f.flops_per_token as f64 / 1e6
        ));
    }
    cx.result(out)
}

fn form_json(form: &Form) -> serde_json::Value {
    let f = form.facts();
    json!({
        "layers": form.layers, "experts": f.experts, "top_k": f.top_k, "expert_input": f.expert_input,
        "expert_inner": f.expert_inner, "shared_inner": f.shared_inner, "parameters": f.parameters,
        "flops_per_token": f.flops_per_token,
    })
}

/// Numbers as ranges: `0-3, 7`.
pub(super) fn ranges(numbers: &[u64]) -> String {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for &n in numbers {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == n => *end = n,
            _ => parts.push((n, n)),
        }
    }
    let text: Vec<String> =
        parts.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") }).collect();
    text.join(", ")
}
