//! Models and graphs to artefacts.

use crate::{Error, ptxas};
use moec_abi::{Manifest, Matrix, Packing, Program, Recipe, Slot, View};
use moec_codegen::{
    Target,
    gpu::tuned::Table,
    lower::{self, CompiledForm, TunedProduct},
    mlir::{Keep, Session},
};
use moec_frontend::{Form, Model, identifier};
use moec_ir::{Extent, Graph, Op};
use moec_passes::{Outcome, Remark};
use std::{
    collections::BTreeMap,
    num::NonZero,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// How to compile.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// Targets, each of which gets its own code.
    pub targets: Vec<Target>,
    /// Results to keep of the interface; all if empty.
    pub outputs: Vec<String>,
    /// Texts to keep.
    pub keep: Keep,
    /// Keep the IR around every pass.
    pub dump_passes: bool,
    /// Assemble PTX to cubins, if an assembler is found.
    pub cubins: bool,
    /// What was measured of products on GPUs.
    pub tuned: Table,
}

/// What happened to one form.
#[derive(Clone, Debug)]
pub struct FormReport {
    /// Name of the form.
    pub name: String,
    /// The graph before passes.
    pub graph: Graph,
    /// The graph of kernel ops.
    pub kernels: Graph,
    /// What passes said and took.
    pub passes: Outcome,
    /// Per target: texts, schedules and times.
    pub targets: Vec<TargetReport>,
}

/// What code generation for one target gave besides code.
#[derive(Clone, Debug)]
pub struct TargetReport {
    /// The target.
    pub target: Target,
    /// MLIR before lowering, if kept.
    pub mlir: Option<String>,
    /// LLVM IR after optimisation, if kept.
    pub llvm: Option<String>,
    /// Assembly, if kept.
    pub assembly: Option<String>,
    /// Schedules of the grouped products.
    pub schedules: Vec<String>,
    /// The grouped products on a GPU, with the numbers that can be measured.
    pub products: Vec<TunedProduct>,
    /// Time per stage.
    pub stages: Vec<(&'static str, Duration)>,
}

/// A compiled model in memory.
#[derive(Clone, Debug)]
pub struct Artefact {
    /// What a runtime needs to know.
    pub manifest: Manifest,
    /// Files by relative name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// What happened, form by form.
    pub forms: Vec<FormReport>,
}

impl Artefact {
    /// The artefact for the runtime, without going through files.
    ///
    /// # Errors
    /// When the manifest is not one that the runtime takes, which is our bug.
    pub fn load(&self) -> Result<moec_runtime::Artefact, Error> {
        Ok(moec_runtime::Artefact::in_memory(self.manifest.clone(), self.files.clone())?)
    }

