//! Kernels that can be run: by this machine, or by an emulator.

use crate::{
    emulator::{self, Program},
    harness::{self, Library, Memory, compile},
};
use moec_abi::CpuKernel;
use moec_codegen::{Target, mlir::Builder};
use std::{
    ffi::c_void,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

/// Whether code for `target` can be run, by this machine or in an emulator.
pub(crate) fn runs(target: Target) -> bool {
    harness::runs(target) || target == Target::Aarch64 && emulator::is_here()
}

/// A kernel that can be run.
#[derive(Clone)]
pub(crate) enum Kernel {
    /// By this machine.
    Native(CpuKernel),
    /// By the emulator: the program, and the kernel's name.
    Emulated(Rc<Program>, String),
}

/// What a kernel is given.
pub(crate) enum Argument<'m> {
    Read(&'m Memory),
    Write(&'m Memory),
    Value(u64),
}

impl Argument<'_> {
    fn value(&self) -> u64 {
        match self {
            Self::Read(memory) | Self::Write(memory) => memory.address(),
            Self::Value(value) => *value,
        }
    }
}

/// Compiles what `build` makes, and gives the kernels of these names.
pub(crate) fn kernels(target: Target, names: &[String], build: impl FnOnce(&Builder<'_>)) -> Vec<Kernel> {
    if target == Target::Aarch64 && cfg!(not(target_arch = "aarch64")) {
        let program = Rc::new(Program::new(&compile(target, build), names.to_vec()));
        return names.iter().map(|name| Kernel::Emulated(Rc::clone(&program), name.clone())).collect();
    }
    let library = Library::new(target, build);
    names.iter().map(|name| Kernel::Native(library.kernel(name))).collect()
}

/// Runs all items on threads that take `grain` at a time; an emulator has one.
pub(crate) fn run(kernel: &Kernel, args: &[Argument<'_>], items: u64, grain: u64, scratch: &[Memory]) {
    let kernel = match kernel {
        Kernel::Native(kernel) => *kernel,
        Kernel::Emulated(program, name) => return program.run(name, args, items, grain, &scratch[0]),
    };
    let args: Vec<_> = args.iter().map(Argument::value).collect();
    let next = AtomicU64::new(0);
    let work = |scratch: &Memory| {
        loop {
            let begin = next.fetch_add(grain, Ordering::Relaxed);
            if begin >= items {
                return;
            }
            let end = (begin + grain).min(items);
            // SAFETY: the arguments are those that the kernel was emitted for; callers own the buffers.
            unsafe { kernel(args.as_ptr(), begin, end, scratch.address() as *mut c_void) };
        }
    };
    std::thread::scope(|scope| {
        for other in &scratch[1..] {
            scope.spawn(|| work(other));
        }
        work(&scratch[0]);
    });
}
