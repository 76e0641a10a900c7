//! What the machine can do: streaming reads and register-only arithmetic, emitted like the kernels.

use crate::{
    harness::{Library, Memory},
    layer::thread_time,
};
use moec_abi::CpuKernel;
use moec_codegen::{
    Target,
    limits::{PIECE, emit_peak, emit_read, operations},
};
use std::{
    ffi::c_void,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bytes that one measurement reads.
const READ: u64 = 192 << 20;
/// Steps of one measurement of arithmetic.
const STEPS: u64 = 1 << 19;

/// Kernels that measure.
pub(crate) struct Limits {
    read: CpuKernel,
    peaks: Vec<(Target, CpuKernel, f64)>,
    next: AtomicU64,
}

impl Limits {
    pub(crate) fn new(targets: &[Target]) -> Self {
        let widest = targets.iter().copied().max_by_key(|t| t.lanes()).expect("a target");
        let read = Library::new(widest, |b| emit_read(b, widest)).kernel("read");
        let peaks = targets.iter().map(|&target| {
            let kernel = Library::new(target, |b| emit_peak(b, target)).kernel("peak");
            (target, kernel, operations(target))
        });
        Self { read, peaks: peaks.collect(), next: AtomicU64::new(0) }
    }

    /// Bytes per second of all threads.
    pub(crate) fn read(&self, memory: &Memory, threads: usize) -> f64 {
        let pieces = memory.slice::<u8>().len() as u64 / PIECE;
        let args = [memory.address(), pieces];
        let count = READ / PIECE;
        // Goes on where the last measurement ended, so that no cache holds what is read.
        let start = self.next.fetch_add(count, Ordering::Relaxed);
        let taken = AtomicU64::new(0);
        let seconds = together(threads, |scratch| {
            loop {
                let piece = taken.fetch_add(1, Ordering::Relaxed);
                if piece >= count {
                    break;
                }
                let at = start + piece;
                // SAFETY: the kernel reads piece `at % pieces` of the memory.
                unsafe { (self.read)(args.as_ptr(), at, at + 1, scratch) };
            }
        });
        READ as f64 / seconds
    }

    /// Operations per second of all threads.
    pub(crate) fn peak(&self, target: Target, threads: usize) -> f64 {
        let Some((_, kernel, operations)) = self.peaks.iter().find(|p| p.0 == target) else {
            return f64::NAN;
        };
        let args = [1.0_f32.to_bits().into(), 0.5_f32.to_bits().into()];
        let steps = if target == Target::X86V4Amx { STEPS / 8 } else { STEPS };
        // SAFETY: the kernel only writes its scratch.
        let seconds = together(threads, |scratch| unsafe { kernel(args.as_ptr(), 0, steps, scratch) });
        steps as f64 * operations * threads as f64 / seconds
    }
}

/// Processor time per thread of `work` on all threads at once.
fn together(threads: usize, work: impl Fn(*mut c_void) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let spent = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let scratch = Memory::new(8192, 0);
                barrier.wait();
                let start = thread_time();
                work(scratch.address() as *mut c_void);
                spent.fetch_add(thread_time() - start, Ordering::Relaxed);
            });
        }
    });
    spent.into_inner() as f64 * 1e-9 / threads as f64
}
