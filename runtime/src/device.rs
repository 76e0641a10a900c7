//! Devices: where a program runs.

use crate::error::{Code, Result, RuntimeError};
use moec_abi::Program;
#[cfg(any(feature = "cuda", feature = "sim"))]
use moec_abi::{Arg, BufferKind, TensorMap};
use std::{any::Any, sync::Arc};

/// Files of an artefact, by relative name.
pub trait Files {
    /// Content of a file.
    ///
    /// # Errors
    /// There is no such file, or it cannot be read.
    fn read(&self, name: &str) -> Result<Vec<u8>>;
}

/// Code of one program on one device.
pub trait Module: Any + Send + Sync {
    /// What was loaded, for people: kernels, bytes, variant.
    fn describe(&self) -> String;
}

/// One call of a program: addresses on the device, one for each buffer of the program.
pub struct Bound<'a> {
    /// The program.
    pub program: &'a Program,
    /// Number of tokens.
    pub tokens: u64,
    /// Address of each buffer.
    pub addresses: &'a [u64],
    /// Start of the workspace.
    pub workspace: u64,
    /// Bytes of the workspace.
    pub workspace_bytes: u64,
}

/// A place where programs run. Addresses are those of the device.
pub trait Device: Send + Sync {
    /// Name on the command line: `cpu`, `sim`, `cuda:0`.
    fn name(&self) -> String;

    /// Whether code for this target runs here, and why not.
    ///
    /// # Errors
    /// The reason, for people.
    fn runs(&self, target: &str) -> Result<(), String>;

    /// How good a target is among those that run; the largest is taken.
    fn rank(&self, target: &str) -> u32;

    /// Loads the code of a program.
    ///
    /// # Errors
    /// The code is missing, damaged, or refused by the device.
    fn load(&self, program: &Program, files: &dyn Files) -> Result<Arc<dyn Module>>;

    /// `bytes` of memory, aligned to 256 bytes, content undefined.
    ///
    /// # Errors
    /// Memory ran out.
    fn allocate(&self, bytes: u64) -> Result<u64>;

    /// Gives memory back.
    ///
    /// # Safety
    /// `address` and `bytes` are those of an [`allocate`](Self::allocate) that nobody uses any more.
    unsafe fn free(&self, address: u64, bytes: u64);

    /// Copies to the device; done when it returns.
    ///
    /// # Safety
    /// The range lies in memory of this device that nobody uses at the same time.
    ///
    /// # Errors
    /// The device failed.
    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()>;

    /// Copies from the device after all launches so far.
    ///
    /// # Safety
    /// The range lies in memory of this device that was written.
    ///
    /// # Errors
    /// The device failed.
    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()>;

    /// Runs all launches of a program. With `times`, waits and adds the nanoseconds of each launch.
    ///
    /// # Safety
    /// `module` was loaded from the program, and the addresses are valid for the sizes of its buffers.
    ///
    /// # Errors
    /// The device refused or failed.
    unsafe fn launch(&self, module: &dyn Module, bound: &Bound<'_>, times: Option<&mut Vec<u64>>) -> Result<()>;

    /// Waits until all launches are done.
    ///
    /// # Errors
    /// A launch failed.
    fn synchronize(&self) -> Result<()>;

    /// Whether addresses are those of this process, so that callers' memory needs no copy.
    fn shares_memory(&self) -> bool {
        false
    }

    /// The device as one that runs PTX of other producers, if it does.
    #[cfg(feature = "sim")]
    fn machine(&self) -> Option<Box<dyn moec_sim::case::Machine + '_>> {
        None
    }
}

/// Memory of a device, given back when dropped.
pub struct Memory {
    device: Arc<dyn Device>,
    address: u64,
    bytes: u64,
}

impl Memory {
    /// `bytes` of memory of `device`.
    ///
    /// # Errors
    /// Memory ran out.
    pub fn new(device: &Arc<dyn Device>, bytes: u64) -> Result<Self> {
        let address = device.allocate(bytes.max(1))?;
        Ok(Self { device: Arc::clone(device), address, bytes: bytes.max(1) })
    }

