//! The MLIR context, the pipeline to the LLVM dialect, and the way into LLVM.

use crate::{CodegenError, mlir::Builder, target::Target};
use inkwell::{
    OptimizationLevel,
    context::Context as LlvmContext,
    llvm_sys::support::LLVMParseCommandLineOptions,
    module::Module as LlvmModule,
    passes::PassBuilderOptions,
    targets::{
        CodeModel, FileType, InitializationConfig, RelocMode, Target as LlvmTarget, TargetMachine, TargetTriple,
    },
};
use melior::{
    Context,
    dialect::DialectRegistry,
    ir::{BlockLike as _, Location, Module, operation::OperationLike as _},
    pass::PassManager,
    utility::{parse_pass_pipeline, register_all_dialects, register_all_llvm_translations, register_all_passes},
};
use std::{
    cell::RefCell,
    ffi::{CStr, c_int},
    rc::Rc,
    sync::Once,
    time::{Duration, Instant},
};

/// From `scf`, `arith`, `vector` and `nvvm` to the LLVM dialect, all dialects in one conversion; the same for every
/// target. What is left to clean up is left to LLVM.
const PIPELINE: &str = "builtin.module(cse,convert-scf-to-cf,convert-to-llvm,reconcile-unrealized-casts)";

/// Optimisation of LLVM IR for CPUs. The emitters unroll, vectorise and interleave themselves, so what is left is to
/// clean up and to move address arithmetic out of loops: as fast as the code of `default<O3>`, in a tenth of its time.
const CLEAN_UP: &str = "function(sroa<modify-cfg>,early-cse<memssa>,simplifycfg,loop-mssa(loop-rotate,licm),\
early-cse<memssa>,instcombine<no-verify-fixpoint>,simplifycfg)";

/// The same for GPUs, where loops of a few turns are worth unrolling: a warp has registers for them.
const CLEAN_UP_AND_UNROLL: &str = "function(sroa<modify-cfg>,early-cse<memssa>,instcombine<no-verify-fixpoint>,\
simplifycfg,loop-mssa(loop-rotate,licm),loop(indvars,loop-deletion,loop-unroll-full),sroa<modify-cfg>,\
early-cse<memssa>,instcombine<no-verify-fixpoint>,simplifycfg)";

/// What LLVM's code generators do by themselves and without effect here, since the emitters write addresses as loops
/// need them: they add what is constant last, and carry what grows from turn to turn. It took a tenth of the time of
/// compiling for GPUs and a quarter for CPUs.
const LEFT_OUT: [&CStr; 4] =
    [c"moec", c"-disable-lsr", c"-opt-disable=slsr,nary-reassociate", c"-opt-disable-enable-verbosity=0"];

/// An MLIR context with the dialects that kernels use. Not shared between threads.
#[derive(Debug)]
pub struct Session {
    context: Context,
    messages: Rc<RefCell<Vec<String>>>,
}

/// What one module became.
#[derive(Debug, Default)]
pub struct Compiled {
    /// MLIR before lowering, if it was asked for.
    pub mlir: Option<String>,
    /// LLVM IR after optimisation, if it was asked for.
    pub llvm: Option<String>,
    /// Native object or PTX text.
    pub code: Vec<u8>,
    /// Assembly of native code, if it was asked for.
    pub assembly: Option<String>,
    /// Time per stage, in order.
    pub stages: Vec<(&'static str, Duration)>,
}

/// Which intermediate texts to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// MLIR before lowering.
    pub mlir: bool,
    /// Optimised LLVM IR.
    pub llvm: bool,
    /// Assembly of native code.
    pub assembly: bool,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// Registers what kernels use; a few milliseconds.
    pub fn new() -> Self {
        static PROCESS: Once = Once::new();
        PROCESS.call_once(|| {
            register_all_passes();
            let words = LEFT_OUT.map(CStr::as_ptr);
            // SAFETY: the words are alive during the call, which copies them. No thread of ours uses LLVM before its
            // session.
            unsafe { LLVMParseCommandLineOptions(words.len() as c_int, words.as_ptr(), std::ptr::null()) };
        });
        let registry = DialectRegistry::new();
        register_all_dialects(&registry);
        // No thread pool: modules are small, and start-up and memory count.
        let context = Context::new_with_registry(&registry, false);
        register_all_llvm_translations(&context);
        // The parser loads dialects on demand, the builder does not.
        for dialect in ["arith", "cf", "llvm", "nvvm", "scf", "ub", "vector"] {
            context.get_or_load_dialect(dialect);
        }
        let messages: Rc<RefCell<Vec<String>>> = Rc::default();
        let sink = Rc::clone(&messages);
        context.attach_diagnostic_handler(move |diagnostic| {
            sink.borrow_mut().push(diagnostic.to_string());
            true
        });
        Self { context, messages }
    }

