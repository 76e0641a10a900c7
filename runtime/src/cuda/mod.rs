//! An NVIDIA GPU as a device, through the CUDA driver, which is loaded at run time.
//!
//! Launches of a layer go to one stream without waiting, so that a host can capture them in a graph.
//! After an error that ends the context every call answers with that error at once; a new
//! [`Cuda`] after all old ones are gone starts afresh.

mod driver;
#[cfg(feature = "sim")]
mod foreign;
mod launch;
mod load;

use crate::{
    device::{Bound, Device, Files, Module},
    error::{Code, Result, RuntimeError},
    target::{gpu_number, gpu_rank},
};
use driver::{Driver, Handle, OLDEST, is_sticky, version};
use moec_abi::Program;
use std::{
    ffi::{CStr, c_int, c_void},
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

/// A GPU with one stream.
pub struct Cuda {
    context: Arc<Context>,
    stream: Handle,
    /// The stream was made here and is destroyed here.
    owns_stream: bool,
}

// SAFETY: handles of the driver may be used from any thread once the context is current there.
unsafe impl Send for Cuda {}
// SAFETY: as above; the driver locks what needs locking.
unsafe impl Sync for Cuda {}

/// The device's context; alive as long as modules need it.
struct Context {
    driver: Driver,
    ordinal: c_int,
    device: c_int,
    context: Handle,
    name: String,
    capability: u32,
    driver_version: c_int,
    /// The error that ended the context.
    lost: Mutex<Option<RuntimeError>>,
}

// SAFETY: as for `Cuda`.
unsafe impl Send for Context {}
// SAFETY: as for `Cuda`.
unsafe impl Sync for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context was retained by `open`.
        unsafe { (self.driver.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

impl Context {
    fn open(ordinal: u32) -> Result<Self> {
        let driver = Driver::load()?;
        let check = |what: &str, result: c_int| match result {
            0 => Ok(()),
            _ => Err(RuntimeError::new(Code::Driver, format!("{what}: {}", driver.name(result)))),
        };
        let mut found = 0;
        // SAFETY: `found` is a place for a number; this function works before `cuInit`.
        check("the driver does not tell its version", unsafe { (driver.cuDriverGetVersion)(&raw mut found) })?;
        if found < OLDEST {
            let (found, oldest) = (version(found), version(OLDEST));
            let message = format!("the CUDA driver supports CUDA {found}; this runtime needs CUDA {oldest} or newer");
            return Err(RuntimeError::new(Code::Driver, message).with_help("update the NVIDIA driver"));
        }
        // SAFETY: the argument must be 0.
        let status = unsafe { (driver.cuInit)(0) };
        check("the CUDA driver does not start", status).map_err(|e| match status {
            100 => RuntimeError::new(Code::Device, "no CUDA device in this machine, or none is visible")
                .with_help("check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu or --device sim"),
            803 => e.with_help("kernel module and driver library have different versions: restart the machine"),
            _ => e.with_help("check that nvidia-smi works"),
        })?;
        let mut count = 0;
        // SAFETY: `count` is a place for a number.
        check("the driver does not count devices", unsafe { (driver.cuDeviceGetCount)(&raw mut count) })?;
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        if ordinal >= count {
            let message = format!("no CUDA device {ordinal}; this machine has {count}");
            return Err(RuntimeError::new(Code::Device, message).with_help("devices count from 0: cuda:0"));
        }
        let mut device = 0;
        // SAFETY: `device` is a place for a number; the ordinal is in range.
        check("the device cannot be opened", unsafe { (driver.cuDeviceGet)(&raw mut device, ordinal) })?;
        let mut text = [0; 128];
        // SAFETY: `text` has room for 128 bytes.
        check("the device has no name", unsafe { (driver.cuDeviceGetName)(text.as_mut_ptr(), 128, device) })?;
        // SAFETY: the driver writes a text that ends with a zero.
        let name = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned();
        let mut numbers = [0; 2];
        // Attributes 75 and 76: major and minor of the compute capability.
        for (number, attribute) in numbers.iter_mut().zip([75, 76]) {
            // SAFETY: `number` is a place for a number.
            let status = unsafe { (driver.cuDeviceGetAttribute)(ptr::from_mut(number), attribute, device) };
            check("the device does not tell its compute capability", status)?;
        }
        let capability = (numbers[0] * 10 + numbers[1]).unsigned_abs();
        let mut context = ptr::null_mut();
        // SAFETY: `context` is a place for a handle.
        let status = unsafe { (driver.cuDevicePrimaryCtxRetain)(&raw mut context, device) };
        check(&format!("{name}: no context"), status).map_err(|mut e| {
            e.code = Code::Device;
            e.with_help("another process may use the device exclusively, or its memory may be full")
        })?;
        let lost = Mutex::new(None);
        Ok(Self { driver, ordinal, device, context, name, capability, driver_version: found, lost })
    }

    /// Makes the context current for this thread, unless it is lost.
    fn enter(&self) -> Result<&Driver> {
        if let Some(error) = self.lost.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            return Err(error.clone());
        }
        // SAFETY: the context is retained.
        self.check("the context", unsafe { (self.driver.cuCtxSetCurrent)(self.context) })?;
        Ok(&self.driver)
    }

    fn check(&self, what: &str, result: c_int) -> Result<()> {
        if result == 0 {
            return Ok(());
        }
        let message = format!("{} (cuda:{}), {what}: {}", self.name, self.ordinal, self.driver.name(result));
        let error = match result {
            2 => RuntimeError::new(Code::Memory, message),
            900..=909 => RuntimeError::new(Code::Argument, message)
                .with_help("allocate and copy before the capture of a graph begins"),
            _ => RuntimeError::new(Code::Launch, message),
        };
        if is_sticky(result) {
            let error = error.with_help("the context is lost: drop the model and the device, then open it again");
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
            return Err(error);
        }
        Err(error)
    }
}

impl Cuda {
    /// Device `ordinal` with a stream of its own.
    ///
    /// # Errors
    /// No driver, one that is too old, or no such device; the error names the versions on both sides.
    pub fn open(ordinal: u32) -> Result<Self> {
        let context = Arc::new(Context::open(ordinal)?);
        let mut stream = ptr::null_mut();
        let driver = context.enter()?;
        // SAFETY: `stream` is a place for a handle; 1 means that it does not wait for the default stream.
        context.check("no stream", unsafe { (driver.cuStreamCreate)(&raw mut stream, 1) })?;
        Ok(Self { context, stream, owns_stream: true })
    }

    /// The same device with a stream of the host.
    ///
    /// # Safety
    /// `stream` is a `CUstream` of the device's primary context and outlives the result.
    pub unsafe fn on_stream(&self, stream: *mut c_void) -> Self {
        Self { context: Arc::clone(&self.context), stream, owns_stream: false }
    }

    /// Name of the device, such as `NVIDIA H200`.
    pub fn device_name(&self) -> &str {
        &self.context.name
    }

    /// Compute capability times ten: 90 for sm_90.
    pub fn capability(&self) -> u32 {
        self.context.capability
    }

    /// CUDA version that the driver supports, such as `12.4`.
    pub fn driver_version(&self) -> String {
        version(self.context.driver_version)
    }

    /// Records what `launches` launches on this device instead of running it.
    ///
    /// Memory must be allocated before: run the same call once outside.
    ///
    /// # Errors
    /// What `launches` answers, or the device failed.
    pub fn capture(&self, launches: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let context = &self.context;
        let driver = context.enter()?;
        // SAFETY: the stream is alive; 1 means that only calls of this thread are watched.
        context.check("no capture", unsafe { (driver.cuStreamBeginCapture_v2)(self.stream, 1) })?;
        let launched = launches();
        let mut graph = ptr::null_mut();
        // SAFETY: a capture is under way on the stream; `graph` is a place for a handle.
        let ended = unsafe { (driver.cuStreamEndCapture)(self.stream, &raw mut graph) };
        let graph = RawGraph { context: Arc::clone(context), graph };
        launched?;
        context.check("the capture failed", ended)?;
        let mut exec = ptr::null_mut();
        // SAFETY: the graph is complete; `exec` is a place for a handle.
        let status = unsafe { (driver.cuGraphInstantiateWithFlags)(&raw mut exec, graph.graph, 0) };
        context.check("the graph cannot be made ready", status)?;
        Ok(Graph { context: Arc::clone(context), exec, stream: self.stream })
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.owns_stream {
            // SAFETY: the stream was made by `open`; its launches end before it goes.
            unsafe {
                (self.context.driver.cuCtxSetCurrent)(self.context.context);
                (self.context.driver.cuStreamSynchronize)(self.stream);
                (self.context.driver.cuStreamDestroy_v2)(self.stream);
            }
        }
    }
}

struct RawGraph {
    context: Arc<Context>,
    graph: Handle,
}

impl Drop for RawGraph {
    fn drop(&mut self) {
        if !self.graph.is_null() {
            // SAFETY: the graph came from a capture.
            unsafe { (self.context.driver.cuGraphDestroy)(self.graph) };
        }
    }
}

/// Recorded launches that run with one call. The layer and its memory must outlive it, and so must the device.
pub struct Graph {
    context: Arc<Context>,
    exec: Handle,
    stream: Handle,
}

// SAFETY: as for `Cuda`.
unsafe impl Send for Graph {}

impl Graph {
    /// Runs the launches, without waiting.
    ///
    /// # Safety
    /// All memory that was recorded, and the device, are still alive.
    ///
    /// # Errors
    /// The device failed.
    pub unsafe fn launch(&self) -> Result<()> {
        let driver = self.context.enter()?;
        // SAFETY: the graph is ready; the caller vouches for what it uses.
        self.context.check("the graph", unsafe { (driver.cuGraphLaunch)(self.exec, self.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle came from `capture`.
        unsafe { (self.context.driver.cuGraphExecDestroy)(self.exec) };
    }
}

impl Device for Cuda {
    fn name(&self) -> String {
        format!("cuda:{}", self.context.ordinal)
    }

    fn runs(&self, target: &str) -> Result<(), String> {
        let (here, name) = (self.context.capability, &self.context.name);
        match gpu_number(target) {
            Some((number, true)) if number == here => Ok(()),
            Some((number, false)) if number <= here => Ok(()),
            Some(_) => Err(format!("{name} is sm_{here}")),
            None => Err("it is not code for a GPU".into()),
        }
    }

    fn rank(&self, target: &str) -> u32 {
        gpu_rank(target)
    }

    fn load(&self, program: &Program, files: &dyn Files) -> Result<Arc<dyn Module>> {
        load::load(&self.context, program, files)
    }

    fn allocate(&self, bytes: u64) -> Result<u64> {
        let driver = self.context.enter()?;
        let mut address = 0;
        let size = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
        // SAFETY: `address` is a place for an address.
        let status = unsafe { (driver.cuMemAlloc_v2)(&raw mut address, size) };
        if status == 2 {
            let (mut free, mut total) = (0, 0);
            // SAFETY: both are places for sizes.
            unsafe { (driver.cuMemGetInfo_v2)(&raw mut free, &raw mut total) };
            let mib = |n: u64| n.div_ceil(1 << 20);
            let message = format!(
                "{} (cuda:{}): no {} MiB of device memory; {} MiB of {} MiB are free",
                self.context.name,
                self.context.ordinal,
                mib(bytes),
                mib(free as u64),
                mib(total as u64)
            );
            return Err(RuntimeError::new(Code::Memory, message)
                .with_help("use fewer layers or tokens, or free memory of other processes"));
        }
        self.context.check("memory", status)?;
        Ok(address)
    }

    unsafe fn free(&self, address: u64, _bytes: u64) {
        if let Ok(driver) = self.context.enter() {
            // SAFETY: the caller passes an address of `allocate`; the driver waits for launches that use it.
            unsafe { (driver.cuMemFree_v2)(address) };
        }
    }

    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let driver = self.context.enter()?;
        // SAFETY: the caller vouches for the range; the bytes live until the copy is done, below.
        let status = unsafe { (driver.cuMemcpyHtoDAsync_v2)(address, bytes.as_ptr().cast(), bytes.len(), self.stream) };
        self.context.check("copy to the device", status)?;
        self.synchronize()
    }

    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let driver = self.context.enter()?;
        // SAFETY: the caller vouches for the range; the bytes are borrowed until the copy is done, below.
        let status =
            unsafe { (driver.cuMemcpyDtoHAsync_v2)(bytes.as_mut_ptr().cast(), address, bytes.len(), self.stream) };
        self.context.check("copy from the device", status)?;
        self.synchronize()
    }

    unsafe fn launch(&self, module: &dyn Module, bound: &Bound<'_>, times: Option<&mut Vec<u64>>) -> Result<()> {
        // SAFETY: as the caller vouches.
        unsafe { launch::launch(&self.context, self.stream, module, bound, times) }
    }

    fn synchronize(&self) -> Result<()> {
        let driver = self.context.enter()?;
        // SAFETY: the stream is alive.
        self.context.check("a launch failed", unsafe { (driver.cuStreamSynchronize)(self.stream) })
    }

    #[cfg(feature = "sim")]
    fn machine(&self) -> Option<Box<dyn moec_sim::case::Machine + '_>> {
        Some(Box::new(foreign::Foreign::new(self)))
    }
}
