//! Times layers on the device.
//!
//! Launches are recorded in a graph that goes round several copies of the weights, so that none of them is still in
//! the second-level cache when its turn comes again, and over several sets of tokens. The routing of each set is
//! left in a folder, so that peers time the same one.

use crate::{
    Arguments, Place, Result, emit,
    routing::{BenchWeights, Routing, rows},
};
use moec_abi::{Buffer, BufferKind};
use moec_check::compare::floats;
use moec_runtime::{Artefact, Layer, Memory, Model, Random};
use serde::Deserialize;
use serde_json::json;
use std::{collections::BTreeSet, path::Path, sync::Arc, time::Instant};

/// What a GPU does in a second, as measured on an H200: bytes from memory, operations of bf16 products.
const BYTES_PER_SECOND: f64 = 4.3e12;
const FLOPS: f64 = 790e12;
/// Bytes that must pass before weights count as gone from the second-level cache (60 MB).
const COLD: u64 = 256 << 20;
/// Most bytes of all copies of a layer.
const COPIES: u64 = 48 << 30;
/// Launches of a graph at least, and time of a measurement in seconds.
const LAUNCHES: usize = 8;
const SAMPLE: f64 = 0.02;
const SAMPLES: usize = 5;

/// A layer of `layers.json`.
#[derive(Debug, Deserialize)]
struct Spec {
    name: String,
    router: String,
    hidden: u64,
    inner: u64,
    experts: u64,
    top_k: u64,
}

/// One set of tokens with its results on the device.
struct Set {
    /// Address of each buffer that the caller passes.
    addresses: Vec<u64>,
    /// Kept alive.
    memory: Vec<Memory>,
    /// Chosen experts and their weights, row by row.
    ids: Vec<i32>,
    weights: Vec<f32>,
    hidden: Vec<u8>,
}

fn failure(e: moec_runtime::RuntimeError) -> String {
    format!("{}: {}", e.code, e.message)
}

/// All layers, numbers of tokens and routings that are wanted and fit the time.
pub(crate) fn run(here: &Place, layers: &Path, artefacts: &Path, out: &Path, args: &Arguments) -> Result<()> {
    let text = std::fs::read_to_string(layers).map_err(|e| format!("{}: {e}", layers.display()))?;
    let specs: Vec<Spec> = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", layers.display()))?;
    let tokens: Vec<u64> = match &args.tokens {
        Some(list) => {
            list.split(',').map(|n| n.parse().map_err(|e| format!("--tokens {n}: {e}"))).collect::<Result<_>>()?
        }
        None => vec![1, 4, 16, 64, 256, 1024, 4096, 16384],
    };
    let deadline = args.seconds.map(|s| Instant::now() + std::time::Duration::from_secs_f64(s));
    for spec in specs.iter().filter(|s| args.wants(&s.name)) {
        if deadline.is_some_and(|d| Instant::now() > d) {
            emit(&json!({ "kind": "bench", "layer": spec.name, "skipped": "out of time" }));
            continue;
        }
        if let Err(why) = layer(here, spec, artefacts, out, &tokens, deadline) {
            emit(&json!({ "kind": "bench", "layer": spec.name, "failed": why }));
        }
    }
    Ok(())
}

fn layer(
    here: &Place,
    spec: &Spec,
    artefacts: &Path,
    out: &Path,
    tokens: &[u64],
    deadline: Option<Instant>,
) -> Result<()> {
    let artefact = Arc::new(Artefact::load(&artefacts.join(&spec.name)).map_err(failure)?);
    let model = Model::new(artefact, Arc::clone(&here.device));
    let first = model.artefact().program(0).map_err(failure)?;
    let number = first.layers.first().copied().ok_or("the program serves no layer")?;
    let (_, program, prefix) = model.program(number).map_err(failure)?;
    let random = Random::new(&program.slots, prefix, 1).map_err(failure)?;
    let weights = BenchWeights::new(random, &spec.router, spec.experts, spec.hidden)?;
    let mut copies = vec![model.layer(number, &weights).map_err(failure)?];
    let touched = 6 * spec.hidden * spec.inner * spec.top_k;
    let all = copies[0].weights_bytes();
    let wanted = COLD.div_ceil(touched.max(1)).clamp(1, 8).min((COPIES / all.max(1)).max(1));
    while (copies.len() as u64) < wanted && here.cuda.is_some() {
        copies.push(model.layer(number, &weights).map_err(failure)?);
    }
    for &t in tokens {
        for (routing, name) in Routing::ALL {
            if deadline.is_some_and(|d| Instant::now() > d) {
                emit(
                    &json!({ "kind": "bench", "layer": spec.name, "tokens": t, "routing": name, "skipped": "out of time" }),
                );
                continue;
            }
            match cell(here, spec, &copies, t, routing, &out.join(format!("{}-{name}-{t}", spec.name))) {
                Ok(mut row) => {
                    row["routing"] = json!(name);
                    row["copies"] = json!(copies.len());
                    emit(&row);
                }
                Err(why) => {
                    emit(&json!({ "kind": "bench", "layer": spec.name, "tokens": t, "routing": name, "failed": why }));
                }
            }
        }
    }
    Ok(())
}

