//! A model on a device, and its layers with bound weights.

use crate::{
    artefact::Artefact,
    device::{Bound, Device, Memory, Module, buffer_bytes, overflow},
    error::{Code, Result, RuntimeError},
    pack::pack,
    tensors::Tensors,
};
use moec_abi::{Buffer, BufferKind, DType, Program, format};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// An artefact on a device. Code is loaded once for each program and shared by its layers.
pub struct Model {
    artefact: Arc<Artefact>,
    device: Arc<dyn Device>,
    modules: Mutex<BTreeMap<usize, Arc<dyn Module>>>,
}

/// One layer: a program, its code, and the packed weights on the device.
pub struct Layer {
    artefact: Arc<Artefact>,
    program: usize,
    number: u64,
    device: Arc<dyn Device>,
    module: Arc<dyn Module>,
    weights: Memory,
    offsets: Vec<u64>,
    scratch: Mutex<Scratch>,
}

/// Memory that calls with host data use again.
#[derive(Default)]
struct Scratch {
    workspace: Option<Memory>,
    staging: BTreeMap<usize, Memory>,
}

/// Nanoseconds of one launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchTime {
    /// Name of the kernel op.
    pub name: String,
    /// Nanoseconds.
    pub nanoseconds: u64,
}

impl Model {
    /// A model whose layers run on `device`.
    pub fn new(artefact: Arc<Artefact>, device: Arc<dyn Device>) -> Self {
        Self { artefact, device, modules: Mutex::new(BTreeMap::new()) }
    }

    /// The artefact.
    pub const fn artefact(&self) -> &Arc<Artefact> {
        &self.artefact
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The program that serves `layer` here, and the prefix of its tensors.
    ///
    /// # Errors
    /// As [`Artefact::choose`].
    pub fn program(&self, layer: u64) -> Result<(usize, &Program, &str)> {
        let index = self.artefact.choose(layer, &*self.device)?.program;
        let program = self.artefact.program(index)?;
        let place = program.layers.iter().position(|&l| l == layer);
        let prefix = place.and_then(|p| program.prefixes.get(p)).map_or("", String::as_str);
        Ok((index, program, prefix))
    }

    fn module(&self, index: usize, program: &Program) -> Result<Arc<dyn Module>> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&index) {
            return Ok(Arc::clone(module));
        }
        let module = self.device.load(program, &*self.artefact)?;
        modules.insert(index, Arc::clone(&module));
        Ok(module)
    }

    /// Loads the code of `layer` and packs its weights from checkpoint tensors.
    ///
    /// # Errors
    /// No program runs here, or the tensors do not fit.
    pub fn layer(&self, layer: u64, tensors: &dyn Tensors) -> Result<Layer> {
        let (index, program, prefix) = self.program(layer)?;
        let module = self.module(index, program)?;
        self.bind(layer, index, module, |slot, out| pack(&program.slots[slot], prefix, tensors, out))
    }

    /// Loads the code of `layer` and takes weights that [`packed_layer`] made.
    ///
    /// # Errors
    /// No program runs here, or the weights were packed for another one.
    pub fn layer_packed(&self, layer: u64, weights: &[u8]) -> Result<Layer> {
        let (index, program, _) = self.program(layer)?;
        let (offsets, total) = places(program)?;
        let word = |i: usize| {
            weights.get(8 * i..8 * i + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
        };
        let wanted = [format::WEIGHTS_MAGIC, moec_abi::fingerprint(&program.slots), total, program.slots.len() as u64];
        if weights.len() as u64 != total || wanted.iter().enumerate().any(|(i, &w)| word(i) != w) {
            let message = format!("layer {layer}: the weights were packed for another program");
            return Err(
                RuntimeError::new(Code::FileForm, message).with_help("pack the weights again for this artefact")
            );
        }
        let module = self.module(index, program)?;
        self.bind(layer, index, module, |slot, out| {
            let start = offsets[slot] as usize;
            out.copy_from_slice(&weights[start..start + out.len()]);
            Ok(())
        })
    }

    /// A layer with code that the caller loaded: for kernels of this process.
    ///
    /// # Safety
    /// The module was made from the program that [`program`](Self::program) names for this layer.
    ///
    /// # Errors
    /// As [`layer`](Self::layer).
    pub unsafe fn layer_with(&self, layer: u64, module: Arc<dyn Module>, tensors: &dyn Tensors) -> Result<Layer> {
        let (index, program, prefix) = self.program(layer)?;
        self.bind(layer, index, module, |slot, out| pack(&program.slots[slot], prefix, tensors, out))
    }

    fn bind(
        &self,
        number: u64,
        index: usize,
        module: Arc<dyn Module>,
        fill: impl Fn(usize, &mut [u8]) -> Result<()>,
    ) -> Result<Layer> {
        let program = self.artefact.program(index)?;
        let (offsets, total) = places(program)?;
        let mut weights = Memory::new(&self.device, total)?;
        for (i, (slot, &offset)) in program.slots.iter().zip(&offsets).enumerate() {
            let bytes = usize::try_from(slot.bytes).map_err(|_| overflow(&slot.name))?;
            if self.device.shares_memory() {
                let start = std::ptr::with_exposed_provenance_mut::<u8>((weights.address() + offset) as usize);
                // SAFETY: the slot lies in the block, which is memory of this process and borrowed by nobody
                // else. Its bytes need no value: every bit pattern is a byte, and `fill` writes all of them.
                fill(i, unsafe { std::slice::from_raw_parts_mut(start, bytes) })?;
            } else {
                let mut packed = vec![0; bytes];
                fill(i, &mut packed)?;
                weights.write(offset, &packed)?;
            }
        }
        Ok(Layer {
            artefact: Arc::clone(&self.artefact),
            program: index,
            number,
            device: Arc::clone(&self.device),
            module,
            weights,
            offsets,
            scratch: Mutex::default(),
        })
    }
}

