//! `moec compile`: a model to an artefact.

use super::{
    emit::{self, Kind, Request},
    ir_dump,
};
use crate::{
    args::{Compile, Developer},
    context::Context,
    failure::Failure,
    wanted,
};
use moec::{
    Artefact, Compiler, Error, FormReport, Keep, Table, Target,
    frontend::{Form, LayerKind, Model},
    ir::{Code, Diagnostic},
    ptxas,
};
use serde_json::json;
use std::{fmt::Write as _, path::Path, time::Instant};

/// Compiles and writes.
pub(crate) fn run(cx: &Context, args: &Compile) -> Result<(), Failure> {
    let start = Instant::now();
    let requests = emit::requests(&args.emit)?;
    ir_dump::check(&args.developer.print_ir)?;
    if args.output.is_none() && requests.is_empty() {
        return Err(Failure::Usage("nothing to write: name a folder with -o DIR, or outputs with --emit".to_owned()));
    }
    let mut source = wanted::model(cx, &args.model)?;
    cx.say("Reading", &format!("{} ({})", args.model.display(), wanted::about(&source)));
    keep_layer(&mut source.model, &args.layer)?;
    let model = &source.model;
    let (targets, found) = targets(args, model)?;
    let names: Vec<&str> = targets.iter().map(|t| t.name()).collect();
    cx.say("Targeting", &format!("{}{found}", names.join(", ")));
    let table = super::tune::table(args.tuned.as_deref())?;
    let mut artefact = compile(cx, args, model, targets, &requests, &table)?;
    artefact.manifest.inputs = source.inputs;
    let assembled = assembled(cx, args, &artefact, &requests)?;
    let kernels: usize = artefact.manifest.programs.iter().map(|p| p.launches.len()).sum();
    let forms = artefact.forms.len();
    cx.say(
        "Compiled",
        &format!("{forms} layer form{} to {kernels} kernels{assembled}", if forms == 1 { "" } else { "s" }),
    );
    for target in super::tune::untuned(&artefact, &table) {
        cx.say("Untuned", &format!("{}: schedules are estimates; `moec bench --tune` measures them", target.name()));
    }
    artefact.package()?;
    developer(cx, &args.developer, &artefact)?;
    let mut bytes = 0;
    if let Some(folder) = &args.output {
        bytes = artefact.write(folder)?;
        let library = artefact.files.keys().find(|name| name.ends_with(".a"));
        let library = library.map_or_else(String::new, |l| format!("{l}, {}.h, ", artefact.manifest.model));
        let seconds = start.elapsed().as_secs_f64();
        let size = size(bytes);
        cx.say("Written", &format!("{}/ ({library}manifest.json; {size}) in {seconds:.1}s", folder.display()));
    }
    emit::write(cx, &artefact, &requests, args.output.as_deref())?;
    if cx.is_json() && args.output.is_some() {
        let programs: Vec<_> = artefact
            .manifest
            .programs
            .iter()
            .map(|p| json!({"name": p.name, "target": p.target, "kernels": p.launches.len(), "layers": p.layers}))
            .collect();
        return cx.json(&json!({
            "schema": 1, "model": artefact.manifest.model, "output": args.output, "bytes": bytes, "programs": programs,
        }));
    }
    Ok(())
}

/// Keeps the form of one layer.
fn keep_layer(model: &mut Model, wanted: &str) -> Result<(), Failure> {
    if wanted == "all" {
        return Ok(());
    }
    let layer: u64 = wanted
        .parse()
        .map_err(|_| Failure::Usage(format!("`--layer {wanted}`: the number of a layer is due, or all")))?;
    let kind = usize::try_from(layer).ok().and_then(|l| model.layers.get(l)).map(|l| l.kind);
    let Some(LayerKind::Moe { form }) = kind else {
        let have: Vec<u64> = model.forms.iter().flat_map(|f| f.layers.iter().copied()).collect();
        let what = if kind.is_some() { "has no experts" } else { "does not exist" };
        let help = format!("layers with experts: {}", super::check::ranges(&have));
        return Err(Failure::refused("E0215", format!("layer {layer} {what}"), help));
    };
    let mut only: Form = model.forms.swap_remove(form);
    only.prefixes = only.prefix(layer).map(str::to_owned).into_iter().collect();
    only.layers = vec![layer];
    model.forms = vec![only];
    Ok(())
}

/// Targets to compile for, and where the choice comes from.
fn targets(args: &Compile, model: &Model) -> Result<(Vec<Target>, String), Failure> {
    if !args.target.is_empty() {
        return Ok((wanted::targets(&args.target, model.dtype)?, String::new()));
    }
    let mut targets = wanted::cpu_targets(model.dtype);
    let found = match wanted::gpu() {
        Some((name, target)) => {
            targets.push(target);
            format!(" ({name}, found on this machine)")
        }
        None => {
            targets.push(Target::Sm90a);
            " (no GPU here; the CPU code is chosen when it is loaded)".to_owned()
        }
    };
    Ok((targets, found))
}

