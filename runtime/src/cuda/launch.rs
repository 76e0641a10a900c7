//! Launches a program on a stream.

use super::{Context, driver::Handle, load::CudaModule};
use crate::{
    device::{Bound, Module, Value, grid, overflow, values, zeroed},
    error::{Code, Result, RuntimeError},
};
use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUtensorMap,
};
use moec_abi::{DType, GpuGrid, Grid, TensorMap};
use std::{
    any::Any,
    ffi::{c_int, c_void},
    ptr,
    sync::Arc,
};

/// An event that goes with its value.
struct Event<'a> {
    context: &'a Context,
    event: Handle,
}

impl<'a> Event<'a> {
    fn record(context: &'a Context, stream: Handle) -> Result<Self> {
        let mut event = ptr::null_mut();
        // SAFETY: `event` is a place for a handle; 0 means that it takes the time.
        context.check("an event", unsafe { (context.driver.cuEventCreate)(&raw mut event, 0) })?;
        let event = Self { context, event };
        // SAFETY: event and stream are alive.
        context.check("an event", unsafe { (context.driver.cuEventRecord)(event.event, stream) })?;
        Ok(event)
    }

    fn nanoseconds_to(&self, end: &Self) -> Result<u64> {
        let mut milliseconds = 0f32;
        // SAFETY: both events are recorded.
        self.context.check("a launch failed", unsafe { (self.context.driver.cuEventSynchronize)(end.event) })?;
        // SAFETY: as above; `milliseconds` is a place for a number.
        let status = unsafe { (self.context.driver.cuEventElapsedTime)(&raw mut milliseconds, self.event, end.event) };
        self.context.check("the time of a launch", status)?;
        Ok((f64::from(milliseconds) * 1e6) as u64)
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // SAFETY: the event was made by `record`.
        unsafe { (self.context.driver.cuEventDestroy_v2)(self.event) };
    }
}

/// A kernel argument in memory of its own, which must not move before the launch.
#[repr(C, align(64))]
pub(super) struct Aligned(CUtensorMap);

impl Aligned {
    pub(super) const fn pointer(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }
}

/// A tensor map in numbers of the driver.
pub(super) struct Encoding {
    pub(super) dtype: c_int,
    pub(super) base: u64,
    pub(super) dims: Vec<u64>,
    pub(super) strides: Vec<u64>,
    pub(super) box_dims: Vec<u32>,
    pub(super) steps: Vec<u32>,
    pub(super) swizzle: c_int,
}

/// The 128 bytes of a map.
pub(super) fn encode(context: &Context, map: &Encoding) -> Result<Box<Aligned>> {
    let Encoding { dtype, base, dims, strides, box_dims, steps, swizzle } = map;
    let rank = dims.len();
    if !(1..=5).contains(&rank) || strides.len() + 1 != rank || box_dims.len() != rank || steps.len() != rank {
        let what = format!("{rank} axes, {} strides and a box of {} axes", strides.len(), box_dims.len());
        return Err(RuntimeError::new(Code::Artefact, format!("a tensor map with {what}")));
    }
    let mut out = Box::new(Aligned(CUtensorMap { opaque: [0; 16] }));
    // SAFETY: all arrays have as many entries as the rank needs, and the result is aligned to 64 bytes.
    let status = unsafe {
        (context.driver.cuTensorMapEncodeTiled)(
            &raw mut out.0,
            *dtype,
            rank as u32,
            ptr::without_provenance_mut(*base as usize),
            dims.as_ptr(),
            strides.as_ptr(),
            box_dims.as_ptr(),
            steps.as_ptr(),
            0,
            *swizzle,
            // Promotion of reads to 256 bytes in the second-level cache.
            3,
            0,
        )
    };
    context.check(&format!("a tensor map of {dims:?}, strides {strides:?}, box {box_dims:?}"), status)?;
    Ok(out)
}

fn tensor_map(context: &Context, map: &TensorMap, base: u64, tokens: u64) -> Result<Box<Aligned>> {
    let eval = |e: &moec_abi::Expr| e.eval(tokens).ok_or_else(|| overflow("a tensor map"));
    // Numbers of the driver's enumerations.
    let dtype = match map.dtype {
        DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 => 0,
        DType::I32 => 3,
        DType::I64 => 5,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::Bf16 => 9,
    };
    let swizzle = match map.swizzle {
        0 => 0,
        32 => 1,
        64 => 2,
        128 => 3,
        other => {
            return Err(RuntimeError::new(Code::Artefact, format!("a tensor map with a swizzle of {other} bytes")));
        }
    };
    let dims = map.dims.iter().map(eval).collect::<Result<Vec<_>>>()?;
    let strides = map.strides.iter().map(eval).collect::<Result<Vec<_>>>()?;
    let steps = vec![1; dims.len()];
    encode(context, &Encoding { dtype, base, dims, strides, box_dims: map.box_dims.clone(), steps, swizzle })
}

