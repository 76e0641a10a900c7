//! Meaning checks: one function for each rule, one code for each function.

use crate::{
    harmless,
    json::{Member, cut},
    keys::{Keys, Num},
    limits,
};
use moec_ir::{Code, Diagnostic, Span, nearest};

/// Adds the place of a key, if it has one.
pub(crate) fn at(error: Diagnostic, span: Option<Span>, text: impl Into<String>) -> Diagnostic {
    match span {
        Some(span) if error.labels.iter().any(|l| l.primary) => error.secondary(span, text),
        Some(span) => error.primary(span, text),
        None => error,
    }
}

/// `E0203`: a token cannot use more experts than there are.
pub(crate) fn top_k(keys: &mut Keys<'_>, top_k: &Num, experts: &Num) {
    if top_k.known && experts.known && top_k.value > experts.value {
        let error = Diagnostic::error(Code("E0203"), "more experts per token than experts");
        let error = at(error, top_k.span, format!("asks for {}", top_k.value));
        let error = at(error, experts.span, format!("{} experts", experts.value));
        keys.errors.push(error.help(format!("set {} to {} or less", top_k.key, experts.value)));
    }
}

/// `W0202`: one expert that every token uses is a dense network.
pub(crate) fn one_expert(keys: &mut Keys<'_>, top_k: &Num, experts: &Num) {
    if top_k.known && experts.known && experts.value == 1 && top_k.value == 1 {
        let warning = Diagnostic::warning(Code("W0202"), "one expert that every token uses");
        keys.warnings
            .push(at(warning, experts.span, "1 expert").help("this is a dense network with a router in front"));
    }
}

/// `E0209`: a number beyond what moec compiles.
pub(crate) fn limit(keys: &mut Keys<'_>, number: &Num, max: u64, what: &str) {
    if number.known && number.value > max {
        let error =
            Diagnostic::error(Code("E0209"), format!("{} is {}, more than {max} {what}", number.key, number.value));
        keys.errors.push(at(error, number.span, format!("at most {max}")));
    }
}

/// `E0207`, `E0209`: the weights of one layer fit into 64 bits, and into 64 TiB.
pub(crate) fn volume(keys: &mut Keys<'_>, experts: &Num, inner: &Num, hidden: &Num) {
    if !(experts.known && inner.known && hidden.known) {
        return;
    }
    let product = u128::from(experts.value) * u128::from(inner.value) * u128::from(hidden.value) * 3;
    let bytes = product * u128::from(keys.dtype.bytes());
    let words = format!(
        "{} experts x {} inner x {} hidden x 3 matrices = {product} weights",
        experts.value, inner.value, hidden.value
    );
    let error = if bytes > u128::from(u64::MAX) {
        Diagnostic::error(Code("E0207"), "the weights of one layer do not fit into 64 bits").note(words)
    } else if bytes > u128::from(limits::LAYER_BYTES) {
        Diagnostic::error(
            Code("E0209"),
            format!("the weights of one layer need {} TiB, more than {} TiB", bytes >> 40, limits::LAYER_BYTES >> 40),
        )
        .note(words)
    } else {
        return;
    };
    let error = at(error, inner.span, format!("{} is {}", inner.key, inner.value));
    let error = at(error, experts.span, format!("{} is {}", experts.key, experts.value));
    keys.errors.push(at(error, hidden.span, format!("{} is {}", hidden.key, hidden.value)));
}

