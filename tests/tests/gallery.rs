//! Every graph of the gallery, compiled and run, against the interpreter; and the vectors of the research forms.

use moec::{
    Target, host_target,
    runtime::{Cpu, Sim},
    verify::{Bench, Status, case},
};
use moec_tests::gallery::{check, every_file, files, graph, tokens_of};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

#[test]
fn every_graph_of_the_gallery_agrees_with_the_interpreter() {
    every_file(&files("models/systems", "json"), |path| {
        let graph = graph(path);
        check(&graph, host_target(), Arc::new(Cpu::new(1)), &[tokens_of(&graph, 21), 0, 1])
    });
}

#[test]
fn every_graph_of_the_gallery_agrees_as_ptx() {
    every_file(&files("models/systems", "json"), |path| {
        let graph = graph(path);
        check(&graph, Target::Sm80, Arc::new(Sim::new(moec_sim::Options::default())), &[tokens_of(&graph, 7), 0])
    });
}

/// Vectors of passes over weights are no layers.
fn vectors() -> Vec<PathBuf> {
    let mut files = files("goldens-systems", "safetensors");
    files.retain(|f| f.file_name().is_some_and(|n| !n.to_string_lossy().starts_with("pass_")));
    files
}

fn verify(path: &Path, bench: &Bench) -> Result<(), String> {
    let result = case(path, bench);
    if result.status == Status::Pass { Ok(()) } else { Err(result.reason.unwrap_or_default()) }
}

#[test]
fn every_vector_agrees_on_this_processor() {
    every_file(&vectors(), |path| verify(path, &Bench { device: Arc::new(Cpu::new(1)), target: host_target() }));
}

#[test]
fn every_vector_agrees_as_ptx() {
    every_file(&vectors(), |path| {
        let device = Arc::new(Sim::new(moec_sim::Options::default()));
        verify(path, &Bench { device, target: Target::Sm80 })
    });
}
