//! What the op set leaves out by decision, so that a refusal can say why and what to do instead.

use serde_json::Value;

/// Reason and next step for an operation that is left out on purpose.
pub(super) fn operation(name: &str) -> Option<(&'static str, &'static str)> {
    let plain = name.to_ascii_lowercase().replace(['-', '.'], "_");
    let is = |names: &[&str]| names.iter().any(|n| plain == *n || plain.starts_with(&format!("{n}_")));
    if plain.contains("conv") {
        return Some((
            "convolution is outside of the op set (convolution experts, key convolution)",
            "pass convolved values, such as keys, as an input",
        ));
    }
    if is(&["loss", "aux_loss", "cross_entropy", "kl", "balance_loss", "load_balance_loss", "z_loss"])
        || plain.ends_with("_loss")
    {
        return Some((
            "losses are outside of the op set",
            "give the values that the loss needs as outputs (`count`, `reduce` of the scores) and compute it on the host",
        ));
    }
    if is(&["grad", "gradient", "backward", "optimizer", "update", "fit"]) || plain.ends_with("_update") {
        return Some((
            "gradients and updates are outside of the op set",
            "compute them on the host from outputs of the graph; state tensors can be replaced between runs",
        ));
    }
    if is(&["contrast", "self_contrast", "logit_contrast"]) {
        return Some((
            "the contrast of logits is host code around two compiled graphs",
            "compile the strong and the weak graph (`select rank`) and combine their logits on the host",
        ));
    }
    if is(&["data_select", "data_selection"]) {
        return Some((
            "selection of data normalised over the batch (Union-of-Experts) has no exact definition",
            "use `select` of experts, or `expert_choice` for a capacity",
        ));
    }
    if is(&["residual_attention", "attention_map"]) {
        return Some((
            "attention maps of an earlier layer (LaTtE-Flow) have no exact definition",
            "pass the map as an input and apply it with `einsum`",
        ));
    }
    if is(&["random", "rand", "noise", "gumbel", "dropout", "jitter"]) {
        return Some(("random numbers are outside of the op set", "draw them on the host and pass them as an input"));
    }
    if is(&["all_to_all", "all_gather", "all_reduce", "reduce_scatter", "send", "recv"]) {
        return Some((
            "communication is no operation of a graph file",
            "it follows from the plan: see `moec plan` and the pass `fold-parallelism`",
        ));
    }
    None
}

/// Name, reason and next step for an attribute, or one inside its value, that is left out on purpose.
pub(super) fn attribute<'a>(
    op: &str,
    name: &'a str,
    value: &'a Value,
) -> Option<(&'a str, &'static str, &'static str)> {
    if op == "attention" && matches!(name, "bias" | "mask" | "map" | "residual") {
        let why = "attention takes no mask or earlier map of its own";
        return Some((name, why, "write it with `einsum`, `binary` and `softmax`"));
    }
    if op == "experts" && matches!(name, "expansion" | "virtual" | "shuffle" | "id_shuffle" | "offset" | "share") {
        let why =
            "virtual value expansion, id shuffle and shared tables with an offset (UltraMemV2) are not expressible";
        return Some((name, why, "give every `neuron` part its own table, and ids that are final"));
    }
    if let ("experts", "kind", Value::String(kind)) = (op, name, value)
        && let Some((why, instead)) = operation(kind)
    {
        return Some((name, why, instead));
    }
    match value {
        Value::Array(items) => items.iter().find_map(|item| attribute(op, "", item)),
        Value::Object(map) => map.iter().find_map(|(name, value)| attribute(op, name, value)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}