/// `E0210`: groups divide the experts and offer enough of them.
pub(crate) fn groups(keys: &mut Keys<'_>, experts: &Num, groups: &Num, kept: &Num, top_k: &Num) {
    if !(experts.known && groups.known && kept.known && top_k.known) {
        return;
    }
    let error = |text: String| Diagnostic::error(Code("E0210"), text);
    if !experts.value.is_multiple_of(groups.value) {
        let divisors: Vec<String> = (1..=experts.value.min(limits::EXPERTS))
            .filter(|d| experts.value.is_multiple_of(*d))
            .map(|d| d.to_string())
            .collect();
        let error = at(
            error(format!("{} experts do not split into {} equal groups", experts.value, groups.value)),
            groups.span,
            format!("{} groups", groups.value),
        );
        let error = at(error, experts.span, format!("{} experts", experts.value));
        keys.errors.push(error.help(format!("{} divides into {}", experts.value, divisors.join(", "))));
    } else if kept.value > groups.value {
        let error = at(
            error(format!("{} groups are kept of {}", kept.value, groups.value)),
            kept.span,
            format!("keeps {}", kept.value),
        );
        let error = at(error, groups.span, format!("{} groups", groups.value));
        keys.errors.push(error.help(format!("set {} to {} or less", kept.key, groups.value)));
    } else if top_k.value > kept.value * (experts.value / groups.value) {
        let offered = kept.value * (experts.value / groups.value);
        let error = at(
            error(format!("the kept groups hold {offered} experts, but a token needs {}", top_k.value)),
            top_k.span,
            format!("asks for {}", top_k.value),
        );
        let error = at(error, kept.span, format!("keeps {} of {} groups", kept.value, groups.value));
        keys.errors.push(error.help(format!("set {} to {offered} or less, or keep more groups", top_k.key)));
    }
}

/// `E0208`, `W0201`: keys that nobody asked for.
///
/// A key that looks as if it changes the mixture is never ignored. Others that are not known to be
/// harmless are worth one warning.
pub(crate) fn unused(keys: &mut Keys<'_>) {
    let asked: Vec<String> = keys.asked.iter().cloned().collect();
    let asked: Vec<&str> = asked.iter().map(String::as_str).collect();
    let mut odd: Vec<&Member> = Vec::new();
    for member in keys.unused() {
        let name = member.key.as_str();
        if HARMLESS.contains(&name) || harmless::KEYS.binary_search(&name).is_ok() {
            continue;
        }
        if changes_mixture(name) {
            let near = nearest(name, asked.iter().copied());
            let error =
                Diagnostic::error(Code("E0208"), format!("{} has no meaning for {}", cut(name), keys.model_type))
                    .primary(member.key_span, "unknown key");
            if let Some(near) = near {
                // The misspelt key explains the missing one.
                keys.errors.retain(|e| e.code.0 != "E0204" || e.message != format!("{near} is missing"));
            }
            keys.errors.push(match near {
                Some(near) => error
                    .help(format!("did you mean {near}? A key that looks like part of the mixture is never ignored")),
                None => error
                    .help("a key that looks like part of the mixture is never ignored; remove it if it has no effect"),
            });
        } else {
            odd.push(member);
        }
    }
    if let Some(first) = odd.first() {
        let mut warning = Diagnostic::warning(Code("W0201"), format!("unknown key {}", cut(&first.key)))
            .primary(first.key_span, "not read");
        if let Some(near) = nearest(&first.key, asked.iter().copied()) {
            warning = warning.help(format!("did you mean {near}?"));
        }
        for other in odd.iter().skip(1).take(5) {
            warning = warning.note(format!("also unknown: {}", cut(&other.key)));
        }
        if odd.len() > 6 {
            warning = warning.note(format!("and {} more", odd.len() - 6));
        }
        keys.warnings.push(warning);
    }
}

fn changes_mixture(key: &str) -> bool {
    let key = key.to_lowercase();
    ["expert", "router", "gate", "moe"].iter().any(|part| key.contains(part)) || key.starts_with("quantization")
}

/// Keys that contain a word of the mixture but change nothing that is computed in inference.
const HARMLESS: &[&str] = &[
    // Losses, noise and limits of training.
    "output_router_logits",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
    "router_ignore_padding_tokens",
    "add_router_probs",
    "router_type",
    "moe_loss_weight",
    "moe_jitter_eps",
    "moe_capacity",
    "moe_drop_tokens",
    "moe_dropout",
    "moe_aux_loss_coef",
    "moe_z_loss_coef",
    "uniform_expert_assignment",
    "moe_random_routing_dropped_token",
    // How a trainer or server spreads the work.
    "ep_size",
    "moe_shared_expert_overlap",
    "moe_layer_num_skipped",
    "expert_capacity",
    // Gates of attention and of convolutions.
    "attn_output_gate",
    "output_gate_type",
    "gated_norm_rank",
    "gating",
    "is_gated_act",
    "use_gated_attention",
    "gate_attention",
    "mtp_mlp_layer_types",
];
