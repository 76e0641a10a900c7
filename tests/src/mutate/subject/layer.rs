//! Layers of small models.

use super::{Fault, Outcome, Program, Spread, Subject};
use moec::{Compiler, Target};
use moec_abi::{BufferKind, DType, Manifest};
use moec_runtime::{Artefact, Model, Random, Sim};
use std::{collections::BTreeMap, sync::Arc};

/// Configs of one layer: widths that no tile divides, and numbers of experts that no warp does.
const CONFIGS: [(&str, &str); 4] = [
    (
        "mixtral bf16",
        r#"{"model_type": "mixtral", "hidden_act": "silu", "hidden_size": 72, "intermediate_size": 40,
        "num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 32, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}"#,
    ),
    (
        "qwen3 bf16",
        r#"{"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 72, "intermediate_size": 40,
        "moe_intermediate_size": 40, "num_experts": 11, "num_experts_per_tok": 3, "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 32, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}"#,
    ),
    (
        "deepseek bf16",
        r#"{"model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 72, "intermediate_size": 40,
        "moe_intermediate_size": 40, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32,
        "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}"#,
    ),
    (
        "mixtral f32",
        r#"{"model_type": "mixtral", "hidden_act": "silu", "hidden_size": 40, "intermediate_size": 24,
        "num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 32, "rms_norm_eps": 1e-5, "torch_dtype": "float32"}"#,
    ),
];

struct Layer {
    manifest: Manifest,
    weights: Random,
}

/// Which of them, for which target.
const SUBJECTS: [(usize, Target); 4] = [(0, Target::Sm80), (1, Target::Sm90a), (2, Target::Sm90a), (3, Target::Sm80)];

pub(super) fn subjects(seeds: u64, filter: &str) -> Vec<Subject> {
    let named =
        SUBJECTS.iter().map(|&(i, target)| (format!("{} {}", CONFIGS[i].0, target.name()), CONFIGS[i].1, target));
    named
        .filter(|(name, ..)| name.contains(filter))
        .map(|(name, config, target)| {
            let mut subject = subject(&name, config, target, seeds);
            // Products are subjects of their own.
            subject.mutated = |entry| !entry.contains("_up") && !entry.contains("_down");
            subject
        })
        .collect()
}

fn subject(name: &str, config: &str, target: Target, seeds: u64) -> Subject {
    let model = moec_frontend::read_config(config, name).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let compiler = Compiler { targets: vec![target], ..Compiler::default() };
    let artefact = compiler.compile(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
    let program = artefact.manifest.programs.first().expect("a layer has a program");
    let prefix = program.prefixes.first().map_or("", String::as_str);
    let weights = Random::new(&program.slots, prefix, 7).unwrap_or_else(|e| panic!("{name}: {e}"));
    let ptx = String::from_utf8(artefact.files[&program.code].clone()).expect("PTX is text");
    let layer = Layer { manifest: artefact.manifest.clone(), weights };
    let shapes = [(3, Spread::Skewed), (19, Spread::Skewed)];
    Subject::new(name, ptx, Box::new(layer), &shapes, seeds)
}

impl Program for Layer {
    fn run(&self, ptx: &str, tokens: u64, _: Spread, options: moec_sim::Options) -> Outcome {
        let program = &self.manifest.programs[0];
        let files = BTreeMap::from([(program.code.clone(), ptx.as_bytes().to_vec())]);
        let artefact = Artefact::in_memory(self.manifest.clone(), files).expect("the manifest is of this version");
        let sim = Arc::new(Sim::new(options));
        let model = Model::new(Arc::new(artefact), Arc::clone(&sim) as _);
        let run = || {
            let layer = model.layer(program.layers[0], &self.weights)?;
            let bytes = |shape: &[moec_abi::Expr], dtype: DType| {
                let elements: u64 = shape.iter().map(|d| d.eval(tokens).expect("shapes are small")).product();
                usize::try_from(elements * dtype.bytes()).expect("shapes are small")
            };
            let mut numbers = super::product::Numbers(tokens);
            let inputs: Vec<Vec<u8>> = layer
                .inputs()?
                .iter()
                .map(|b| numbers.bytes(b.dtype, bytes(&b.shape, b.dtype) / b.dtype.bytes() as usize))
                .collect();
            let mut outputs: Vec<Vec<u8>> =
                layer.outputs()?.iter().map(|b| vec![0xff; bytes(&b.shape, b.dtype)]).collect();
            debug_assert!(layer.outputs()?.iter().all(|b| matches!(b.kind, BufferKind::Output { .. })));
            let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
            // Twice, so that the first kernel has a launch before it, too.
            for _ in 0..2 {
                layer.launch(tokens, &inputs, &mut outputs.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())?;
            }
            Ok::<_, moec_runtime::RuntimeError>(outputs.concat())
        };
        match run() {
            Ok(out) => Ok((out, sim.take_counts().total.warp_instructions)),
            Err(error) => Err(Fault::of(&sim.take_findings(), || error.message)),
        }
    }
}
