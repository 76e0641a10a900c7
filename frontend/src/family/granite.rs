//! Granite mixtures and JetMoE: the best logits, softmax over them, stacked experts.
//!
//! The residual multiplier of Granite is the layer's; JetMoE adds one bias to the block's output.

use super::{Draft, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2},
    check,
    keys::{Keys, Refused},
    layout::{self, Glu, slice, viewed},
    limits,
};
use moec_ir::{
    Code, Diagnostic, Source,
    ops::{BinaryFn, Weigh, WeighFn},
};

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let kind = keys.model_type.clone();
    let jetmoe = kind == "jetmoe";
    no_experts(keys)?;
    let sizes = sizes(keys, &["num_local_experts", "num_experts"], TOP_K);
    let inner = inner(keys, &["intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act", "activation_function"]);
    let with_shared = matches!(kind.as_str(), "granitemoeshared" | "granitemoehybrid" | "granitemoe_swa");
    let shared = if with_shared { keys.size_or(&["shared_intermediate_size"], 0, 0, limits::SIZE).value } else { 0 };
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);

    // Where a shared network may stand beside the mixture, the prefix is the layer's.
    let (prefix, dir) = match (jetmoe, with_shared) {
        (true, _) => ("model.layers.{i}.mlp.", ""),
        (false, true) => ("model.layers.{i}.", "block_sparse_moe."),
        (false, false) => ("model.layers.{i}.block_sparse_moe.", ""),
    };
    let sparse = vec![true; layers::count(&sizes.layers)];
    Ok(build(hidden, &sparse, prefix, |_, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits(&format!("{dir}router.layer.weight"), experts);
        let chosen = b.topk(logits, k);
        let route = b.weigh_rounded(chosen, logits, Weigh { function: WeighFn::Softmax, ..RAW });
        let glu = layout::stacked(
            &format!("{{p}}{dir}input_linear.weight"),
            &format!("{{p}}{dir}output_linear.weight"),
            inner,
        );
        let bank = b.glu_bank(experts, glu, Shape2 { input: hidden, inner, act });
        let mut out = b.routed(b.x, route, bank);
        if jetmoe {
            b.plain("bias", &[hidden]);
            out = b.with_weight("biased", BinaryFn::Add, out, "bias");
            b.rounded(out);
        }
        if shared > 0 {
            let ffn = b.glu("shared_mlp", shared_mlp(shared), Shape2 { input: hidden, inner: shared, act });
            let shared = b.ffn("shared", b.x, ffn);
            out = b.add(out, shared);
        }
        b.finish(out, route, Some(logits))
    }))
}

/// `input_linear` holds gate rows, then up rows.
fn shared_mlp(inner: u64) -> Glu {
    let input = "{p}shared_mlp.input_linear.weight";
    Glu {
        gate: viewed(input, vec![slice(0, 0, inner)]),
        up: viewed(input, vec![slice(0, inner, inner)]),
        down: Source::plain("{p}shared_mlp.output_linear.weight"),
    }
}

/// `E0215`: hybrid models may have no experts at all.
fn no_experts(keys: &mut Keys<'_>) -> Result<(), Refused> {
    if keys.model_type != "granitemoehybrid" {
        return Ok(());
    }
    let experts = keys.size_or(&["num_local_experts"], 1, 0, limits::SIZE);
    if experts.value > 0 {
        return Ok(());
    }
    let error = Diagnostic::error(Code("E0215"), "nothing to compile: num_local_experts is 0, so every layer is dense");
    keys.errors.push(check::at(error, experts.span, "no experts"));
    Err(Refused)
}