    /// Remarks of all passes, and of packing.
    pub fn remarks(&self) -> Vec<Remark> {
        let passes = self.forms.iter().flat_map(|f| &f.passes.remarks).cloned();
        let mut all: Vec<Remark> = passes.collect();
        for remark in self.manifest.programs.iter().flat_map(decoded_early) {
            // Most targets pack alike.
            if !all.contains(&remark) {
                all.push(remark);
            }
        }
        all
    }
}

/// Weights that are stored as codes and packed as values, which kernels read with more bytes.
fn decoded_early(program: &Program) -> Vec<Remark> {
    let why = |matrix: &Matrix| {
        let whole = |view: &View| {
            matches!(view, View::Expert | View::Index { .. } | View::ExpertRows { .. } | View::Slice { axis: 0, .. })
        };
        let source = &matrix.source;
        let coded = match &source.packing {
            Packing::Fp8Block { .. } | Packing::Mxfp4 { .. } => true,
            Packing::Composed(recipe) => matches!(**recipe, Recipe::Grouped { .. } | Recipe::Scaled { .. }),
            Packing::Plain
            | Packing::Fp8Codes
            | Packing::Fp8Factors { .. }
            | Packing::Mxfp4Codes
            | Packing::Mxfp4Exponents => false,
        };
        coded.then(|| match source.view.iter().all(whole) {
            true => "no kernel decodes this form",
            false if source.view.contains(&View::Transpose) => "inputs and outputs are transposed",
            false => "its rows are cut",
        })
    };
    let of_slot = |slot: &Slot| {
        let text = |m: &Matrix| {
            why(m).map(|why| format!("`{}` is stored as codes and decoded when it is packed: {why}", m.source.tensor))
        };
        let found = slot.matrices.iter().filter_map(text);
        found.map(|text| Remark { pass: "pack", node: slot.name.clone(), text }).collect::<Vec<_>>()
    };
    program.slots.iter().flat_map(of_slot).collect()
}

/// The best target of this host's processor.
pub fn host_target() -> Target {
    [Target::X86V4Amx, Target::X86V4Bf16, Target::X86V4, Target::X86V3, Target::Aarch64]
        .into_iter()
        .find(|t| moec_runtime::cpu_runs(t.name()).is_ok())
        .unwrap_or(Target::X86V3)
}

impl Default for Compiler {
    fn default() -> Self {
        Self {
            targets: vec![host_target()],
            outputs: vec!["output".into()],
            keep: Keep::default(),
            dump_passes: false,
            cubins: false,
            tuned: Table::default(),
        }
    }
}

impl Compiler {
    /// Compiles every form of a model.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn compile(&self, model: &Model) -> Result<Artefact, Error> {
        self.compile_forms(&model.name, &model.forms)
    }

    /// Compiles one graph. The artefact has the identifier nearest to `name`: files and symbols are named after it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn compile_graph(&self, name: &str, graph: Graph) -> Result<Artefact, Error> {
        let form = Form { graph, layers: vec![0], prefixes: vec![String::new()] };
        self.compile_forms(&identifier(name), std::slice::from_ref(&form))
    }

    /// Compiles the given forms.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn compile_forms(&self, model: &str, forms: &[Form]) -> Result<Artefact, Error> {
        self.check_outputs(forms)?;
        self.compile_sharing(model, forms, &Shared::default())
    }

    /// Every output that is wanted is one of some form.
    pub(crate) fn check_outputs(&self, forms: &[Form]) -> Result<(), Error> {
        let offered = |name: &str| forms.iter().any(|f| f.graph.outputs.iter().any(|o| o.name == name));
        if let Some(unknown) = self.outputs.iter().find(|name| !offered(name)) {
            let mut known: Vec<&str> =
                forms.iter().flat_map(|f| f.graph.outputs.iter().map(|o| o.name.as_str())).collect();
            known.sort_unstable();
            known.dedup();
            let help = format!("the model has {}", known.join(", "));
            return Err(Error::refused("E0408", format!("there is no output `{unknown}`"), help));
        }
        Ok(())
    }

    /// As [`compile_forms`](Self::compile_forms); code of equal kernels comes from `shared`, and new code goes there.
    pub(crate) fn compile_sharing(&self, model: &str, forms: &[Form], shared: &Shared) -> Result<Artefact, Error> {
        let mut artefact = Artefact {
            manifest: Manifest {
                schema: moec_abi::SCHEMA,
                producer: format!("moec {}", env!("CARGO_PKG_VERSION")),
                model: model.to_owned(),
                inputs: Vec::new(),
                programs: Vec::new(),
                chains: Vec::new(),
                notes: Vec::new(),
            },
            files: BTreeMap::new(),
            forms: Vec::new(),
        };
        for (i, form) in forms.iter().enumerate() {
            let name = if forms.len() == 1 { model.to_owned() } else { format!("{model}_{i}") };
            artefact.forms.push(self.fuse(name, form)?);
        }
        let jobs: Vec<(usize, Target)> =
            (0..forms.len()).flat_map(|form| self.targets.iter().map(move |t| (form, *t))).collect();
        let results = generate(&jobs, |session, (form, target)| {
            let kernels = &artefact.forms[form].kernels;
            let key = (target, moec_ir::print(&neutral(kernels)));
            let known = shared.0.lock().ok().and_then(|known| known.get(&key).cloned());
            let options = lower::Options {
                target,
                keep: self.keep,
                code: known,
                layers: forms[form].layers.clone(),
                prefixes: forms[form].prefixes.clone(),
                tuned: self.tuned.clone(),
            };
            let compiled = lower::compile(session, kernels, &options)?;
            if let Ok(mut known) = shared.0.lock() {
                known.entry(key).or_insert_with(|| compiled.compiled.code.clone());
            }
            // The slowest step, of programs that are not ours: next to the work on other targets.
            let assembler = (self.cubins && target.is_gpu()).then(ptxas::found).flatten();
            let cubin = assembler.map(|a| a.assemble(&compiled.compiled.code, target.name())).transpose()?;
            Ok::<_, Error>((compiled, cubin))
        });
        for ((form, target), result) in jobs.iter().zip(results) {
            let (CompiledForm { mut program, compiled, schedules, products }, cubin) = result?;
            if let Some(cubin) = cubin {
                let name = format!("kernels/{}.{}.cubin", program.name, program.target);
                artefact.files.insert(name.clone(), cubin);
                program.binary = Some(name);
            }
            artefact.files.insert(program.code.clone(), compiled.code);
            artefact.manifest.programs.push(program);
            artefact.forms[*form].targets.push(TargetReport {
                target: *target,
                mlir: compiled.mlir,
                llvm: compiled.llvm,
                assembly: compiled.assembly,
                schedules,
                products,
                stages: compiled.stages,
            });
        }
        Ok(artefact)
    }

    /// Runs the passes over one form.
    fn fuse(&self, name: String, form: &Form) -> Result<FormReport, Error> {
        let mut graph = form.graph.clone();
        graph.name.clone_from(&name);
        if !self.outputs.is_empty() {
            graph.outputs.retain(|o| self.outputs.contains(&o.name) || o.name.starts_with("state_"));
        }
        let mut kernels = graph.clone();
        let passes = moec_passes::run(&mut kernels, self.dump_passes)?;
        Ok(FormReport { name, graph, kernels, passes, targets: Vec::new() })
    }
}

