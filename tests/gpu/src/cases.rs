//! Cases on the device, and the device against the simulator.

use crate::{Arguments, Place, Result, emit};
use moec_check::{CaseResult, execute::Found, golden};
use moec_runtime::{Artefact, Device, Model, SafetensorsBytes, Sim};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

fn files(folder: &Path, args: &Arguments) -> Result<Vec<(String, PathBuf)>> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut out: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter_map(|path| Some((path.file_stem()?.to_str()?.to_owned(), path)))
        .filter(|(name, _)| args.wants(name))
        .collect();
    out.sort();
    if out.is_empty() { Err(format!("no case in {}", folder.display())) } else { Ok(out) }
}

fn line(kind: &str, result: &CaseResult, more: Value) {
    let mut value = json!({ "kind": kind, "result": result });
    if let (Value::Object(to), Value::Object(from)) = (&mut value, more) {
        to.extend(from);
    }
    emit(&value);
}

/// Every golden on the device, under its own limits; its results beside those of the simulator.
pub(crate) fn goldens(here: &Place, artefacts: &Path, folder: &Path, args: &Arguments) -> Result<()> {
    for (name, path) in files(folder, args)? {
        let started = std::time::Instant::now();
        let (result, beside) = match golden(here, &artefacts.join(&name), &path, &name) {
            Ok(found) => found,
            Err(why) => (CaseResult::failed(&name, why), Value::Null),
        };
        line("golden", &result, json!({ "beside_sim": beside, "seconds": started.elapsed().as_secs_f64() }));
    }
    Ok(())
}

fn golden(here: &Place, artefact: &Path, path: &Path, name: &str) -> Result<(CaseResult, Value)> {
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let tensors = SafetensorsBytes::new(&bytes).map_err(|e| e.to_string())?;
    let artefact = Arc::new(Artefact::load(artefact).map_err(|e| e.to_string())?);
    let program = artefact.program(0).map_err(|e| e.to_string())?;
    let number = golden::layer(&tensors, &artefact).map_err(|e| e.to_string())?;
    let layer = |device: Arc<dyn Device>| {
        Model::new(Arc::clone(&artefact), device).layer(number, &tensors).map_err(|e| e.to_string())
    };
    let on_device = layer(Arc::clone(&here.device))?;
    let result = golden::run(name, &tensors, &on_device).map_err(|e| e.to_string())?;
    if here.cuda.is_none() {
        return Ok((result, Value::Null));
    }
    // The simulator's rules were checked before; here only its arithmetic is in question.
    let sim = Arc::new(Sim::new(moec_sim::Options { check: false, ..moec_sim::Options::default() }));
    let simulated = golden::results(&tensors, &layer(sim)?).map_err(|e| e.to_string())?;
    let real = golden::results(&tensors, &on_device).map_err(|e| e.to_string())?;
    let text = moec_runtime::Files::read(&*artefact, &program.code).map_err(|e| e.to_string())?;
    Ok((result, beside(&real, &simulated, &inexact(&String::from_utf8_lossy(&text)))))
}

/// Instructions of a module whose results hardware may round or order in its own way.
fn inexact(ptx: &str) -> Vec<&'static str> {
    ["mma.sync", "wgmma.mma_async", ".approx", "red.global.add.f", "atom.global.add.f"]
        .into_iter()
        .filter(|op| ptx.contains(op))
        .collect()
}

/// Each result on both: elements whose numbers differ, and by how much. Where nothing is inexact, none may differ.
fn beside(real: &BTreeMap<String, Found>, simulated: &BTreeMap<String, Found>, inexact: &[&str]) -> Value {
    let same = |a: f64, b: f64| a == b || a.is_nan() && b.is_nan();
    let mut equal = true;
    let rows: BTreeMap<&str, Value> = real
        .iter()
        .map(|(name, found)| {
            let other = simulated.get(name).map_or(&[][..], |f| &f.values);
            let differ = found.values.iter().zip(other).filter(|(a, b)| !same(**a, **b)).count();
            let differ = differ + found.values.len().abs_diff(other.len());
            let (max, rms) = moec_check::compare::difference(&found.values, other);
            equal &= differ == 0;
            let row = json!({ "elements": found.values.len(), "differ": differ, "max_rel": max, "rms_rel": rms });
            (name.as_str(), row)
        })
        .collect();
    let exact = inexact.is_empty();
    json!({ "exact": exact, "inexact_because_of": inexact, "equal": equal, "agrees": equal || !exact, "results": rows })
}

/// PTX of other producers.
pub(crate) fn ptx(here: &Place, folder: &Path, args: &Arguments) -> Result<()> {
    for (name, path) in files(folder, args)? {
        let run = || {
            let bytes = std::fs::read(&path).map_err(|e| e.to_string())?;
            moec_check::ptx::run(&name, &bytes, &*here.device).map_err(|e| e.to_string())
        };
        let result = run().unwrap_or_else(|why| CaseResult::failed(&name, why));
        line("ptx", &result, Value::Null);
    }
    Ok(())
}
