//! Batch kernels: single ops that no row kernel and no grouped product can compute.
//!
//! They move elements across rows, reduce over the batch, or let rows compete for experts. Each
//! kernel holds one op. Most ops are a number of independent *units* (an element, a row, an
//! expert), one for each thread; the others run as one *team*, the threads of one block, with
//! barriers between phases. On a CPU a unit is a loop iteration and a team is one thread.
//! Sizes that depend on the number of tokens are passed as values.

mod attention;
mod cx;
mod dispatch;
mod element;
mod quantise;
mod route;
mod share;
mod transport;

pub use quantise::Quantise;
pub use share::{Share, Step};

use crate::{
    CodegenError, Target,
    lower::extent,
    mlir::{Builder, FuncKind, V},
    rows::{InputPart, OutputPart, type_of},
};
use cx::Cx;
use moec_abi::{CpuGrid, DType, Expr, GpuGrid, Grid};
use moec_ir::{Dim, Graph, NodeId, Op, Type, WeightName, ops::SelectRule};

/// One argument of a batch kernel; the number of units (a value) comes last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BatchArg {
    /// Something of operand `operand` of the kernel op.
    Input {
        /// Position among the operands.
        operand: usize,
        /// Which memory.
        part: InputPart,
    },
    /// A weight, row by row without padding.
    Weight {
        /// Name in the graph.
        name: WeightName,
        /// Element type.
        dtype: DType,
    },
    /// Memory for the result.
    Output(OutputPart),
    /// So many floats that belong to this launch.
    Scratch(Dim),
    /// A size as a number.
    Size(Dim),
}

/// A batch kernel, planned for a target.
#[derive(Clone, Debug)]
pub struct BatchKernel<'g> {
    /// Symbol of the kernel.
    pub symbol: String,
    /// The region: inputs and one op, with types.
    pub body: &'g Graph,
    /// Element types of operands in memory, `None` for routes.
    pub operands: Vec<Option<DType>>,
    /// Element type of a tensor result in memory.
    pub result: DType,
    /// Arguments, without the number of units.
    pub args: Vec<BatchArg>,
    /// Independent pieces of work; `None` for a team.
    pub units: Option<Dim>,
    node: NodeId,
}

/// Threads of a block whose threads work alone.
const THREADS: u32 = 128;

/// The launch of `count` units: a thread each, or on a CPU `grain` at a time.
fn units(target: Target, count: Expr, grain: u64) -> Grid {
    if target.is_gpu() {
        blocks(count.ceil_div(THREADS.into()), THREADS)
    } else {
        Grid::Cpu(CpuGrid { items: count, grain, scratch: 0 })
    }
}

/// The launch of so many blocks on a GPU.
fn blocks(count: Expr, threads: u32) -> Grid {
    Grid::Gpu(GpuGrid {
        blocks: [count, 1.into(), 1.into()],
        threads: [threads, 1, 1],
        cluster: [1, 1, 1],
        shared: 0,
        dependent: false,
        tokens: moec_abi::ANY_TOKENS,
    })
}
/// Threads of a team.
const TEAM: u32 = 256;
/// Units that a CPU thread takes at a time, where units are single elements.
const GRAIN: u64 = 512;

fn unsupported<T>(body: &Graph, id: NodeId, what: &str) -> Result<T, CodegenError> {
    let node = body.node(id);
    Err(CodegenError::Unsupported { node: node.name.clone(), what: format!("{}: {what}", node.op.name()) })
}

/// Product of sizes.
fn volume(body: &Graph, id: NodeId, shape: &[Dim]) -> Result<Dim, CodegenError> {
    match shape.iter().try_fold(Dim::Const(1), |n, d| n.mul(d.clone())) {
        Some(n) => Ok(n),
        None => unsupported(body, id, "a size exceeds 64 bits"),
    }
}

/// Rows of a tensor: all axes but the last.
fn lead(body: &Graph, id: NodeId, shape: &[Dim]) -> Result<Dim, CodegenError> {
    volume(body, id, shape.split_last().map_or(&[][..], |(_, lead)| lead))
}

