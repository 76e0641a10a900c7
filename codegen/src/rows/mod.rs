//! Row kernels: everything that treats each row alone, in one kernel.
//!
//! Gates (logits, scores, selection, weights), combines (weighted sums of expert rows and what
//! follows) and chains of tensor ops are all of this kind. The body of the kernel op is walked
//! once; elementwise ops become expressions that are computed where they are used, the others
//! keep rows in scratch memory. `exec` says how the steps run on a CPU thread and on a warp.

mod combine;
mod exec;
mod linear;
mod select;
mod tensor;
mod value;
mod walk;
mod weigh;

pub(crate) use exec::element;

use crate::{
    CodegenError, Target,
    mlir::{Builder, FuncKind, Session, V},
};
use moec_abi::{CpuGrid, DType, Expr, GpuGrid, Grid, Layout};
use moec_ir::{Graph, NodeId, Type, WeightName};

/// One argument of a row kernel, in order; the number of rows (a value) comes last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowArg {
    /// Something of operand `operand` of the kernel op.
    Input {
        /// Position among the operands.
        operand: usize,
        /// Which memory.
        part: InputPart,
    },
    /// A packed weight.
    Weight {
        /// Name in the graph.
        name: WeightName,
        /// How it is packed.
        layout: Layout,
        /// Element type of the packed values.
        dtype: DType,
    },
    /// The value of a node of the body, f32, which another kernel has computed.
    Given(NodeId),
    /// Memory for the result.
    Output(OutputPart),
}

/// Which memory of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputPart {
    /// Elements of a tensor, or the sorted rows of a ragged value.
    Data,
    /// Ids of a route.
    Idx,
    /// Weights of a route.
    Weights,
    /// Positions of the slots among sorted rows.
    Positions,
    /// Token of each sorted row.
    Map,
    /// Number of sorted rows.
    Offsets,
    /// Weight of each sorted row.
    Scale,
}

/// Which memory of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputPart {
    /// Elements of a tensor.
    Data,
    /// Ids of a route.
    Idx,
    /// Weights of a route.
    Weights,
}

/// A row kernel, planned for a target.
#[derive(Clone, Debug)]
pub struct RowKernel<'g> {
    /// Symbol of the kernel.
    pub symbol: String,
    /// The region that it computes, with types.
    pub body: &'g Graph,
    /// Element types of tensor operands in memory.
    pub operands: Vec<Option<DType>>,
    /// Operands whose rows are those of some experts only.
    pub partial: Vec<bool>,
    /// Element type of a tensor result in memory.
    pub result: DType,
    /// Arguments, without the number of rows.
    pub args: Vec<RowArg>,
    /// Warps per thread block, each with a row.
    warps: u32,
    /// Warps that share the columns of a row.
    parts: u32,
    /// Bytes of scratch per CPU thread or warp.
    scratch: u64,
}

/// Bytes of shared memory that a block of a row kernel may use: what every supported GPU has.
const SHARED_LIMIT: u64 = 96 * 1024;

impl<'g> RowKernel<'g> {
    /// Plans the kernel: finds its arguments and measures its scratch memory by emitting it once.
    ///
    /// `operands` gives the element type of each operand in memory, `None` for routes, and whether its rows
    /// are those of some experts only; `given` are nodes of the body whose values other kernels compute.
    ///
    /// # Errors
    /// [`CodegenError::Unsupported`] with the node that is no row op.
    pub fn plan(
        session: &Session,
        target: Target,
        symbol: String,
        body: &'g Graph,
        operands: Vec<(Option<DType>, bool)>,
        given: &[NodeId],
        result: DType,
    ) -> Result<Self, CodegenError> {
        let args = arguments(body, target, given)?;
        let (operands, partial) = operands.into_iter().unzip();
        let mut kernel =
            Self { symbol, body, operands, partial, result, args, warps: exec::GPU_WARPS, parts: 1, scratch: 0 };
        let mut measured = Ok((0, true));
        session.sketch(|b| {
            if target.is_gpu() {
                b.shared(crate::SHARED, 0, 1024);
            }
            measured = kernel.emit_measured(b, target);
        });
        let together;
        (kernel.scratch, together) = measured?;
        if target.is_gpu() && !together {
            kernel.parts = columns(body)?.div_ceil(PART).try_into().unwrap_or(1);
        }
        while kernel.warps > 1 && kernel.scratch * u64::from(kernel.warps) > SHARED_LIMIT {
            kernel.warps /= 2;
        }
        if target.is_gpu() && kernel.scratch > SHARED_LIMIT {
            return Err(CodegenError::Unsupported {
                node: body.name.clone(),
                what: format!(
                    "a row needs {} bytes of shared memory, {SHARED_LIMIT} are there; use a narrower layer or a CPU target",
                    kernel.scratch
                ),
            });
        }
        Ok(kernel)
    }

