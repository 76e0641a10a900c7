//! `moec doctor`: what was found on this machine, and what follows from it.

use crate::{context::Context, failure::Failure, wanted};
use moec::{Target, host_target, ptxas, runtime::Cuda};
use serde_json::json;
use std::fmt::Write as _;

/// Prints a line for each thing that matters.
pub(crate) fn run(cx: &Context) -> Result<(), Failure> {
    let search = ptxas::find();
    let cuda = Cuda::open(0);
    let gpu = wanted::gpu();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let runs: Vec<&str> = Target::ALL
        .into_iter()
        .filter(|t| !t.is_gpu() && moec::runtime::cpu_runs(t.name()).is_ok())
        .map(Target::name)
        .collect();
    if cx.is_json() {
        return cx.json(&json!({
            "schema": 1,
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": {"best": host_target().name(), "targets": runs, "threads": threads},
            "gpu": gpu.as_ref().map(|(name, target)| json!({"name": name, "target": target.name()})),
            "driver": match &cuda {
                Ok(cuda) => json!({"found": true, "cuda": cuda.driver_version()}),
                Err(error) => json!({"found": false, "reason": error.message}),
            },
            "ptxas": search.found.as_ref().map(|p| json!({"path": p.path, "version": p.version})),
            "ptxas_looked": search.looked,
        }));
    }
    let mut out = String::new();
    let mut row = |name: &str, text: String| {
        let _ = writeln!(out, "{name:>10}  {text}");
    };
    row("moec", format!("{}, LLVM and MLIR 22 linked in", env!("CARGO_PKG_VERSION")));
    row("cpu", format!("{threads} threads; best target {}, runs {}", host_target().name(), runs.join(", ")));
    match (&cuda, &gpu) {
        (Ok(cuda), Some((name, target))) => {
            row("gpu", format!("{name}, target {}; driver for CUDA {}", target.name(), cuda.driver_version()));
        }
        (Ok(cuda), None) => row("gpu", format!("{}, for which there is no target", cuda.device_name())),
        (Err(error), _) => {
            row("gpu", format!("none: {}", error.message));
            row("", "kernels for GPUs are compiled all the same, and run on --device sim".to_owned());
        }
    }
    match &search.found {
        Some(found) => {
            row("ptxas", format!("{} at {}; cubins are made", found.version, found.path.display()));
        }
        None => {
            row("ptxas", "not found: PTX alone is written, which drivers assemble when it is loaded".to_owned());
            row(
                "",
                format!(
                    "looked in {} places (listed with -v): PATH, $CUDA_HOME/bin, /usr/local/cuda*,",
                    search.looked.len()
                ),
            );
            row("", "Python packages nvidia/cu13, nvidia/cuda_nvcc and triton".to_owned());
        }
    }
    if cx.verbose {
        for place in &search.looked {
            row("", place.display().to_string());
        }
    }
    cx.result(out)
}
