//! Random small layers: compiled kernels against the interpreter, on the same weights.
//!
//! Families, sizes, types and numbers of tokens are drawn from a seed, so that every run draws the same. Rows are
//! random, all equal (every token goes to the same experts), zero (every score ties), or spoilt by a NaN. In bf16,
//! rows whose choice hangs on the last places are left out; few may be.

use moec::{
    Compiler, host_target,
    run::{Input, Tensor, Weights, prepare},
    runtime::{Cpu, Device},
};
use moec_tests::draw::Draw;
use moec_tests::layers::Sample;
use std::{
    fmt::Write as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

const LAYERS: usize = 300;
const TOKENS: [u64; 11] = [0, 1, 2, 7, 16, 17, 63, 64, 65, 129, 1000];
/// Numbers of tokens that one layer is launched with; each layer starts further on.
const LAUNCHES: usize = 5;
/// Rows of a launch that are compared.
const ROWS: u64 = 20;

/// A config of a small model.
fn config(draw: &mut Draw) -> String {
    let hidden = draw.of(&[16, 24, 32, 40, 48, 64, 72, 96, 128]);
    let inner = draw.of(&[8, 16, 20, 33, 48, 64, 80]);
    let experts = draw.of(&[1, 2, 3, 5, 8, 12, 16, 33]);
    let top_k = 1 + draw.below(experts.min(6));
    let dtype = draw.of(&["float32", "bfloat16"]);
    let act = draw.of(&["silu", "gelu", "relu"]);
    let yes = |draw: &mut Draw| draw.of(&["true", "false"]);
    let mut text = format!(
        r#"{{"torch_dtype": "{dtype}", "hidden_size": {hidden}, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": {top_k}"#
    );
    let rest = match draw.below(6) {
        0 => format!(
            r#""model_type": "mixtral", "hidden_act": "{act}", "intermediate_size": {inner}, "num_local_experts": {experts}"#
        ),
        1 => format!(
            r#""model_type": "qwen3_moe", "hidden_act": "{act}", "intermediate_size": 64, "moe_intermediate_size": {inner},
  "num_experts": {experts}, "norm_topk_prob": {}, "decoder_sparse_step": 1, "mlp_only_layers": []"#,
            yes(draw)
        ),
        2 => format!(
            r#""model_type": "olmoe", "hidden_act": "{act}", "intermediate_size": {inner}, "num_experts": {experts},
  "norm_topk_prob": {}"#,
            yes(draw)
        ),
        3 => format!(
            r#""model_type": "qwen2_moe", "hidden_act": "{act}", "intermediate_size": 64, "moe_intermediate_size": {inner},
  "shared_expert_intermediate_size": {}, "num_experts": {experts}, "norm_topk_prob": {}, "decoder_sparse_step": 1,
  "mlp_only_layers": []"#,
            draw.of(&[8, 24, 40]),
            yes(draw)
        ),
        4 => {
            // Groups have at least two experts and offer enough of them.
            let (groups, each) = (draw.of(&[1, 2, 4]), 2 + draw.below(4));
            let kept = 1 + draw.below(groups);
            let top_k = 1 + draw.below((kept * each).min(6));
            text = text.replace(
                &format!("\"num_experts_per_tok\": {}", text_number(&text)),
                &format!("\"num_experts_per_tok\": {top_k}"),
            );
            format!(
                r#""model_type": "deepseek_v3", "hidden_act": "silu", "intermediate_size": 64, "moe_intermediate_size": {inner},
  "n_routed_experts": {}, "n_shared_experts": {}, "n_group": {groups}, "topk_group": {kept}, "norm_topk_prob": {},
  "routed_scaling_factor": {}, "first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
  "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "scoring_func": "sigmoid", "topk_method": "noaux_tc""#,
                groups * each,
                draw.of(&[1, 2]),
                yes(draw),
                draw.of(&["1.0", "2.5"])
            )
        }
        _ => format!(
            r#""model_type": "granitemoe", "hidden_act": "{act}", "intermediate_size": {inner}, "num_local_experts": {experts}"#
        ),
    };
    let _ = write!(text, ", {rest}}}");
    text
}

/// The number of experts per token that stands in the text.
fn text_number(text: &str) -> &str {
    text.rsplit("\"num_experts_per_tok\": ").next().unwrap_or("")
}

/// Rows of a kind: random, all equal, all zero, with a NaN.
fn rows(inputs: &mut [Tensor], kind: u64) {
    for tensor in inputs {
        let rows = tensor.shape.first().copied().unwrap_or(0) as usize;
        if rows == 0 {
            continue;
        }
        let each = tensor.bytes.len() / rows;
        let element = tensor.dtype.bytes() as usize;
        match kind {
            0 => {}
            1 => {
                let first = tensor.bytes[..each].to_vec();
                tensor.bytes.chunks_mut(each).for_each(|row| row.copy_from_slice(&first));
            }
            2 => tensor.bytes.fill(0),
            _ => {
                let at = rows / 2 * each + each / 2 / element * element;
                tensor.bytes[at..at + element].fill(0xff);
            }
        }
    }
}

/// Compiles a layer and holds it against the interpreter; gives the rows compared and left out, or what differs.
fn check(number: usize) -> Result<(u64, u64), String> {
    let mut draw = Draw(number as u64 * 7919 + 1);
    let text = config(&mut draw);
    let failed = |what: String| format!("layer {number}: {what}\n{text}");
    let source = moec::read::bytes(text.as_bytes(), "config.json")
        .map_err(|d| failed(d.iter().map(|d| d.message.clone()).collect::<Vec<_>>().join("; ")))?;
    let outputs = ["output", "topk_indices", "router_logits"].map(str::to_owned).to_vec();
    let compiler = Compiler { targets: vec![host_target()], outputs, ..Compiler::default() };
    let form = source.model.forms[0].clone();
    let compiled =
        compiler.compile_forms(&source.model.name, std::slice::from_ref(&form)).map_err(|e| failed(e.to_string()))?;
    let artefact = Arc::new(compiled.load().map_err(|e| failed(e.to_string()))?);
    let device: Arc<dyn Device> = Arc::new(Cpu::new(1 + draw.below(3) as u32));
    let layer =
        prepare(&artefact, &device, None, &Weights::Random(number as u64)).map_err(|e| failed(e.to_string()))?;
    let mut sample = Sample::new(&layer, &compiled.forms[0].graph);
    for i in 0..LAUNCHES {
        let tokens = TOKENS[(number * LAUNCHES + i) % TOKENS.len()];
        let (_, mut inputs) = layer.inputs(&Input::Random(tokens)).map_err(|e| failed(e.to_string()))?;
        let kind = (i + number) as u64 % 4;
        rows(&mut inputs, kind);
        let what = format!("{tokens} tokens, rows of kind {kind}");
        sample.launch(&what, tokens, &inputs, ROWS).map_err(|e| failed(format!("{what}: {e}")))?;
    }
    sample.compare().map_err(failed)?;
    Ok((sample.compared, sample.unsteady))
}

#[test]
fn random_layers_agree_with_the_interpreter() {
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let (compared, unsteady) = (AtomicU64::new(0), AtomicU64::new(0));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= LAYERS {
                        break;
                    }
                    match check(number) {
                        Ok((rows, out)) => {
                            compared.fetch_add(rows, Ordering::Relaxed);
                            unsteady.fetch_add(out, Ordering::Relaxed);
                        }
                        Err(failure) => failures.lock().expect("no thread panics").push(failure),
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no thread panics");
    assert!(failures.is_empty(), "{} of {LAYERS} layers differ\n{}", failures.len(), failures.join("\n"));
    let (compared, unsteady) = (compared.into_inner(), unsteady.into_inner());
    println!("{compared} rows compared, {unsteady} left out");
    assert!(unsteady * 4 < compared, "{unsteady} of {compared} rows were left out");
}

#[test]
fn a_wrong_value_is_noticed() {
    let mut draw = Draw(1);
    let source = moec::read::bytes(config(&mut draw).as_bytes(), "config.json").expect("the config is one");
    let compiled = Compiler::default().compile(&source.model).expect("compiles");
    let artefact = Arc::new(compiled.load().expect("loads"));
    let device: Arc<dyn Device> = Arc::new(Cpu::new(1));
    let layer = prepare(&artefact, &device, None, &Weights::Random(1)).expect("binds");
    let (tokens, inputs) = layer.inputs(&Input::Random(5)).expect("inputs");
    let mut outputs = layer.launch(tokens, &inputs).expect("runs").outputs;
    let compare = |outputs: &[Tensor]| layer.compare(&compiled.forms[0].graph, &inputs, outputs).expect("compares");
    assert!(compare(&outputs).passed());
    let last = outputs[0].bytes.len() - 1;
    outputs[0].bytes[last] ^= 0x40;
    assert!(!compare(&outputs).passed());
}
