//! Lowering: a graph of kernel ops becomes a program and the kernels that it launches.
//!
//! Every value that crosses a kernel boundary gets memory, every weight a packed slot, every
//! kernel op one or more launches. What the kernels look like inside is the emitters' business.

mod batch;
mod domains;
mod forms;
mod grouped;
mod launch;
mod memory;
mod weights;

use crate::{
    CodegenError, Target,
    batch::{BatchKernel, Quantise, Share},
    cpu,
    gpu::{
        self,
        tuned::{Choice, Table},
    },
    grouped::Grouped,
    mlir::{Builder, Compiled, Keep, Session},
    plan::PlanKernel,
    rows::{InputPart, OutputPart, RowArg, RowKernel, type_of},
};
pub(crate) use memory::dim as extent;
pub use memory::dtype;
use memory::{Memory, Place, dim};
use moec_abi::{Arg, Expr, Grid, Launch, Program};
use moec_ir::{
    Graph, NodeId, Op, Type,
    ops::{Kernel, KernelKind, PartKind},
};

/// What to compile for, and which texts to keep.
#[derive(Clone, Debug)]
pub struct Options {
    /// Target of the code.
    pub target: Target,
    /// Intermediate texts to keep.
    pub keep: Keep,
    /// Code of kernels that are known to be equal, made before; nothing is generated then.
    pub code: Option<Vec<u8>>,
    /// Layers of the model that the form serves.
    pub layers: Vec<u64>,
    /// Checkpoint prefix of each of these layers.
    pub prefixes: Vec<String>,
    /// What was measured of products on GPUs.
    pub tuned: Table,
}

/// A layer form, compiled for one target.
#[derive(Debug)]
pub struct CompiledForm {
    /// What to launch, with which memory.
    pub program: Program,
    /// Code and the texts that were asked for.
    pub compiled: Compiled,
    /// The schedule of each grouped product, for people.
    pub schedules: Vec<String>,
    /// The grouped products on a GPU.
    pub products: Vec<TunedProduct>,
}

/// A grouped product on a GPU, and the numbers that it was compiled with.
#[derive(Clone, Debug)]
pub struct TunedProduct {
    /// What is computed; its symbol is the start of the kernels' symbols.
    pub spec: Grouped,
    /// The numbers.
    pub choice: Choice,
}

impl TunedProduct {
    /// Its name in tables.
    pub fn name(&self, target: Target) -> String {
        gpu::tuned::product(&self.spec, target)
    }
}

/// A kernel that is part of the module.
enum Kernels<'g> {
    Rows(RowKernel<'g>),
    Plan(PlanKernel),
    Batch(BatchKernel<'g>),
    Quantise(Quantise),
    Share(Share),
    Cpu(Grouped, cpu::Schedule),
    Gpu(Grouped, gpu::Schedule),
}

/// Compiles a graph whose ops are kernel ops.
///
/// # Errors
/// [`CodegenError::Unsupported`] for what the target cannot do; the others are bugs of an emitter.
pub fn compile<'g>(session: &'g Session, graph: &'g Graph, options: &'g Options) -> Result<CompiledForm, CodegenError> {
    let mut lowering = Lowering {
        session,
        graph,
        target: options.target,
        tuned: &options.tuned,
        products: Vec::new(),
        memory: Memory::new(graph),
        slots: Vec::new(),
        launches: Vec::new(),
        kernels: Vec::new(),
        schedules: Vec::new(),
    };
    lowering.memory.inputs(graph)?;
    refuse_series(graph)?;
    for id in early_gates(graph) {
        lowering.node(id)?;
    }
    let domains = domains::of_inputs(graph, &lowering.memory);
    let Lowering { memory, slots, launches, kernels, schedules, products, .. } = lowering;
    let mut failure = None;
    let compiled = match &options.code {
        Some(code) => Compiled { code: code.clone(), ..Compiled::default() },
        None => session.compile(&options.target, options.keep, |b| {
            if options.target.is_gpu() {
                b.shared(crate::SHARED, 0, 1024);
            }
            for kernel in &kernels {
                if let Err(error) = kernel.emit(b, options.target) {
                    failure = Some(error);
                }
            }
        })?,
    };
    if let Some(error) = failure {
        return Err(error);
    }
    let (buffers, workspace) = memory.finish();
    let fits = domains::sizes(graph);
    let max_tokens = memory::max_tokens(&buffers, &workspace, &launches);
    let extension = if options.target.is_gpu() { "ptx" } else { "o" };
    let program = Program {
        name: graph.name.clone(),
        target: options.target.name().to_owned(),
        buffers,
        slots,
        launches,
        workspace,
        max_tokens,
        fits,
        layers: options.layers.clone(),
        prefixes: options.prefixes.clone(),
        code: format!("kernels/{}.{}.{extension}", graph.name, options.target.name()),
        binary: None,
        domains,
    };
    Ok(CompiledForm { program, compiled, schedules, products })
}

