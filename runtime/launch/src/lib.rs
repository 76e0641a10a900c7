//! Runs compiled programs on CPU threads, and views stored tensors; `core` and libc only.
//!
//! The same code serves `moec-runtime` and, compiled on its own, every generated C library.
//! [`program`] reads the words that `moec-abi` encodes, [`pool`] holds the threads, and [`run`](mod@run)
//! walks the launches. Results do not depend on the number of threads: kernels do items, and an item
//! is done the same way whoever does it.
//!
//! Compiled with `--cfg moec_standalone` it is the launcher object of a C library; see `README.md`.
#![no_std]

#[cfg(unix)]
pub mod capi;
#[path = "../../abi/src/format.rs"]
pub mod format;
pub mod pack;
#[cfg(unix)]
pub mod pool;
pub mod processor;
pub mod program;
#[cfg(unix)]
pub mod run;
pub mod status;
#[cfg(unix)]
mod sys;
pub mod view;

/// C type of a CPU kernel; see the type of the same name in `moec-abi`.
pub type CpuKernel = unsafe extern "C" fn(args: *const u64, begin: u64, end: u64, scratch: *mut core::ffi::c_void);

/// Nothing here panics; should a check of the language fail all the same, the thread stops where it is
/// instead of taking the host down.
#[cfg(moec_standalone)]
#[panic_handler]
fn stop(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
