//! The innermost loops of the grouped products on CPUs: instructions for each multiply-add, pinned.
//!
//! Times are not tested; a loop that grows is. `docs/cpu-kernels.md` explains the figures.

use moec::{Compiler, Keep, Target};

const CONFIG: &str = r#"{"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 8, "num_experts_per_tok": 8,
    "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32, "rms_norm_eps": 1e-6,
    "torch_dtype": "DTYPE"}"#;

/// A loop whose end jumps to its start, with no label between.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Loop {
    instructions: usize,
    products: usize,
    /// Values that are kept in memory for want of registers.
    spills: usize,
}

/// The loop of `symbol` with the most products.
fn hottest(assembly: &str, symbol: &str, product: &str) -> Loop {
    let start = assembly.find(&format!("\n{symbol}:")).unwrap_or_else(|| panic!("there is no {symbol}"));
    let body = &assembly[start + 1..];
    let body = &body[..body.find("\n.Lfunc_end").unwrap_or(body.len())];
    let (mut label, mut now, mut best) = ("", Loop::default(), Loop::default());
    for line in body.lines().map(|l| l.split('#').next().unwrap_or("").trim()).filter(|l| !l.is_empty()) {
        if let Some(name) = line.strip_suffix(':') {
            (label, now) = (name, Loop::default());
            continue;
        }
        if line.starts_with('.') {
            continue;
        }
        now.instructions += 1;
        now.products += usize::from(line.starts_with(product));
        now.spills += usize::from(line.contains("(%rsp)"));
        if line.starts_with('j') && line.split_whitespace().nth(1) == Some(label) && now.products > best.products {
            best = now;
        }
    }
    best
}

#[test]
fn main_loops_stay_tight() {
    // Weights, target, mnemonic of a product, products of a turn, instructions of a turn at most.
    let pinned = [
        ("bfloat16", Target::X86V3, "vfmadd", 20, 43),
        ("bfloat16", Target::X86V4, "vfmadd", 48, 79),
        ("bfloat16", Target::X86V4Bf16, "vdpbf16ps", 24, 44),
        ("bfloat16", Target::X86V4Amx, "tdpbf16ps", 4, 63),
        ("float32", Target::X86V3, "vfmadd", 12, 27),
        ("float32", Target::X86V4, "vfmadd", 24, 44),
        ("fp8", Target::X86V4, "vfmadd", 22, 67),
        ("fp8", Target::X86V4Bf16, "vdpbf16ps", 22, 40),
        ("mxfp4", Target::X86V3, "vfmadd", 20, 59),
        ("mxfp4", Target::X86V4, "vfmadd", 42, 76),
        ("mxfp4", Target::X86V4Bf16, "vdpbf16ps", 96, 133),
    ];
    let mut wrong = Vec::new();
    for (weights, target, product, products, instructions) in pinned {
        let config = match weights {
            "fp8" => include_str!("../models/deepseek-v3/config.json").to_owned(),
            "mxfp4" => include_str!("../models/gpt-oss-120b/config.json").to_owned(),
            dtype => CONFIG.replace("DTYPE", dtype),
        };
        let model = moec::read::bytes(config.as_bytes(), "config.json").expect("reads").model;
        let keep = Keep { mlir: false, llvm: false, assembly: true };
        let artefact =
            Compiler { targets: vec![target], keep, ..Compiler::default() }.compile(&model).expect("compiles");
        let assembly = artefact.forms[0].targets[0].assembly.as_deref().expect("was kept");
        for kernel in ["up", "down"] {
            let found = hottest(assembly, &format!("{}_{kernel}", artefact.forms[0].name), product);
            if found.products != products || found.instructions > instructions || found.spills > 0 {
                wrong.push(format!("{weights} {} {kernel}: {found:?}", target.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "loops have changed:\n{}", wrong.join("\n"));
}
