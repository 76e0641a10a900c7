//! Layers of small models and of the gallery.

use super::{Fault, Outcome, Program, Spread, Subject};
use crate::gallery::{self, Compiled, data, tokens_of};
use moec::{Compiler, Target};
use moec_abi::{Arg, Buffer, BufferKind, DType, Expr, Grid, Launch, Manifest};
use moec_runtime::{Artefact, Model, Random, Sim, Tensors};
use std::{collections::BTreeMap, ops::Range, path::Path, sync::Arc};

/// Configs of one layer: widths that no tile divides, and numbers of experts that no warp does.
const CONFIGS: [(&str, &str); 6] = [
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
    (
        "deepseek fp8",
        r#"{"model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 160, "intermediate_size": 144,
        "moe_intermediate_size": 144, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": null,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 32, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}"#,
    ),
    (
        "gpt_oss mxfp4",
        r#"{"model_type": "gpt_oss", "hidden_act": "silu", "hidden_size": 160, "intermediate_size": 96,
        "num_local_experts": 4, "num_experts_per_tok": 2, "experts_per_token": 2, "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4"}, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 32, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}"#,
    ),
];

/// The kernels of a layer that are mutated.
#[derive(Clone, Copy)]
enum Part {
    /// Gate, plan and weighted sum: products have subjects of their own.
    Around,
    /// Grouped products.
    Products,
}

/// Which configs, for which target, and which of their kernels.
const SUBJECTS: [(usize, Target, Part); 6] = [
    (0, Target::Sm80, Part::Around),
    (1, Target::Sm90a, Part::Around),
    (2, Target::Sm90a, Part::Around),
    (3, Target::Sm80, Part::Around),
    (4, Target::Sm89, Part::Products),
    (5, Target::Sm90a, Part::Products),
];

/// Files of `models/systems`, for these targets.
const FORMS: [(&str, Target); 4] = [
    ("peer_product_key", Target::Sm80),
    ("monet_horizontal", Target::Sm90a),
    ("selective_sinkhorn", Target::Sm80),
    ("vmoe_priority", Target::Sm89),
];

/// A compiled layer with its weights, and what it is given.
struct Layer {
    manifest: Manifest,
    weights: Box<dyn Tensors>,
    inputs: Box<dyn Fn(u64) -> Vec<Vec<u8>> + Send + Sync>,
}

pub(super) fn subjects(seeds: u64, filter: &str) -> Vec<Subject> {
    let mut all = Vec::new();
    for (config, target, part) in SUBJECTS {
        let (name, text) = CONFIGS[config];
        let name = format!("{name} {}", target.name());
        if name.contains(filter) {
            all.push(of_config(&name, text, target, part, seeds));
        }
    }
    for (file, target) in FORMS {
        let name = format!("{file} {}", target.name());
        if name.contains(filter) {
            all.push(of_file(&name, file, target, seeds));
        }
    }
    all
}

fn is_product(entry: &str) -> bool {
    entry.contains("_up") || entry.contains("_down")
}

