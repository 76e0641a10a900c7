//! What the machine can do: streaming reads and register-only arithmetic, emitted like the kernels.

use crate::{
    harness::{Library, Memory},
    layer::thread_time,
};
use moec_abi::CpuKernel;
use moec_codegen::{
    Target,
    mlir::{Builder, FuncKind},
};
use std::{
    ffi::c_void,
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bytes of one item of streaming reads.
const PIECE: u64 = 1 << 20;
/// Bytes that one measurement reads.
const READ: u64 = 192 << 20;
/// Steps of one measurement of arithmetic.
const STEPS: u64 = 1 << 19;
/// Independent sums: enough to hide the latency.
const CHAINS: usize = 24;

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
            let operations = match target {
                Target::X86V4Amx => (4 * 16 * 16 * 32 * 2) as f64,
                _ => (CHAINS * target.lanes() * 2) as f64,
            };
            (target, kernel, operations)
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

const KERNEL: [(&str, &str); 4] = [("!llvm.ptr", "{}"), ("i64", "{}"), ("i64", "{}"), ("!llvm.ptr", "{}")];

/// Adds up the pieces `begin..end` of memory (arguments: address, number of pieces).
fn emit_read(b: &Builder<'_>, target: Target) {
    let lanes = target.lanes();
    let ty = format!("vector<{lanes}xi32>");
    b.func("read", FuncKind::Plain, &KERNEL, |f| {
        let memory = b.load(f[0], "!llvm.ptr", 8);
        let pieces = b.load(b.gepc(f[0], "i64", 1), "i64", 8);
        b.each(f[1], f[2], |piece| {
            let base = b.gep(memory, "i8", b.mulc(b.remui(piece, pieces), PIECE as i64));
            let init: Vec<_> = (0..8).map(|_| b.i32s(0, lanes)).collect();
            let step = (8 * lanes * 4) as i64;
            let sums = b.for_(b.i64(0), b.i64(PIECE as i64), b.i64(step), &init, |i, sums| {
                let at = b.gep(base, "i8", i);
                for line in (0..step).step_by(64) {
                    let attributes = [("rw", "0 : i32"), ("hint", "3 : i32"), ("cache", "1 : i32")];
                    b.op0("llvm.intr.prefetch", &[b.gep(at, "i8", b.i64(4096 + line))], &attributes);
                }
                let add = |(v, sum): (usize, &_)| {
                    b.addi(*sum, b.load(b.gep(at, "i8", b.i64((v * lanes * 4) as i64)), &ty, 4))
                };
                sums.iter().enumerate().map(add).collect()
            });
            for (v, sum) in sums.iter().enumerate() {
                b.store(*sum, b.gep(f[3], "i8", b.i64((v * lanes * 4) as i64)), 4);
            }
        });
    });
}

/// Multiplies registers `end` times.
fn emit_peak(b: &Builder<'_>, target: Target) {
    let lanes = target.lanes();
    let ty = format!("vector<{lanes}xf32>");
    b.func("peak", FuncKind::Plain, &KERNEL, |f| {
        if target == Target::X86V4Amx {
            return emit_tiles(b, f);
        }
        let x = b.splat(b.load(f[0], "f32", 4), &ty);
        let y = b.splat(b.load(b.gepc(f[0], "i64", 1), "f32", 4), &ty);
        // The narrow targets have too few registers for all chains.
        let chains = if target.vector_registers() < 32 { CHAINS / 2 } else { CHAINS };
        let init: Vec<_> = (0..chains).map(|i| b.f32s(i as f32, lanes)).collect();
        let sums = b.for_(f[1], f[2], b.i64(1), &init, |_, sums| {
            let mut sums = sums.to_vec();
            for _ in 0..CHAINS / chains {
                for sum in &mut sums {
                    *sum = b.fma(x, y, *sum);
                }
            }
            sums
        });
        for (i, sum) in sums.iter().enumerate() {
            b.store(*sum, b.gep(f[3], "i8", b.i64((i * lanes * 4) as i64)), 4);
        }
    });
}

fn emit_tiles<'c>(b: &Builder<'c>, f: &[moec_codegen::mlir::V<'c>]) {
    let number = |i: u8| b.op("arith.constant", &[], "i8", &[("value", &format!("{i} : i8"))]);
    let configuration = [(0, 1), (16, 0x40_0040), (20, 0x40_0040), (24, 0x40_0040), (28, 0x40_0040)];
    for (at, word) in configuration.into_iter().chain([(48, 0x1010_1010), (52, 0x1010_1010)]) {
        b.store(b.i32(word), b.gep(f[3], "i8", b.i64(at)), 4);
    }
    b.intrinsic0("llvm.x86.ldtilecfg", &[f[3]]);
    for i in 0..8 {
        b.intrinsic0("llvm.x86.tilezero", &[number(i)]);
    }
    b.each(f[1], f[2], |_| {
        for i in 0..4 {
            let registers = [i, 4 + i / 2, 6 + i % 2].map(number);
            b.intrinsic0("llvm.x86.tdpbf16ps", &registers);
        }
    });
    b.intrinsic0("llvm.x86.tilerelease", &[]);
}
