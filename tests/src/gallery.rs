//! Graph files with invented data: compiled, run, and interpreted.

use half::{bf16, f16};
use indexmap::IndexMap;
use moec::{
    Compiler, Error, Target,
    runtime::{Device, InMemory, Layer, Model},
};
use moec_abi::{BufferKind, Program};
use moec_ir::{
    DType, Dim, Extent, Graph, Op, Part,
    interp::{Array, ArrayData, MapWeights, Options, Rounding, interpret},
    json::{Signature, read_graph},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Results by name.
pub type Results = BTreeMap<String, Vec<f64>>;

/// Files of a folder of `tests/` with this extension, sorted; `MOEC_CASES=a,b` keeps those whose path contains one.
///
/// # Panics
/// When the folder is not there.
pub fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
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

/// Name of a file without its folder and extension.
pub fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The graph of a file that carries its shapes.
///
/// # Panics
/// When the file is no graph.
pub fn graph(path: &Path) -> Graph {
    let text = std::fs::read_to_string(path).expect("the file can be read");
    read_graph(&text, &Signature::default()).unwrap_or_else(|e| panic!("{}: {e:?}", path.display()))
}

/// Runs `check` for every item on all cores; gives the reasons of failures, in the order of the items.
pub fn on_all_cores<T: Sync>(items: &[T], check: impl Fn(&T) -> Result<(), String> + Sync) -> Vec<String> {
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { return };
                    if let Err(reason) = check(item) {
                        failures.lock().expect("no thread panics").insert(at, reason);
                    }
                }
            });
        }
    });
    failures.into_inner().expect("no thread panics").into_values().collect()
}

/// As [`on_all_cores`] over files; fails with all reasons.
///
/// # Panics
/// When a check fails.
pub fn every_file(files: &[PathBuf], check: impl Fn(&Path) -> Result<(), String> + Sync) {
    let list = on_all_cores(files, |path| check(path).map_err(|reason| format!("{}: {reason}", stem(path))));
    assert!(list.is_empty(), "{} of {} fail\n{}", list.len(), files.len(), list.join("\n"));
}

/// What kind of numbers the data hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// Between -1 and 1.
    Small,
    /// Between -6 and 6: activations reach their bends and clamps.
    Large,
    /// Inputs that are floats are 0: all scores are equal.
    Zero,
}

/// Numbers that look random.
struct Stream(u64);

impl Stream {
    fn of(name: &str, seed: u64) -> Self {
        let hash = name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut stream = Self(hash | 1);
        for _ in 0..16 {
            stream.next();
        }
        stream
    }

    /// Between -1 and 1.
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        #[expect(clippy::cast_precision_loss, reason = "24 bits are exact")]
        let unit = (self.0 >> 40) as f32 / (1u64 << 23) as f32;
        unit - 1.0
    }
}

/// Whether a tensor of floats holds codes: -1, 0 and 1.
pub(crate) fn is_code(name: &str) -> bool {
    name.ends_with("codes") || name.starts_with("ternary")
}

/// A tensor with values that fit its name: variances are positive, codes are -1, 0 and 1, integers are 0 and 1.
fn tensor(name: &str, dtype: DType, shape: &[u64], seed: u64, scale: f32) -> (Vec<u8>, Array) {
    let count: u64 = shape.iter().product();
    let mut numbers = Stream::of(name, seed);
    let shape = shape.iter().map(|n| usize::try_from(*n).expect("small")).collect();
    if dtype.is_float() {
        let value = |v: f32| match name {
            name if name.contains("var") => v.abs() + 0.5,
            name if is_code(name) => (v * 1.5).round(),
            _ => v * scale,
        };
        let values: Vec<f32> = (0..count).map(|_| rounded(value(numbers.next()), dtype)).collect();
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (bytes, Array { shape, data: ArrayData::F64(values.into_iter().map(f64::from).collect()) })
    } else {
        let values: Vec<i64> = (0..count).map(|_| i64::from(numbers.next() > 0.0)).collect();
        let bytes = values.iter().flat_map(|v| i32::try_from(*v).expect("small").to_le_bytes()).collect();
        (bytes, Array { shape, data: ArrayData::I64(values) })
    }
}