/// Experts that a combine computes stand alone between dispatch and combine: behind or before other experts they have no
/// kernel.
fn refuse_series(graph: &Graph) -> Result<(), CodegenError> {
    for id in graph.order() {
        let node = graph.node(id);
        if let Op::Kernel(kernel) = &node.op {
            refuse_series(&kernel.body)?;
        }
        let Op::Experts(op) = &node.op else { continue };
        let dispatched = graph.operands(id).first().is_some_and(|o| matches!(graph.node(*o).op, Op::Dispatch(_)));
        let summed = graph.users(id).into_iter().all(|user| matches!(graph.node(user).op, Op::Combine(_)));
        let alone = dispatched && summed && !graph.is_output(id);
        let kind = op.bank.iter().find_map(|part| match part.kind {
            PartKind::Film(_) => Some("film"),
            PartKind::Const { .. } if !alone => Some("const"),
            PartKind::Neuron(_) if !alone => Some("neuron"),
            PartKind::Identity {} if !alone => Some("identity"),
            PartKind::Const { .. }
            | PartKind::Neuron(_)
            | PartKind::Identity {}
            | PartKind::Ffn(_)
            | PartKind::Linear(_)
            | PartKind::Zero {} => None,
        });
        if let Some(kind) = kind {
            let what = format!("experts of kind `{kind}` in series with other experts, or read as rows");
            return Err(CodegenError::Unsupported { node: node.name.clone(), what });
        }
    }
    Ok(())
}

/// Nodes in the order of their launches: a gate runs as soon as its operands are there, so that whoever fetches experts
/// knows a route that follows from earlier values (of the layer before, or from before attention) before the work that
/// does not need it.
fn early_gates(graph: &Graph) -> Vec<NodeId> {
    let (mut rest, mut order) = (graph.order(), Vec::new());
    let is_gate = |id: NodeId| matches!(&graph.node(id).op, Op::Kernel(kernel) if kernel.kind == KernelKind::Gate);
    let is_input = |id: NodeId| matches!(graph.node(id).op, Op::Input(_));
    while !rest.is_empty() {
        let ready = |id: NodeId| graph.operands(id).iter().all(|o| order.contains(o));
        let next = rest.iter().position(|id| is_input(*id));
        let next = next.or_else(|| rest.iter().position(|id| is_gate(*id) && ready(*id))).unwrap_or(0);
        order.push(rest.remove(next));
    }
    order
}

impl Kernels<'_> {
    fn emit(&self, b: &Builder<'_>, target: Target) -> Result<(), CodegenError> {
        match self {
            Self::Rows(kernel) => kernel.emit(b, target),
            Self::Plan(kernel) => {
                kernel.emit(b, target);
                Ok(())
            }
            Self::Batch(kernel) => kernel.emit(b, target),
            Self::Quantise(kernel) => {
                kernel.emit(b, target);
                Ok(())
            }
            Self::Share(kernel) => {
                kernel.emit(b, target);
                Ok(())
            }
            Self::Cpu(spec, schedule) => {
                cpu::emit(b, spec, schedule, target);
                Ok(())
            }
            Self::Gpu(spec, schedule) => {
                gpu::emit(b, spec, schedule, target);
                Ok(())
            }
        }
    }
}

pub(crate) struct Lowering<'g> {
    session: &'g Session,
    graph: &'g Graph,
    target: Target,
    memory: Memory,
    slots: Vec<moec_abi::Slot>,
    launches: Vec<Launch>,
    kernels: Vec<Kernels<'g>>,
    schedules: Vec<String>,
    tuned: &'g Table,
    products: Vec<TunedProduct>,
}

impl<'g> Lowering<'g> {
    fn fail<T>(&self, id: NodeId, what: impl Into<String>) -> Result<T, CodegenError> {
        Err(CodegenError::Unsupported { node: self.graph.node(id).name.clone(), what: what.into() })
    }

    fn symbol(&self, id: NodeId, suffix: &str) -> String {
        let own: String =
            self.graph.node(id).name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        format!("{}_{own}{suffix}", self.graph.name)
    }