fn bytes(buffer: &Buffer, tokens: u64) -> Result<u64> {
    let all = buffer.shape.iter().try_fold(buffer.dtype.bytes(), |n, d| n.checked_mul(d.eval(tokens)?));
    all.ok_or_else(|| format!("the size of {}", buffer.name))
}

/// Memory for one set of tokens, and the routing that the layer makes of it.
fn set(here: &Place, spec: &Spec, layer: &Layer, tokens: u64, routing: Routing, seed: u64) -> Result<Set> {
    let hidden = rows(routing, tokens, spec.hidden, spec.experts, seed);
    let mut set = Set { addresses: Vec::new(), memory: Vec::new(), ids: Vec::new(), weights: Vec::new(), hidden };
    let buffers = &layer.program().map_err(failure)?.buffers;
    let mut places = Vec::new();
    for buffer in buffers {
        let outside = matches!(buffer.kind, BufferKind::Input { .. } | BufferKind::Output { .. });
        let address = if outside {
            let mut memory = Memory::new(&here.device, bytes(buffer, tokens)?).map_err(failure)?;
            if matches!(buffer.kind, BufferKind::Input { .. }) {
                if bytes(buffer, tokens)? != set.hidden.len() as u64 {
                    return Err(format!("the input {} is not the hidden states", buffer.name));
                }
                memory.write(0, &set.hidden).map_err(failure)?;
            }
            set.memory.push(memory);
            places.push(set.memory.len() - 1);
            set.memory.last().map_or(0, Memory::address)
        } else {
            places.push(usize::MAX);
            0
        };
        set.addresses.push(address);
    }
    let size = layer.workspace_bytes(tokens).map_err(failure)?;
    let workspace = Memory::new(&here.device, size).map_err(failure)?;
    let mut addresses = set.addresses.clone();
    // SAFETY: the addresses are those of blocks of the sizes that the program gives, which live on.
    unsafe { layer.launch_at(tokens, &mut addresses, workspace.address(), workspace.bytes(), None) }
        .map_err(failure)?;
    here.device.synchronize().map_err(failure)?;
    for (buffer, place) in buffers.iter().zip(places) {
        let BufferKind::Output { name } = &buffer.kind else { continue };
        let mut raw = vec![0; bytes(buffer, tokens)? as usize];
        set.memory[place].read(0, &mut raw).map_err(failure)?;
        let values = floats(buffer.dtype, &raw);
        match name.as_str() {
            "topk_indices" => set.ids = values.iter().map(|v| *v as i32).collect(),
            "topk_weights" => set.weights = values.iter().map(|v| *v as f32).collect(),
            _ if values.iter().any(|v| v.is_nan()) => return Err(format!("the output {name} has NaN")),
            _ => {}
        }
    }
    Ok(set)
}

/// Leaves the sets for the peers: raw little-endian arrays and their shapes.
fn save(spec: &Spec, sets: &[Set], tokens: u64, out: &Path) -> Result<()> {
    let write = |name: &str, bytes: Vec<u8>| std::fs::write(out.join(name), bytes).map_err(|e| e.to_string());
    std::fs::create_dir_all(out).map_err(|e| e.to_string())?;
    write("hidden.bf16", sets.iter().flat_map(|s| s.hidden.clone()).collect())?;
    write("ids.i32", sets.iter().flat_map(|s| &s.ids).flat_map(|v| v.to_le_bytes()).collect())?;
    write("weights.f32", sets.iter().flat_map(|s| &s.weights).flat_map(|v| v.to_le_bytes()).collect())?;
    let shape = json!({ "layer": spec.name, "sets": sets.len(), "tokens": tokens, "hidden": spec.hidden,
        "inner": spec.inner, "experts": spec.experts, "top_k": spec.top_k });
    write("shape.json", shape.to_string().into_bytes())
}

