//! Threads that share the items of one launch after another.
//!
//! The calling thread takes items like all others and never waits for a thread that has taken
//! none, so that a late or descheduled worker costs nothing. A launch is published as a job under a
//! generation number; whoever adds one to `claim` gets the next chunk of the generation that the
//! sum carries. A worker that comes too late sees another generation in the job, or a chunk beyond
//! its end, and takes nothing.

use crate::{
    CpuKernel,
    status::{Result, Status},
    sys::{self, FloatState, Opaque},
};
use core::{
    ffi::c_void,
    ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence},
};

/// How long a worker looks for work before it sleeps. Waking a sleeper costs some microseconds, and
/// the calls of one forward pass follow each other faster than this.
const SPIN_NS: u64 = 100_000;
/// Chunks of a launch at most, so that generation and chunk share a word.
const MAX_CHUNKS: u64 = 1 << 31;
const NO_GENERATION: u64 = u64::MAX;

/// A value with cache lines of its own.
#[repr(C, align(128))]
struct Line<T>(T);

/// One launch: what a worker needs to do a chunk.
struct Job {
    generation: AtomicU64,
    kernel: AtomicPtr<()>,
    args: AtomicPtr<u64>,
    items: AtomicU64,
    grain: AtomicU64,
}

/// Threads and their memory; lives at one address from [`Pool::create`] to [`Pool::destroy`].
#[repr(C)]
pub struct Pool {
    /// Generation in the upper half, next chunk in the lower.
    claim: Line<AtomicU64>,
    /// Chunks of the current generation that are done.
    done: Line<AtomicU64>,
    jobs: Line<[Job; 2]>,
    sleepers: Line<AtomicU32>,
    stop: AtomicBool,
    busy: AtomicBool,
    mutex: Opaque,
    cond: Opaque,
    scratch: *mut u8,
    scratch_bytes: usize,
    workers: *mut Worker,
    threads: u32,
    started: u32,
}

struct Worker {
    pool: *const Pool,
    thread: sys::Thread,
    index: u32,
}

/// The right to launch on a pool, held by one thread at a time.
pub(crate) struct Session<'a> {
    pool: &'a Pool,
    _float: FloatState,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.pool.busy.store(false, Ordering::Release);
    }
}

/// Processors that are online; at least 1.
pub fn processors() -> u32 {
    // SAFETY: asks for a number.
    let count = unsafe { sys::sysconf(sys::SC_NPROCESSORS_ONLN) };
    u32::try_from(count).unwrap_or(1).max(1)
}

