//! Bad configs: each gets its code, a place inside the text, and a way out.

use moec_frontend::{Model, read_config, read_model};
use moec_ir::Diagnostic;
use serde_json::json;
use std::fs;

const MIXTRAL: &str = r#"{
  "model_type": "mixtral",
  "torch_dtype": "bfloat16",
  "hidden_size": 64,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_local_experts": 8,
  "num_experts_per_tok": 2
}"#;

const DEEPSEEK: &str = r#"{
  "model_type": "deepseek_v3",
  "torch_dtype": "bfloat16",
  "hidden_size": 64,
  "moe_intermediate_size": 32,
  "num_hidden_layers": 4,
  "n_routed_experts": 16,
  "num_experts_per_tok": 4,
  "n_group": 4,
  "topk_group": 2,
  "n_shared_experts": 1,
  "routed_scaling_factor": 2.5
}"#;

fn errors(text: &str) -> Vec<Diagnostic> {
    let errors = read_config(text, "config.json").err().unwrap_or_default();
    for error in &errors {
        for label in &error.labels {
            assert!(label.span.start <= label.span.end && label.span.end <= text.len(), "{error:?}");
            assert!(text.is_char_boundary(label.span.start) && text.is_char_boundary(label.span.end), "{error:?}");
        }
        assert_eq!(error.labels.iter().filter(|l| l.primary).count().max(1), 1, "{error:?}");
        assert!(error.labels.len() <= 3, "{error:?}");
    }
    errors
}

fn codes(text: &str) -> Vec<&'static str> {
    errors(text).iter().map(|e| e.code.0).collect()
}

/// The config with one line replaced, or removed.
fn with(config: &str, key: &str, line: &str) -> String {
    let mut out: Vec<String> = Vec::new();
    for old in config.lines() {
        let keep = !old.trim_start().starts_with(&format!("\"{key}\""));
        if keep {
            out.push(old.trim_end_matches(',').to_owned());
        } else if !line.is_empty() {
            out.push(format!("  {line}"));
        }
    }
    let inner = &out[1..out.len() - 1];
    let added =
        if config.contains(&format!("\"{key}\"")) || line.is_empty() { String::new() } else { format!(",\n  {line}") };
    format!("{{\n{}{added}\n}}", inner.join(",\n"))
}

fn mixtral(key: &str, line: &str) -> Vec<&'static str> {
    codes(&with(MIXTRAL, key, line))
}

fn deepseek(key: &str, line: &str) -> Vec<&'static str> {
    codes(&with(DEEPSEEK, key, line))
}

fn read(text: &str) -> Model {
    read_config(text, "config.json").unwrap_or_else(|e| panic!("{e:#?}"))
}

fn warnings(text: &str) -> Vec<&'static str> {
    read(text).warnings.iter().map(|w| w.code.0).collect()
}

#[test]
fn the_bases_are_good() {
    assert_eq!(codes(MIXTRAL), Vec::<&str>::new());
    assert_eq!(codes(DEEPSEEK), Vec::<&str>::new());
    assert_eq!(warnings(MIXTRAL), Vec::<&str>::new());
}

#[test]
fn other_kinds_than_whole_numbers_are_e0201() {
    for value in ["8.5", "\"8\"", "true", "[]", "1e308", "8.0"] {
        assert_eq!(mixtral("num_local_experts", &format!("\"num_local_experts\": {value}")), ["E0201"], "{value}");
    }
    let whole = errors(&with(MIXTRAL, "num_local_experts", "\"num_local_experts\": 8.0"));
    assert_eq!(whole[0].help.as_deref(), Some("write 8"));
}

#[test]
fn sizes_out_of_range_are_e0202() {
    for value in ["18446744073709551616", "1000000000000000000000000000000", "-1", "-0", "0"] {
        for key in ["num_local_experts", "num_experts_per_tok", "hidden_size", "num_hidden_layers"] {
            assert_eq!(mixtral(key, &format!("\"{key}\": {value}")), ["E0202"], "{key} {value}");
        }
    }
}

