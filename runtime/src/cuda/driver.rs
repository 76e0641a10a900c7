//! The functions of the CUDA driver that we call, looked up one by one.
//!
//! Results are plain numbers here: a newer driver may return a code that no enumeration knows yet.
//! A missing library or function is an error value, never a panic.

use crate::error::{Code, Result, RuntimeError};
use cudarc::driver::sys::{self, CUlaunchConfig, CUtensorMap};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// Opaque things of the driver.
pub(super) type Handle = *mut c_void;

/// Oldest driver that has all functions and features that generated code uses.
pub(super) const OLDEST: c_int = 12_000;

macro_rules! driver {
    ($($name:ident($($arg:ty),*);)*) => {
        /// Functions of the driver.
        #[allow(non_snake_case, reason = "names are those of the driver")]
        pub(super) struct Driver {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl Driver {
            fn find() -> std::result::Result<Self, &'static str> {
                // SAFETY: `load` has found the library.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    $($name: {
                        // SAFETY: the type is the one that the driver documents.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> c_int>(stringify!($name).as_bytes()) };
                        *found.map_err(|_| stringify!($name))?
                    },)*
                })
            }
        }
    };
}

driver! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetName(*mut c_char, c_int, c_int);
    cuDeviceGetAttribute(*mut c_int, c_int, c_int);
    cuDevicePrimaryCtxRetain(*mut Handle, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuCtxSetCurrent(Handle);
    cuGetErrorName(c_int, *mut *const c_char);
    cuModuleLoadDataEx(*mut Handle, *const c_void, c_uint, *mut c_int, *mut *mut c_void);
    cuModuleUnload(Handle);
    cuModuleGetFunction(*mut Handle, Handle, *const c_char);
    cuFuncSetAttribute(Handle, c_int, c_int);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, Handle);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, Handle);
    cuMemsetD8Async(u64, u8, usize, Handle);
    cuStreamCreate(*mut Handle, c_uint);
    cuStreamDestroy_v2(Handle);
    cuStreamSynchronize(Handle);
    cuStreamBeginCapture_v2(Handle, c_int);
    cuStreamEndCapture(Handle, *mut Handle);
    cuGraphInstantiateWithFlags(*mut Handle, Handle, u64);
    cuGraphLaunch(Handle, Handle);
    cuGraphDestroy(Handle);
    cuGraphExecDestroy(Handle);
    cuEventCreate(*mut Handle, c_uint);
    cuEventDestroy_v2(Handle);
    cuEventRecord(Handle, Handle);
    cuEventSynchronize(Handle);
    cuEventElapsedTime(*mut f32, Handle, Handle);
    cuLaunchKernelEx(*const CUlaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
    cuTensorMapEncodeTiled(
        *mut CUtensorMap, c_int, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32,
        c_int, c_int, c_int, c_int
    );
}

/// `12.4` for 12040.
pub(super) fn version(number: c_int) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

impl Driver {
    /// Loads the driver's library.
    pub(super) fn load() -> Result<Self> {
        // SAFETY: opens the driver's library, which has no requirement.
        if !unsafe { sys::is_culib_present() } {
            return Err(RuntimeError::new(Code::Driver, "no CUDA driver: libcuda.so.1 was not found")
                .with_help("install the NVIDIA driver, or use --device cpu or --device sim"));
        }
        Self::find().map_err(|name| {
            let oldest = version(OLDEST);
            RuntimeError::new(Code::Driver, format!("the CUDA driver has no {name}; drivers for CUDA {oldest} have it"))
                .with_help("update the NVIDIA driver")
        })
    }

    /// The driver's name of a result.
    pub(super) fn name(&self, result: c_int) -> String {
        let mut text = std::ptr::null();
        // SAFETY: `text` is a place for a pointer.
        let status = unsafe { (self.cuGetErrorName)(result, &raw mut text) };
        if status != 0 || text.is_null() {
            return format!("CUDA error {result}");
        }
        // SAFETY: the driver gives a static text.
        let name = unsafe { CStr::from_ptr(text) };
        format!("{} ({result})", name.to_string_lossy())
    }
}

/// Results that end a context: every later call on it fails too.
pub(super) const fn is_sticky(result: c_int) -> bool {
    // Uncorrectable memory and link errors, illegal addresses and instructions, timeouts, traps, asserts, unknown.
    matches!(result, 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 999)
}