impl<'g> BatchKernel<'g> {
    /// Plans the kernel of a body with one op.
    ///
    /// # Errors
    /// [`CodegenError::Unsupported`] with the node that is no batch op.
    pub fn plan(
        symbol: String,
        body: &'g Graph,
        operands: Vec<Option<DType>>,
        result: DType,
    ) -> Result<Self, CodegenError> {
        let ops: Vec<NodeId> =
            body.order().into_iter().filter(|id| !matches!(body.node(*id).op, Op::Input(_))).collect();
        let [node] = ops[..] else {
            let what = "a batch kernel has exactly one op".to_owned();
            return Err(CodegenError::Unsupported { node: body.name.clone(), what });
        };
        let (units, scratch) = work(body, node)?;
        let mut args = Vec::new();
        let mut sizes: Vec<Dim> = Vec::new();
        let mut note = |dims: &[Dim]| {
            for dim in dims {
                if dim.known().is_none() && !sizes.contains(dim) {
                    sizes.push(dim.clone());
                }
            }
        };
        for (operand, id) in body.inputs().into_iter().enumerate() {
            let mut input = |part| args.push(BatchArg::Input { operand, part });
            match type_of(body, id)? {
                Type::Tensor(tensor) => {
                    note(&tensor.shape);
                    input(InputPart::Data);
                }
                Type::Route(route) => {
                    note(std::slice::from_ref(&route.rows));
                    input(InputPart::Idx);
                    if route.weighted {
                        input(InputPart::Weights);
                    }
                }
                Type::Plan(_) => {
                    input(InputPart::Offsets);
                    input(InputPart::Map);
                    if dispatch::is_weighted(body, node) {
                        input(InputPart::Scale);
                    }
                }
                Type::Ragged(_) => {
                    input(InputPart::Data);
                    input(InputPart::Offsets);
                    input(InputPart::Map);
                }
            }
        }
        for (name, weight) in &body.weights {
            let dtype = if weight.dtype == moec_ir::DType::Bf16 { DType::Bf16 } else { DType::F32 };
            args.push(BatchArg::Weight { name: name.clone(), dtype });
        }
        match type_of(body, node)? {
            Type::Tensor(tensor) => {
                note(&tensor.shape);
                args.push(BatchArg::Output(OutputPart::Data));
            }
            Type::Route(route) => {
                note(std::slice::from_ref(&route.rows));
                args.push(BatchArg::Output(OutputPart::Idx));
                if route.weighted {
                    args.push(BatchArg::Output(OutputPart::Weights));
                }
            }
            Type::Ragged(_) => args.push(BatchArg::Output(OutputPart::Data)),
            Type::Plan(_) => return unsupported(body, node, "a plan has a kernel of its own"),
        }
        args.extend(scratch.into_iter().map(BatchArg::Scratch));
        args.extend(sizes.into_iter().map(BatchArg::Size));
        Ok(Self { symbol, body, operands, result, args, units, node })
    }

    /// Extent of the launch, and the number of units.
    pub fn grid(&self, target: Target) -> (Grid, Expr) {
        let count = self.units.as_ref().map_or(Expr::Const(1), extent);
        let heavy = !is_element(&self.body.node(self.node).op);
        let grid = match self.units {
            None if target.is_gpu() => blocks(1.into(), TEAM),
            Some(_) | None => units(target, count.clone(), if heavy { 1 } else { GRAIN }),
        };
        (grid, count)
    }

    /// Appends the kernel to the module.
    ///
    /// # Errors
    /// [`CodegenError::Unsupported`] with the node that is no batch op.
    pub fn emit(&self, b: &Builder<'_>, target: Target) -> Result<(), CodegenError> {
        let threads = if self.units.is_some() { THREADS } else { TEAM };
        let pointers: Vec<bool> = self.args.iter().map(|a| !matches!(a, BatchArg::Size(_))).collect();
        let mut outcome = Ok(());
        function(b, target, &self.symbol, &pointers, threads, |place, values| {
            let cx = Cx::new(self, b, target, values, place.team);
            match self.units {
                Some(_) => place.each_unit(b, |unit| outcome = emit_unit(&cx, unit)),
                None => outcome = transport::emit(&cx),
            }
        });
        outcome
    }
}

/// Where a thread stands among the others.
struct Place<'c> {
    /// First and one past the last unit of a CPU thread, or the unit of a GPU thread and the number of units.
    range: (V<'c>, V<'c>),
    gpu: bool,
    /// Thread of the team and number of threads, on a GPU.
    team: Option<(V<'c>, V<'c>)>,
}

impl<'c> Place<'c> {
    fn each_unit(&self, b: &Builder<'c>, body: impl FnOnce(V<'c>)) {
        let (first, end) = self.range;
        if self.gpu {
            b.if_(b.cmpi("slt", first, end), || body(first));
        } else {
            b.each(first, end, body);
        }
    }
}

/// A kernel whose arguments are pointers or numbers, and last the number of units.
fn function<'c>(
    b: &Builder<'c>,
    target: Target,
    symbol: &str,
    pointers: &[bool],
    threads: u32,
    body: impl FnOnce(&Place<'c>, &[V<'c>]),
) {
    let n = pointers.len();
    if target.is_gpu() {
        let parameters: Vec<(&str, &str)> =
            pointers.iter().chain([&false]).map(|p| (if *p { "!llvm.ptr<1>" } else { "i64" }, "{}")).collect();
        b.func(symbol, FuncKind::Kernel { threads, blocks: 1, cluster: 1 }, &parameters, |a| {
            let special = |name: &str| {
                let raw = b.op(&format!("nvvm.read.ptx.sreg.{name}"), &[], "i32", &[]);
                b.cast("arith.extui", raw, "i64")
            };
            let (thread, block) = (special("tid.x"), special("ctaid.x"));
            let unit = b.addi(b.mulc(block, i64::from(threads)), thread);
            let team = Some((thread, b.i64(i64::from(threads))));
            body(&Place { range: (unit, a[n]), gpu: true, team }, &a[..n]);
        });
    } else {
        let parameters = [("!llvm.ptr", "{}"), ("i64", "{}"), ("i64", "{}"), ("!llvm.ptr", "{}")];
        b.func(symbol, FuncKind::Plain, &parameters, |a| {
            let word = |i: usize| b.load(b.gepc(a[0], "i64", i32::try_from(i).unwrap_or(i32::MAX)), "i64", 8);
            let values: Vec<V<'_>> = pointers
                .iter()
                .enumerate()
                .map(|(i, p)| if *p { b.cast("llvm.inttoptr", word(i), "!llvm.ptr") } else { word(i) })
                .collect();
            body(&Place { range: (a[1], a[2]), gpu: false, team: None }, &values);
        });
    }
}