impl Pool {
    /// A pool of `threads` threads, of which the calling one is the first; 0 means all processors.
    /// Each has `scratch` bytes of its own.
    ///
    /// # Errors
    /// [`Status::OUT_OF_MEMORY`], [`Status::NO_THREAD`].
    pub fn create(threads: u32, scratch: u64) -> Result<ptr::NonNull<Self>> {
        let threads = if threads == 0 { processors() } else { threads.min(4096) };
        let scratch = scratch.checked_next_multiple_of(128).and_then(|n| usize::try_from(n).ok());
        let scratch = scratch.ok_or(Status::OVERFLOW)?;
        let total = scratch.checked_mul(threads as usize).ok_or(Status::OVERFLOW)?;
        let pool = sys::allocate(size_of::<Self>(), align_of::<Self>()).cast::<Self>();
        let workers = sys::allocate(threads as usize * size_of::<Worker>(), 64).cast::<Worker>();
        let memory = sys::allocate(total, 128);
        let Some(place) = ptr::NonNull::new(pool).filter(|_| !workers.is_null() && !memory.is_null()) else {
            // SAFETY: null or fresh from the allocator.
            unsafe {
                sys::free(pool.cast());
                sys::free(workers.cast());
                sys::free(memory.cast());
            }
            return Err(Status::OUT_OF_MEMORY);
        };
        let job = || Job {
            generation: AtomicU64::new(NO_GENERATION),
            kernel: AtomicPtr::new(ptr::null_mut()),
            args: AtomicPtr::new(ptr::null_mut()),
            items: AtomicU64::new(0),
            grain: AtomicU64::new(1),
        };
        // SAFETY: the memory is fresh, large enough and aligned; nobody else knows it yet.
        unsafe {
            place.write(Self {
                claim: Line(AtomicU64::new(0)),
                done: Line(AtomicU64::new(0)),
                jobs: Line([job(), job()]),
                sleepers: Line(AtomicU32::new(0)),
                stop: AtomicBool::new(false),
                busy: AtomicBool::new(false),
                mutex: Opaque::new(),
                cond: Opaque::new(),
                scratch: memory,
                scratch_bytes: scratch,
                workers,
                threads,
                started: 1,
            });
            sys::pthread_mutex_init((*pool).mutex.get(), ptr::null());
            sys::pthread_cond_init((*pool).cond.get(), ptr::null());
        }
        // Signals stay with the threads of the host.
        let (all, before) = (Opaque::new(), Opaque::new());
        // SAFETY: both places are large enough for a set of signals.
        unsafe {
            sys::sigfillset(all.get());
            sys::pthread_sigmask(sys::SIG_SETMASK, all.get(), before.get());
        }
        let mut status = Status::OK;
        for index in 1..threads {
            // SAFETY: `index` is below the number of workers that were allocated; a worker lives until
            // `destroy` has joined its thread. `started` is read by nobody else before that.
            unsafe {
                let worker = workers.add(index as usize);
                worker.write(Worker { pool, thread: 0, index });
                if sys::pthread_create(&raw mut (*worker).thread, ptr::null(), work, worker.cast()) != 0 {
                    status = Status::NO_THREAD;
                    break;
                }
                (*pool).started = index + 1;
            }
        }
        // SAFETY: `before` holds the set that was in force.
        unsafe { sys::pthread_sigmask(sys::SIG_SETMASK, before.get(), ptr::null_mut()) };
        if status == Status::OK {
            return Ok(place);
        }
        // SAFETY: the pool was made here and nobody else uses it.
        unsafe { Self::destroy(place) };
        Err(status)
    }

    /// Ends the threads and frees the memory.
    ///
    /// # Safety
    /// The pool came from [`create`](Self::create), no call on it is under way, and it is not used again.
    pub unsafe fn destroy(place: ptr::NonNull<Self>) {
        // SAFETY: the caller passes a live pool.
        let pool = unsafe { place.as_ref() };
        pool.stop.store(true, Ordering::SeqCst);
        pool.wake(true);
        for index in 1..pool.started {
            // SAFETY: threads below `started` were started and not joined.
            unsafe { sys::pthread_join((*pool.workers.add(index as usize)).thread, ptr::null_mut()) };
        }
        // SAFETY: no thread is left that could use the memory.
        unsafe {
            sys::pthread_cond_destroy(pool.cond.get());
            sys::pthread_mutex_destroy(pool.mutex.get());
            sys::free(pool.scratch.cast());
            sys::free(pool.workers.cast());
            sys::free(place.as_ptr().cast());
        }
    }

    /// Number of threads, with the calling one.
    pub const fn threads(&self) -> u32 {
        self.threads
    }

