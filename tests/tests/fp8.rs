//! Checkpoints with FP8 weights, as each method stores them: decoded by kernels as the reference decodes them, and as
//! the same weights decoded before.

use half::bf16;
use moec::{
    Artefact, Compiler, Target, host_target,
    run::{Input, Tensor, Weights, prepare},
    runtime::{Cpu, Device, Sim},
};
use moec_frontend::read_config;
use moec_tests::draw::Draw;
use safetensors::{Dtype, tensor::TensorView};
use std::{collections::BTreeMap, path::Path, sync::Arc};

const HIDDEN: u64 = 64;
const INNER: u64 = 48;
const EXPERTS: u64 = 5;

/// A way to store weights: the section of the config, and what the scales are.
struct Method {
    name: &'static str,
    section: &'static str,
    suffix: &'static str,
    scale: Scale,
    dtype: Dtype,
}

/// Scales of a matrix.
#[derive(Clone, Copy, PartialEq)]
enum Scale {
    /// One number, with a shape of so many axes.
    Matrix(usize),
    /// One number for each row, with a second axis or without.
    Row(bool),
    /// One number for each tile.
    Tile([u64; 2]),
}

const METHODS: [Method; 7] = [
    Method {
        name: "AutoFP8",
        section: r#"{"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}"#,
        suffix: "_scale",
        scale: Scale::Matrix(0),
        dtype: Dtype::F32,
    },
    Method {
        name: "transformers without tiles",
        section: r#"{"quant_method": "fp8", "weight_block_size": null, "modules_to_not_convert": ["lm_head"]}"#,
        suffix: "_scale_inv",
        scale: Scale::Matrix(0),
        dtype: Dtype::BF16,
    },
    Method {
        name: "modelopt",
        section: r#"{"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.layers.*.mlp.gate"]}"#,
        suffix: "_scale",
        scale: Scale::Matrix(0),
        dtype: Dtype::F32,
    },
    Method {
        name: "fbgemm",
        section: r#"{"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}"#,
        suffix: "_scale",
        scale: Scale::Row(true),
        dtype: Dtype::F32,
    },
    Method {
        name: "compressed-tensors by matrix",
        section: r#"{"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:.*mlp.gate$"],
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "float"},
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": true}}}}"#,
        suffix: "_scale",
        scale: Scale::Matrix(1),
        dtype: Dtype::BF16,
    },
    Method {
        name: "compressed-tensors by row",
        section: r#"{"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:.*mlp.gate$"],
            "config_groups": {"group_0": {"targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}}}}"#,
        suffix: "_scale",
        scale: Scale::Row(true),
        dtype: Dtype::BF16,
    },
    Method {
        name: "compressed-tensors by tile",
        section: r#"{"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": [],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float",
            "strategy": "block", "block_structure": [16, 32], "symmetric": true}}}}"#,
        suffix: "_scale",
        scale: Scale::Tile([16, 32]),
        dtype: Dtype::F32,
    },
];

fn config(dtype: &str, section: &str) -> String {
    format!(
        r#"{{"model_type": "qwen3_moe", "torch_dtype": "{dtype}", "hidden_act": "silu", "hidden_size": {HIDDEN},
  "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
  "intermediate_size": 64, "moe_intermediate_size": {INNER}, "num_experts": {EXPERTS}, "num_experts_per_tok": 2,
  "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "quantization_config": {section}}}"#
    )
}