/// Whether units are single elements.
fn is_element(op: &Op) -> bool {
    matches!(op, Op::Unary(_) | Op::Binary(_) | Op::Shape(_) | Op::Param(_) | Op::Gather(_) | Op::Dispatch(_))
        || matches!(op, Op::Norm(op) if op.kind == moec_ir::ops::NormKind::Batch)
}

/// Units of the op, and the scratch arrays that it needs.
fn work(body: &Graph, id: NodeId) -> Result<(Option<Dim>, Vec<Dim>), CodegenError> {
    let shape = |id: NodeId| -> Result<&[Dim], CodegenError> {
        match type_of(body, id)? {
            Type::Tensor(tensor) => Ok(&tensor.shape),
            Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => unsupported(body, id, "a tensor is needed"),
        }
    };
    let operand = |i: usize| match body.operands(id).get(i) {
        Some(operand) => Ok(*operand),
        None => unsupported(body, id, "an operand is missing"),
    };
    let elements = || volume(body, id, shape(id)?);
    let units = match &body.node(id).op {
        Op::Unary(_) | Op::Binary(_) | Op::Shape(_) | Op::Param(_) => elements()?,
        Op::Gather(_) | Op::Einsum(_) | Op::Reduce(_) => elements()?,
        Op::Norm(_) if is_element(&body.node(id).op) => elements()?,
        Op::Norm(_) | Op::Softmax(_) => lead(body, id, shape(id)?)?,
        Op::Select(op) if matches!(op.rule, SelectRule::ExpertChoice { .. }) => match shape(operand(0)?)?.first() {
            Some(rows) => rows.clone(),
            None => return unsupported(body, id, "a scalar has no rows"),
        },
        Op::Limit(op) => route::claims(body, id, op)?,
        Op::Count(_) => elements()?,
        Op::Attention(_) => attention::units(body, id)?,
        Op::Dispatch(_) => dispatch::units(body, id)?,
        Op::Transport(op) => return Ok((None, transport::scratch(op, shape(id)?))),
        op @ (Op::Input(_)
        | Op::Linear(_)
        | Op::Adjust(_)
        | Op::Select(_)
        | Op::ProductKey(_)
        | Op::Weigh(_)
        | Op::Override(_)
        | Op::Experts(_)
        | Op::Combine(_)
        | Op::Ffn(_)
        | Op::Plan(_)
        | Op::Described(_)
        | Op::Collective(_)
        | Op::Kernel(_)) => return unsupported(body, id, &format!("`{}` is no batch op", op.name())),
    };
    Ok((Some(units), Vec::new()))
}

fn emit_unit<'c>(cx: &Cx<'_, 'c>, unit: V<'c>) -> Result<(), CodegenError> {
    match &cx.body.node(cx.node).op {
        Op::Shape(op) => element::shape(cx, op, unit),
        Op::Unary(op) => element::unary(cx, op, unit),
        Op::Binary(op) => element::binary(cx, op, unit),
        Op::Param(op) => element::param(cx, &op.w, unit),
        Op::Gather(op) => element::gather(cx, &op.w, unit),
        Op::Einsum(op) => element::einsum(cx, op, unit),
        Op::Reduce(op) => element::reduce(cx, op, unit),
        Op::Norm(op) => element::norm(cx, op, unit),
        Op::Softmax(op) => element::softmax(cx, op, unit),
        Op::Select(op) => route::expert_choice(cx, &op.rule, unit),
        Op::Limit(op) => route::limit(cx, op, unit),
        Op::Count(_) => route::count(cx, unit),
        Op::Attention(op) => attention::emit(cx, op, unit),
        Op::Dispatch(op) => dispatch::emit(cx, op, unit),
        op @ (Op::Input(_)
        | Op::Linear(_)
        | Op::Adjust(_)
        | Op::ProductKey(_)
        | Op::Weigh(_)
        | Op::Override(_)
        | Op::Experts(_)
        | Op::Combine(_)
        | Op::Ffn(_)
        | Op::Plan(_)
        | Op::Described(_)
        | Op::Collective(_)
        | Op::Kernel(_)
        | Op::Transport(_)) => unsupported(cx.body, cx.node, &format!("`{}` is no batch op", op.name())),
    }
}
