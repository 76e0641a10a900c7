//! What the kernels of a layer do, pinned: `tests/counts.json`, from a layer of Qwen3-30B-A3B with eight experts.
//!
//! `MOEC_BLESS=1 cargo test -p moec-tests --test counts` writes the file anew.

use moec::{Compiler, Target};
use moec_runtime::{Model, Random, Sim};
use moec_sim::Options;
use std::{collections::BTreeMap, path::Path, sync::Arc};

const CONFIG: &str = r#"{"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 8, "num_experts_per_tok": 8,
    "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32, "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16"}"#;
const TOKENS: u64 = 16;
/// By how much a count may grow.
const SLACK: f64 = 1.02;

type Counts = BTreeMap<String, BTreeMap<String, u64>>;

fn counts(target: Target) -> Counts {
    let model = moec_frontend::read_config(CONFIG, "qwen3-30b-a3b").expect("the config is one");
    let artefact = Compiler { targets: vec![target], ..Compiler::default() }.compile(&model).expect("compiles");
    let program = &artefact.manifest.programs[0];
    let weights = Random::new(&program.slots, &program.prefixes[0], 1).expect("weights have shapes");
    let sim = Arc::new(Sim::new(Options { check: false, ..Options::default() }));
    let model = Model::new(Arc::new(artefact.load().expect("loads")), Arc::clone(&sim) as _);
    let layer = model.layer(program.layers[0], &weights).expect("binds");
    let hidden: Vec<u8> = (0..TOKENS * 2048)
        .flat_map(|i| half::bf16::from_f32((((i * 2_654_435_761) >> 7) % 509) as f32 / 254.0 - 1.0).to_le_bytes())
        .collect();
    let mut output = vec![0; hidden.len()];
    layer.launch(TOKENS, &[&hidden], &mut [&mut output]).expect("runs");
    let kernels = sim.take_counts().kernels;
    let row = |c: &moec_sim::Counts| {
        [
            ("instructions", c.warp_instructions),
            ("global_bytes_read", c.global_bytes_read),
            ("global_bytes_written", c.global_bytes_written),
            ("shared_bytes_read", c.shared_bytes_read),
            ("shared_bytes_written", c.shared_bytes_written),
            ("bank_conflicts", c.bank_conflicts()),
        ]
        .map(|(name, n)| (name.to_owned(), n))
        .into()
    };
    kernels.iter().map(|(name, c)| (format!("{} {name}", target.name()), row(c))).collect()
}

#[test]
fn kernels_do_no_more_than_before() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("counts.json");
    let now: Counts = [Target::Sm80, Target::Sm90a].into_iter().flat_map(counts).collect();
    let text = serde_json::to_string_pretty(&now).expect("counts are JSON") + "\n";
    if std::env::var_os("MOEC_BLESS").is_some() {
        std::fs::write(&path, text).expect("the file can be written");
        return;
    }
    let before = std::fs::read(&path).expect("run with MOEC_BLESS=1 first");
    let before: Counts = serde_json::from_slice(&before).expect("the file has counts");
    assert!(now.keys().eq(before.keys()), "there are other kernels: {:?}; MOEC_BLESS=1 if so", now.keys());
    let (mut worse, mut better) = (Vec::new(), Vec::new());
    for (kernel, row) in &now {
        for (name, &n) in row {
            let was = before[kernel].get(name).copied().unwrap_or(0);
            let line = format!("{kernel}: {name} were {was}, are {n}");
            if n as f64 > was as f64 * SLACK {
                worse.push(line);
            } else if (n as f64) * SLACK < was as f64 {
                better.push(line);
            }
        }
    }
    assert!(worse.is_empty(), "kernels do more:\n{}\nMOEC_BLESS=1 if this is meant", worse.join("\n"));
    assert!(better.is_empty(), "kernels do less:\n{}\nMOEC_BLESS=1 to hold on to it", better.join("\n"));
}