    /// First address.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    fn range(&self, offset: u64, len: usize) -> Result<u64> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.bytes) {
            let message = format!("bytes {offset}..+{len} of a block of {}", self.bytes);
            return Err(RuntimeError::new(Code::Argument, message));
        }
        Ok(self.address + offset)
    }

    /// Writes from `offset` on.
    ///
    /// # Errors
    /// Outside of the block, or the device failed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let address = self.range(offset, bytes.len())?;
        // SAFETY: the range lies in this block, which is borrowed exclusively.
        unsafe { self.device.write(address, bytes) }
    }

    /// Reads from `offset` on.
    ///
    /// # Errors
    /// Outside of the block, or the device failed.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let address = self.range(offset, bytes.len())?;
        // SAFETY: the range lies in this block.
        unsafe { self.device.read(address, bytes) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the block came from `allocate`, and its owner goes.
        unsafe { self.device.free(self.address, self.bytes) };
    }
}

/// A kernel argument with its value.
#[cfg(any(feature = "cuda", feature = "sim"))]
pub(crate) enum Value<'a> {
    /// A 64-bit word.
    Word(u64),
    /// A tensor map over a buffer at this address.
    Map {
        /// How the copy sees the buffer.
        map: &'a TensorMap,
        /// Address of the buffer.
        address: u64,
    },
}

pub(crate) fn overflow(what: &str) -> RuntimeError {
    RuntimeError::new(Code::Tokens, format!("a size of {what} does not fit in 64 bits"))
}

/// Values of the arguments of a launch.
#[cfg(any(feature = "cuda", feature = "sim"))]
pub(crate) fn values<'a>(bound: &Bound<'_>, launch: &'a moec_abi::Launch) -> Result<Vec<Value<'a>>> {
    let address = |buffer: usize| {
        let message = || RuntimeError::new(Code::Artefact, format!("launch {}: no buffer {buffer}", launch.name));
        bound.addresses.get(buffer).copied().ok_or_else(message)
    };
    let eval = |e: &moec_abi::Expr| e.eval(bound.tokens).ok_or_else(|| overflow(&launch.name));
    launch
        .args
        .iter()
        .map(|arg| {
            Ok(match arg {
                Arg::Buffer(buffer) => Value::Word(address(*buffer)?),
                Arg::Offset { buffer, bytes } => {
                    Value::Word(address(*buffer)?.checked_add(eval(bytes)?).ok_or_else(|| overflow(&launch.name))?)
                }
                Arg::Value(value) => Value::Word(eval(value)?),
                Arg::TensorMap(map) => Value::Map { map, address: address(map.buffer)? },
            })
        })
        .collect()
}

/// Places and lengths of the parts of the workspace that start as zeros.
#[cfg(any(feature = "cuda", feature = "sim"))]
pub(crate) fn zeroed(bound: &Bound<'_>) -> Result<Vec<(u64, u64)>> {
    let mut parts = Vec::new();
    for (buffer, address) in bound.program.buffers.iter().zip(bound.addresses) {
        if buffer.zeroed && buffer.kind == BufferKind::Workspace {
            parts.push((*address, buffer_bytes(buffer, bound.tokens)?));
        }
    }
    Ok(parts)
}

/// Bytes of a buffer for `tokens`.
pub(crate) fn buffer_bytes(buffer: &moec_abi::Buffer, tokens: u64) -> Result<u64> {
    let size = |n: u64, s: &moec_abi::Expr| n.checked_mul(s.eval(tokens)?);
    buffer.shape.iter().try_fold(buffer.dtype.bytes(), size).ok_or_else(|| overflow(&buffer.name))
}

/// Blocks of a grid for `tokens`.
#[cfg(any(feature = "cuda", feature = "sim"))]
pub(crate) fn grid(shape: &moec_abi::GpuGrid, tokens: u64, name: &str) -> Result<[u32; 3]> {
    let mut blocks = [0; 3];
    let [first, last] = shape.tokens;
    if !(first..=last).contains(&tokens) {
        return Ok(blocks);
    }
    // x reaches to 2^31 - 1, y and z to 65535.
    for ((out, expr), limit) in blocks.iter_mut().zip(&shape.blocks).zip([0x7fff_ffff, 0xffff, 0xffff]) {
        let value = expr.eval(tokens).ok_or_else(|| overflow(name))?;
        *out = u32::try_from(value).ok().filter(|&n| n <= limit).ok_or_else(|| {
            RuntimeError::new(Code::Tokens, format!("launch {name}: {value} blocks; a GPU takes at most {limit}"))
        })?;
    }
    Ok(blocks)
}
