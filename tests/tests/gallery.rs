//! Every graph of the gallery, compiled and run, against the interpreter; and the vectors of the research forms.

use indexmap::IndexMap;
use moec::{
    Compiler, Target, host_target,
    runtime::{Cpu, Device, InMemory, Model, Sim},
    verify::{Bench, Status, case},
};
use moec_ir::{
    DType, Dim, Extent, Graph, Op, Part,
    interp::{Array, ArrayData, MapWeights, Options, interpret},
    json::{Signature, read_graph},
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder is part of the repository")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    let chosen = std::env::var("MOEC_CASES").unwrap_or_default();
    files.retain(|f| chosen.split(',').any(|c| f.to_string_lossy().contains(c)));
    files
}

/// Runs `check` for every file on all cores; it gives the reason of a failure.
fn on_all_cores(files: &[PathBuf], check: impl Fn(&Path) -> Result<(), String> + Sync) {
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::<String>::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(path) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(reason) = check(path) {
                        let name = path.file_stem().unwrap_or_default().to_string_lossy();
                        failures.lock().expect("no thread panics").push(format!("{name}: {reason}"));
                    }
                }
            });
        }
    });
    let list = failures.into_inner().expect("no thread panics");
    assert!(list.is_empty(), "{} of {} fail\n{}", list.len(), files.len(), list.join("\n"));
}

/// Numbers between -1 and 1 that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        #[expect(clippy::cast_precision_loss, reason = "24 bits are exact")]
        let unit = (self.0 >> 40) as f32 / (1u64 << 23) as f32;
        unit - 1.0
    }
}

/// A tensor with values that fit its name: variances are positive, integers are 0 and 1.
fn tensor(name: &str, dtype: DType, shape: &[u64], seed: u64) -> (Vec<u8>, Array) {
    let count: u64 = shape.iter().product();
    let hash = name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut numbers = Numbers(hash | 1);
    for _ in 0..16 {
        numbers.next();
    }
    let shape = shape.iter().map(|n| usize::try_from(*n).expect("small")).collect();
    if dtype.is_float() {
        let positive = name.contains("var");
        let values: Vec<f32> =
            (0..count).map(|_| if positive { numbers.next().abs() + 0.5 } else { numbers.next() }).collect();
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (bytes, Array { shape, data: ArrayData::F64(values.into_iter().map(f64::from).collect()) })
    } else {
        let values: Vec<i64> = (0..count).map(|_| i64::from(numbers.next() > 0.0)).collect();
        let bytes = values.iter().flat_map(|v| i32::try_from(*v).expect("small").to_le_bytes()).collect();
        (bytes, Array { shape, data: ArrayData::I64(values) })
    }
}

/// What a graph needs: weights for the compiled layer and for the interpreter, inputs for both.
struct Data {
    stored: InMemory,
    weights: MapWeights,
    inputs: Vec<Vec<u8>>,
    arrays: IndexMap<String, Array>,
}

fn data(graph: &Graph, tokens: u64, seed: u64) -> Data {
    let mut data =
        Data { stored: InMemory::new(), weights: MapWeights::default(), inputs: Vec::new(), arrays: IndexMap::new() };
    for (name, weight) in &graph.weights {
        let entries = if name.contains('{') { 96 } else { 1 };
        for e in 0..entries {
            let own = name.replace("{e}", &e.to_string()).replace("{g}", &e.to_string());
            let shape: Vec<u64> =
                weight.shape.iter().map(|x: &Extent| x.of(usize::try_from(e).expect("small")).unwrap_or(0)).collect();
            let (bytes, array) = tensor(&own, weight.dtype, &shape, seed);
            let dtype = if weight.dtype.is_float() { moec_abi::DType::F32 } else { moec_abi::DType::I32 };
            data.stored.insert(own.clone(), dtype, shape, bytes).expect("the bytes fit");
            data.weights.0.insert(own, array);
        }
    }
    for id in graph.inputs() {
        let Op::Input(input) = &graph.node(id).op else { continue };
        let shape: Vec<u64> = input.ty.shape.iter().map(|d: &Dim| d.eval(tokens).expect("small")).collect();
        let (bytes, array) = tensor(&input.name, input.ty.dtype, &shape, seed);
        data.inputs.push(bytes);
        data.arrays.insert(input.name.clone(), array);
    }
    data
}

