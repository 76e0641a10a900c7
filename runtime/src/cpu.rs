//! The CPU as a device: the object is loaded into this process and run by the launcher.

use crate::{
    device::{Bound, Device, Files, Module},
    elf,
    error::{Code, Result, RuntimeError},
    target,
};
use moec_abi::{BufferKind, Program};
use moec_launch::{CpuKernel, pool::Pool, program::Program as Words, run, status::Status};
use std::{
    alloc::{Layout, alloc, dealloc},
    any::Any,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

const ALIGN: usize = 256;
/// Bytes of a large page.
#[cfg(target_os = "linux")]
const PAGE: usize = 2 << 20;

/// The processor of this machine.
pub struct Cpu {
    threads: u32,
    /// The pool that fits all programs so far; it is replaced when one needs more scratch.
    pool: Mutex<Option<Arc<Threads>>>,
}

struct Threads {
    pool: NonNull<Pool>,
    scratch: u64,
    /// Calls take turns.
    turn: Mutex<()>,
}

// SAFETY: a pool may be used from any thread; calls take turns.
unsafe impl Send for Threads {}
// SAFETY: as above.
unsafe impl Sync for Threads {}

impl Drop for Threads {
    fn drop(&mut self) {
        // SAFETY: the pool came from `create`, and no call can be under way without a reference to `self`.
        unsafe { Pool::destroy(self.pool) };
    }
}

struct CpuModule {
    words: Vec<u64>,
    kernels: Vec<CpuKernel>,
    threads: Arc<Threads>,
    about: String,
    /// Holds the code of `kernels`.
    _image: Option<elf::Image>,
}

impl Module for CpuModule {
    fn describe(&self) -> String {
        self.about.clone()
    }
}

fn status_error(status: Status) -> RuntimeError {
    let code = match status.kind() {
        Status::TOO_MANY_TOKENS | Status::UNFIT_TOKENS | Status::OVERFLOW => Code::Tokens,
        Status::OUT_OF_MEMORY | Status::NO_THREAD => Code::Memory,
        Status::BAD_PROGRAM => Code::Artefact,
        Status::UNSUPPORTED_CPU => Code::Target,
        _ => Code::Argument,
    };
    RuntimeError::new(code, status.text().to_string_lossy())
}

impl Cpu {
    /// The processor with this many threads; 0 means all that are online.
    pub fn new(threads: u32) -> Self {
        Self { threads, pool: Mutex::new(None) }
    }

    fn threads(&self, scratch: u64) -> Result<Arc<Threads>> {
        let mut current = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(threads) = current.as_ref().filter(|t| t.scratch >= scratch) {
            return Ok(Arc::clone(threads));
        }
        let pool = Pool::create(self.threads, scratch).map_err(status_error)?;
        let threads = Arc::new(Threads { pool, scratch, turn: Mutex::new(()) });
        *current = Some(Arc::clone(&threads));
        Ok(threads)
    }

    /// A module from kernels of this process, one for each launch: for tests and for linked libraries.
    ///
    /// # Safety
    /// The kernels do what the launches of `program` say, with the type [`CpuKernel`].
    ///
    /// # Errors
    /// The program is not for a CPU, or there are not as many kernels as launches.
    pub unsafe fn module(&self, program: &Program, kernels: Vec<CpuKernel>) -> Result<Arc<dyn Module>> {
        self.build(program, kernels, None)
    }

    fn build(&self, program: &Program, kernels: Vec<CpuKernel>, image: Option<elf::Image>) -> Result<Arc<dyn Module>> {
        let bad = |what: String| RuntimeError::new(Code::Artefact, format!("program {}: {what}", program.name));
        let words = moec_abi::encode(program).map_err(|e| bad(e.to_string()))?;
        let scratch = Words::new(&words).map_err(|s| bad(s.text().to_string_lossy().into_owned()))?.scratch();
        if kernels.len() != program.launches.len() {
            return Err(bad(format!("{} kernels for {} launches", kernels.len(), program.launches.len())));
        }
        let about = format!(
            "{} kernels, {} bytes of code, {} threads",
            kernels.len(),
            image.as_ref().map_or(0, elf::Image::bytes),
            if self.threads == 0 { moec_launch::pool::processors() } else { self.threads },
        );
        Ok(Arc::new(CpuModule { words, kernels, threads: self.threads(scratch)?, about, _image: image }))
    }
}

impl Device for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn runs(&self, target: &str) -> Result<(), String> {
        target::cpu_runs(target)
    }

    fn rank(&self, target: &str) -> u32 {
        target::cpu_rank(target)
    }

    fn load(&self, program: &Program, files: &dyn Files) -> Result<Arc<dyn Module>> {
        let image = elf::load(&files.read(&program.code)?)?;
        let mut kernels = Vec::with_capacity(program.launches.len());
        for launch in &program.launches {
            let address = image.symbol(&launch.symbol).ok_or_else(|| {
                let message =
                    format!("{} does not define {}, the kernel of {}", program.code, launch.symbol, launch.name);
                RuntimeError::new(Code::CodeObject, message)
            })?;
            // SAFETY: the manifest says that this symbol is a CPU kernel; the image lives as long as the module.
            kernels.push(unsafe { std::mem::transmute::<u64, CpuKernel>(address) });
        }
        self.build(program, kernels, Some(image))
    }

    fn allocate(&self, bytes: u64) -> Result<u64> {
        let none = || RuntimeError::new(Code::Memory, format!("no {bytes} bytes of memory"));
        let size = usize::try_from(bytes.max(1)).map_err(|_| none())?;
        let layout = Layout::from_size_align(size, ALIGN).map_err(|_| none())?;
        // SAFETY: the size is not zero.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(none());
        }
        // Large pages: a tenth of the time to fill memory that is new. Only a wish, so nobody asks what became of it.
        // SAFETY: whole pages inside of what was allocated, whose content stays.
        #[cfg(target_os = "linux")]
        unsafe {
            let before = memory.align_offset(PAGE);
            if let Some(inside) = size.checked_sub(before).filter(|n| *n >= PAGE) {
                libc::madvise(memory.add(before).cast(), inside / PAGE * PAGE, libc::MADV_HUGEPAGE);
            }
        }
        Ok(memory.expose_provenance() as u64)
    }

    unsafe fn free(&self, address: u64, bytes: u64) {
        let Ok(layout) = Layout::from_size_align(bytes.max(1) as usize, ALIGN) else { return };
        // SAFETY: the caller passes an address and size of `allocate`.
        unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address as usize), layout) };
    }

    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller vouches for the range.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                std::ptr::with_exposed_provenance_mut(address as usize),
                bytes.len(),
            );
        }
        Ok(())
    }

    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the caller vouches for the range.
        unsafe {
            std::ptr::copy_nonoverlapping(
                std::ptr::with_exposed_provenance::<u8>(address as usize),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
        Ok(())
    }

    unsafe fn launch(&self, module: &dyn Module, bound: &Bound<'_>, times: Option<&mut Vec<u64>>) -> Result<()> {
        let module = (module as &dyn Any)
            .downcast_ref::<CpuModule>()
            .ok_or_else(|| RuntimeError::new(Code::Argument, "the module was loaded on another device"))?;
        let words = Words::new(&module.words).map_err(status_error)?;
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        let mut weights = vec![std::ptr::null(); bound.program.slots.len()];
        for (buffer, &address) in bound.program.buffers.iter().zip(bound.addresses) {
            let pointer = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
            match buffer.kind {
                BufferKind::Input { .. } => inputs.push(pointer.cast_const()),
                BufferKind::Output { .. } => outputs.push(pointer),
                BufferKind::Weight { slot } => {
                    if let Some(weight) = weights.get_mut(slot) {
                        *weight = pointer.cast_const();
                    }
                }
                BufferKind::Workspace => {}
            }
        }
        // A slot that no buffer names has no address; the launcher only looks at those that are named.
        let unused = std::ptr::without_provenance(ALIGN);
        weights.iter_mut().filter(|w| w.is_null()).for_each(|w| *w = unused);
        let call = run::Call {
            tokens: bound.tokens,
            inputs: &inputs,
            outputs: &outputs,
            weights: &weights,
            workspace: std::ptr::with_exposed_provenance_mut(bound.workspace as usize),
            workspace_bytes: bound.workspace_bytes,
        };
        let mut table = vec![0; words.max_args()];
        let mut measured = times.is_some().then(|| vec![0; module.kernels.len()]);
        let turn = module.threads.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the pool lives as long as `threads`; the caller vouches for addresses and kernels.
        let status = unsafe {
            let pool = module.threads.pool.as_ref();
            run::run(&words, &module.kernels, pool, &call, &mut table, measured.as_deref_mut())
        };
        drop(turn);
        status.map_err(|status| {
            match status.argument().and_then(|place| words.text(place, status.kind() == Status::MISALIGNED)) {
                Some(text) => RuntimeError::new(Code::Argument, text.to_string_lossy()),
                None => status_error(status),
            }
        })?;
        if let (Some(times), Some(measured)) = (times, measured) {
            times.extend(measured);
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn shares_memory(&self) -> bool {
        true
    }
}