/// A tensor of a file.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// The value of an E4M3 number.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size =
        if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if code & 0x80 == 0 { size } else { -size }
}

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A matrix as codes with scales, and its decoded values.
fn matrix(draw: &mut Draw, rows: u64, columns: u64, method: &Method) -> (Stored, Stored, Vec<f32>) {
    let tile = match method.scale {
        Scale::Matrix(_) => [rows, columns],
        Scale::Row(_) => [1, columns],
        Scale::Tile(tile) => tile,
    };
    let grid = [rows.div_ceil(tile[0]), columns.div_ceil(tile[1])];
    let shape = match method.scale {
        Scale::Matrix(axes) => vec![1; axes],
        Scale::Row(true) | Scale::Tile(_) => grid.map(|n| n as usize).to_vec(),
        Scale::Row(false) => vec![grid[0] as usize],
    };
    // Exact in bf16.
    let scales: Vec<f32> = (0..grid[0] * grid[1]).map(|_| (64 + draw.below(64)) as f32 / 65536.0).collect();
    let codes: Vec<u8> = (0..rows * columns)
        .map(|_| match draw.below(256) as u8 {
            // Not a number.
            0x7f | 0xff => 0x12,
            code => code,
        })
        .collect();
    let at = |i: u64| scales[((i / columns / tile[0]) * grid[1] + i % columns / tile[1]) as usize];
    let values = codes.iter().enumerate().map(|(i, code)| e4m3(*code) * at(i as u64)).collect();
    let sides = vec![rows as usize, columns as usize];
    ((Dtype::F8_E4M3, sides, codes), (method.dtype, shape, bytes(method.dtype, &scales)), values)
}

/// A checkpoint with codes, and one with the decoded weights.
fn checkpoints(method: &Method, dtype: Dtype) -> [BTreeMap<String, Stored>; 2] {
    let (mut draw, mut coded, mut plain) = (Draw(7), BTreeMap::new(), BTreeMap::new());
    let router: Vec<f32> = (0..EXPERTS * HIDDEN).map(|_| draw.below(256) as f32 / 1024.0 - 0.125).collect();
    let sides = vec![EXPERTS as usize, HIDDEN as usize];
    for file in [&mut coded, &mut plain] {
        file.insert("model.layers.0.mlp.gate.weight".to_owned(), (dtype, sides.clone(), bytes(dtype, &router)));
    }
    for e in 0..EXPERTS {
        for (part, [rows, columns]) in
            [("gate_proj", [INNER, HIDDEN]), ("up_proj", [INNER, HIDDEN]), ("down_proj", [HIDDEN, INNER])]
        {
            let name = format!("model.layers.0.mlp.experts.{e}.{part}.weight");
            let (codes, scales, values) = matrix(&mut draw, rows, columns, method);
            plain.insert(name.clone(), (dtype, codes.1.clone(), bytes(dtype, &values)));
            coded.insert(format!("{name}{}", method.suffix), scales);
            coded.insert(name, codes);
        }
    }
    [coded, plain]
}

fn write(folder: &Path, tensors: &BTreeMap<String, Stored>) -> Weights {
    std::fs::create_dir_all(folder).expect("the folder can be made");
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("the bytes fit"))
    });
    let file = folder.join("model.safetensors");
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &file).expect("the file can be written");
    Weights::Folder(file)
}

/// The layer's outputs for some tokens, compared with the interpreter.
fn outputs(artefact: &Artefact, device: &Arc<dyn Device>, weights: &Weights, tokens: u64) -> Vec<Tensor> {
    let graph = artefact.forms[0].graph.clone();
    let loaded = Arc::new(artefact.load().expect("loads"));
    let layer = prepare(&loaded, device, None, weights).unwrap_or_else(|e| panic!("{e}"));
    let (tokens, inputs) = layer.inputs(&Input::Random(tokens)).expect("invents");
    let found = layer.launch(tokens, &inputs).unwrap_or_else(|e| panic!("{e}")).outputs;
    let compared = layer.compare(&graph, &inputs, &found).unwrap_or_else(|e| panic!("{e}"));
    assert!(compared.passed(), "{compared:?}");
    found
}

