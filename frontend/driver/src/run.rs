//! Running one layer: inputs, launch, and the comparison with the reference.

use crate::{
    Error,
    reference::{self, Stored},
};
use half::{bf16, f16};
use moec_abi::{Buffer, BufferKind, DType, Expr, Program};
use moec_ir::Graph;
use moec_runtime::{Artefact, Device, Files as _, LaunchTime, Layer, Model, SafetensorsBytes, Tensors, packed_layer};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng as _, SeedableRng as _},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

pub use crate::{reference::Tensor, stored::Weights};

/// Inputs as a user names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Invented rows for this many tokens.
    Random(u64),
    /// A safetensors file with a tensor for each input, or with one tensor for the only one.
    File(PathBuf),
}

/// A layer with its weights, ready to run.
pub struct Prepared {
    layer: Layer,
    artefact: Arc<Artefact>,
    tensors: Box<dyn Tensors>,
    prefix: String,
    /// Which program was taken, and why, a line each.
    pub choice: Vec<String>,
    /// Time that loading code, reading weights and packing them took.
    pub bound_in: Duration,
}

/// What a launch gave.
#[derive(Clone, Debug)]
pub struct Launched {
    /// Outputs in the order of the program.
    pub outputs: Vec<Tensor>,
    /// Wall-clock time of the call.
    pub time: Duration,
    /// Time of each launch.
    pub launches: Vec<LaunchTime>,
}

/// How outputs compare with the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Largest difference of the output, relative to the largest expected value.
    pub max_rel: f64,
    /// Root mean square of the differences, relative to that of the expected values.
    pub rms_rel: f64,
    /// Limits on the two.
    pub limits: (f64, f64),
    /// Tokens that chose other experts, and all tokens, if the selection is an output.
    pub selection: Option<(u64, u64)>,
    /// Time that the reference took.
    pub time: Duration,
}

impl Comparison {
    /// Whether the output is within its limits.
    pub fn passed(&self) -> bool {
        self.max_rel <= self.limits.0 && self.rms_rel <= self.limits.1
    }
}

/// Chooses a program for `layer` (the first of the artefact if none is named) and binds its weights.
///
/// # Errors
/// No program runs on the device, or the weights do not fit.
pub fn prepare(
    artefact: &Arc<Artefact>,
    device: &Arc<dyn Device>,
    layer: Option<u64>,
    weights: &Weights,
) -> Result<Prepared, Error> {
    let first = artefact.manifest().programs.first().and_then(|p| p.layers.first()).copied();
    let number = layer.or(first).unwrap_or(0);
    let choice = artefact.choose(number, &**device)?.reasons;
    let model = Model::new(Arc::clone(artefact), Arc::clone(device));
    let (_, program, prefix) = model.program(number)?;
    let tensors = weights.open(program, prefix)?;
    let prefix = prefix.to_owned();
    let start = Instant::now();
    let layer = model.layer(number, &*tensors)?;
    let bound_in = start.elapsed();
    Ok(Prepared { layer, artefact: Arc::clone(artefact), tensors, prefix, choice, bound_in })
}

impl Prepared {
    /// The layer.
    pub const fn layer(&self) -> &Layer {
        &self.layer
    }

    /// The program that runs.
    ///
    /// # Errors
    /// Never for a layer that was bound.
    pub fn program(&self) -> Result<&Program, Error> {
        Ok(self.layer.program()?)
    }

    /// The weights.
    pub fn tensors(&self) -> &dyn Tensors {
        &*self.tensors
    }

    /// Prefix of the layer's tensors.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The packed weights, as the C library binds them on this machine.
    ///
    /// # Errors
    /// The tensors do not fit.
    pub fn packed_weights(&self) -> Result<Vec<u8>, Error> {
        Ok(packed_layer(self.program()?, &self.prefix, &*self.tensors)?)
    }

    /// Inputs for the program, and the number of tokens.
    ///
    /// # Errors
    /// The file cannot be read, or does not hold what the program needs.
    pub fn inputs(&self, input: &Input) -> Result<(u64, Vec<Tensor>), Error> {
        match input {
            Input::Random(tokens) => {
                let inputs: Result<_, Error> =
                    self.layer.inputs()?.into_iter().map(|b| random_input(b, *tokens, 0)).collect();
                Ok((*tokens, inputs?))
            }
            Input::File(path) => self.read_inputs(path),
        }
    }