/// Code by target and kernels, for forms that differ in nothing but their weights.
#[derive(Debug, Default)]
pub(crate) struct Shared(Mutex<BTreeMap<(Target, String), Vec<u8>>>);

/// The graph without what only decides where weights come from: kernels of equal neutral graphs are equal.
fn neutral(graph: &Graph) -> Graph {
    let mut graph = graph.clone();
    let fixed = graph.weights.values().all(|w| w.shape.iter().all(|x| matches!(x, Extent::Fixed(_))));
    if fixed {
        for weight in graph.weights.values_mut() {
            weight.source.tensor.clear();
            weight.source.view.clear();
        }
    }
    for id in graph.ids() {
        match &mut graph.node_mut(id).op {
            Op::Kernel(kernel) => *kernel.body = neutral(&kernel.body),
            Op::Experts(op) if fixed => op.bank.iter_mut().for_each(|part| {
                part.numbers.clear();
                part.base_id = 0;
            }),
            _ => {}
        }
    }
    graph
}

/// Does the jobs on all cores, those for GPUs first as they take longest; results come in the order of the jobs.
///
/// MLIR contexts are not shared between threads, so every thread has its own.
fn generate<R: Send + Sync>(jobs: &[(usize, Target)], run: impl Fn(&Session, (usize, Target)) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(jobs.len());
    if threads <= 1 {
        let session = Session::new();
        return jobs.iter().map(|job| run(&session, *job)).collect();
    }
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|i| !jobs[*i].1.is_gpu());
    let next = AtomicUsize::new(0);
    let results: Vec<OnceLock<R>> = jobs.iter().map(|_| OnceLock::new()).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let session = Session::new();
                while let Some(i) = order.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    // Each place is written once, by the thread that drew its number.
                    let _ = results[i].set(run(&session, jobs[i]));
                }
            });
        }
    });
    results.into_iter().filter_map(OnceLock::into_inner).collect()
}