/// Compiles; a default target that cannot do the model is left out, and said.
fn compile(
    cx: &Context,
    args: &Compile,
    model: &Model,
    targets: Vec<Target>,
    requests: &[Request],
    table: &Table,
) -> Result<Artefact, Failure> {
    let mut keep = emit::keep(requests);
    if args.developer.save_temps.is_some() {
        keep = Keep { mlir: true, llvm: true, assembly: true };
    }
    let dump_passes = !args.developer.print_ir.is_empty() || args.developer.save_temps.is_some();
    let outputs = match args.outputs.as_slice() {
        [] => wanted::outputs(model, &["output"]),
        names if names.iter().any(|o| o == "all") => Vec::new(),
        names => names.to_vec(),
    };
    let compiler = Compiler { targets, outputs, keep, dump_passes, cubins: !args.no_cubin, tuned: table.clone() };
    let spread = super::spread::read(cx, &args.spread)?;
    let build = |compiler: &Compiler| match &spread {
        None => compiler.compile(model),
        Some(spread) => {
            let one = compiler.compile_ranks(model, spread, &[args.rank])?;
            one.into_iter().next().ok_or_else(|| Error::Internal("a rank was not compiled".to_owned()))
        }
    };
    match build(&compiler) {
        Err(Error::Unsupported { node, what }) if args.target.is_empty() => {
            let cpu: Vec<Target> = compiler.targets.iter().copied().filter(|t| !t.is_gpu()).collect();
            let mut artefact = build(&Compiler { targets: cpu, ..compiler.clone() })?;
            let message = format!("not compiled for the GPU: {node}: {what}");
            artefact.manifest.notes.push(message.clone());
            if !cx.quiet {
                cx.report(&[Diagnostic::warning(Code("E0403"), message)]);
            }
            Ok(artefact)
        }
        other => Ok(other?),
    }
}

/// Whether there are cubins, in a few words.
fn assembled(cx: &Context, args: &Compile, artefact: &Artefact, requests: &[Request]) -> Result<&'static str, Failure> {
    let has_gpu = artefact.forms.iter().flat_map(|f| &f.targets).any(|t| t.target.is_gpu());
    if !has_gpu || args.no_cubin {
        return Ok("");
    }
    match ptxas::found() {
        Some(found) => {
            cx.detail("Assembled", &format!("cubins with {} {}", found.path.display(), found.version));
            Ok(", with cubins")
        }
        None if requests.iter().any(|r| r.kind == Kind::Cubin) => Err(Failure::machine(
            "E0503",
            "no cubin can be made: ptxas was not found",
            "`moec doctor -v` lists where it looked",
        )),
        None => Ok(" (PTX without cubin: no ptxas found)"),
    }
}

/// What developers asked to see.
fn developer(cx: &Context, flags: &Developer, artefact: &Artefact) -> Result<(), Failure> {
    for form in &artefact.forms {
        ir_dump::print(cx, &flags.print_ir, &form.passes)?;
    }
    if flags.remarks || cx.verbose {
        for remark in artefact.remarks() {
            cx.stderr(&format!("remark[{}]: {}: {}\n", remark.pass, remark.node, remark.text));
        }
    }
    if flags.timings {
        cx.stderr(&timings(artefact));
    }
    if let Some(folder) = &flags.save_temps {
        save_temps(artefact, folder)?;
        cx.say("Kept", &format!("the text of every stage in {}/", folder.display()));
    }
    Ok(())
}

/// Time per stage, a line each.
fn timings(artefact: &Artefact) -> String {
    let mut out = String::new();
    for form in &artefact.forms {
        for timing in &form.passes.timings {
            let _ = writeln!(out, "{:>10.3} ms  {} {}", timing.time.as_secs_f64() * 1e3, form.name, timing.pass);
        }
        for target in &form.targets {
            for (stage, time) in &target.stages {
                let name = target.target.name();
                let _ = writeln!(out, "{:>10.3} ms  {} {name} {stage}", time.as_secs_f64() * 1e3, form.name);
            }
        }
    }
    out
}

/// Text of every stage, in files whose numbers are the order.
fn save_temps(artefact: &Artefact, folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(|e| {
        Failure::machine("E0601", format!("cannot create {}: {e}", folder.display()), "name another folder")
    })?;
    for form in &artefact.forms {
        let mut number = 0;
        let mut put = |what: &str, text: &str| {
            let name = format!("{}.{number:02}-{what}", form.name);
            number += 1;
            moec::files::write(&folder.join(name), text.as_bytes())
        };
        put("graph.moe", &moec::ir::print(&form.graph))?;
        for dump in &form.passes.dumps {
            put(&format!("after-{}.moe", dump.pass), &dump.after)?;
        }
        for target in &form.targets {
            let name = target.target.name();
            let texts = [(&target.mlir, "mlir"), (&target.llvm, "ll"), (&target.assembly, "s")];
            for (text, extension) in texts {
                if let Some(text) = text {
                    put(&format!("{name}.{extension}"), text)?;
                }
            }
        }
    }
    for (name, bytes) in artefact.files.iter().filter(|(name, _)| name.starts_with("kernels/")) {
        let name = name.replace('/', ".");
        moec::files::write(&folder.join(name), bytes)?;
    }
    Ok(())
}

/// Choices, schedules and times of a form.
pub(crate) fn report(form: &FormReport) -> String {
    let mut out = format!("{}\n\nchoices\n", form.name);
    for remark in &form.passes.remarks {
        let _ = writeln!(out, "  {}: {}: {}", remark.pass, remark.node, remark.text);
    }
    for target in &form.targets {
        let _ = writeln!(out, "\n{}", target.target.name());
        for schedule in &target.schedules {
            let _ = writeln!(out, "  {schedule}");
        }
        for (stage, time) in &target.stages {
            let _ = writeln!(out, "  {:>10.3} ms  {stage}", time.as_secs_f64() * 1e3);
        }
    }
    out
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} bytes"),
        10_240..1_048_576 => format!("{:.0} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}
