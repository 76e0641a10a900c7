//! PTX of other producers on the device: one module, one launch, and memory that goes with it.

use super::{
    Cuda,
    launch::{Encoding, attributes, encode},
    load::{allow, function, image},
};
use crate::{
    device::Device as _,
    error::{Code, RuntimeError},
};
use cudarc::driver::sys::CUlaunchConfig;
use moec_sim::{Arg, Launch, MapType, Module, Swizzle, TensorMapDesc, case::Machine};
use std::{ffi::c_void, ptr};

/// The device for one case after another; frees all memory at its end.
pub(super) struct Foreign<'a> {
    cuda: &'a Cuda,
    memory: Vec<(u64, u64)>,
}

impl<'a> Foreign<'a> {
    pub(super) const fn new(cuda: &'a Cuda) -> Self {
        Self { cuda, memory: Vec::new() }
    }
}

impl Drop for Foreign<'_> {
    fn drop(&mut self) {
        for (address, bytes) in self.memory.drain(..) {
            // SAFETY: the block was allocated by `alloc`, and every launch has been awaited.
            unsafe { self.cuda.free(address, bytes) };
        }
    }
}

fn text(error: RuntimeError) -> String {
    error.message
}

/// Bytes of an argument, aligned for any of its types.
fn value(arg: &Arg) -> Result<Vec<u64>, RuntimeError> {
    let bytes = arg.bytes().map_err(|e| RuntimeError::new(Code::Argument, e.to_string()))?;
    let word = |part: &[u8]| part.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
    Ok(bytes.chunks(8).map(word).collect())
}

/// The map in numbers of the driver's enumerations.
fn encoding(map: &TensorMapDesc) -> Encoding {
    let dtype = match map.dtype {
        MapType::U8 => 0,
        MapType::U16 => 1,
        MapType::U32 => 2,
        MapType::S32 => 3,
        MapType::U64 => 4,
        MapType::S64 => 5,
        MapType::F16 => 6,
        MapType::F32 => 7,
        MapType::F64 => 8,
        MapType::Bf16 => 9,
        MapType::Tf32 => 11,
    };
    let swizzle = match map.swizzle {
        Swizzle::None => 0,
        Swizzle::B32 => 1,
        Swizzle::B64 => 2,
        Swizzle::B128 => 3,
    };
    let steps = if map.element_strides.is_empty() { vec![1; map.dims.len()] } else { map.element_strides.clone() };
    Encoding {
        dtype,
        base: map.base,
        dims: map.dims.clone(),
        strides: map.strides.clone(),
        box_dims: map.box_dims.clone(),
        steps,
        swizzle,
    }
}

impl Machine for Foreign<'_> {
    fn alloc(&mut self, bytes: u64, align: u64) -> Result<u64, String> {
        if align > 256 {
            return Err(format!("memory at a multiple of {align}; the driver gives multiples of 256"));
        }
        let address = self.cuda.allocate(bytes).map_err(text)?;
        self.memory.push((address, bytes));
        Ok(address)
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), String> {
        // SAFETY: the case writes to memory that `alloc` gave, and no launch is under way.
        unsafe { self.cuda.write(address, data) }.map_err(text)
    }

    fn read(&mut self, address: u64, bytes: u64) -> Result<Vec<u8>, String> {
        let mut out = vec![0; usize::try_from(bytes).map_err(|e| e.to_string())?];
        // SAFETY: the case reads memory that `alloc` gave and that was written before the launch.
        unsafe { self.cuda.read(address, &mut out) }.map_err(text)?;
        Ok(out)
    }

    fn launch(&mut self, ptx: &str, launch: &Launch<'_>) -> Result<(), String> {
        let context = &self.cuda.context;
        let driver = context.enter().map_err(text)?;
        let mut bytes = ptx.as_bytes().to_vec();
        bytes.push(0);
        let module = image(context, &bytes).map_err(|(status, log)| {
            let name = context.driver.name(status);
            format!("{} does not load the PTX: {name} {log}", context.name)
        })?;
        let run = || {
            let kernel = function(context, module, launch.entry)?;
            allow(context, kernel, launch.dynamic_shared, launch.cluster, launch.entry)?;
            let mut words: Vec<Vec<u64>> = Vec::new();
            let mut maps = Vec::new();
            for arg in &launch.args {
                match arg {
                    Arg::TensorMap(map) => maps.push(encode(context, &encoding(map))?),
                    Arg::U64(_)
                    | Arg::I64(_)
                    | Arg::U32(_)
                    | Arg::I32(_)
                    | Arg::U16(_)
                    | Arg::U8(_)
                    | Arg::F32(_)
                    | Arg::F64(_)
                    | Arg::Bytes(_) => words.push(value(arg)?),
                }
            }
            let (mut next_word, mut next_map) = (words.iter_mut(), maps.iter_mut());
            let mut params: Vec<*mut c_void> = launch
                .args
                .iter()
                .filter_map(|arg| match arg {
                    Arg::TensorMap(_) => next_map.next().map(|m| m.pointer()),
                    Arg::U64(_)
                    | Arg::I64(_)
                    | Arg::U32(_)
                    | Arg::I32(_)
                    | Arg::U16(_)
                    | Arg::U8(_)
                    | Arg::F32(_)
                    | Arg::F64(_)
                    | Arg::Bytes(_) => next_word.next().map(|w| w.as_mut_ptr().cast()),
                })
                .collect();
            // A cluster that the kernel itself requires must not be given again.
            let own = Module::parse(ptx).ok().and_then(|m| {
                m.entries().into_iter().find(|e| e.name == launch.entry).and_then(|e| e.required_cluster)
            });
            let cluster = if own.is_some() { [1; 3] } else { launch.cluster };
            let mut attributes = attributes(cluster, false);
            let config = CUlaunchConfig {
                gridDimX: launch.grid[0],
                gridDimY: launch.grid[1],
                gridDimZ: launch.grid[2],
                blockDimX: launch.block[0],
                blockDimY: launch.block[1],
                blockDimZ: launch.block[2],
                sharedMemBytes: launch.dynamic_shared,
                hStream: self.cuda.stream.cast(),
                attrs: attributes.as_mut_ptr(),
                numAttrs: attributes.len() as u32,
            };
            // SAFETY: the parameters live until the driver has copied them; that kernel and arguments fit is what
            // the case vouches for, and a kernel that is wrong harms nothing but the context.
            let status =
                unsafe { (driver.cuLaunchKernelEx)(&raw const config, kernel, params.as_mut_ptr(), ptr::null_mut()) };
            context.check(launch.entry, status)?;
            self.cuda.synchronize()
        };
        let done = run().map_err(text);
        // SAFETY: the module was loaded above and its launch has been awaited.
        unsafe { (driver.cuModuleUnload)(module) };
        done
    }
}
