//! The blocks of the reference library through compiled kernels: on the CPU, and as PTX on the simulator.

use moec::{
    Target, host_target,
    runtime::{Cpu, Device, Sim},
    verify::{Bench, CaseResult, Status, case},
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder of cases is part of the repository")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    files
}

/// Every case on a device of its own kind, on all cores.
fn verify(target: Target, device: impl Fn() -> Arc<dyn Device> + Sync) {
    let cases = cases();
    assert!(cases.len() >= 100, "{} cases", cases.len());
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::<CaseResult>::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(path) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = case(path, &Bench { device: device(), target });
                    if result.status != Status::Pass {
                        failures.lock().expect("no thread panics").push(result);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no thread panics");
    let list: Vec<String> =
        failures.iter().map(|f| format!("{}: {}", f.name, f.reason.clone().unwrap_or_default())).collect();
    assert!(list.is_empty(), "{} of {} cases fail\n{}", list.len(), cases.len(), list.join("\n"));
}

#[test]
fn all_pass_on_this_processor() {
    verify(host_target(), || Arc::new(Cpu::new(1)));
}

#[test]
fn all_pass_on_every_level_of_processor_that_is_here() {
    for target in [Target::X86V3, Target::X86V4, Target::X86V4Bf16] {
        if target != host_target() && moec::runtime::cpu_runs(target.name()).is_ok() {
            verify(target, || Arc::new(Cpu::new(1)));
        }
    }
}

#[test]
fn all_pass_as_ptx_for_ampere_on_the_simulator() {
    verify(Target::Sm80, || Arc::new(Sim::new(moec_sim::Options::default())));
}

#[test]
fn all_pass_as_ptx_for_hopper_on_the_simulator() {
    verify(Target::Sm90a, || Arc::new(Sim::new(moec_sim::Options::default())));
}