fn cell(
    here: &Place,
    spec: &Spec,
    copies: &[Layer],
    tokens: u64,
    routing: Routing,
    out: &Path,
) -> Result<serde_json::Value> {
    let count = match tokens {
        0..=64 => 8,
        65..=1024 => 4,
        _ => 1,
    };
    let mut sets = Vec::new();
    for seed in 0..if here.cuda.is_some() { count } else { 1 } {
        sets.push(set(here, spec, &copies[0], tokens, routing, seed)?);
    }
    let choices = (tokens * spec.top_k) as usize;
    if sets.iter().any(|s| s.ids.len() != choices || s.weights.len() != choices) {
        return Err("the artefact has no `topk_indices` and `topk_weights`".to_owned());
    }
    save(spec, &sets, tokens, out)?;
    let distinct: Vec<usize> = sets.iter().map(|s| s.ids.iter().collect::<BTreeSet<_>>().len()).collect();
    let distinct = distinct.iter().sum::<usize>() as f64 / sets.len() as f64;
    let size = copies[0].workspace_bytes(tokens).map_err(failure)?;
    let workspace = Memory::new(&here.device, size).map_err(failure)?;
    let all = LAUNCHES.max(copies.len()).next_multiple_of(sets.len());
    // What the simulator takes says nothing.
    let launches = if here.cuda.is_some() { all } else { 1 };
    let once = || -> moec_runtime::Result<()> {
        for i in 0..launches {
            let mut addresses = sets[i % sets.len()].addresses.clone();
            let layer = &copies[i % copies.len()];
            // SAFETY: the blocks have the sizes that the program gives for these tokens, and live as long as the graph.
            unsafe { layer.launch_at(tokens, &mut addresses, workspace.address(), workspace.bytes(), None)? };
        }
        Ok(())
    };
    let device = &here.device;
    let mut kernels = Vec::new();
    for set in &sets {
        let mut addresses = set.addresses.clone();
        let (at, size) = (workspace.address(), workspace.bytes());
        let mut times = Vec::new();
        // SAFETY: as above.
        unsafe { copies[0].launch_at(tokens, &mut addresses, at, size, Some(&mut times)) }.map_err(failure)?;
        kernels.push(times);
    }
    let names: Vec<String> = copies[0].program().map_err(failure)?.launches.iter().map(|l| l.name.clone()).collect();
    let kernels: Vec<serde_json::Value> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let mut times: Vec<u64> = kernels.iter().filter_map(|k| k.get(i).copied()).collect();
            times.sort_unstable();
            json!({ "name": name, "us": times.get(times.len() / 2).map_or(0.0, |n| *n as f64 / 1e3) })
        })
        .collect();
    let mut samples = match &here.cuda {
        Some(cuda) => {
            let graph = cuda.capture(once).map_err(failure)?;
            timed(
                || {
                    // SAFETY: everything that was recorded is alive.
                    unsafe { graph.launch() }.map_err(failure)
                },
                || device.synchronize().map_err(failure),
            )?
        }
        None => timed(|| once().map_err(failure), || Ok(()))?,
    };
    samples.iter_mut().for_each(|s| *s *= 1e6 / launches as f64);
    samples.sort_by(f64::total_cmp);
    let us = samples[samples.len() / 2];
    let flops = 6.0 * (tokens * spec.top_k * spec.hidden * spec.inner) as f64;
    let read = distinct * 6.0 * (spec.hidden * spec.inner) as f64 + 4.0 * (tokens * spec.hidden) as f64;
    let floor = (read / BYTES_PER_SECOND).max(flops / FLOPS) * 1e6;
    Ok(json!({
        "kind": "bench", "layer": spec.name, "tokens": tokens, "us": us, "us_least": samples[0],
        "us_most": samples.last(), "kernels": kernels, "distinct_experts": distinct, "sets": sets.len(),
        "floor_us": floor, "share_of_floor": floor / us, "tflops": flops / us / 1e6, "gb_per_s": read / us / 1e3,
    }))
}

/// Seconds of one call, several times: each sample calls as often as fills its time and waits at the end.
fn timed(mut call: impl FnMut() -> Result<()>, wait: impl Fn() -> Result<()>) -> Result<Vec<f64>> {
    call()?;
    wait()?;
    let start = Instant::now();
    call()?;
    wait()?;
    let turns = (SAMPLE / start.elapsed().as_secs_f64().max(1e-6)).ceil().clamp(1.0, 1000.0) as u32;
    let mut samples = Vec::new();
    for _ in 0..SAMPLES {
        let start = Instant::now();
        for _ in 0..turns {
            call()?;
        }
        wait()?;
        samples.push(start.elapsed().as_secs_f64() / f64::from(turns));
    }
    Ok(samples)
}