/// The value as this type of floats holds it.
fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::F64 | DType::F32 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
            value
        }
    }
}

/// The bytes of an input, from those of f32.
fn encoded(bytes: Vec<u8>, dtype: DType) -> Vec<u8> {
    let values = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
    match dtype {
        DType::Bf16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
        DType::F64 | DType::F32 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
            bytes
        }
    }
}

/// What a graph needs: weights for the compiled layer and for the interpreter, inputs for both.
pub struct Data {
    /// Weights as a checkpoint has them.
    pub stored: InMemory,
    /// The same for the interpreter.
    pub weights: MapWeights,
    /// Bytes of the inputs, in the order of the interface.
    pub inputs: Vec<Vec<u8>>,
    /// The same for the interpreter.
    pub arrays: IndexMap<String, Array>,
    /// Number of tokens.
    pub tokens: u64,
}

/// Weights and inputs for a graph. A value depends on the name, the seed and its place alone.
///
/// # Panics
/// When a size does not fit into memory.
pub fn data(graph: &Graph, tokens: u64, seed: u64, numbers: Numbers) -> Data {
    let mut data = Data {
        stored: InMemory::new(),
        weights: MapWeights::default(),
        inputs: Vec::new(),
        arrays: IndexMap::new(),
        tokens,
    };
    for (name, weight) in &graph.weights {
        let template = name.contains("{e}") || name.contains("{g}");
        let listed = weight.shape.iter().find_map(|x: &Extent| match x {
            Extent::PerExpert(sizes) => Some(sizes.len() as u64),
            Extent::Fixed(_) => None,
        });
        let entries = if template { listed.unwrap_or(96) } else { 1 };
        for e in 0..entries {
            let own = name.replace("{e}", &e.to_string()).replace("{g}", &e.to_string());
            let shape: Vec<u64> =
                weight.shape.iter().map(|x| x.of(usize::try_from(e).expect("small")).unwrap_or(0)).collect();
            let (bytes, array) = tensor(&own, weight.dtype, &shape, seed, 1.0);
            let dtype = if weight.dtype.is_float() { moec_abi::DType::F32 } else { moec_abi::DType::I32 };
            data.stored.insert(own.clone(), dtype, shape, bytes).expect("the bytes fit");
            data.weights.0.insert(own, array);
        }
    }
    let scale = match numbers {
        Numbers::Small => 1.0,
        Numbers::Large => 6.0,
        Numbers::Zero => 0.0,
    };
    for id in graph.inputs() {
        let Op::Input(input) = &graph.node(id).op else { continue };
        let shape: Vec<u64> = input.ty.shape.iter().map(|d: &Dim| d.eval(tokens).expect("small")).collect();
        let (bytes, array) = tensor(&input.name, input.ty.dtype, &shape, seed, scale);
        data.inputs.push(encoded(bytes, input.ty.dtype));
        data.arrays.insert(input.name.clone(), array);
    }
    data
}

impl Data {
    /// Sets an input.
    ///
    /// # Panics
    /// When the graph has no such input, or one of another size.
    pub fn set(&mut self, name: &str, values: &[f32]) {
        let at = self.arrays.get_index_of(name).expect("the input exists");
        let array = &mut self.arrays[at];
        assert_eq!(array.shape.iter().product::<usize>(), values.len(), "size of {name}");
        array.data = ArrayData::F64(values.iter().copied().map(f64::from).collect());
        self.inputs[at] = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    }

    /// Sets an input of integers.
    ///
    /// # Panics
    /// As [`set`](Self::set).
    pub fn set_ints(&mut self, name: &str, values: &[i32]) {
        let at = self.arrays.get_index_of(name).expect("the input exists");
        let array = &mut self.arrays[at];
        assert_eq!(array.shape.iter().product::<usize>(), values.len(), "size of {name}");
        array.data = ArrayData::I64(values.iter().copied().map(i64::from).collect());
        self.inputs[at] = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    }