    /// Builds a module with `build` and compiles it for `target`.
    ///
    /// # Errors
    /// When MLIR or LLVM refuses the module, which is a bug of an emitter; the text says what they said.
    pub fn compile(
        &self,
        target: &Target,
        keep: Keep,
        build: impl FnOnce(&Builder<'_>),
    ) -> Result<Compiled, CodegenError> {
        let mut clock = Clock::default();
        let location = Location::unknown(&self.context);
        let mut module = Module::new(location);
        // SAFETY: the builder is dropped before the module.
        let body = unsafe { melior::ir::block::BlockRef::from_raw(module.body().to_raw()) };
        build(&Builder::new(&self.context, body));
        let mut compiled = Compiled::default();
        if keep.mlir {
            compiled.mlir = Some(module.as_operation().to_string());
        }
        clock.mark("build");
        if !module.as_operation().verify() {
            return Err(self.failure("verify"));
        }
        let manager = PassManager::new(&self.context);
        // The module was verified above; the passes are MLIR's own.
        manager.enable_verifier(false);
        parse_pass_pipeline(manager.as_operation_pass_manager(), PIPELINE).map_err(|_| self.failure("pipeline"))?;
        manager.run(&mut module).map_err(|_| self.failure("lowering"))?;
        clock.mark("mlir");
        let llvm = LlvmContext::create();
        // SAFETY: both contexts are alive; the returned module belongs to `llvm`.
        let raw = unsafe { mlir_sys::mlirTranslateModuleToLLVMIR(module.as_operation().to_raw(), llvm.raw().cast()) };
        if raw.ptr_is_null() {
            return Err(self.failure("translation"));
        }
        // SAFETY: `raw` is a module of `llvm` that nothing else owns.
        let native = unsafe { LlvmModule::new(raw.cast()) };
        clock.mark("translate");
        let machine = machine(target)?;
        native.set_triple(&machine.get_triple());
        native.set_data_layout(&machine.get_target_data().get_data_layout());
        let options = PassBuilderOptions::create();
        let passes = if target.is_gpu() { CLEAN_UP_AND_UNROLL } else { CLEAN_UP };
        native.run_passes(passes, &machine, options).map_err(|e| CodegenError::llvm("optimise", &e.to_string()))?;
        clock.mark("optimise");
        if keep.llvm {
            compiled.llvm = Some(native.print_to_string().to_string());
        }
        let write = |kind| {
            machine
                .write_to_memory_buffer(&native, kind)
                .map(|b| b.as_slice().to_vec())
                .map_err(|e| CodegenError::llvm("emit", &e.to_string()))
        };
        compiled.code = write(if target.is_gpu() { FileType::Assembly } else { FileType::Object })?;
        // LLVM ends assembly with a NUL.
        while target.is_gpu() && compiled.code.last() == Some(&0) {
            compiled.code.pop();
        }
        clock.mark("emit");
        if keep.assembly && !target.is_gpu() {
            let mut text = write(FileType::Assembly)?;
            while text.last() == Some(&0) {
                text.pop();
            }
            compiled.assembly = Some(String::from_utf8_lossy(&text).into_owned());
        }
        compiled.stages = clock.stages;
        Ok(compiled)
    }

    /// Builds a module only to learn something from the emitter.
    pub fn sketch(&self, build: impl FnOnce(&Builder<'_>)) {
        let module = Module::new(Location::unknown(&self.context));
        // SAFETY: the builder is dropped before the module.
        let body = unsafe { melior::ir::block::BlockRef::from_raw(module.body().to_raw()) };
        build(&Builder::new(&self.context, body));
    }

    fn failure(&self, stage: &'static str) -> CodegenError {
        let text = self.messages.borrow_mut().drain(..).collect::<Vec<_>>().join("\n");
        CodegenError::Mlir { stage, text }
    }
}

trait PtrIsNull {
    fn ptr_is_null(&self) -> bool;
}
impl<T> PtrIsNull for *mut T {
    fn ptr_is_null(&self) -> bool {
        self.is_null()
    }
}

fn machine(target: &Target) -> Result<TargetMachine, CodegenError> {
    static NVPTX: Once = Once::new();
    static X86: Once = Once::new();
    static AARCH64: Once = Once::new();
    match target.triple() {
        "nvptx64-nvidia-cuda" => NVPTX.call_once(|| LlvmTarget::initialize_nvptx(&InitializationConfig::default())),
        "aarch64-unknown-linux-gnu" => {
            AARCH64.call_once(|| LlvmTarget::initialize_aarch64(&InitializationConfig::default()));
        }
        _ => X86.call_once(|| LlvmTarget::initialize_x86(&InitializationConfig::default())),
    }
    let triple = TargetTriple::create(target.triple());
    LlvmTarget::from_triple(&triple)
        .map_err(|e| CodegenError::llvm("target", &e.to_string()))?
        .create_target_machine(
            &triple,
            target.cpu(),
            target.features(),
            // For GPUs the highest only numbers values twice more.
            if target.is_gpu() { OptimizationLevel::Default } else { OptimizationLevel::Aggressive },
            if target.is_gpu() { RelocMode::Default } else { RelocMode::PIC },
            CodeModel::Default,
        )
        .ok_or_else(|| CodegenError::llvm("target", target.name()))
}

/// Wall-clock time of named stages.
struct Clock {
    last: Instant,
    stages: Vec<(&'static str, Duration)>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { last: Instant::now(), stages: Vec::new() }
    }
}

impl Clock {
    fn mark(&mut self, stage: &'static str) {
        self.stages.push((stage, self.last.elapsed()));
        self.last = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlir::{FuncKind, V};

    fn scale(b: &Builder<'_>, kind: FuncKind) {
        b.func("scale", kind, &[("!llvm.ptr", "{}"), ("i64", "{}")], |a| {
            let (low, high) = match kind {
                FuncKind::Kernel { .. } => {
                    let thread = b.op("nvvm.read.ptx.sreg.tid.x", &[], "i32", &[]);
                    let i = b.cast("arith.extui", thread, "i64");
                    (i, b.minsi(b.addc(i, 1), a[1]))
                }
                FuncKind::Plain | FuncKind::Private => (b.i64(0), a[1]),
            };
            b.each(low, high, |i| {
                let at = b.gep(a[0], "f32", i);
                let x = b.load(at, "f32", 4);
                b.store(b.maximumf(b.mulf(x, b.f32(0.1)), b.f32(0.0)), at, 4);
            });
        });
    }

    #[test]
    fn every_target_gets_code() {
        let session = Session::new();
        for target in Target::ALL {
            let kind = if target.is_gpu() {
                FuncKind::Kernel { threads: 128, blocks: 1, cluster: 1 }
            } else {
                FuncKind::Plain
            };
            let code = session.compile(&target, Keep::default(), |b| scale(b, kind)).expect("compiles").code;
            if target.is_gpu() {
                let ptx = String::from_utf8(code).expect("PTX is text");
                assert!(ptx.contains(".visible .entry scale"), "{ptx}");
                assert!(ptx.contains(&format!(".target {}", target.name())), "{ptx}");
            } else {
                assert_eq!(&code[..4], b"\x7fELF");
            }
        }
    }

    #[test]
    fn a_rolled_loop_stays_one() {
        let session = Session::new();
        fn count<'c>(b: &Builder<'c>, rolled: bool) {
            let kind = FuncKind::Kernel { threads: 32, blocks: 1, cluster: 1 };
            b.func("count", kind, &[("!llvm.ptr", "{}"), ("i32", "{}")], |a| {
                let body = |i: V<'c>, _: &[V<'c>]| {
                    b.store(i, b.gep(a[0], "i32", i), 4);
                    Vec::new()
                };
                let (low, step) = (b.i32(0), b.i32(1));
                if rolled {
                    b.rolled(low, a[1], step, &[], body)
                } else {
                    b.for_(low, a[1], step, &[], body)
                };
            });
        }
        let compile = |rolled| {
            let code = session.compile(&Target::Sm80, Keep::default(), |b| count(b, rolled));
            String::from_utf8(code.expect("compiles").code).expect("PTX is text")
        };
        assert!(compile(true).contains(".pragma \"nounroll\""), "{}", compile(true));
        assert!(!compile(false).contains(".pragma"), "{}", compile(false));
    }

    #[test]
    fn a_refused_module_says_what_mlir_said() {
        let session = Session::new();
        let error = session
            .compile(&Target::X86V4, Keep::default(), |b| {
                b.func("f", FuncKind::Plain, &[], |_| {
                    b.address_of("nowhere", "!llvm.ptr");
                });
            })
            .expect_err("a symbol that does not exist");
        assert!(error.to_string().contains("must reference a global"), "{error}");
    }
}
