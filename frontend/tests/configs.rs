//! Every config of the corpus is read, or refused with the reason that holds for it.

use moec_frontend::{LayerKind, Model, read_config};
use std::path::PathBuf;

/// Class defaults that describe no mixture, with the code of the refusal.
const REFUSED: &[(&str, &str)] = &[
    ("deepseek_ocr2", "E0215"), // num_experts_per_tok is null: a dense model
    ("deepseek_v2", "E0215"),   // num_experts_per_tok is null: a dense model
    ("doge", "E0215"),          // is_moe is false
    ("dots1", "E0215"),         // n_routed_experts is null: a dense model
    ("gemma4_text", "E0215"),   // enable_moe_block is false
];

fn corpus() -> Vec<(String, PathBuf)> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models"));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&root).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name == "class-defaults" {
            for entry in std::fs::read_dir(&path).unwrap() {
                let path = entry.unwrap().path();
                files.push((path.file_stem().unwrap().to_string_lossy().into_owned(), path));
            }
        } else if path.join("config.json").exists() {
            files.push((name, path.join("config.json")));
        }
    }
    files.sort();
    files
}

fn read(path: &PathBuf) -> Result<Model, Vec<moec_ir::Diagnostic>> {
    read_config(&std::fs::read_to_string(path).unwrap(), path.to_str().unwrap())
}

#[test]
fn every_config_is_read_or_refused_with_its_reason() {
    let files = corpus();
    assert!(files.len() >= 89, "{} files", files.len());
    let mut wrong = Vec::new();
    for (name, path) in &files {
        let refused = REFUSED.iter().find(|(n, _)| n == name).map(|(_, code)| *code);
        match (read(path), refused) {
            (Ok(model), None) => {
                let mixtures = model.layers.iter().filter(|l| matches!(l.kind, LayerKind::Moe { .. })).count();
                let of_forms: usize = model.forms.iter().map(|f| f.layers.len()).sum();
                if mixtures != of_forms || mixtures == 0 {
                    wrong.push(format!("{name}: {mixtures} mixtures, {of_forms} of forms"));
                }
            }
            (Ok(_), Some(code)) => wrong.push(format!("{name}: expected {code}, was read")),
            (Err(errors), Some(code)) if errors.iter().all(|e| e.code.0 == code) => {}
            (Err(errors), _) => {
                wrong.push(format!(
                    "{name}: {}",
                    errors.iter().map(|e| format!("{} {}", e.code.0, e.message)).collect::<Vec<_>>().join("; ")
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn released_shapes_are_as_published() {
    let model = |name: &str| {
        read(&PathBuf::from(format!("{}/../tests/models/{name}/config.json", env!("CARGO_MANIFEST_DIR")))).unwrap()
    };

    let mixtral = model("mixtral-8x7b");
    let facts = mixtral.forms[0].facts();
    assert_eq!((facts.experts, facts.top_k, facts.expert_inner, mixtral.layers.len()), (8, 2, 14336, 32));
    assert_eq!(mixtral.name, "mixtral_8x7b");

    let deepseek = model("deepseek-v3");
    let facts = deepseek.forms[0].facts();
    assert_eq!((facts.experts, facts.top_k, facts.expert_inner, facts.shared_inner), (256, 8, 2048, 2048));
    assert_eq!(deepseek.forms.len(), 1);
    assert_eq!(deepseek.forms[0].layers.len(), 58);
    assert_eq!(deepseek.block_of("model.layers.3.mlp."), Some((0, 3)));

    let qwen = model("qwen3-30b-a3b");
    assert_eq!(qwen.forms[0].facts().top_k, 8);
}

#[test]
fn every_block_is_a_sound_graph_that_survives_its_text() {
    for (name, path) in corpus() {
        let Ok(model) = read(&path) else { continue };
        for form in &model.forms {
            let errors: Vec<_> =
                moec_ir::verify(&form.graph).into_iter().filter(|d| d.severity == moec_ir::Severity::Error).collect();
            assert!(errors.is_empty(), "{name}: {errors:#?}");
            let again = moec_ir::parse(&moec_ir::print(&form.graph)).unwrap_or_else(|e| panic!("{name}: {e:?}"));
            assert!(again == form.graph, "{name}");
        }
    }
}

#[test]
fn released_configs_give_no_warnings() {
    for (name, path) in corpus() {
        if path.ends_with("config.json") {
            let warnings = read(&path).unwrap_or_else(|e| panic!("{name}: {e:#?}")).warnings;
            assert!(warnings.is_empty(), "{name}: {warnings:#?}");
        }
    }
}