    fn node(&mut self, id: NodeId) -> Result<(), CodegenError> {
        let graph = self.graph;
        match &graph.node(id).op {
            Op::Input(_) => Ok(()),
            Op::Kernel(kernel) => match kernel.kind {
                KernelKind::Gate | KernelKind::Combine | KernelKind::Rows => self.rows(id, kernel),
                KernelKind::Plan => self.plan(id),
                KernelKind::Up | KernelKind::Down | KernelKind::Dense => self.products(id, kernel),
                KernelKind::Attention | KernelKind::Batch => self.batch(id, kernel),
            },
            op @ (Op::Param(_)
            | Op::Linear(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Norm(_)
            | Op::Softmax(_)
            | Op::Einsum(_)
            | Op::Reduce(_)
            | Op::Shape(_)
            | Op::Gather(_)
            | Op::Attention(_)
            | Op::Adjust(_)
            | Op::Transport(_)
            | Op::Select(_)
            | Op::ProductKey(_)
            | Op::Limit(_)
            | Op::Weigh(_)
            | Op::Override(_)
            | Op::Count(_)
            | Op::Dispatch(_)
            | Op::Experts(_)
            | Op::Combine(_)
            | Op::Ffn(_)
            | Op::Plan(_)
            | Op::Described(_)
            | Op::Collective(_)) => {
                self.fail(id, format!("operation `{}` is not part of a kernel and cannot be compiled", op.name()))
            }
        }
    }

    fn launch(&mut self, id: NodeId, symbol: String, args: Vec<Arg>, grid: Grid) {
        self.launches.push(Launch { name: self.graph.node(id).name.clone(), symbol, args, grid });
    }

    /// A gate, a combine, or another chain of row ops.
    fn rows(&mut self, id: NodeId, kernel: &'g Kernel) -> Result<(), CodegenError> {
        let operands = self.graph.operands(id);
        let dtypes = operands
            .iter()
            .map(|o| (self.memory.place(*o).and_then(Place::dtype), self.memory.is_partial(self.graph, *o)))
            .collect();
        let place = self.memory.allocate(self.graph, id, self.target)?;
        let result = place.dtype().unwrap_or(moec_abi::DType::F32);
        let symbol = self.symbol(id, "");
        let given = self.logits(id, kernel)?;
        let nodes: Vec<NodeId> = given.iter().map(|(node, _)| *node).collect();
        let planned = RowKernel::plan(self.session, self.target, symbol.clone(), &kernel.body, dtypes, &nodes, result)?;
        let mut args = Vec::new();
        for arg in &planned.args {
            let buffer = match arg {
                RowArg::Input { operand, part } => {
                    let source = operands.get(*operand).and_then(|o| self.memory.place(*o));
                    match (source, part) {
                        (Some(place), InputPart::Data) => place.data(),
                        (Some(place), InputPart::Idx) => place.idx(),
                        (Some(place), InputPart::Weights) => place.weights(),
                        (Some(place), InputPart::Positions) => place.positions(),
                        (Some(_), InputPart::Map | InputPart::Offsets | InputPart::Scale) | (None, _) => None,
                    }
                }
                RowArg::Weight { name, layout, dtype } => {
                    let slot = weights::whole(&kernel.body, id, self.graph, name, layout.clone(), *dtype)?;
                    Some(self.memory.weight(&mut self.slots, slot))
                }
                RowArg::Given(node) => given.iter().find(|(id, _)| id == node).map(|(_, buffer)| *buffer),
                RowArg::Output(OutputPart::Data) => place.data(),
                RowArg::Output(OutputPart::Idx) => place.idx(),
                RowArg::Output(OutputPart::Weights) => place.weights(),
            };
            match buffer {
                Some(buffer) => args.push(Arg::Buffer(buffer)),
                None => return self.fail(id, "an operand has no memory"),
            }
        }
        let rows = self.leading(id)?;
        args.push(Arg::Value(rows.clone()));
        self.launch(id, symbol, args, planned.grid(self.target, rows));
        self.kernels.push(Kernels::Rows(planned));
        Ok(())
    }

    /// Rows of a value: its first dimension.
    fn leading(&self, id: NodeId) -> Result<Expr, CodegenError> {
        match type_of(self.graph, id)? {
            Type::Tensor(tensor) => match tensor.shape.first() {
                Some(rows) => Ok(dim(rows)),
                None => self.fail(id, "a scalar has no rows"),
            },
            Type::Route(route) | Type::Plan(route) => Ok(dim(&route.rows)),
            Type::Ragged(ragged) => Ok(dim(&ragged.route.rows).times(ragged.repeat)),
        }
    }

    /// The sort of a route by expert.
    fn plan(&mut self, id: NodeId) -> Result<(), CodegenError> {
        let Some(route) = self.graph.operands(id).first().copied() else { return self.fail(id, "no route") };
        let Type::Plan(ty) = type_of(self.graph, id)?.clone() else { return self.fail(id, "the value is no plan") };
        let grouped::Needs { range, holes, scale, repeat } = grouped::plan_needs(self.graph, id)?;
        let Some(Place::Route { idx, w, .. }) = self.memory.place(route).cloned() else {
            return self.fail(id, "the route has no memory");
        };
        let symbol = self.symbol(id, "");
        let kernel = PlanKernel {
            symbol: symbol.clone(),
            first: range[0],
            end: range[1],
            holes,
            slots: ty.slots,
            repeat,
            scale,
        };
        let place = self.memory.plan(self.graph, id, (idx, w), &ty, &kernel);
        let mut args = vec![Some(idx)];
        if scale {
            args.push(w);
        }
        let Place::Plan { offsets, map, positions, scale: sorted, .. } = &place else {
            return self.fail(id, "the plan has no memory");
        };
        args.extend([Some(*offsets), Some(*map), Some(*positions)]);
        if scale {
            args.push(*sorted);
        }
        let Some(args) = args.into_iter().collect::<Option<Vec<usize>>>() else {
            return self.fail(id, "the route has no weights");
        };
        let mut args: Vec<Arg> = args.into_iter().map(Arg::Buffer).collect();
        args.push(Arg::Value(dim(&ty.rows)));
        self.launch(id, symbol, args, kernel.grid(self.target));
        self.kernels.push(Kernels::Plan(kernel));
        Ok(())
    }
}