    /// Extent of the launch for `rows` rows.
    pub fn grid(&self, target: Target, rows: Expr) -> Grid {
        if target.is_gpu() {
            Grid::Gpu(GpuGrid {
                blocks: [rows.ceil_div(u64::from(self.warps)), u64::from(self.parts).into(), 1.into()],
                threads: [self.warps * 32, 1, 1],
                cluster: [1, 1, 1],
                shared: u32::try_from(self.scratch * u64::from(self.warps)).unwrap_or(u32::MAX),
                dependent: crate::gpu::starts_early(target),
                tokens: moec_abi::ANY_TOKENS,
            })
        } else {
            Grid::Cpu(CpuGrid { items: rows.ceil_div(exec::CPU_ROWS), grain: 1, scratch: self.scratch })
        }
    }

    /// Appends the kernel to the module.
    ///
    /// # Errors
    /// [`CodegenError::Unsupported`] with the node that is no row op.
    pub fn emit(&self, b: &Builder<'_>, target: Target) -> Result<(), CodegenError> {
        self.emit_measured(b, target).map(|_| ())
    }

    /// Appends the kernel; gives the bytes of scratch that it uses, and whether lanes depend on each other.
    fn emit_measured(&self, b: &Builder<'_>, target: Target) -> Result<(u64, bool), CodegenError> {
        let mut outcome = Ok((0, true));
        if target.is_gpu() {
            let kind = FuncKind::Kernel { threads: self.warps * 32, blocks: 1, cluster: 1 };
            let parameters: Vec<(&str, &str)> =
                self.args.iter().map(|_| ("!llvm.ptr<1>", "{}")).chain([("i64", "{}")]).collect();
            b.func(&self.symbol, kind, &parameters, |a| {
                if crate::gpu::starts_early(target) {
                    crate::gpu::wait_for_predecessor(b);
                }
                let special = |name: &str| {
                    let raw = b.op(&format!("nvvm.read.ptx.sreg.{name}"), &[], "i32", &[]);
                    b.cast("arith.extui", raw, "i64")
                };
                let (thread, block) = (special("tid.x"), special("ctaid.x"));
                let warp = b.shrui(thread, b.i64(5));
                let lane = b.andi(thread, b.i64(31));
                let row = b.addi(b.mulc(block, i64::from(self.warps)), warp);
                let shared = b.address_of(crate::SHARED, "!llvm.ptr<3>");
                let rows = a[self.args.len()];
                b.if_(b.cmpi("slt", row, rows), || {
                    let part = (self.parts > 1).then(|| (special("ctaid.y"), self.parts));
                    let x = exec::Exec::warp(b, target, row, lane, shared, (warp, self.warps), part);
                    outcome = walk::walk(self, &x, &a[..self.args.len()]).map(|()| (x.scratch_bytes(), x.together()));
                });
            });
        } else {
            let parameters = [("!llvm.ptr", "{}"), ("i64", "{}"), ("i64", "{}"), ("!llvm.ptr", "{}")];
            b.func(&self.symbol, FuncKind::Plain, &parameters, |a| {
                let word = |i: usize| b.load(b.gepc(a[0], "i64", i32::try_from(i).unwrap_or(i32::MAX)), "i64", 8);
                let pointers: Vec<V<'_>> =
                    (0..self.args.len()).map(|i| b.cast("llvm.inttoptr", word(i), "!llvm.ptr")).collect();
                let total = word(self.args.len());
                b.each(a[1], a[2], |item| {
                    let height = i64::try_from(exec::CPU_ROWS).unwrap_or(1);
                    let first = b.mulc(item, height);
                    let rows = b.minsi(b.i64(height), b.subi(total, first));
                    let x = exec::Exec::cpu(b, target, first, rows, a[3]);
                    outcome = walk::walk(self, &x, &pointers).map(|()| (x.scratch_bytes(), x.together()));
                });
            });
        }
        outcome
    }
}