pub(super) fn attributes(cluster: [u32; 3], dependent: bool) -> Vec<CUlaunchAttribute> {
    let mut out = Vec::new();
    let mut add = |id, fill: &dyn Fn(&mut CUlaunchAttributeValue)| {
        let mut value = CUlaunchAttributeValue { pad: [0; 64] };
        fill(&mut value);
        out.push(CUlaunchAttribute { id, pad: [0; 4], value });
    };
    let [x, y, z] = cluster;
    if cluster != [1; 3] {
        add(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, &|value| {
            let dims = [x, y, z].map(u32::to_ne_bytes).concat();
            // SAFETY: every bit pattern is valid for the bytes of the union.
            let pad = unsafe { &mut value.pad };
            pad.iter_mut().zip(dims).for_each(|(p, b)| *p = b.cast_signed() as _);
        });
    }
    if dependent {
        add(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, &|value| {
            value.programmaticStreamSerializationAllowed = 1;
        });
    }
    out
}

/// Puts all launches of a program on a stream.
///
/// # Safety
/// As for `Device::launch`.
pub(super) unsafe fn launch(
    context: &Arc<Context>,
    stream: Handle,
    module: &dyn Module,
    bound: &Bound<'_>,
    mut times: Option<&mut Vec<u64>>,
) -> Result<()> {
    let module = (module as &dyn Any)
        .downcast_ref::<CudaModule>()
        .ok_or_else(|| RuntimeError::new(Code::Argument, "the module was loaded on another device"))?;
    let driver = context.enter()?;
    for (address, bytes) in zeroed(bound)? {
        let bytes = usize::try_from(bytes).map_err(|_| overflow("a buffer"))?;
        // SAFETY: the buffer lies in memory of the device, as the caller vouches.
        context.check("clearing the workspace", unsafe { (driver.cuMemsetD8Async)(address, 0, bytes, stream) })?;
    }
    for launch in &bound.program.launches {
        let shape = match &launch.grid {
            Grid::Gpu(shape) => shape,
            Grid::Cpu(_) => {
                return Err(RuntimeError::new(Code::Artefact, format!("launch {} is for a CPU", launch.name)));
            }
        };
        let start = if times.is_some() { Some(Event::record(context, stream)?) } else { None };
        let blocks = grid(shape, bound.tokens, &launch.name)?;
        // A grid without blocks is an error for the driver, and nothing to do for us.
        if blocks.iter().all(|&n| n > 0) {
            let function = module
                .function(&launch.symbol)
                .ok_or_else(|| RuntimeError::new(Code::Artefact, format!("launch {} was not loaded", launch.name)))?;
            let (mut words, mut maps) = (Vec::new(), Vec::new());
            // First all values, then their addresses: growing vectors move.
            let values = values(bound, launch)?;
            for value in &values {
                match value {
                    Value::Word(word) => words.push(*word),
                    Value::Map { map, address } => maps.push(tensor_map(context, map, *address, bound.tokens)?),
                }
            }
            let (mut next_word, mut next_map) = (words.iter_mut(), maps.iter_mut());
            let mut params: Vec<*mut c_void> = values
                .iter()
                .filter_map(|value| match value {
                    Value::Word(_) => next_word.next().map(|w| ptr::from_mut(w).cast()),
                    Value::Map { .. } => next_map.next().map(|m| m.pointer()),
                })
                .collect();
            let mut attributes = attributes(shape.cluster, shape.dependent);
            let config = CUlaunchConfig {
                gridDimX: blocks[0],
                gridDimY: blocks[1],
                gridDimZ: blocks[2],
                blockDimX: shape.threads[0],
                blockDimY: shape.threads[1],
                blockDimZ: shape.threads[2],
                sharedMemBytes: shape.shared,
                hStream: stream.cast(),
                attrs: attributes.as_mut_ptr(),
                numAttrs: attributes.len() as u32,
            };
            // SAFETY: the parameters live until the driver has copied them, which it does before it returns;
            // the caller vouches that kernel and addresses fit.
            let status =
                unsafe { (driver.cuLaunchKernelEx)(&raw const config, function, params.as_mut_ptr(), ptr::null_mut()) };
            check_launch(context, &launch.name, shape, blocks, status)?;
        }
        if let (Some(times), Some(start)) = (times.as_deref_mut(), start) {
            times.push(start.nanoseconds_to(&Event::record(context, stream)?)?);
        }
    }
    Ok(())
}

fn check_launch(context: &Context, name: &str, shape: &GpuGrid, blocks: [u32; 3], status: c_int) -> Result<()> {
    let what = || {
        format!(
            "launch {name} (blocks {blocks:?}, threads {:?}, cluster {:?}, {} bytes of shared memory)",
            shape.threads, shape.cluster, shape.shared
        )
    };
    if status == 0 { Ok(()) } else { context.check(&what(), status) }
}