    /// Sets a weight.
    ///
    /// # Panics
    /// When the graph has no such weight, or one of another size.
    pub fn set_weight(&mut self, name: &str, values: &[f32]) {
        let array = self.weights.0.get_mut(name).expect("the weight exists");
        assert_eq!(array.shape.iter().product::<usize>(), values.len(), "size of {name}");
        array.data = ArrayData::F64(values.iter().copied().map(f64::from).collect());
        let shape = array.shape.iter().map(|n| *n as u64).collect();
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.stored.insert(name, moec_abi::DType::F32, shape, bytes).expect("the bytes fit");
    }

    /// Sets a weight of integers.
    ///
    /// # Panics
    /// As [`set_weight`](Self::set_weight).
    pub fn set_weight_ints(&mut self, name: &str, values: &[i32]) {
        let array = self.weights.0.get_mut(name).expect("the weight exists");
        assert_eq!(array.shape.iter().product::<usize>(), values.len(), "size of {name}");
        array.data = ArrayData::I64(values.iter().copied().map(i64::from).collect());
        let shape = array.shape.iter().map(|n| *n as u64).collect();
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.stored.insert(name, moec_abi::DType::I32, shape, bytes).expect("the bytes fit");
    }

    /// Values of an input.
    ///
    /// # Panics
    /// When the graph has no such input.
    pub fn input(&self, name: &str) -> Vec<f32> {
        #[expect(clippy::cast_possible_truncation, reason = "they were f32")]
        self.arrays[name].floats().iter().map(|v| *v as f32).collect()
    }

    /// What the interpreter says.
    ///
    /// # Errors
    /// As [`interpret`].
    pub fn expected(&self, graph: &Graph) -> Result<Results, moec_ir::interp::InterpError> {
        let options = Options { rounding: Rounding::Model, ..Options::default() };
        let found = interpret(graph, &self.arrays, &self.weights, options)?;
        Ok(found.into_iter().map(|(name, array)| (name, array.floats())).collect())
    }
}

/// A compiled graph on a device.
pub struct Compiled {
    /// What was compiled.
    pub artefact: moec::Artefact,
    model: Model,
}

impl Compiled {
    /// Compiles a graph for one target.
    ///
    /// # Errors
    /// As [`Compiler::compile_graph`].
    pub fn new(graph: &Graph, target: Target, device: Arc<dyn Device>) -> Result<Self, Error> {
        let compiler = Compiler { targets: vec![target], outputs: Vec::new(), ..Compiler::default() };
        let artefact = compiler.compile_graph(&graph.name, graph.clone())?;
        let model = Model::new(Arc::new(artefact.load()?), device);
        Ok(Self { artefact, model })
    }

    /// The program of the only form.
    pub fn program(&self) -> &Program {
        &self.artefact.manifest.programs[0]
    }

    /// The layer with these weights.
    ///
    /// # Errors
    /// As [`Model::layer`].
    pub fn layer(&self, data: &Data) -> Result<Layer, Error> {
        Ok(self.model.layer(0, &data.stored)?)
    }

    /// Binds the weights and runs.
    ///
    /// # Errors
    /// The weights do not fit, or the device failed.
    pub fn run(&self, data: &Data) -> Result<Results, Error> {
        run(&self.layer(data)?, data)
    }
}

/// Runs a layer on the inputs of the data.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// When a result does not fit into memory.
pub fn run(layer: &Layer, data: &Data) -> Result<Results, Error> {
    let buffers = layer.outputs()?;
    let mut results: Vec<Vec<u8>> = buffers
        .iter()
        .map(|b| {
            let size = b.shape.iter().fold(b.dtype.bytes(), |n, d| n * d.eval(data.tokens).unwrap_or(0));
            // A result that a kernel forgets to write shall not look like zeros.
            vec![0xff; usize::try_from(size).expect("small")]
        })
        .collect();
    let inputs: Vec<&[u8]> = data.inputs.iter().map(Vec::as_slice).collect();
    layer.launch(data.tokens, &inputs, &mut results.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())?;
    let named = buffers.iter().zip(&results).filter_map(|(buffer, bytes)| {
        let BufferKind::Output { name } = &buffer.kind else { return None };
        Some((name.clone(), floats(buffer.dtype, bytes)))
    });
    Ok(named.collect())
}