/// Columns of a row that a warp takes, where warps can share a row.
const PART: u64 = 128;

/// Columns of the result.
fn columns(body: &Graph) -> Result<u64, CodegenError> {
    let Some(output) = body.outputs.first() else { return Ok(1) };
    match type_of(body, output.node)? {
        Type::Tensor(tensor) => Ok(tensor.shape.iter().skip(1).map(|d| d.known().unwrap_or(1)).product()),
        Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => Ok(1),
    }
}

/// The arguments that a body needs, in order.
fn arguments(body: &Graph, target: Target, given: &[NodeId]) -> Result<Vec<RowArg>, CodegenError> {
    let mut args = Vec::new();
    for (operand, id) in body.inputs().into_iter().enumerate() {
        let mut input = |part| args.push(RowArg::Input { operand, part });
        match type_of(body, id)? {
            Type::Tensor(_) => input(InputPart::Data),
            Type::Route(route) | Type::Plan(route) => {
                input(InputPart::Idx);
                if route.weighted {
                    input(InputPart::Weights);
                }
            }
            Type::Ragged(_) => {
                input(InputPart::Data);
                input(InputPart::Positions);
            }
        }
    }
    args.extend(given.iter().map(|id| RowArg::Given(*id)));
    let matrices = walk::matrices(body);
    let used: Vec<&WeightName> =
        body.ids().into_iter().filter(|id| !given.contains(id)).flat_map(|id| body.node(id).op.weights()).collect();
    for (name, weight) in &body.weights {
        if !given.is_empty() && !used.contains(&name) {
            continue;
        }
        let matrix = matrices.contains(&name.as_str());
        let layout = if matrix { linear::layout(target) } else { Layout::Rows { columns: 1 } };
        let dtype = if weight.dtype == moec_ir::DType::Bf16 { DType::Bf16 } else { DType::F32 };
        args.push(RowArg::Weight { name: name.clone(), layout, dtype });
    }
    let Some(output) = body.outputs.first() else {
        return Err(CodegenError::Unsupported { node: body.name.clone(), what: "the region has no result".into() });
    };
    match type_of(body, output.node)? {
        Type::Tensor(_) => args.push(RowArg::Output(OutputPart::Data)),
        Type::Route(route) => {
            args.push(RowArg::Output(OutputPart::Idx));
            if route.weighted {
                args.push(RowArg::Output(OutputPart::Weights));
            }
        }
        Type::Plan(_) | Type::Ragged(_) => {
            return Err(CodegenError::Unsupported {
                node: body.node(output.node).name.clone(),
                what: "a row kernel gives a tensor or a route".into(),
            });
        }
    }
    Ok(args)
}

/// The type of a node, which inference has set.
pub(crate) fn type_of(graph: &Graph, id: NodeId) -> Result<&Type, CodegenError> {
    let node = graph.node(id);
    node.ty.as_ref().ok_or_else(|| CodegenError::Unsupported {
        node: node.name.clone(),
        what: "the value has no type; infer types before code generation".into(),
    })
}