#[test]
fn too_many_experts_per_token_is_e0203_with_both_places() {
    let errors = errors(&with(MIXTRAL, "num_experts_per_tok", "\"num_experts_per_tok\": 9"));
    assert_eq!(errors[0].code.0, "E0203");
    assert_eq!(errors[0].labels.len(), 2);
    assert_eq!(errors[0].help.as_deref(), Some("set num_experts_per_tok to 8 or less"));
}

#[test]
fn missing_and_null_keys_are_e0204_with_two_texts() {
    let missing = errors(&with(MIXTRAL, "hidden_size", ""));
    assert_eq!((missing[0].code.0, missing[0].message.as_str()), ("E0204", "hidden_size is missing"));
    let null = errors(&with(MIXTRAL, "hidden_size", "\"hidden_size\": null"));
    assert_eq!((null[0].code.0, null[0].message.as_str()), ("E0204", "hidden_size is null"));
    assert_eq!(codes("{}"), ["E0204"]);
}

#[test]
fn unknown_model_types_are_e0205_and_cut() {
    let unknown = errors(&with(MIXTRAL, "model_type", "\"model_type\": \"mixtrall\""));
    assert_eq!(unknown[0].code.0, "E0205");
    assert!(unknown[0].help.as_deref().unwrap().contains("did you mean mixtral?"));
    assert_eq!(mixtral("model_type", "\"model_type\": \"\""), ["E0205"]);
    let long = errors(&with(MIXTRAL, "model_type", &format!("\"model_type\": \"{}\"", "x".repeat(10_000))));
    assert!(long[0].message.len() < 120);
}

#[test]
fn classes_of_other_families_are_e0206() {
    let errors = errors(&with(MIXTRAL, "architectures", "\"architectures\": [\"Qwen3MoeForCausalLM\"]"));
    assert_eq!((errors[0].code.0, errors[0].labels.len()), ("E0206", 2));
    assert_eq!(mixtral("architectures", "\"architectures\": [\"MixtralForCausalLM\"]"), Vec::<&str>::new());
    assert_eq!(mixtral("architectures", "\"architectures\": [\"SomethingElse\"]"), Vec::<&str>::new());
}

#[test]
fn overflow_is_e0207_and_limits_are_e0209() {
    let huge = with(
        &with(MIXTRAL, "hidden_size", "\"hidden_size\": 2147483648"),
        "intermediate_size",
        "\"intermediate_size\": 2147483648",
    );
    assert_eq!(codes(&huge), ["E0207"]);
    let large = with(
        &with(MIXTRAL, "hidden_size", "\"hidden_size\": 2147483648"),
        "intermediate_size",
        "\"intermediate_size\": 65536",
    );
    assert_eq!(codes(&large), ["E0209"]);
    assert_eq!(mixtral("num_local_experts", "\"num_local_experts\": 4097"), ["E0209"]);
    assert_eq!(mixtral("num_hidden_layers", "\"num_hidden_layers\": 4097"), ["E0209"]);
    assert_eq!(mixtral("num_local_experts", "\"num_local_experts\": 4096"), Vec::<&str>::new());
}

#[test]
fn misspelt_mixture_keys_are_e0208_with_the_nearest() {
    let misspelt = errors(&with(MIXTRAL, "num_experts_per_tok", "\"num_expert_per_tok\": 2"));
    assert_eq!(misspelt.iter().map(|e| e.code.0).collect::<Vec<_>>(), ["E0208"]);
    assert!(misspelt[0].help.as_deref().unwrap().contains("num_experts_per_tok"));
    for key in ["my_expert_thing", "use_router_x", "gate_y", "moe_z", "quantization"] {
        assert_eq!(mixtral(key, &format!("\"{key}\": 1")), ["E0208"], "{key}");
    }
}

#[test]
fn groups_are_e0210() {
    let divide = errors(&with(DEEPSEEK, "n_group", "\"n_group\": 5"));
    assert_eq!(divide[0].code.0, "E0210");
    assert!(divide[0].help.as_deref().unwrap().contains("1, 2, 4, 8, 16"));
    assert_eq!(deepseek("topk_group", "\"topk_group\": 5"), ["E0210"]);
    assert_eq!(deepseek("num_experts_per_tok", "\"num_experts_per_tok\": 9"), ["E0210"]);
}