fn floats(dtype: moec_abi::DType, bytes: &[u8]) -> Vec<f64> {
    use moec_abi::DType;
    match dtype {
        DType::I32 => bytes.as_chunks().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect(),
        DType::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect(),
        DType::F64 | DType::F32 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I64 => {
            bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
        }
    }
}

/// How far an element of a result may be from the interpreter's: ids not at all, others 3e-5 of the largest value.
pub fn limit(graph: &Graph, name: &str, wanted: &[f64]) -> f64 {
    // A value close to the middle of two narrow numbers may go either way.
    let rounds = graph.ids().into_iter().any(|id| graph.node(id).round.is_some());
    limit_within(graph, name, wanted, if rounds { 2e-2 } else { 3e-5 })
}

/// As [`limit`], with this share of the largest value.
pub(crate) fn limit_within(graph: &Graph, name: &str, wanted: &[f64], share: f64) -> f64 {
    let exact = graph.outputs.iter().any(|o| o.name == name && o.part == Part::Idx);
    let top = wanted.iter().fold(1e-30f64, |m, v| if v.is_finite() { m.max(v.abs()) } else { m });
    if exact { 0.0 } else { share * top }
}

/// Whether results agree, each element within its [`limit`].
///
/// # Errors
/// The first difference.
pub fn agree(graph: &Graph, found: &Results, expected: &Results) -> Result<(), String> {
    compare(found, expected, |name, wanted| limit(graph, name, wanted))
}

/// Whether results agree within a share of the largest value; ids exactly.
///
/// # Errors
/// The first difference.
pub fn agree_within(graph: &Graph, found: &Results, expected: &Results, share: f64) -> Result<(), String> {
    compare(found, expected, |name, wanted| limit_within(graph, name, wanted, share))
}

fn compare(found: &Results, expected: &Results, limit: impl Fn(&str, &[f64]) -> f64) -> Result<(), String> {
    for (name, wanted) in expected {
        let got = found.get(name).ok_or_else(|| format!("there is no result `{name}`"))?;
        let limit = limit(name, wanted);
        if got.len() != wanted.len() {
            return Err(format!("`{name}` has {} elements, {} are expected", got.len(), wanted.len()));
        }
        let differs = |g: f64, w: f64| g != w && (g.is_nan() != w.is_nan() || (g - w).abs() > limit);
        if let Some(i) = (0..got.len()).find(|i| differs(got[*i], wanted[*i])) {
            return Err(format!("`{name}`[{i}] is {}, expected {}", got[i], wanted[i]));
        }
    }
    Ok(())
}

/// Compiles a graph, runs it for each number of tokens and compares every result with the interpreter. What the
/// interpreter refuses, the program has to refuse.
///
/// # Errors
/// What differs.
pub fn check(graph: &Graph, target: Target, device: Arc<dyn Device>, tokens: &[u64]) -> Result<(), String> {
    let compiled = Compiled::new(graph, target, device).map_err(|e| e.to_string())?;
    for tokens in tokens {
        let data = data(graph, *tokens, *tokens, Numbers::Small);
        match (data.expected(graph), compiled.run(&data)) {
            (Ok(expected), Ok(found)) => agree(graph, &found, &expected),
            (Err(_), Err(_)) => Ok(()),
            (Ok(_), Err(error)) => Err(error.to_string()),
            (Err(error), Ok(_)) => Err(format!("runs, though {error}")),
        }
        .map_err(|e| format!("{e} ({tokens} tokens)"))?;
    }
    Ok(())
}

/// Number of tokens that the graph was written for, or another.
pub fn tokens_of(graph: &Graph, otherwise: u64) -> u64 {
    let lead = |id| {
        let Op::Input(input) = &graph.node(id).op else { return None };
        input.ty.shape.first().cloned()
    };
    graph.inputs().into_iter().find_map(lead).and_then(|d| d.known()).unwrap_or(otherwise)
}
