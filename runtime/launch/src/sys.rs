//! The few calls of the C library that threads need, declared here so that nothing has to be linked but libc.

#![allow(missing_docs, reason = "names and meanings are those of POSIX")]

use core::ffi::{c_int, c_long, c_void};

/// Room for any of the opaque types of pthreads; the largest known is 64 bytes.
#[repr(C, align(16))]
pub(crate) struct Opaque(pub(crate) core::cell::UnsafeCell<[u8; 128]>);

impl Opaque {
    pub(crate) const fn new() -> Self {
        Self(core::cell::UnsafeCell::new([0; 128]))
    }

    pub(crate) const fn get(&self) -> *mut c_void {
        self.0.get().cast()
    }
}

#[repr(C)]
pub(crate) struct Timespec {
    seconds: i64,
    nanoseconds: c_long,
}

pub(crate) type Thread = usize;
pub(crate) type Entry = unsafe extern "C" fn(*mut c_void) -> *mut c_void;

unsafe extern "C" {
    pub(crate) fn pthread_create(thread: *mut Thread, attr: *const c_void, entry: Entry, arg: *mut c_void) -> c_int;
    pub(crate) fn pthread_join(thread: Thread, result: *mut *mut c_void) -> c_int;
    pub(crate) fn pthread_mutex_init(mutex: *mut c_void, attr: *const c_void) -> c_int;
    pub(crate) fn pthread_mutex_lock(mutex: *mut c_void) -> c_int;
    pub(crate) fn pthread_mutex_unlock(mutex: *mut c_void) -> c_int;
    pub(crate) fn pthread_mutex_destroy(mutex: *mut c_void) -> c_int;
    pub(crate) fn pthread_cond_init(cond: *mut c_void, attr: *const c_void) -> c_int;
    pub(crate) fn pthread_cond_wait(cond: *mut c_void, mutex: *mut c_void) -> c_int;
    pub(crate) fn pthread_cond_broadcast(cond: *mut c_void) -> c_int;
    pub(crate) fn pthread_cond_destroy(cond: *mut c_void) -> c_int;
    pub(crate) fn pthread_sigmask(how: c_int, set: *const c_void, old: *mut c_void) -> c_int;
    pub(crate) fn sigfillset(set: *mut c_void) -> c_int;
    pub(crate) fn sched_yield() -> c_int;
    pub(crate) fn sysconf(name: c_int) -> c_long;
    pub(crate) fn posix_memalign(out: *mut *mut c_void, align: usize, size: usize) -> c_int;
    pub(crate) fn free(pointer: *mut c_void);
    fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
}

#[cfg(target_os = "macos")]
mod numbers {
    pub(crate) const SIG_SETMASK: i32 = 3;
    pub(crate) const SC_NPROCESSORS_ONLN: i32 = 58;
    pub(crate) const CLOCK_MONOTONIC: i32 = 6;
}
#[cfg(not(target_os = "macos"))]
mod numbers {
    pub(crate) const SIG_SETMASK: i32 = 2;
    pub(crate) const SC_NPROCESSORS_ONLN: i32 = 84;
    pub(crate) const CLOCK_MONOTONIC: i32 = 1;
}
pub(crate) use numbers::{SC_NPROCESSORS_ONLN, SIG_SETMASK};

/// Nanoseconds of a clock that never goes back.
pub(crate) fn now() -> u64 {
    let mut time = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: `time` is a valid place for the result.
    unsafe { clock_gettime(numbers::CLOCK_MONOTONIC, &raw mut time) };
    time.seconds.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(time.nanoseconds as u64)
}

/// `size` bytes at a multiple of `align`, or null.
pub(crate) fn allocate(size: usize, align: usize) -> *mut u8 {
    let mut out = core::ptr::null_mut();
    // SAFETY: `out` is a valid place for the result.
    let status = unsafe { posix_memalign(&raw mut out, align, size.max(1)) };
    if status == 0 { out.cast() } else { core::ptr::null_mut() }
}

/// The floating-point environment that kernels are compiled for: round to nearest, no traps, and
/// denormals kept, whatever the calling thread has set. Otherwise results would depend on which
/// thread does an item.
pub(crate) struct FloatState(u64);

impl FloatState {
    /// Sets the environment and remembers the one before.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn set() -> Self {
        let mut before = 0u32;
        let wanted = 0x1f80u32;
        // SAFETY: reads and writes the control register of SSE through valid addresses; the value is its default.
        unsafe {
            core::arch::asm!("stmxcsr [{}]", in(reg) &raw mut before, options(nostack, preserves_flags));
            core::arch::asm!("ldmxcsr [{}]", in(reg) &raw const wanted, options(nostack, preserves_flags, readonly));
        }
        Self(u64::from(before))
    }

    /// Sets the environment and remembers the one before.
    #[cfg(target_arch = "aarch64")]
    pub(crate) fn set() -> Self {
        let before: u64;
        // SAFETY: reads the control register and writes its default.
        unsafe {
            core::arch::asm!("mrs {}, fpcr", out(reg) before, options(nomem, nostack, preserves_flags));
            core::arch::asm!("msr fpcr, {}", in(reg) 0u64, options(nomem, nostack, preserves_flags));
        }
        Self(before)
    }

    /// Nothing to set on other processors.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn set() -> Self {
        Self(0)
    }
}

impl Drop for FloatState {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        {
            let before = self.0 as u32;
            // SAFETY: restores the value that the register had.
            unsafe {
                core::arch::asm!("ldmxcsr [{}]", in(reg) &raw const before, options(nostack, preserves_flags, readonly));
            }
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: restores the value that the register had.
        unsafe {
            core::arch::asm!("msr fpcr, {}", in(reg) self.0, options(nomem, nostack, preserves_flags));
        }
    }
}