/// One method on one target: with the weights as codes, and decoded before.
fn check(method: &Method, dtype: &str, target: Target, device: &Arc<dyn Device>, tokens: u64) {
    let folder = std::env::temp_dir().join(format!("moec-fp8-{}-{}-{dtype}", std::process::id(), target.name()));
    let stored = if dtype == "float32" { Dtype::F32 } else { Dtype::BF16 };
    let [coded, plain] = checkpoints(method, stored);
    let both = [(method.section, coded), ("null", plain)].map(|(section, tensors)| {
        let weights = write(&folder, &tensors);
        let model = read_config(&config(dtype, section), "config.json").unwrap_or_else(|e| panic!("{e:?}"));
        let checkpoint = moec_frontend::Checkpoint::open(&folder.join("model.safetensors")).expect("opens");
        let bound = moec_frontend::weights::bind(&model.forms[0], 0, &checkpoint);
        bound.unwrap_or_else(|e| panic!("{}: {e:?}", method.name));
        let compiler = Compiler { targets: vec![target], ..Compiler::default() };
        let artefact = compiler.compile(&model).unwrap_or_else(|e| panic!("{e}"));
        let bytes: u64 = artefact.manifest.programs[0].slots.iter().map(|s| s.bytes).sum();
        let found = outputs(&artefact, device, &weights, tokens).remove(0).numbers();
        (bytes, found)
    });
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    let [(codes, found), (values, wanted)] = both;
    // A byte and its share of a scale for two or four bytes.
    assert!(codes * 10 < values * 7, "{}: {codes} bytes of codes, {values} of values", method.name);
    let top = wanted.iter().fold(0f64, |m, v| m.max(v.abs()));
    let limit = top * if dtype == "float32" { 2e-5 } else { 1e-2 };
    let apart = found.iter().zip(&wanted).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
    assert!(apart <= limit, "{} on {}: {apart:e} of {top:e}", method.name, target.name());
}

/// A model whose experts are stored together, with inputs before outputs.
fn transposed(section: &str) -> String {
    format!(
        r#"{{"model_type": "qwen3_vl_moe_text", "torch_dtype": "bfloat16", "hidden_size": {HIDDEN}, "num_hidden_layers": 1,
  "num_experts": {EXPERTS}, "num_experts_per_tok": 2, "moe_intermediate_size": {INNER}, "quantization_config": {section}}}"#
    )
}

#[test]
fn codes_with_inputs_before_outputs_are_decoded_when_packed_and_that_is_said() {
    let compile = |text: &str, target| {
        let model = read_config(text, "config.json").unwrap_or_else(|e| panic!("{e:?}"));
        let compiler = Compiler { targets: vec![target], ..Compiler::default() };
        compiler.compile(&model).unwrap_or_else(|e| panic!("{e}"))
    };
    let said = |artefact: &Artefact| {
        let remarks = artefact.remarks().into_iter().filter(|r| r.text.contains("decoded when it is packed"));
        remarks.map(|r| r.text).collect::<Vec<_>>()
    };
    let (cpu, sim): (Arc<dyn Device>, Arc<dyn Device>) =
        (Arc::new(Cpu::new(1)), Arc::new(Sim::new(moec_sim::Options::default())));
    for section in [
        r#"{"quant_method": "fp8", "weight_block_size": [16, 32]}"#,
        r#"{"quant_method": "fbgemm_fp8"}"#,
        r#"{"quant_method": "modelopt", "quant_algo": "FP8"}"#,
    ] {
        for (target, device) in [(host_target(), &cpu), (Target::Sm80, &sim)] {
            let artefact = compile(&transposed(section), target);
            let remarks = said(&artefact);
            assert!(!remarks.is_empty() && remarks.iter().all(|r| r.contains("transposed")), "{remarks:?}");
            outputs(&artefact, device, &Weights::Random(3), 5);
        }
    }
    let whole = compile(&config("bfloat16", METHODS[0].section), host_target());
    assert_eq!(said(&whole), Vec::<String>::new());
}

#[test]
fn every_method_is_decoded_on_this_processor() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new(1));
    for method in &METHODS {
        for dtype in ["float32", "bfloat16"] {
            check(method, dtype, host_target(), &device, 19);
        }
    }
}

#[test]
fn every_method_is_decoded_by_ptx() {
    // Few tokens and many have different kernels; scales of matrices and of rows meet both on both.
    let chosen = [
        (Target::Sm80, 70),
        (Target::Sm90a, 3),
        (Target::Sm90a, 70),
        (Target::Sm80, 3),
        (Target::Sm80, 3),
        (Target::Sm90a, 70),
        (Target::Sm80, 70),
    ];
    for (method, (target, tokens)) in METHODS.iter().zip(chosen) {
        let device: Arc<dyn Device> = Arc::new(Sim::new(moec_sim::Options::default()));
        check(method, "bfloat16", target, &device, tokens);
    }
}