fn places(program: &Program) -> Result<(Vec<u64>, u64)> {
    moec_abi::weight_offsets(&program.slots).ok_or_else(|| overflow("the weights"))
}

/// The packed weights of a layer as a host of the C library binds them: a header page, then each slot at a page.
///
/// # Errors
/// The tensors do not fit.
pub fn packed_layer(program: &Program, prefix: &str, tensors: &dyn Tensors) -> Result<Vec<u8>> {
    let (offsets, total) = places(program)?;
    let mut out = vec![0; usize::try_from(total).map_err(|_| overflow("the weights"))?];
    let header = [format::WEIGHTS_MAGIC, moec_abi::fingerprint(&program.slots), total, program.slots.len() as u64];
    out.as_chunks_mut::<8>().0.iter_mut().zip(header).for_each(|(o, word)| *o = word.to_le_bytes());
    for (i, (slot, offset)) in program.slots.iter().zip(offsets).enumerate() {
        let start = offset as usize;
        pack(slot, prefix, tensors, &mut out[start..start + slot.bytes as usize])?;
        if let Some(flag) = out.get_mut(format::WEIGHTS_FLAGS + i).filter(|_| i < format::MAX_SLOTS) {
            *flag = 1;
        }
    }
    Ok(out)
}

fn is_input(buffer: &Buffer) -> bool {
    match buffer.kind {
        BufferKind::Input { .. } => true,
        BufferKind::Output { .. } | BufferKind::Weight { .. } | BufferKind::Workspace => false,
    }
}

fn is_output(buffer: &Buffer) -> bool {
    match buffer.kind {
        BufferKind::Output { .. } => true,
        BufferKind::Input { .. } | BufferKind::Weight { .. } | BufferKind::Workspace => false,
    }
}

impl Layer {
    /// The program.
    ///
    /// # Errors
    /// Never for a layer that was bound.
    pub fn program(&self) -> Result<&Program> {
        self.artefact.program(self.program)
    }

    /// Number of the layer in the model.
    pub const fn number(&self) -> u64 {
        self.number
    }

    /// What was loaded, for people.
    pub fn describe(&self) -> String {
        self.module.describe()
    }

    /// Bytes of packed weights on the device.
    pub const fn weights_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Inputs in the order in which they are passed.
    ///
    /// # Errors
    /// As [`program`](Self::program).
    pub fn inputs(&self) -> Result<Vec<&Buffer>> {
        Ok(self.program()?.buffers.iter().filter(|b| is_input(b)).collect())
    }

    /// Outputs in the order in which they are passed.
    ///
    /// # Errors
    /// As [`program`](Self::program).
    pub fn outputs(&self) -> Result<Vec<&Buffer>> {
        Ok(self.program()?.buffers.iter().filter(|b| is_output(b)).collect())
    }

    /// Bytes of workspace for `tokens`.
    ///
    /// # Errors
    /// More tokens than the program was compiled for.
    pub fn workspace_bytes(&self, tokens: u64) -> Result<u64> {
        let program = self.program()?;
        if tokens > program.max_tokens {
            let message = format!("{tokens} tokens; the program was compiled for at most {}", program.max_tokens);
            return Err(RuntimeError::new(Code::Tokens, message).with_help("call it for parts of the tokens"));
        }
        program.workspace.eval(tokens).ok_or_else(|| overflow("the workspace"))
    }