    fn read_inputs(&self, path: &Path) -> Result<(u64, Vec<Tensor>), Error> {
        let shown = path.display();
        let bytes = std::fs::read(path)
            .map_err(|e| Error::File { path: shown.to_string(), message: format!("cannot be read: {e}") })?;
        let file = SafetensorsBytes::new(&bytes)?;
        let wanted = self.layer.inputs()?;
        let names = file.names();
        let mut tokens = None;
        let mut inputs = Vec::new();
        for buffer in &wanted {
            let name = interface_name(buffer);
            let only = (wanted.len() == 1 && names.len() == 1).then(|| names.first().map(String::as_str)).flatten();
            let stored = file.find(name).or_else(|| file.find(only?)).ok_or_else(|| {
                let help = format!("it holds {}", names.join(", "));
                Error::refused("E0821", format!("{shown} holds no tensor `{name}`, an input of the layer"), help)
            })?;
            if let (Some(Expr::Tokens), Some(rows)) = (buffer.shape.first(), stored.shape.first()) {
                tokens.get_or_insert(*rows);
            }
            let data = convert(&stored.read(0, stored.bytes())?, stored.dtype, buffer.dtype).ok_or_else(|| {
                let message = format!("`{name}` of {shown} is {:?}, the layer reads {:?}", stored.dtype, buffer.dtype);
                Error::refused("E0821", message, "convert the tensor")
            })?;
            inputs.push(Tensor {
                name: name.to_owned(),
                dtype: buffer.dtype,
                shape: stored.shape.clone(),
                bytes: data,
            });
        }
        let tokens = tokens.unwrap_or(1);
        for (buffer, tensor) in wanted.iter().zip(&inputs) {
            let shape = sizes(buffer, tokens)?;
            if shape != tensor.shape {
                let message =
                    format!("`{}` of {shown} has shape {:?}, the layer reads {shape:?}", tensor.name, tensor.shape);
                return Err(Error::refused("E0821", message, "the first side counts tokens"));
            }
        }
        Ok((tokens, inputs))
    }

    /// Runs the layer once.
    ///
    /// # Errors
    /// As [`Layer::launch`].
    pub fn launch(&self, tokens: u64, inputs: &[Tensor]) -> Result<Launched, Error> {
        let mut outputs = Vec::new();
        for buffer in self.layer.outputs()? {
            let shape = sizes(buffer, tokens)?;
            let bytes = elements(&shape).and_then(|n| n.checked_mul(buffer.dtype.bytes() as usize));
            // A result that a kernel forgets to write shall not look like zeros.
            let bytes = vec![0xff; bytes.ok_or_else(|| too_large(&buffer.name))?];
            outputs.push(Tensor { name: interface_name(buffer).to_owned(), dtype: buffer.dtype, shape, bytes });
        }
        let slices: Vec<&[u8]> = inputs.iter().map(|t| t.bytes.as_slice()).collect();
        let mut results: Vec<&mut [u8]> = outputs.iter_mut().map(|t| t.bytes.as_mut_slice()).collect();
        let start = Instant::now();
        let launches = self.layer.launch_timed(tokens, &slices, &mut results)?;
        Ok(Launched { outputs, time: start.elapsed(), launches })
    }

    /// The graph that the artefact keeps for the reference.
    ///
    /// # Errors
    /// The artefact has none.
    pub fn graph(&self) -> Result<Graph, Error> {
        let name = format!("graph/{}.moe", self.program()?.name);
        let text = self.artefact.read(&name)?;
        let text = String::from_utf8_lossy(&text);
        moec_ir::parse(&text).map_err(|d| Error::Input(vec![d]))
    }

    /// Computes `graph` with the interpreter on the same weights and compares.
    ///
    /// # Errors
    /// The reference has no value for these inputs.
    pub fn compare(&self, graph: &Graph, inputs: &[Tensor], outputs: &[Tensor]) -> Result<Comparison, Error> {
        let start = Instant::now();
        let stored = Stored { tensors: &*self.tensors, prefix: &self.prefix };
        let expected = reference::interpret(graph, inputs, &stored)?;
        let time = start.elapsed();
        let find = |name: &str| outputs.iter().find(|t| t.name == name);
        let numbers = |name: &str| expected.get(name).map(moec_ir::interp::Array::floats);
        let output = find("output").or_else(|| outputs.first());
        let (Some(output), Some(wanted)) = (output, output.and_then(|o| numbers(&o.name))) else {
            return Err(Error::refused("E0821", "the layer has no output to compare", "compile it with an output"));
        };
        let (max_rel, rms_rel) = moec_check::compare::difference(&output.numbers(), &wanted);
        // Those of the reference cases: what sums in 32 bits and one rounding at the end leave.
        let limits = match output.dtype {
            DType::F64 | DType::F32 => (2e-5, 5e-6),
            DType::Bf16 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => (3e-2, 1e-2),
            DType::U8 | DType::I8 | DType::I32 | DType::I64 => (0.0, 0.0),
        };
        let selection = match (find("topk_indices"), numbers("topk_indices")) {
            (Some(got), Some(wanted)) => {
                let rows = got.shape.first().copied().unwrap_or(0);
                Some((differing_sets(&got.numbers(), &wanted, rows), rows))
            }
            (Some(_), None) | (None, _) => None,
        };
        Ok(Comparison { max_rel, rms_rel, limits, selection, time })
    }
}

/// Rows whose set of ids differs.
fn differing_sets(got: &[f64], wanted: &[f64], rows: u64) -> u64 {
    let width = got.len() / usize::try_from(rows.max(1)).unwrap_or(1);
    if width == 0 || got.len() != wanted.len() {
        return if got.len() == wanted.len() { 0 } else { rows };
    }
    let sorted = |row: &[f64]| {
        let mut row = row.to_vec();
        row.sort_by(f64::total_cmp);
        row
    };
    let differ = got.chunks(width).zip(wanted.chunks(width)).filter(|(g, w)| sorted(g) != sorted(w));
    differ.count() as u64
}

