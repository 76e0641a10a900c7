//! The functions of a generated C library.
//!
//! Compiled on its own, this crate is the whole library but for two things that codegen adds: the
//! encoded program and the table of kernels. All names start with `moec_launch_`, which is replaced
//! by the name of the program when the object is put into a library, so that libraries share
//! nothing and any number of them links into one program. No function unwinds or aborts.

use crate::{
    CpuKernel, pack,
    pool::Pool,
    processor,
    program::Program,
    run::{self, Call},
    status::{Result, Status},
    sys,
};
use core::ptr::{self, NonNull};

/// What a handle of a generated library holds.
pub struct Handle {
    pool: NonNull<Pool>,
    /// Address of each slot; all null before weights are bound.
    slots: *mut *const u8,
    /// Words of the argument table.
    table: *mut u64,
    bound: bool,
}

/// The parts that are compiled into a library.
#[derive(Clone, Copy)]
pub struct Parts {
    /// First word of the encoded program.
    pub program: *const u64,
    /// One kernel for each launch.
    pub kernels: *const CpuKernel,
}

impl Parts {
    fn program(&self) -> Result<Program<'static>> {
        // SAFETY: codegen emits an encoded program, which is never unloaded before the code.
        unsafe { Program::from_pointer(self.program) }
    }
}

/// Makes a handle with its threads.
///
/// # Safety
/// `out` is null or a place for a pointer.
///
/// # Errors
/// See [`Status`].
pub unsafe fn create(parts: Parts, threads: u32, out: *mut *mut Handle) -> Result<()> {
    if out.is_null() {
        return Err(Status::NULL_POINTER);
    }
    // SAFETY: not null, so a place for a pointer.
    unsafe { out.write(ptr::null_mut()) };
    let program = parts.program()?;
    if !processor::reaches(program.cpu_level()) {
        return Err(Status::UNSUPPORTED_CPU);
    }
    let size = |n: usize, bytes: usize| n.max(1).checked_mul(bytes).ok_or(Status::OVERFLOW);
    let slots = sys::allocate(size(program.slots(), size_of::<*const u8>())?, 64).cast::<*const u8>();
    let table = sys::allocate(size(program.max_args(), size_of::<u64>())?, 64).cast::<u64>();
    let handle = sys::allocate(size_of::<Handle>(), 64).cast::<Handle>();
    let pool = if slots.is_null() || table.is_null() || handle.is_null() {
        Err(Status::OUT_OF_MEMORY)
    } else {
        Pool::create(threads, program.scratch())
    };
    match pool {
        Ok(pool) => {
            // SAFETY: fresh memory of the right size; all bits zero are null pointers.
            unsafe {
                slots.write_bytes(0, program.slots().max(1));
                table.write_bytes(0, program.max_args().max(1));
                handle.write(Handle { pool, slots, table, bound: false });
                out.write(handle);
            }
            Ok(())
        }
        Err(status) => {
            // SAFETY: null or fresh from the allocator.
            unsafe {
                sys::free(slots.cast());
                sys::free(table.cast());
                sys::free(handle.cast());
            }
            Err(status)
        }
    }
}

/// Ends the threads of a handle and frees it; null is ignored.
///
/// # Safety
/// The handle came from [`create`], no call on it is under way, and it is not used again.
pub unsafe fn destroy(handle: *mut Handle) {
    if handle.is_null() {
        return;
    }
    // SAFETY: the caller passes a live handle.
    unsafe {
        Pool::destroy((*handle).pool);
        sys::free((*handle).slots.cast());
        sys::free((*handle).table.cast());
        sys::free(handle.cast());
    }
}

/// Binds packed weights, which the caller keeps.
///
/// # Safety
/// The handle is live and no call on it is under way; `weights` has `bytes` bytes for as long as it is bound.
///
/// # Errors
/// See [`Status`].
pub unsafe fn bind(parts: Parts, handle: *mut Handle, weights: *const u8, bytes: u64) -> Result<()> {
    if handle.is_null() {
        return Err(Status::NULL_POINTER);
    }
    let program = parts.program()?;
    // SAFETY: the handle is live and has a pointer for each slot.
    unsafe {
        (*handle).bound = false;
        let slots = core::slice::from_raw_parts_mut((*handle).slots, program.slots());
        pack::slots(&program, weights, bytes, slots)?;
        (*handle).bound = true;
    }
    Ok(())
}

