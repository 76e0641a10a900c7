//! Ends of the process that come from outside or from below.

use crate::files;

/// Takes away unfinished files and ends with 130 or 143 when the process is interrupted or terminated, and with
/// 101 when a library aborts. For the start of a program, before other threads.
#[cfg(unix)]
pub fn watch() {
    /// Only what a signal handler may do.
    extern "C" fn aborted(_: libc::c_int) {
        const TEXT: &[u8] = b"error: a library of the compiler aborted; this is a bug in moec\n  \
            = help: report it with the command line and the model that shows it\n";
        // SAFETY: both functions may be called in a signal handler.
        unsafe {
            libc::write(2, TEXT.as_ptr().cast(), TEXT.len());
            libc::_exit(101);
        }
    }
    // SAFETY: the set is made by `sigemptyset` before it is used; the handler does what handlers may.
    let set = unsafe {
        libc::signal(libc::SIGABRT, aborted as extern "C" fn(libc::c_int) as libc::sighandler_t);
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        // Threads inherit the mask, so that only the one below sees the signals.
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    };
    std::thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: the set was made above, the place for the number is here.
        while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
        files::remove_unfinished();
        // SAFETY: ends the process; nothing that other threads hold is needed.
        unsafe { libc::_exit(128 + signal) };
    });
}

/// Nothing to do here.
#[cfg(not(unix))]
pub fn watch() {}