/// Name of an input or output in the interface.
fn interface_name(buffer: &Buffer) -> &str {
    match &buffer.kind {
        BufferKind::Input { name } | BufferKind::Output { name } => name,
        BufferKind::Weight { .. } | BufferKind::Workspace => &buffer.name,
    }
}

fn too_large(name: &str) -> Error {
    Error::refused("E0822", format!("`{name}` does not fit into memory"), "use fewer tokens")
}

fn sizes(buffer: &Buffer, tokens: u64) -> Result<Vec<u64>, Error> {
    buffer.shape.iter().map(|d| d.eval(tokens)).collect::<Option<_>>().ok_or_else(|| too_large(&buffer.name))
}

fn elements(shape: &[u64]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, s| n.checked_mul(usize::try_from(*s).ok()?))
}

/// Values of an input that nobody gave: numbers around 0 with deviation 1, and small ids.
pub(crate) fn random_input(buffer: &Buffer, tokens: u64, seed: u64) -> Result<Tensor, Error> {
    let shape = sizes(buffer, tokens)?;
    let count = elements(&shape).filter(|n| *n <= 1 << 36).ok_or_else(|| too_large(&buffer.name))?;
    let name = interface_name(buffer).to_owned();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(count * buffer.dtype.bytes() as usize);
    for i in 0..count {
        let value = match buffer.dtype {
            DType::U8 | DType::I8 | DType::I32 | DType::I64 => f64::from(u32::try_from(i % 2).unwrap_or(0)),
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => {
                // The sum of four uniform numbers is close to normal.
                let bits = rng.next_u64();
                let sum: u32 = (0..4).map(|k| u32::from((bits >> (16 * k)) as u16)).sum();
                (f64::from(sum) / 65536.0 - 2.0) * 3f64.sqrt()
            }
        };
        put(buffer.dtype, value, &mut bytes).ok_or_else(|| {
            Error::refused("E0821", format!("no random values of type {:?} for `{name}`", buffer.dtype), "name a file")
        })?;
    }
    Ok(Tensor { name, dtype: buffer.dtype, shape, bytes })
}

/// Appends a value in a type, if numbers are written in it.
pub(crate) fn put(dtype: DType, value: f64, bytes: &mut Vec<u8>) -> Option<()> {
    #[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
    match dtype {
        DType::F64 => bytes.extend(value.to_le_bytes()),
        DType::F32 => bytes.extend((value as f32).to_le_bytes()),
        DType::Bf16 => bytes.extend(bf16::from_f64(value).to_le_bytes()),
        DType::F16 => bytes.extend(f16::from_f64(value).to_le_bytes()),
        DType::I32 => bytes.extend((value as i32).to_le_bytes()),
        DType::I64 => bytes.extend((value as i64).to_le_bytes()),
        DType::I8 => bytes.push((value as i8).cast_unsigned()),
        #[expect(clippy::cast_sign_loss, reason = "values are small and positive")]
        DType::U8 => bytes.push(value as u8),
        DType::F8e4m3 | DType::F8e5m2 => return None,
    }
    Some(())
}

/// Elements in another type, where nothing surprising happens: between floats, between ids.
fn convert(bytes: &[u8], from: DType, to: DType) -> Option<Vec<u8>> {
    let float = |d| matches!(d, DType::F64 | DType::F32 | DType::Bf16 | DType::F16);
    let id = |d| matches!(d, DType::I32 | DType::I64);
    if from == to {
        return Some(bytes.to_vec());
    }
    if !(float(from) && float(to) || id(from) && id(to)) {
        return None;
    }
    let mut out = Vec::new();
    moec_check::compare::floats(from, bytes).into_iter().try_for_each(|v| put(to, v, &mut out))?;
    Some(out)
}

/// Tensors as a safetensors file.
///
/// # Errors
/// Only by our bugs.
pub fn safetensors(tensors: &[Tensor]) -> Result<Vec<u8>, Error> {
    use safetensors::{Dtype, tensor::TensorView};
    let internal = |e: safetensors::SafeTensorError| Error::Internal(format!("writing tensors: {e}"));
    let mut views = BTreeMap::new();
    for tensor in tensors {
        let dtype = match tensor.dtype {
            DType::F64 => Dtype::F64,
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::F8e4m3 => Dtype::F8_E4M3,
            DType::F8e5m2 => Dtype::F8_E5M2,
            DType::U8 => Dtype::U8,
            DType::I8 => Dtype::I8,
            DType::I32 => Dtype::I32,
            DType::I64 => Dtype::I64,
        };
        let shape = tensor.shape.iter().map(|n| usize::try_from(*n).unwrap_or(usize::MAX)).collect();
        views.insert(tensor.name.clone(), TensorView::new(dtype, shape, &tensor.bytes).map_err(internal)?);
    }
    safetensors::serialize(views, None).map_err(internal)
}
