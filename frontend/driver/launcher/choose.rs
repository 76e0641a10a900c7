//! Chooses among the variants of a C library: the same functions, handed to the best code for this processor.
//!
//! Compiled on its own into one object, like the launcher. Each variant is a whole library of its own (program,
//! kernels, launcher) under its own prefix; the table of their functions comes from the library writer, best
//! first. The choice is made once, and is the same for every function, so that sizes, packed weights and
//! handles belong together.
#![no_std]

#[path = "../../../runtime/launch/src/processor.rs"]
mod processor;

use core::{
    ffi::{c_char, c_int, c_void},
    sync::atomic::{AtomicUsize, Ordering},
};

/// The functions of a variant, in the order in which the library writer lists them.
#[repr(C)]
struct Variant {
    level: u64,
    create: unsafe extern "C" fn(u32, *mut *mut c_void) -> c_int,
    destroy: unsafe extern "C" fn(*mut c_void),
    max_tokens: extern "C" fn() -> u64,
    workspace_bytes: extern "C" fn(u64) -> u64,
    weights_bytes: extern "C" fn() -> u64,
    pack_begin: unsafe extern "C" fn(*mut c_void, u64) -> c_int,
    pack: unsafe extern "C" fn(u64, *const c_void, u64, *mut c_void, u64) -> c_int,
    bind: unsafe extern "C" fn(*mut c_void, *const c_void, u64) -> c_int,
    launch: unsafe extern "C" fn(*mut c_void, u64, *const *mut u8, *mut c_void, u64, *mut c_void) -> c_int,
    status_text: extern "C" fn(c_int) -> *const c_char,
}

unsafe extern "C" {
    #[link_name = "moec_launch_variants"]
    static VARIANTS: Variant;
    #[link_name = "moec_launch_variant_count"]
    static COUNT: u64;
}

/// Index of the chosen variant plus one; 0 before the first call.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// The best variant that this processor runs; the least demanding one if there is none, whose `create` says so.
fn chosen() -> &'static Variant {
    // SAFETY: the table has `COUNT` entries, at least one, and is never written.
    unsafe {
        let (first, count) = (&raw const VARIANTS, COUNT as usize);
        let known = CHOSEN.load(Ordering::Relaxed);
        if known != 0 {
            return &*first.add(known.wrapping_sub(1));
        }
        let mut index = 0usize;
        while index.wrapping_add(1) < count && !processor::reaches((*first.add(index)).level) {
            index = index.wrapping_add(1);
        }
        // Threads that meet here choose the same.
        CHOSEN.store(index.wrapping_add(1), Ordering::Relaxed);
        &*first.add(index)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn moec_launch_create(threads: u32, out: *mut *mut c_void) -> c_int {
    // SAFETY: as the header asks of callers; the same for all below.
    unsafe { (chosen().create)(threads, out) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn moec_launch_destroy(handle: *mut c_void) {
    // SAFETY: see above.
    unsafe { (chosen().destroy)(handle) };
}

#[unsafe(no_mangle)]
extern "C" fn moec_launch_max_tokens() -> u64 {
    (chosen().max_tokens)()
}

#[unsafe(no_mangle)]
extern "C" fn moec_launch_workspace_bytes(tokens: u64) -> u64 {
    (chosen().workspace_bytes)(tokens)
}

#[unsafe(no_mangle)]
extern "C" fn moec_launch_weights_bytes() -> u64 {
    (chosen().weights_bytes)()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn moec_launch_pack_begin(weights: *mut c_void, bytes: u64) -> c_int {
    // SAFETY: see above.
    unsafe { (chosen().pack_begin)(weights, bytes) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn moec_launch_pack(
    slot: u64,
    tensors: *const c_void,
    count: u64,
    weights: *mut c_void,
    bytes: u64,
) -> c_int {
    // SAFETY: see above.
    unsafe { (chosen().pack)(slot, tensors, count, weights, bytes) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn moec_launch_bind(handle: *mut c_void, weights: *const c_void, bytes: u64) -> c_int {
    // SAFETY: see above.
    unsafe { (chosen().bind)(handle, weights, bytes) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn moec_launch_launch(
    handle: *mut c_void,
    tokens: u64,
    io: *const *mut u8,
    workspace: *mut c_void,
    workspace_bytes: u64,
    stream: *mut c_void,
) -> c_int {
    // SAFETY: see above.
    unsafe { (chosen().launch)(handle, tokens, io, workspace, workspace_bytes, stream) }
}

#[unsafe(no_mangle)]
extern "C" fn moec_launch_status_text(status: c_int) -> *const c_char {
    (chosen().status_text)(status)
}

/// Nothing here panics; should a check of the language fail all the same, the thread stops where it is.
#[panic_handler]
fn stop(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
