//! Loads the code of a program: the ahead-of-time binary if it fits, else PTX.

use super::{Context, driver::Handle, driver::version};
use crate::{
    device::{Files, Module},
    error::{Code, Result, RuntimeError},
};
use moec_abi::{Grid, Program};
use std::{
    collections::BTreeMap,
    ffi::{CString, c_int, c_void},
    ptr,
    sync::Arc,
};

/// Dynamic shared memory that a kernel may use without asking, in bytes.
const FREE_SHARED: u32 = 48 * 1024;
/// Blocks of a cluster that every device with clusters takes.
const PORTABLE_CLUSTER: u32 = 8;

/// Attributes of functions by their numbers in the driver's enumeration.
const ATTRIBUTE_MAX_DYNAMIC_SHARED: c_int = 8;
const ATTRIBUTE_NON_PORTABLE_CLUSTER: c_int = 14;
/// Options of the PTX compiler by their numbers.
const OPTION_ERROR_LOG: c_int = 5;
const OPTION_ERROR_LOG_BYTES: c_int = 6;

/// Code on a GPU.
pub(super) struct CudaModule {
    context: Arc<Context>,
    module: Handle,
    functions: BTreeMap<String, Handle>,
    about: String,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for CudaModule {}
// SAFETY: as above.
unsafe impl Sync for CudaModule {}

impl Module for CudaModule {
    fn describe(&self) -> String {
        self.about.clone()
    }
}

impl CudaModule {
    pub(super) fn function(&self, symbol: &str) -> Option<Handle> {
        self.functions.get(symbol).copied()
    }
}

impl Drop for CudaModule {
    fn drop(&mut self) {
        if let Ok(driver) = self.context.enter() {
            // SAFETY: the module was loaded and its functions go with it.
            unsafe { (driver.cuModuleUnload)(self.module) };
        }
    }
}

/// The version after `.version` of a PTX text.
fn ptx_version(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let found = text.lines().find_map(|line| line.trim().strip_prefix(".version"));
    found.map_or_else(|| "unknown".into(), |v| v.trim().to_owned())
}

/// Loads an image; the second value of an error is what the driver's compiler said.
pub(super) fn image(context: &Context, bytes: &[u8]) -> std::result::Result<Handle, (c_int, String)> {
    let mut log = vec![0u8; 8192];
    let mut options = [OPTION_ERROR_LOG, OPTION_ERROR_LOG_BYTES];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), ptr::without_provenance_mut(log.len() - 1)];
    let mut module = ptr::null_mut();
    // SAFETY: the image ends with a zero byte, which text needs and binaries ignore; options and values
    // are two each, and the log has the room that they say.
    let status = unsafe {
        (context.driver.cuModuleLoadDataEx)(
            &raw mut module,
            bytes.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    if status == 0 {
        return Ok(module);
    }
    let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
    Err((status, String::from_utf8_lossy(&log[..end]).trim().to_owned()))
}

fn refused(context: &Context, program: &Program, file: &str, bytes: &[u8], status: c_int, log: &str) -> RuntimeError {
    let (driver, here) = (version(context.driver_version), context.capability);
    let ptx = ptx_version(bytes);
    let inside = format!("{file} holds code for {}, PTX version {ptx}", program.target);
    let at = format!("{} is sm_{here}, its driver supports CUDA {driver}", context.name);
    let error = |code, what: &str| RuntimeError::new(code, format!("{what}: {inside}; {at}"));
    match status {
        222 => error(Code::Driver, "the PTX is too new for the driver")
            .with_help("update the NVIDIA driver, or compile with --target for an older one"),
        200 | 209 => error(Code::Target, "no code for this GPU")
            .with_help(format!("compile with --target sm_{here}{}", if here >= 90 { "a" } else { "" })),
        218 => {
            let log = if log.is_empty() { String::new() } else { format!("; the driver says: {log}") };
            RuntimeError::new(Code::CodeObject, format!("the driver refuses the PTX: {inside}; {at}{log}"))
        }
        2 => error(Code::Memory, "no memory for the code"),
        _ => {
            let name = context.driver.name(status);
            error(Code::CodeObject, &format!("the code cannot be loaded ({name})"))
        }
    }
}

pub(super) fn load(context: &Arc<Context>, program: &Program, files: &dyn Files) -> Result<Arc<dyn Module>> {
    context.enter()?;
    let mut loaded = None;
    let mut note = String::new();
    if let Some(binary) = &program.binary {
        let mut bytes = files.read(binary)?;
        bytes.push(0);
        match image(context, &bytes) {
            Ok(module) => loaded = Some((module, binary)),
            // Made for another GPU, or damaged: the PTX may still do.
            Err((status @ (200 | 209 | 300 | 218), _)) => {
                note = format!("; {binary} was not taken: {}", context.driver.name(status));
            }
            Err((status, _)) => context.check(&format!("loading {binary}"), status)?,
        }
    }
    let (module, file) = match loaded {
        Some(loaded) => loaded,
        None => {
            let mut bytes = files.read(&program.code)?;
            bytes.push(0);
            let module = image(context, &bytes).map_err(|(status, log)| {
                // A lost context is remembered.
                let _ = context.check("loading code", status);
                refused(context, program, &program.code, &bytes, status, &log)
            })?;
            (module, &program.code)
        }
    };
    let about = format!("{} kernels from {file} on {}{note}", program.launches.len(), context.name);
    let mut loaded = CudaModule { context: Arc::clone(context), module, functions: BTreeMap::new(), about };
    for launch in &program.launches {
        let Grid::Gpu(grid) = &launch.grid else {
            return Err(RuntimeError::new(Code::Artefact, format!("launch {} is for a CPU", launch.name)));
        };
        let function = function(context, module, &launch.symbol).map_err(|e| match e.code {
            Code::CodeObject => RuntimeError::new(
                Code::CodeObject,
                format!("{file} does not define {}, the kernel of {}", launch.symbol, launch.name),
            ),
            _ => e,
        })?;
        allow(context, function, grid.shared, grid.cluster, &launch.name)?;
        loaded.functions.insert(launch.symbol.clone(), function);
    }
    Ok(Arc::new(loaded))
}

/// A kernel of a module; `CodeObject` if there is none of this name.
pub(super) fn function(context: &Context, module: Handle, name: &str) -> Result<Handle> {
    let symbol = CString::new(name)
        .map_err(|_| RuntimeError::new(Code::Artefact, format!("kernel {name:?}: a name with a zero")))?;
    let mut function = ptr::null_mut();
    // SAFETY: `function` is a place for a handle, the symbol ends with a zero.
    let status = unsafe { (context.driver.cuModuleGetFunction)(&raw mut function, module, symbol.as_ptr()) };
    if status == 500 {
        return Err(RuntimeError::new(Code::CodeObject, format!("there is no kernel {name}")));
    }
    context.check(name, status)?;
    Ok(function)
}

/// Asks for what a kernel may not have without asking: much shared memory, large clusters.
pub(super) fn allow(context: &Context, function: Handle, shared: u32, cluster: [u32; 3], name: &str) -> Result<()> {
    if shared > FREE_SHARED {
        let bytes = c_int::try_from(shared).unwrap_or(c_int::MAX);
        // SAFETY: the function is loaded.
        let status = unsafe { (context.driver.cuFuncSetAttribute)(function, ATTRIBUTE_MAX_DYNAMIC_SHARED, bytes) };
        if status == 1 {
            let message = format!("launch {name}: {} does not have {bytes} bytes of shared memory", context.name);
            return Err(RuntimeError::new(Code::Target, message));
        }
        context.check(name, status)?;
    }
    if cluster.iter().product::<u32>() > PORTABLE_CLUSTER {
        // SAFETY: the function is loaded.
        let status = unsafe { (context.driver.cuFuncSetAttribute)(function, ATTRIBUTE_NON_PORTABLE_CLUSTER, 1) };
        context.check(name, status)?;
    }
    Ok(())
}