fn of_config(name: &str, config: &str, target: Target, part: Part, seeds: u64) -> Subject {
    let model = moec_frontend::read_config(config, name).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let compiler = Compiler { targets: vec![target], ..Compiler::default() };
    let artefact = compiler.compile(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
    let program = artefact.manifest.programs.first().expect("a layer has a program").clone();
    let prefix = program.prefixes.first().map_or("", String::as_str);
    let weights = Random::new(&program.slots, prefix, 7).unwrap_or_else(|e| panic!("{name}: {e}"));
    let ptx = String::from_utf8(artefact.files[&program.code].clone()).expect("PTX is text");
    let inputs = move |tokens| {
        let mut numbers = super::product::Numbers(tokens);
        let given = program.buffers.iter().filter(|b| matches!(b.kind, BufferKind::Input { .. }));
        let input = |b: &Buffer| {
            let mut all = numbers.bytes(b.dtype, bytes(&b.shape, b.dtype, tokens) / b.dtype.bytes() as usize);
            if matches!(part, Part::Products) {
                super::product::spoil(
                    &mut all,
                    b.dtype,
                    bytes(&b.shape[1..], b.dtype, tokens) / b.dtype.bytes() as usize,
                );
            }
            all
        };
        given.map(input).collect()
    };
    let layer = Layer { manifest: artefact.manifest.clone(), weights: Box::new(weights), inputs: Box::new(inputs) };
    // Products have kernels and tiles for different numbers of tokens.
    let (tokens, mutated): (&[u64], fn(&str) -> bool) = match part {
        Part::Around => (&[1, 7], |entry| !is_product(entry)),
        Part::Products => (&[1, 7, 9, 97], is_product),
    };
    let shapes: Vec<_> = tokens.iter().map(|tokens| (*tokens, Spread::Skewed)).collect();
    let subject = Subject::new(name, ptx, Box::new(layer), &shapes, seeds);
    Subject { mutated, ..subject }
}

fn of_file(name: &str, file: &str, target: Target, seeds: u64) -> Subject {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/systems").join(file).with_extension("json");
    let graph = gallery::graph(&path);
    let sim = Arc::new(Sim::new(moec_sim::Options::default()));
    let compiled = Compiled::new(&graph, target, sim).unwrap_or_else(|e| panic!("{name}: {e}"));
    let ptx = String::from_utf8(compiled.artefact.files[&compiled.program().code].clone()).expect("PTX is text");
    let tokens = tokens_of(&graph, 7);
    let of = move |tokens| data(&graph, tokens, 7, gallery::Numbers::Small);
    let weights = Box::new(of(tokens).stored);
    let inputs = Box::new(move |tokens| of(tokens).inputs);
    let layer = Layer { manifest: compiled.artefact.manifest.clone(), weights, inputs };
    Subject::new(name, ptx, Box::new(layer), &[(tokens, Spread::Skewed)], seeds)
}

fn bytes(shape: &[Expr], dtype: DType, tokens: u64) -> usize {
    let elements: u64 = shape.iter().map(|d| d.eval(tokens).expect("shapes are small")).product();
    usize::try_from(elements * dtype.bytes()).expect("shapes are small")
}

impl Program for Layer {
    fn run(&self, ptx: &str, tokens: u64, _: Spread, options: moec_sim::Options) -> Outcome {
        let program = &self.manifest.programs[0];
        let files = BTreeMap::from([(program.code.clone(), ptx.as_bytes().to_vec())]);
        let artefact = Artefact::in_memory(self.manifest.clone(), files).expect("the manifest is of this version");
        let sim = Arc::new(Sim::new(options));
        let model = Model::new(Arc::new(artefact), Arc::clone(&sim) as _);
        let run = || {
            let layer = model.layer(program.layers[0], &*self.weights)?;
            let inputs = (self.inputs)(tokens);
            let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
            let mut outputs: Vec<Vec<u8>> =
                layer.outputs()?.iter().map(|b| vec![0xff; bytes(&b.shape, b.dtype, tokens)]).collect();
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

    fn cluster(&self) -> u32 {
        let blocks = |grid: &Grid| match grid {
            Grid::Gpu(grid) => grid.cluster.iter().product(),
            Grid::Cpu(_) => 1,
        };
        self.manifest.programs[0].launches.iter().map(|l| blocks(&l.grid)).max().unwrap_or(1)
    }

    /// Launches up to the next one that starts after everything may run beside the one before, if this one does not wait.
    fn stands_alone(&self, entry: &str, tokens: u64) -> bool {
        let gpu = |launch: &Launch| match &launch.grid {
            Grid::Gpu(grid) => Some((grid.dependent, grid.tokens)),
            Grid::Cpu(_) => None,
        };
        let made = |launch: &&Launch| gpu(launch).is_some_and(|(_, [first, last])| (first..=last).contains(&tokens));
        let launches: Vec<&Launch> = self.manifest.programs[0].launches.iter().filter(made).collect();
        let Some(at) = launches.iter().position(|launch| launch.symbol == entry) else { return true };
        // The program runs again and again.
        let mut turn = launches.iter().cycle().skip(at + launches.len() - 1).take(launches.len());
        let before = turn.next().map(|launch| self.places(launch, tokens)).unwrap_or_default();
        let beside = turn.take_while(|launch| gpu(launch).is_some_and(|(dependent, _)| dependent));
        let apart = |[a, b]: &[Range<u64>; 2]| a.end <= b.start || b.end <= a.start;
        beside
            .flat_map(|launch| self.places(launch, tokens))
            .all(|b| before.iter().all(|a| apart(&[a.clone(), b.clone()])))
    }
}

impl Layer {
    /// Places of the workspace that a launch reads or writes.
    fn places(&self, launch: &Launch, tokens: u64) -> Vec<Range<u64>> {
        let program = &self.manifest.programs[0];
        let buffer = |arg: &Arg| match arg {
            Arg::Buffer(buffer) | Arg::Offset { buffer, .. } => Some(&program.buffers[*buffer]),
            Arg::Value(_) | Arg::TensorMap(_) => None,
        };
        let place = |buffer: &Buffer| match buffer.kind {
            BufferKind::Workspace => {
                let start = buffer.offset.eval(tokens).expect("sizes are small");
                Some(start..start + bytes(&buffer.shape, buffer.dtype, tokens) as u64)
            }
            // Of a run of its own.
            BufferKind::Output { .. } | BufferKind::Input { .. } | BufferKind::Weight { .. } => None,
        };
        launch.args.iter().filter_map(buffer).filter_map(place).collect()
    }
}