    /// Bytes of scratch of each thread.
    pub const fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// Takes the pool for one call.
    pub(crate) fn enter(&self) -> Result<Session<'_>> {
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(Status::BUSY);
        }
        Ok(Session { pool: self, _float: FloatState::set() })
    }

    fn scratch(&self, index: u32) -> *mut c_void {
        self.scratch.wrapping_add(index as usize * self.scratch_bytes).cast()
    }

    fn wake(&self, always: bool) {
        if always || self.sleepers.0.load(Ordering::SeqCst) > 0 {
            // SAFETY: mutex and condition live as long as the pool.
            unsafe {
                sys::pthread_mutex_lock(self.mutex.get());
                sys::pthread_cond_broadcast(self.cond.get());
                sys::pthread_mutex_unlock(self.mutex.get());
            }
        }
    }

    /// Takes chunks until none is left. Returns the generation that was seen last.
    fn take(&self, index: u32) -> u64 {
        loop {
            let claim = self.claim.0.fetch_add(1, Ordering::AcqRel);
            let (generation, chunk) = (claim >> 32, claim & 0xffff_ffff);
            let job = &self.jobs.0[(generation & 1) as usize];
            if job.generation.load(Ordering::Acquire) != generation {
                return generation;
            }
            let kernel = job.kernel.load(Ordering::Relaxed);
            let args = job.args.load(Ordering::Relaxed);
            let (items, grain) = (job.items.load(Ordering::Relaxed), job.grain.load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            let begin = chunk.saturating_mul(grain);
            if job.generation.load(Ordering::Relaxed) != generation || begin >= items || kernel.is_null() {
                return generation;
            }
            // The chunk exists, so this generation cannot end before `done` counts it.
            // SAFETY: `run` stored a kernel of this type.
            let kernel = unsafe { core::mem::transmute::<*mut (), CpuKernel>(kernel) };
            let end = items.min(begin.saturating_add(grain));
            // SAFETY: the caller of `run` vouches for kernel and arguments; items of one chunk are done once,
            // with the scratch of this thread.
            unsafe { kernel(args, begin, end, self.scratch(index)) };
            self.done.0.fetch_add(1, Ordering::Release);
        }
    }

    fn wait(&self, seen: u64) {
        let changed = || self.claim.0.load(Ordering::SeqCst) >> 32 != seen || self.stop.load(Ordering::SeqCst);
        let limit = sys::now().saturating_add(SPIN_NS);
        loop {
            for _ in 0..64 {
                if changed() {
                    return;
                }
                core::hint::spin_loop();
            }
            if sys::now() > limit {
                break;
            }
        }
        // SAFETY: mutex and condition live as long as the pool.
        unsafe {
            sys::pthread_mutex_lock(self.mutex.get());
            self.sleepers.0.fetch_add(1, Ordering::SeqCst);
            while !changed() {
                sys::pthread_cond_wait(self.cond.get(), self.mutex.get());
            }
            self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
            sys::pthread_mutex_unlock(self.mutex.get());
        }
    }
}

unsafe extern "C" fn work(worker: *mut c_void) -> *mut c_void {
    // SAFETY: `create` passes a worker that lives until this thread is joined; its pool lives longer.
    let (pool, index) = unsafe {
        let worker = worker.cast::<Worker>();
        (&*(*worker).pool, (*worker).index)
    };
    let _float = FloatState::set();
    let mut seen = 0;
    while !pool.stop.load(Ordering::SeqCst) {
        pool.wait(seen);
        seen = pool.take(index);
    }
    ptr::null_mut()
}

impl Session<'_> {
    /// Does all items and returns when they are done.
    ///
    /// # Safety
    /// `kernel` may be called with `args` for any part of the items, on any thread, parts at the same time.
    pub(crate) unsafe fn run(&self, kernel: CpuKernel, args: *mut u64, items: u64, grain: u64) {
        let pool = self.pool;
        let grain = grain.max(items.div_ceil(MAX_CHUNKS)).max(1);
        let chunks = items.div_ceil(grain);
        if chunks <= 1 || pool.threads == 1 {
            let mut begin = 0;
            while begin < items {
                let end = items.min(begin.saturating_add(grain));
                // SAFETY: as the caller vouches; the first scratch belongs to the calling thread.
                unsafe { kernel(args, begin, end, pool.scratch(0)) };
                begin = end;
            }
            return;
        }
        let generation = (pool.claim.0.load(Ordering::Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        let job = &pool.jobs.0[(generation & 1) as usize];
        job.generation.store(NO_GENERATION, Ordering::Relaxed);
        fence(Ordering::Release);
        job.kernel.store(kernel as *mut (), Ordering::Relaxed);
        job.args.store(args, Ordering::Relaxed);
        job.items.store(items, Ordering::Relaxed);
        job.grain.store(grain, Ordering::Relaxed);
        job.generation.store(generation, Ordering::Release);
        pool.done.0.store(0, Ordering::Relaxed);
        pool.claim.0.store(generation << 32, Ordering::SeqCst);
        pool.wake(false);
        pool.take(0);
        let mut turns = 0u32;
        while pool.done.0.load(Ordering::Acquire) < chunks {
            turns += 1;
            if turns.is_multiple_of(256) {
                // A worker with a chunk may need this processor.
                // SAFETY: gives up the rest of a time slice.
                unsafe { sys::sched_yield() };
            } else {
                core::hint::spin_loop();
            }
        }
    }
}