    /// Runs the layer on host data, and waits. Inputs and outputs are little-endian elements, row by row,
    /// in the order of [`inputs`](Self::inputs) and [`outputs`](Self::outputs).
    ///
    /// # Errors
    /// Sizes that do not go with `tokens`, too many tokens, or a failure of the device.
    pub fn launch(&self, tokens: u64, inputs: &[&[u8]], outputs: &mut [&mut [u8]]) -> Result<()> {
        self.run(tokens, inputs, outputs, None)
    }

    /// As [`launch`](Self::launch), with the time of each launch.
    ///
    /// # Errors
    /// As `launch`.
    pub fn launch_timed(&self, tokens: u64, inputs: &[&[u8]], outputs: &mut [&mut [u8]]) -> Result<Vec<LaunchTime>> {
        let mut times = Vec::new();
        self.run(tokens, inputs, outputs, Some(&mut times))?;
        let launches = &self.program()?.launches;
        Ok(launches
            .iter()
            .zip(times)
            .map(|(l, nanoseconds)| LaunchTime { name: l.name.clone(), nanoseconds })
            .collect())
    }

    fn check(&self, tokens: u64, inputs: &[&[u8]], outputs: &[&mut [u8]]) -> Result<()> {
        if let Some(fit) = self.program()?.fits.iter().find(|fit| !fit.holds(tokens)) {
            let message = format!("{tokens} tokens do not fit {}", fit.what);
            return Err(RuntimeError::new(Code::Tokens, message).with_help("call it for another number of tokens"));
        }
        let count = |what: &str, got: usize, needed: usize| {
            if got == needed {
                return Ok(());
            }
            Err(RuntimeError::new(Code::Argument, format!("{got} {what}s were passed, the program has {needed}")))
        };
        count("input", inputs.len(), self.inputs()?.len())?;
        count("output", outputs.len(), self.outputs()?.len())?;
        let lengths = inputs.iter().map(|i| i.len()).chain(outputs.iter().map(|o| o.len()));
        for (buffer, got) in self.inputs()?.into_iter().chain(self.outputs()?).zip(lengths) {
            let needed = buffer_bytes(buffer, tokens)?;
            if got as u64 != needed {
                let message = format!("{}: {got} bytes were passed, {tokens} tokens need {needed}", buffer.name);
                return Err(RuntimeError::new(Code::Argument, message));
            }
        }
        self.check_values(inputs)
    }

    /// Classes and ids must be such as the layer knows.
    fn check_values(&self, inputs: &[&[u8]]) -> Result<()> {
        let program = self.program()?;
        for domain in &program.domains {
            let before = program.buffers.iter().take(domain.buffer).filter(|b| is_input(b)).count();
            let (Some(bytes), Some(buffer)) = (inputs.get(before), program.buffers.get(domain.buffer)) else {
                continue;
            };
            let values: Vec<i64> = match buffer.dtype {
                DType::I32 => bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
                DType::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
                DType::F64
                | DType::F32
                | DType::Bf16
                | DType::F16
                | DType::F8e4m3
                | DType::F8e5m2
                | DType::U8
                | DType::I8 => Vec::new(),
            };
            let unknown = |v: &&i64| !domain.ranges.iter().any(|[low, high]| (low..=high).contains(v));
            let found = values.iter().enumerate().find(|(_, v)| unknown(v));
            if let Some((at, value)) = found {
                let ranges: Vec<String> = domain
                    .ranges
                    .iter()
                    .map(|[low, high]| if low == high { low.to_string() } else { format!("{low} to {high}") })
                    .collect();
                let message = format!("{}: entry {at} is {value}; {} is needed", buffer.name, domain.what);
                return Err(RuntimeError::new(Code::Argument, message)
                    .with_help(format!("the values are {}", ranges.join(", "))));
            }
        }
        Ok(())
    }