fn numbers(dtype: moec_abi::DType, bytes: &[u8]) -> Vec<f64> {
    if dtype == moec_abi::DType::I32 {
        return bytes.as_chunks().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect();
    }
    bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
}

/// Compiles a graph, runs it and compares every output with the interpreter.
fn check(path: &Path, target: Target, device: Arc<dyn Device>, tokens: u64) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let graph = read_graph(&text, &Signature::default()).map_err(|e| format!("{e:?}"))?;
    let data = data(&graph, tokens, tokens);
    let expected = interpret(&graph, &data.arrays, &data.weights, Options::default()).map_err(|e| e.to_string())?;
    let outputs = graph.outputs.clone();
    let compiler = Compiler { targets: vec![target], outputs: Vec::new(), ..Compiler::default() };
    let name = graph.name.clone();
    let artefact = compiler.compile_graph(&name, graph).map_err(|e| e.to_string())?;
    let model = Model::new(Arc::new(artefact.load().map_err(|e| e.to_string())?), device);
    let layer = model.layer(0, &data.stored).map_err(|e| e.to_string())?;
    let buffers = layer.outputs().map_err(|e| e.to_string())?;
    let mut results: Vec<Vec<u8>> = buffers
        .iter()
        .map(|b| {
            let size = b.shape.iter().fold(b.dtype.bytes(), |n, d| n * d.eval(tokens).unwrap_or(0));
            vec![0xff; usize::try_from(size).expect("small")]
        })
        .collect();
    let inputs: Vec<&[u8]> = data.inputs.iter().map(Vec::as_slice).collect();
    layer
        .launch(tokens, &inputs, &mut results.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())
        .map_err(|e| e.to_string())?;
    for (buffer, bytes) in buffers.iter().zip(&results) {
        let moec_abi::BufferKind::Output { name } = &buffer.kind else { continue };
        let (got, wanted) = (numbers(buffer.dtype, bytes), expected[name].floats());
        let exact = outputs.iter().any(|o| o.name == *name && o.part == Part::Idx);
        let top = wanted.iter().fold(1e-30f64, |m, v| if v.is_finite() { m.max(v.abs()) } else { m });
        let limit = if exact { 0.0 } else { 3e-5 * top };
        if got.len() != wanted.len() {
            return Err(format!("`{name}` has {} elements, {} are expected", got.len(), wanted.len()));
        }
        let differs = |g: f64, w: f64| g.is_nan() != w.is_nan() || (g - w).abs() > limit;
        if let Some(i) = (0..got.len()).find(|i| differs(got[*i], wanted[*i])) {
            return Err(format!("`{name}`[{i}] is {}, expected {} ({tokens} tokens)", got[i], wanted[i]));
        }
    }
    Ok(())
}

/// Number of tokens that the graph was written for, or one of two others.
fn tokens_of(path: &Path, otherwise: u64) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let graph = read_graph(&text, &Signature::default()).ok();
    let fixed = graph.and_then(|g| {
        let lead = |id| {
            let Op::Input(input) = &g.node(id).op else { return None };
            input.ty.shape.first().cloned()
        };
        g.inputs().into_iter().find_map(lead).and_then(|d| d.known())
    });
    fixed.unwrap_or(otherwise)
}

#[test]
fn every_graph_of_the_gallery_agrees_with_the_interpreter() {
    let files = files("models/systems", "json");
    on_all_cores(&files, |path| check(path, host_target(), Arc::new(Cpu::new(1)), tokens_of(path, 21)));
}

#[test]
fn every_graph_of_the_gallery_agrees_as_ptx() {
    let files = files("models/systems", "json");
    on_all_cores(&files, |path| {
        check(path, Target::Sm80, Arc::new(Sim::new(moec_sim::Options::default())), tokens_of(path, 7))
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
    on_all_cores(&vectors(), |path| verify(path, &Bench { device: Arc::new(Cpu::new(1)), target: host_target() }));
}

#[test]
fn every_vector_agrees_as_ptx() {
    on_all_cores(&vectors(), |path| {
        let device = Arc::new(Sim::new(moec_sim::Options::default()));
        verify(path, &Bench { device, target: Target::Sm80 })
    });
}
