//! Every model of `tests/models` at its real hidden and inner widths, with as many experts as fit in 2 GiB, on this
//! CPU: `widths [NAME..]`. Rows of all launches are held against the interpreter.

use moec::{
    Compiler, Target,
    frontend::Form,
    host_target,
    routing::{self, Routing},
    run::{Weights, prepare},
    runtime::{Cpu, Device},
};
use moec_tests::{layers::Sample, matrix::divided};
use std::{path::Path, process::ExitCode, sync::Arc, time::Instant};

const TOKENS: [u64; 11] = [0, 1, 2, 7, 16, 17, 63, 64, 65, 129, 1000];
const LIMIT: u64 = 2 << 30;
/// Keys that count experts.
const EXPERTS: [&str; 5] =
    ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"];
/// Rows of a launch that are compared.
const ROWS: u64 = 3;

fn bytes(form: &Form) -> u64 {
    // Packed in the type of the model: two bytes each.
    form.facts().parameters * 2
}

/// The widest mixture of a model that fits.
fn form(path: &Path) -> Result<(String, Form), String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let mut last = "no number of experts fits".to_owned();
    for by in [1, 2, 4, 8, 16, 32, 64] {
        let mut config: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        divided(&mut config, &EXPERTS, by);
        match moec::read::bytes(config.to_string().as_bytes(), "config.json") {
            Ok(source) => {
                let forms = source.model.forms.iter();
                let form = forms.max_by_key(|f| f.facts().expert_parameters).ok_or("no mixture")?;
                if bytes(form) <= LIMIT {
                    return Ok((source.model.name.clone(), form.clone()));
                }
            }
            Err(found) => last = found.iter().map(|d| d.message.clone()).collect::<Vec<_>>().join("; "),
        }
    }
    Err(last)
}

fn check(path: &Path, target: Target) -> Result<String, String> {
    let start = Instant::now();
    let (name, form) = form(path)?;
    let said = |e: moec::Error| e.to_string();
    let outputs = ["output", "topk_indices", "router_logits"].map(str::to_owned).to_vec();
    let compiler = Compiler { targets: vec![target], outputs, ..Compiler::default() };
    let compiled = compiler.compile_forms(&name, std::slice::from_ref(&form)).map_err(said)?;
    let artefact = Arc::new(compiled.load().map_err(|e| e.to_string())?);
    let device: Arc<dyn Device> = Arc::new(Cpu::new(2));
    let layer = prepare(&artefact, &device, None, &Weights::Random(1)).map_err(said)?;
    let (graph, facts) = (&compiled.forms[0].graph, form.facts());
    let mut sample = Sample::new(&layer, graph);
    let mut launches = 0;
    for (set, tokens) in (0..).zip(TOKENS) {
        let routings = [Routing::Uniform, Routing::Zipf(1.2), Routing::AllToOne, Routing::OneEmpty];
        for routing in routings.into_iter().filter(|r| *r == Routing::Uniform || [17, 129, 1000].contains(&tokens)) {
            let inputs = routing::inputs(&layer, graph, &facts, &routing, tokens, set).map_err(said)?;
            let what = format!("{tokens} tokens, {routing:?}");
            sample.launch(&what, tokens, &inputs, ROWS).map_err(|e| format!("{what}: {e}"))?;
            launches += 1;
        }
    }
    let found = sample.compare()?;
    Ok(format!(
        "{} experts, top {}, {}x{}, {:.2} GiB: {launches} launches, {} rows compared, {} left out, {found}, {:.0} s",
        facts.experts,
        facts.top_k,
        facts.expert_input,
        facts.expert_inner,
        bytes(&form) as f64 / f64::from(1 << 30),
        sample.compared,
        sample.unsteady,
        start.elapsed().as_secs_f64()
    ))
}

fn main() -> ExitCode {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    if names.is_empty() {
        names = std::fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.path().join("config.json").is_file())
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
    }
    let mut failed = 0;
    for name in &names {
        match check(&folder.join(name).join("config.json"), host_target()) {
            Ok(found) => println!("PASS {name}: {found}"),
            Err(why) => {
                failed += 1;
                println!("FAIL {name}: {why}");
            }
        }
    }
    println!("{} passed, {failed} failed", names.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