#[test]
fn two_spellings_that_disagree_are_e0211() {
    assert_eq!(mixtral("num_experts", "\"num_experts\": 16"), ["E0211"]);
    assert_eq!(mixtral("num_experts", "\"num_experts\": 8"), Vec::<&str>::new());
    let nested = with(MIXTRAL, "text_config", "\"text_config\": {\"num_local_experts\": 16}");
    assert_eq!(codes(&nested), ["E0211"]);
}

#[test]
fn unknown_functions_are_e0212() {
    let act = errors(&with(MIXTRAL, "hidden_act", "\"hidden_act\": \"sillu\""));
    assert_eq!(act[0].code.0, "E0212");
    assert!(act[0].help.as_deref().unwrap().contains("the nearest is silu"));
    assert_eq!(deepseek("scoring_func", "\"scoring_func\": \"tanh\""), ["E0212"]);
}

#[test]
fn quantisation_that_is_not_read_is_e0213() {
    let section = |body: &str| mixtral("quantization_config", &format!("\"quantization_config\": {body}"));
    assert_eq!(section(r#"{"quant_method": "awq"}"#), ["E0213"]);
    assert_eq!(section("{}"), ["E0213"]);
    assert_eq!(section("true"), ["E0213"]);
    assert_eq!(section(r#"{"quant_method": "fp8", "weight_block_size": [0, 128]}"#), ["E0213"]);
    assert_eq!(section(r#"{"quant_method": "fp8", "fmt": "e5m2"}"#), ["E0213"]);
    assert_eq!(section(r#"{"quant_method": "mxfp4"}"#), ["E0213"]);
    assert_eq!(section(r#"{"quant_method": "modelopt"}"#), ["E0213"]);
    assert_eq!(section(r#"{"quant_method": "modelopt", "quant_algo": "NVFP4"}"#), ["E0213"]);
    assert_eq!(section(r#"{"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["re:("]}"#), ["E0213"]);
    let compressed = |rest: &str| section(&format!(r#"{{"quant_method": "compressed-tensors", {rest}}}"#));
    let group = |weights: &str| {
        compressed(&format!(r#""config_groups": {{"group_0": {{"targets": ["Linear"], "weights": {weights}}}}}"#))
    };
    assert_eq!(compressed(r#""format": "pack-quantized""#), ["E0213"]);
    assert_eq!(compressed(r#""config_groups": {}"#), ["E0213"]);
    assert_eq!(compressed(r#""config_groups": {"a": {"targets": ["lm_head"], "weights": {}}}"#), ["E0213"]);
    assert_eq!(group(r#"{"num_bits": 4, "type": "float", "strategy": "channel"}"#), ["E0213"]);
    assert_eq!(group(r#"{"num_bits": 8, "type": "int", "strategy": "channel"}"#), ["E0213"]);
    assert_eq!(group(r#"{"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": false}"#), ["E0213"]);
    assert_eq!(group(r#"{"num_bits": 8, "type": "float", "strategy": "group"}"#), ["E0213"]);
}

#[test]
fn fp8_scales_belong_to_tiles_outputs_or_matrices() {
    // The packing of the first expert matrix: rows and columns of a tile, and the name of the scales.
    let read = |section: &str| {
        let text = format!(
            r#"{{"model_type": "mixtral", "torch_dtype": "bfloat16", "hidden_act": "silu", "hidden_size": 64,
            "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2, "quantization_config": {section}}}"#
        );
        let model = moec_frontend::read_config(&text, "config.json").unwrap();
        let weights = &model.forms[0].graph.weights;
        let gate = weights.iter().find(|(name, _)| name.contains("gate_proj")).unwrap().1;
        match &gate.source.packing {
            moec_ir::Packing::Fp8Block { scale, block } => {
                Some((block.map(|n| n.min(1000)), scale.strip_prefix(&gate.source.tensor).unwrap().to_owned()))
            }
            moec_ir::Packing::Plain | moec_ir::Packing::Mxfp4 { .. } => None,
        }
    };
    let found = |rows, columns, suffix: &str| Some(([rows, columns], suffix.to_owned()));
    assert_eq!(read(r#"{"quant_method": "fp8", "weight_block_size": [128, 64]}"#), found(128, 64, "_scale_inv"));
    assert_eq!(read(r#"{"quant_method": "fp8", "weight_block_size": null}"#), found(1000, 1000, "_scale_inv"));
    assert_eq!(read(r#"{"quant_method": "fp8"}"#), found(1000, 1000, "_scale"));
    assert_eq!(read(r#"{"quant_method": "fbgemm_fp8"}"#), found(1, 1000, "_scale"));
    assert_eq!(read(r#"{"quant_method": "modelopt", "quant_algo": "FP8"}"#), found(1000, 1000, "_scale"));
    let compressed = |ignore: &str| {
        read(&format!(
            r#"{{"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": [{ignore}], "config_groups":
            {{"a": {{"targets": ["Linear"], "weights": {{"num_bits": 8, "type": "float", "strategy": "channel"}}}}}}}}"#
        ))
    };
    assert_eq!(compressed(r#""lm_head", "re:.*gate$", "re:experts""#), found(1, 1000, "_scale"));
    assert_eq!(compressed(r#""re:.*experts.*""#), None);
    assert_eq!(compressed(r#""model.layers.0.block_sparse_moe""#), None);
    let modelopt = |ignore: &str| {
        read(&format!(r#"{{"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["{ignore}"]}}"#))
    };
    assert_eq!(modelopt("*router*"), found(1000, 1000, "_scale"));
    assert_eq!(modelopt("*block_sparse*"), None);
}

#[test]
fn layer_patterns_are_e0214_and_dense_models_e0215() {
    let kinds = |list: &str| deepseek("mlp_layer_types", &format!("\"mlp_layer_types\": {list}"));
    assert_eq!(kinds(r#"["dense"]"#), ["E0214"]);
    assert_eq!(kinds(r#"["dense", "dense", "dense", "dense", "sparse"]"#), ["E0214"]);
    assert_eq!(kinds(r#"["dense", "sparse", "sparse", "odd"]"#), ["E0214"]);
    assert_eq!(kinds(r#"["dense", "dense", "dense", "dense"]"#), ["E0215"]);
    assert_eq!(deepseek("first_k_dense_replace", "\"first_k_dense_replace\": 4"), ["E0215"]);
    assert_eq!(deepseek("n_routed_experts", "\"n_routed_experts\": null"), ["E0215"]);
}

#[test]
fn negative_layer_numbers_are_e0214() {
    let qwen = MIXTRAL.replace("mixtral", "qwen3_moe").replace("\"intermediate_size", "\"moe_intermediate_size");
    assert_eq!(codes(&with(&qwen, "mlp_only_layers", "\"mlp_only_layers\": [-1]")), ["E0214"]);
    assert_eq!(codes(&with(&qwen, "mlp_only_layers", "\"mlp_only_layers\": [2]")), ["E0214"]);
    assert_eq!(codes(&with(&qwen, "mlp_only_layers", "\"mlp_only_layers\": [1]")), Vec::<&str>::new());
}

#[test]
fn scaling_factors() {
    let factor = |value: &str| deepseek("routed_scaling_factor", &format!("\"routed_scaling_factor\": {value}"));
    assert_eq!(factor("0"), ["E0202"]);
    assert_eq!(factor("1e300"), ["E0202"]);
    assert_eq!(factor("1e-300"), Vec::<&str>::new());
    assert_eq!(factor("-2"), Vec::<&str>::new());
    assert_eq!(factor("NaN"), ["E0111"]);
}

#[test]
fn warnings_do_not_refuse() {
    let one = with(
        &with(MIXTRAL, "num_local_experts", "\"num_local_experts\": 1"),
        "num_experts_per_tok",
        "\"num_experts_per_tok\": 1",
    );
    assert_eq!(warnings(&one), ["W0202"]);
    let odd = with(&with(MIXTRAL, "foo_bar", "\"foo_bar\": 1"), "ключ", "\"ключ\": 1");
    assert_eq!(warnings(&odd), ["W0201"]);
    assert_eq!(warnings(&with(MIXTRAL, "attention_dropout", "\"attention_dropout\": 0.1")), Vec::<&str>::new());
    assert_eq!(warnings(&with(MIXTRAL, "torch_dtype", "")), ["W0203"]);
}

#[test]
fn independent_errors_come_together_in_order_and_at_most_20() {
    let two = with(
        &with(MIXTRAL, "hidden_size", "\"hidden_size\": 0"),
        "num_experts_per_tok",
        "\"num_experts_per_tok\": true",
    );
    assert_eq!(codes(&two), ["E0202", "E0201"]);
    let many: Vec<String> = (0..50).map(|i| format!("\"expert_{i}\": 1")).collect();
    assert_eq!(codes(&with(MIXTRAL, "x", &many.join(", "))).len(), 20);
}

#[test]
fn no_cut_or_changed_config_panics() {
    let mut text = DEEPSEEK.to_owned();
    text.insert_str(1, "\"quantization_config\": {\"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]}, \"mlp_layer_types\": [\"sparse\"],");
    for i in 0..text.len() {
        errors(&text[..i]);
        for c in ["0", "-", "\"", "null", "[", "9999999999999"] {
            errors(&format!("{}{c}{}", &text[..i], &text[i + 1..]));
        }
    }
}

#[test]
fn models_are_read_from_files_folders_and_graphs() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    fs::write(&config, MIXTRAL).unwrap();
    let from_file = read_model(&config).unwrap();
    let from_folder = read_model(folder.path()).unwrap();
    assert_eq!(from_file.forms[0].graph, from_folder.forms[0].graph);

    let text = moec_ir::print(&from_file.forms[0].graph);
    let ir = folder.path().join("block.moe");
    fs::write(&ir, &text).unwrap();
    let from_text = read_model(&ir).unwrap();
    assert_eq!((from_text.family.as_str(), from_text.hidden), ("graph", 64));
    assert_eq!(from_text.forms[0].graph.weights, from_file.forms[0].graph.weights);

    let json = folder.path().join("block.json");
    fs::write(&json, moec_ir::json::write_graph(&from_file.forms[0].graph).to_string()).unwrap();
    let from_json = read_model(&json).unwrap_or_else(|e| panic!("{e:#?}"));
    assert_eq!(from_json.forms[0].facts().experts, 8);

    // Sizes are those of the composed weight: 4 slices of 96 rows are experts of 24.
    let sliced = json!({"format": "moec-graph-1", "inputs": {"x": {"dtype": "f32", "shape": ["T", 16]}},
        "tensors": {"u": {"dtype": "f32", "shape": [96, 16]}, "d{e}": {"dtype": "f32", "shape": [16, 24]},
            "r": {"dtype": "f32", "shape": [4, 16]}},
        "nodes": [{"id": "l", "op": "linear", "in": ["x"], "w": "r"},
            {"id": "q", "op": "select", "in": ["l"], "rule": "topk", "k": 2},
            {"id": "w", "op": "weigh", "in": ["q", "l"], "fn": "softmax"},
            {"id": "d", "op": "dispatch", "in": ["x", "w"]},
            {"id": "e", "op": "experts", "in": ["d"], "bank": [{"ids": [0, 4], "kind": "ffn", "act": "relu",
                "up": {"slice": "u", "axis": 0, "n": 4}, "down": "d{e}"}]},
            {"id": "y", "op": "combine", "in": ["e", "w"]}],
        "outputs": {"output": "y"}});
    fs::write(&json, sliced.to_string()).unwrap();
    let facts = read_model(&json).unwrap_or_else(|e| panic!("{e:#?}")).forms[0].facts();
    assert_eq!((facts.expert_input, facts.expert_inner), (16, 24));

    assert_eq!(read_model(&folder.path().join("none")).unwrap_err()[0].code.0, "E0112");
    fs::create_dir(folder.path().join("empty")).unwrap();
    assert_eq!(read_model(&folder.path().join("empty")).unwrap_err()[0].code.0, "E0112");
}