    fn run(
        &self,
        tokens: u64,
        inputs: &[&[u8]],
        outputs: &mut [&mut [u8]],
        times: Option<&mut Vec<u64>>,
    ) -> Result<()> {
        let workspace_bytes = self.workspace_bytes(tokens)?;
        self.check(tokens, inputs, outputs)?;
        let program = self.program()?;
        if program.writes_nothing(tokens) {
            return Ok(());
        }
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let Scratch { workspace, staging } = &mut *scratch;
        let workspace = room(workspace, &self.device, workspace_bytes)?.address();
        let direct = |pointer: *const u8, buffer: &Buffer| {
            let aligned = (pointer.addr() as u64).is_multiple_of(buffer.dtype.bytes());
            self.device.shares_memory() && aligned
        };
        let mut addresses = vec![0; program.buffers.len()];
        let (mut next_input, mut next_output) = (inputs.iter(), outputs.iter_mut());
        let mut back = Vec::new();
        for (i, buffer) in program.buffers.iter().enumerate() {
            addresses[i] = match buffer.kind {
                BufferKind::Input { .. } => {
                    let Some(bytes) = next_input.next() else { continue };
                    if direct(bytes.as_ptr(), buffer) {
                        bytes.as_ptr().expose_provenance() as u64
                    } else {
                        let memory = stage(staging, i, &self.device, bytes.len() as u64)?;
                        memory.write(0, bytes)?;
                        memory.address()
                    }
                }
                BufferKind::Output { .. } => {
                    let Some(bytes) = next_output.next() else { continue };
                    if direct(bytes.as_ptr(), buffer) {
                        bytes.as_mut_ptr().expose_provenance() as u64
                    } else {
                        let address = stage(staging, i, &self.device, bytes.len() as u64)?.address();
                        back.push((i, bytes));
                        address
                    }
                }
                BufferKind::Weight { .. } | BufferKind::Workspace => continue,
            };
        }
        // SAFETY: inputs and outputs are as long as the program says, checked above; the workspace has its size.
        unsafe { self.launch_at(tokens, &mut addresses, workspace, workspace_bytes, times)? };
        if !self.device.shares_memory() {
            self.device.synchronize()?;
        }
        for (i, bytes) in back {
            if let Some(memory) = staging.get(&i) {
                memory.read(0, bytes)?;
            }
        }
        Ok(())
    }

    /// Runs the layer on memory of the device, without waiting: for hosts that keep activations there.
    ///
    /// `addresses` has an entry for each buffer of the program; those of inputs and outputs are read,
    /// the others are filled in.
    ///
    /// # Safety
    /// The addresses are valid on the device for the sizes that the program gives for `tokens`, until the
    /// launches are done.
    ///
    /// # Errors
    /// Too many tokens, or a failure of the device.
    pub unsafe fn launch_at(
        &self,
        tokens: u64,
        addresses: &mut [u64],
        workspace: u64,
        workspace_bytes: u64,
        times: Option<&mut Vec<u64>>,
    ) -> Result<()> {
        let program = self.program()?;
        let needed = self.workspace_bytes(tokens)?;
        if program.writes_nothing(tokens) {
            return Ok(());
        }
        if workspace_bytes < needed {
            let message = format!("{workspace_bytes} bytes of workspace, {tokens} tokens need {needed}");
            return Err(RuntimeError::new(Code::Argument, message));
        }
        if addresses.len() != program.buffers.len() {
            return Err(RuntimeError::new(Code::Argument, "there must be one address for each buffer"));
        }
        for (address, buffer) in addresses.iter_mut().zip(&program.buffers) {
            let outside = || RuntimeError::new(Code::Artefact, format!("buffer {} lies outside", buffer.name));
            match buffer.kind {
                BufferKind::Input { .. } | BufferKind::Output { .. } => {}
                BufferKind::Weight { slot } => {
                    *address = self.weights.address() + self.offsets.get(slot).ok_or_else(outside)?;
                }
                BufferKind::Workspace => {
                    let offset = buffer.offset.eval(tokens).ok_or_else(|| overflow(&buffer.name))?;
                    let end = offset.checked_add(buffer_bytes(buffer, tokens)?);
                    if end.is_none_or(|end| end > needed) {
                        return Err(outside());
                    }
                    *address = workspace + offset;
                }
            }
        }
        let bound = Bound { program, tokens, addresses, workspace, workspace_bytes };
        // SAFETY: the caller vouches for inputs and outputs; weights and workspace were placed above.
        unsafe { self.device.launch(&*self.module, &bound, times) }
    }
}

/// A block of at least `bytes`, made anew when it is too small.
fn room<'a>(block: &'a mut Option<Memory>, device: &Arc<dyn Device>, bytes: u64) -> Result<&'a mut Memory> {
    if block.as_ref().is_none_or(|b| b.bytes() < bytes) {
        // The old one first, so that both need not fit.
        *block = None;
        *block = Some(Memory::new(device, bytes)?);
    }
    block.as_mut().ok_or_else(|| RuntimeError::new(Code::Memory, "no workspace"))
}

fn stage<'a>(
    staging: &'a mut BTreeMap<usize, Memory>,
    index: usize,
    device: &Arc<dyn Device>,
    bytes: u64,
) -> Result<&'a mut Memory> {
    if staging.get(&index).is_none_or(|b| b.bytes() < bytes) {
        staging.remove(&index);
        staging.insert(index, Memory::new(device, bytes)?);
    }
    staging.get_mut(&index).ok_or_else(|| RuntimeError::new(Code::Memory, "no staging memory"))
}
