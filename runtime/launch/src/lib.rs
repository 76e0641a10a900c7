//! Runs compiled programs on CPU threads, and views stored tensors; `core` and libc only.
//!
//! The same code serves `moec-runtime` and, compiled on its own, every generated C library.
//! [`program`] reads the words that `moec-abi` encodes, [`pool`] holds the threads, and [`run`](mod@run)
//! walks the launches. Results do not depend on the number of threads: kernels do items, and an item
//! is done the same way whoever does it.
#![no_std]

#[path = "../../abi/src/format.rs"]
pub mod format;
#[cfg(unix)]
pub mod pool;
pub mod program;
#[cfg(unix)]
pub mod run;
pub mod status;
#[cfg(unix)]
mod sys;
pub mod view;

/// C type of a CPU kernel; see the type of the same name in `moec-abi`.
pub type CpuKernel = unsafe extern "C" fn(args: *const u64, begin: u64, end: u64, scratch: *mut core::ffi::c_void);
