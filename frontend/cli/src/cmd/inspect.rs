//! `moec inspect`: what is inside an artefact or a file.

use crate::{args::Inspect, context::Context, failure::Failure};
use moec::{
    abi::{BufferKind, Grid, MoveKind, Program, Step},
    frontend::Checkpoint,
    runtime::Artefact,
    sim::Module,
};
use serde_json::{Value, json};
use std::{fmt::Write as _, path::Path};

/// Prints what the file is and holds.
pub(crate) fn run(cx: &Context, args: &Inspect) -> Result<(), Failure> {
    let path = &args.what;
    if path.join("manifest.json").is_file() {
        return artefact(cx, path);
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => tensors(cx, path),
        Some("ptx") => ptx(cx, path),
        _ if path.join("config.json").is_file() || path.is_file() || path == Path::new("-") => {
            super::check::run(cx, &crate::args::Check { model: path.clone() })
        }
        _ => {
            let message = format!("{} is neither an artefact nor a file that is known", path.display());
            Err(Failure::refused("E0811", message, "name a folder that `moec compile -o` has written, or a model file"))
        }
    }
}

fn artefact(cx: &Context, path: &Path) -> Result<(), Failure> {
    let artefact = Artefact::load(path)?;
    let manifest = artefact.manifest();
    if cx.is_json() {
        let value = serde_json::to_value(manifest).map_err(|e| Failure::Bug(e.to_string()))?;
        return cx.json(&value);
    }
    let mut out = format!("{}, by {}, form {}\n", manifest.model, manifest.producer, manifest.schema);
    for (name, hash) in &manifest.inputs {
        let _ = writeln!(out, "from {name}, sha256 {}", hash.get(..16).unwrap_or(hash));
    }
    for program in &manifest.programs {
        out.push_str(&program_text(path, program));
    }
    for chain in &manifest.chains {
        let layers = super::check::ranges(&chain.layers);
        let _ = writeln!(out, "\nrank {} runs for layers {layers}:", chain.rank);
        for step in &chain.steps {
            let _ = match step {
                Step::Run(program) => writeln!(out, "  program {program}"),
                Step::Move(op) => {
                    let kind = match &op.kind {
                        MoveKind::AllToAll { .. } => "rows to the ranks of their experts",
                        MoveKind::AllGather => "rows of all",
                        MoveKind::ReduceScatter { .. } => "sums of all",
                        MoveKind::AllToAllBack { .. } => "rows back",
                    };
                    writeln!(out, "  {kind}, over {} {:?}", op.group.name, op.group.ranks)
                }
            };
        }
    }
    for note in &manifest.notes {
        let _ = writeln!(out, "note: {note}");
    }
    cx.result(out)
}

fn program_text(folder: &Path, program: &Program) -> String {
    let weights: u64 = program.slots.iter().map(|s| s.bytes).sum();
    let code = std::fs::metadata(folder.join(&program.code)).map_or(0, |m| m.len());
    let mut out = format!(
        "\n{} for {}: layers {}, at most {} tokens\n  code {} ({}){}; weights {}; workspace {} for 1 token, {} for 1024\n",
        program.name,
        program.target,
        super::check::ranges(&program.layers),
        program.max_tokens,
        program.code,
        super::compile::size(code),
        program.binary.as_ref().map_or_else(String::new, |b| format!(" and {b}")),
        super::compile::size(weights),
        super::compile::size(program.workspace.eval(1).unwrap_or(u64::MAX)),
        super::compile::size(program.workspace.eval(1024).unwrap_or(u64::MAX)),
    );
    for buffer in &program.buffers {
        let what = match &buffer.kind {
            BufferKind::Input { .. } => "input",
            BufferKind::Output { .. } => "output",
            BufferKind::Weight { .. } | BufferKind::Workspace => continue,
        };
        let shape: Vec<String> =
            buffer.shape.iter().map(|d| d.known().map_or_else(|| "T".to_owned(), |n| n.to_string())).collect();
        let _ = writeln!(out, "  {what} {}: {:?} [{}]", buffer.name, buffer.dtype, shape.join(", "));
    }
    let registers = registers(folder, program);
    for launch in &program.launches {
        let shape = match &launch.grid {
            Grid::Cpu(grid) => format!("{} bytes of scratch a thread", grid.scratch),
            Grid::Gpu(grid) => format!(
                "{} threads a block, {} bytes of shared memory",
                grid.threads.iter().product::<u32>(),
                grid.shared
            ),
        };
        let used = registers.iter().find(|(name, _)| *name == launch.symbol);
        let used = used.map_or_else(String::new, |(_, n)| format!(", about {n} registers"));
        let _ = writeln!(out, "  kernel {}: {} arguments, {shape}{used}", launch.name, launch.args.len());
    }
    out
}

/// Registers of the kernels of a PTX file, as declared.
fn registers(folder: &Path, program: &Program) -> Vec<(String, u32)> {
    let ptx = Path::new(&program.code).extension().is_some_and(|e| e == "ptx");
    let text = ptx.then(|| std::fs::read_to_string(folder.join(&program.code)).ok()).flatten();
    let Some(module) = text.and_then(|t| Module::parse(&t).ok()) else { return Vec::new() };
    module.entries().into_iter().map(|e| (e.name, e.registers)).collect()
}

fn ptx(cx: &Context, path: &Path) -> Result<(), Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::refused("E0803", format!("cannot read {}: {e}", path.display()), "name a PTX file"))?;
    let module = Module::parse(&text).map_err(|e| Failure::refused("E0812", e.to_string(), "name a PTX file"))?;
    if cx.is_json() {
        let entries: Vec<Value> = module
            .entries()
            .iter()
            .map(|e| json!({"name": e.name, "registers": e.registers, "parameters": e.params.len()}))
            .collect();
        return cx.json(&json!({"schema": 1, "target": module.target(), "entries": entries}));
    }
    let mut out = format!("PTX for {}\n", module.target());
    for e in module.entries() {
        let _ = writeln!(out, "  {}: about {} registers, {} parameters", e.name, e.registers, e.params.len());
    }
    cx.result(out)
}

fn tensors(cx: &Context, path: &Path) -> Result<(), Failure> {
    let file = Checkpoint::open(path).map_err(|d| Failure::Refused(vec![d]))?;
    if cx.is_json() {
        let tensors: Vec<Value> =
            file.tensors().map(|(name, t)| json!({"name": name, "type": t.type_name, "shape": t.shape})).collect();
        return cx.json(&json!({"schema": 1, "metadata": file.metadata(), "tensors": tensors}));
    }
    let mut out = String::new();
    for (key, value) in file.metadata() {
        let line: String = value.split('\n').next().unwrap_or("").chars().take(100).collect();
        let _ = writeln!(out, "{key}: {line}");
    }
    for (name, tensor) in file.tensors() {
        let _ = writeln!(out, "  {name}: {} {:?}", tensor.type_name, tensor.shape);
    }
    cx.result(out)
}