/// Runs the program; `io` holds the pointers of the inputs, then of the outputs.
///
/// # Safety
/// The handle is live; `io` has a pointer for each input and output, valid for the sizes of `tokens`.
///
/// # Errors
/// See [`Status`].
pub unsafe fn launch(
    parts: Parts,
    handle: *mut Handle,
    tokens: u64,
    io: *const *mut u8,
    workspace: *mut u8,
    workspace_bytes: u64,
) -> Result<()> {
    if handle.is_null() {
        return Err(Status::NULL_POINTER);
    }
    let program = parts.program()?;
    // SAFETY: the handle is live.
    let handle = unsafe { &*handle };
    program.accepts(tokens)?;
    if program.writes_nothing(tokens)? {
        return Ok(());
    }
    if !handle.bound {
        return Err(Status::NOT_BOUND);
    }
    if io.is_null() {
        return Err(Status::NULL_POINTER);
    }
    // SAFETY: the caller passes as many pointers as there are inputs and outputs; codegen emits a kernel
    // for each launch; slots and table were allocated for this program. Only one call at a time gets past
    // `enter` in `run`, and it is the one that writes the table.
    unsafe {
        let call = Call {
            tokens,
            inputs: core::slice::from_raw_parts(io.cast::<*const u8>(), program.inputs()),
            outputs: core::slice::from_raw_parts(io.add(program.inputs()), program.outputs()),
            weights: core::slice::from_raw_parts(handle.slots, program.slots()),
            workspace,
            workspace_bytes,
        };
        let kernels = core::slice::from_raw_parts(parts.kernels, program.launches());
        let table = core::ptr::slice_from_raw_parts_mut(handle.table, program.max_args());
        run::run_raw(&program, kernels, handle.pool.as_ref(), &call, table, None)
    }
}

/// The names of a library.
#[cfg(moec_standalone)]
mod exported {
    use super::*;
    use core::ffi::{c_char, c_int, c_void};

    fn answer(result: Result<()>) -> c_int {
        match result {
            Ok(()) => Status::OK.0,
            Err(status) => status.0,
        }
    }

    unsafe extern "C" {
        #[link_name = "moec_launch_program"]
        static PROGRAM: u64;
        #[link_name = "moec_launch_kernels"]
        static KERNELS: CpuKernel;
    }

    fn parts() -> Parts {
        Parts { program: &raw const PROGRAM, kernels: &raw const KERNELS }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn moec_launch_create(threads: u32, out: *mut *mut Handle) -> c_int {
        // SAFETY: as the header asks of callers.
        answer(unsafe { create(parts(), threads, out) })
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn moec_launch_destroy(handle: *mut Handle) {
        // SAFETY: as the header asks of callers.
        unsafe { destroy(handle) };
    }

    #[unsafe(no_mangle)]
    extern "C" fn moec_launch_max_tokens() -> u64 {
        parts().program().map_or(0, |p| p.max_tokens())
    }

    #[unsafe(no_mangle)]
    extern "C" fn moec_launch_workspace_bytes(tokens: u64) -> u64 {
        match parts().program() {
            Ok(program) if tokens <= program.max_tokens() => program.workspace_bytes(tokens).unwrap_or(u64::MAX),
            Ok(_) | Err(_) => u64::MAX,
        }
    }

    #[unsafe(no_mangle)]
    extern "C" fn moec_launch_weights_bytes() -> u64 {
        parts().program().map_or(0, |p| p.weights_bytes())
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn moec_launch_pack_begin(weights: *mut c_void, bytes: u64) -> c_int {
        // SAFETY: as the header asks of callers.
        answer(parts().program().and_then(|p| unsafe { pack::begin(&p, weights.cast(), bytes) }))
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn moec_launch_pack(
        slot: u64,
        tensors: *const pack::Tensor,
        count: u64,
        weights: *mut c_void,
        bytes: u64,
    ) -> c_int {
        if tensors.is_null() {
            return Status::NULL_POINTER.0;
        }
        let Ok(count) = usize::try_from(count) else { return Status::OVERFLOW.0 };
        let Ok(slot) = usize::try_from(slot) else { return Status::OVERFLOW.0 };
        // SAFETY: as the header asks of callers.
        answer(parts().program().and_then(|p| unsafe {
            pack::pack(&p, slot, core::slice::from_raw_parts(tensors, count), weights.cast(), bytes)
        }))
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn moec_launch_bind(handle: *mut Handle, weights: *const c_void, bytes: u64) -> c_int {
        // SAFETY: as the header asks of callers.
        answer(unsafe { bind(parts(), handle, weights.cast(), bytes) })
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn moec_launch_launch(
        handle: *mut Handle,
        tokens: u64,
        io: *const *mut u8,
        workspace: *mut c_void,
        workspace_bytes: u64,
        stream: *mut c_void,
    ) -> c_int {
        if !stream.is_null() {
            return Status::STREAM.0;
        }
        // SAFETY: as the header asks of callers.
        answer(unsafe { launch(parts(), handle, tokens, io, workspace.cast(), workspace_bytes) })
    }

    #[unsafe(no_mangle)]
    extern "C" fn moec_launch_status_text(status: c_int) -> *const c_char {
        let status = Status(status);
        let named = status.argument().and_then(|place| {
            let program = parts().program().ok()?;
            let known = place < program.inputs().saturating_add(program.outputs());
            known.then(|| program.text(place, status.kind() == Status::MISALIGNED))?
        });
        named.unwrap_or_else(|| status.text()).as_ptr()
    }
}
