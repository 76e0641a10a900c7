//! Memory of a program: who gets a buffer, and where it lies in the workspace.

use crate::{CodegenError, Target, cpu, plan::PlanKernel, rows::type_of};
use indexmap::IndexMap;
use moec_abi::{Buffer, BufferKind, DType, Expr, Launch, Slot};
use moec_ir::{Dim, Graph, Node, NodeId, Op, Part, RouteType, Type, ops::SelectRule};

/// Alignment of buffers in the workspace, in bytes.
const ALIGN: u64 = 256;

/// Memory of a value; numbers are indices of buffers.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// A tensor.
    Tensor { buffer: usize, dtype: DType },
    /// Ids and weights.
    Route { idx: usize, w: Option<usize> },
    /// The sort of a route.
    Plan {
        idx: usize,
        w: Option<usize>,
        offsets: usize,
        map: usize,
        positions: usize,
        scale: Option<usize>,
        /// First expert that has rows.
        first: u64,
        /// Number of experts from there on that offsets are kept for.
        experts: u64,
        /// Whether some of them have no rows.
        holes: bool,
    },
    /// Rows in sorted order.
    Ragged { buffer: usize, dtype: DType, width: u64, plan: NodeId, positions: usize },
}

impl Place {
    pub(crate) const fn dtype(&self) -> Option<DType> {
        match self {
            Self::Tensor { dtype, .. } | Self::Ragged { dtype, .. } => Some(*dtype),
            Self::Route { .. } | Self::Plan { .. } => None,
        }
    }
    pub(crate) const fn data(&self) -> Option<usize> {
        match self {
            Self::Tensor { buffer, .. } | Self::Ragged { buffer, .. } => Some(*buffer),
            Self::Route { .. } | Self::Plan { .. } => None,
        }
    }
    pub(crate) const fn idx(&self) -> Option<usize> {
        match self {
            Self::Route { idx, .. } | Self::Plan { idx, .. } => Some(*idx),
            Self::Tensor { .. } | Self::Ragged { .. } => None,
        }
    }
    pub(crate) const fn weights(&self) -> Option<usize> {
        match self {
            Self::Route { w, .. } | Self::Plan { w, .. } => *w,
            Self::Tensor { .. } | Self::Ragged { .. } => None,
        }
    }
    pub(crate) const fn positions(&self) -> Option<usize> {
        match self {
            Self::Plan { positions, .. } | Self::Ragged { positions, .. } => Some(*positions),
            Self::Tensor { .. } | Self::Route { .. } => None,
        }
    }
}

/// Buffers of a program under construction.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    buffers: Vec<Buffer>,
    places: IndexMap<NodeId, Place>,
    weights: IndexMap<usize, usize>,
}

/// A size of the graph as an expression of the program.
pub(crate) fn dim(d: &Dim) -> Expr {
    match d {
        Dim::Const(c) => Expr::Const(*c),
        Dim::Tokens => Expr::Tokens,
        Dim::Add(a, b) => dim(a).plus(dim(b)),
        Dim::Mul(a, b) => dim(a).times(dim(b)),
        Dim::CeilDiv(a, n) => dim(a).ceil_div(*n),
        // Graphs are cut at collectives before: then received rows are the tokens of a program.
        Dim::Received(_) => Expr::Tokens,
    }
}

/// An element type of the graph in memory.
pub const fn dtype(ty: moec_ir::DType) -> DType {
    match ty {
        moec_ir::DType::F64 => DType::F64,
        moec_ir::DType::F32 => DType::F32,
        moec_ir::DType::Bf16 => DType::Bf16,
        moec_ir::DType::F16 => DType::F16,
        moec_ir::DType::F8e4m3 => DType::F8e4m3,
        moec_ir::DType::F8e5m2 => DType::F8e5m2,
        moec_ir::DType::U8 => DType::U8,
        moec_ir::DType::I8 => DType::I8,
        moec_ir::DType::I32 => DType::I32,
        moec_ir::DType::I64 => DType::I64,
    }
}

impl Memory {
    pub(crate) fn new(_: &Graph) -> Self {
        Self::default()
    }

    pub(crate) fn place(&self, id: NodeId) -> Option<&Place> {
        self.places.get(&id)
    }

    fn buffer(&mut self, name: String, kind: BufferKind, dtype: DType, shape: Vec<Expr>) -> usize {
        self.buffers.push(Buffer { name, kind, dtype, shape, offset: Expr::Const(0), zeroed: false });
        self.buffers.len() - 1
    }

    /// A buffer of the caller for every input.
    pub(crate) fn inputs(&mut self, graph: &Graph) -> Result<(), CodegenError> {
        for id in graph.inputs() {
            let name = match &graph.node(id).op {
                moec_ir::Op::Input(input) => input.name.clone(),
                _ => continue,
            };
            let Type::Tensor(ty) = type_of(graph, id)? else { continue };
            let dtype = dtype(ty.dtype);
            let shape = ty.shape.iter().map(dim).collect();
            let buffer = self.buffer(name.clone(), BufferKind::Input { name }, dtype, shape);
            self.places.insert(id, Place::Tensor { buffer, dtype });
        }
        Ok(())
    }

    /// The kind of a buffer for a part of a value: an output of the interface, or workspace.
    fn kind(graph: &Graph, id: NodeId, part: Part) -> BufferKind {
        match graph.outputs.iter().find(|o| o.node == id && o.part == part) {
            Some(output) => BufferKind::Output { name: output.name.clone() },
            None => BufferKind::Workspace,
        }
    }

    /// Memory for the tensor or route that a node computes.
    pub(crate) fn allocate(&mut self, graph: &Graph, id: NodeId, target: Target) -> Result<Place, CodegenError> {
        let name = graph.node(id).name.clone();
        let place = match type_of(graph, id)? {
            Type::Tensor(ty) => {
                let kind = Self::kind(graph, id, Part::Whole);
                // Inside the layer, values stay in the arithmetic type.
                let dtype = if matches!(kind, BufferKind::Output { .. }) || !ty.dtype.is_float() {
                    dtype(ty.dtype)
                } else {
                    inner(target, ty.dtype)
                };
                let buffer = self.buffer(name, kind, dtype, ty.shape.iter().map(dim).collect());
                Place::Tensor { buffer, dtype }
            }
            Type::Route(route) => {
                let shape = vec![dim(&route.rows), route.slots.into()];
                let kind = Self::kind(graph, id, Part::Idx);
                let idx = self.buffer(format!("{name}.idx"), kind, DType::I32, shape.clone());
                let w = route.weighted.then(|| {
                    let kind = Self::kind(graph, id, Part::Weights);
                    self.buffer(format!("{name}.w"), kind, DType::F32, shape)
                });
                Place::Route { idx, w }
            }
            Type::Plan(_) | Type::Ragged(_) => {
                return Err(CodegenError::Unsupported {
                    node: name,
                    what: "the kernel gives no tensor or route".into(),
                });
            }
        };
        self.places.insert(id, place.clone());
        Ok(place)
    }

    /// Memory for a tensor with a given element type.
    pub(crate) fn tensor(&mut self, graph: &Graph, id: NodeId, inside: DType) -> Result<Place, CodegenError> {
        let Type::Tensor(ty) = type_of(graph, id)? else {
            let node = graph.node(id).name.clone();
            return Err(CodegenError::Unsupported { node, what: "the kernel gives no tensor".into() });
        };
        let kind = Self::kind(graph, id, Part::Whole);
        let dtype = if matches!(kind, BufferKind::Output { .. }) { dtype(ty.dtype) } else { inside };
        let buffer = self.buffer(graph.node(id).name.clone(), kind, dtype, ty.shape.iter().map(dim).collect());
        let place = Place::Tensor { buffer, dtype };
        self.places.insert(id, place.clone());
        Ok(place)
    }

    /// Whether there may be no sorted rows at all: they are those of some experts only, or every slot may be empty.
    pub(crate) fn is_partial(&self, graph: &Graph, id: NodeId) -> bool {
        let Some(Place::Ragged { plan, .. }) = self.places.get(&id) else { return false };
        match (self.places.get(plan), &graph.node(*plan).ty) {
            (Some(Place::Plan { experts, holes, .. }), Some(Type::Plan(ty))) => {
                *holes || *experts < ty.experts || graph.operands(*plan).into_iter().any(|o| is_sparse(graph, o))
            }
            (_, _) => false,
        }
    }

    /// The same memory for another node.
    pub(crate) fn alias(&mut self, id: NodeId, place: Place) {
        self.places.insert(id, place);
    }

    /// Memory for numbers of one launch.
    pub(crate) fn scratch(&mut self, name: String, dtype: DType, shape: Vec<Expr>) -> usize {
        self.buffer(name, BufferKind::Workspace, dtype, shape)
    }

    /// Memory for a plan.
    pub(crate) fn plan(
        &mut self,
        graph: &Graph,
        id: NodeId,
        (idx, w): (usize, Option<usize>),
        ty: &RouteType,
        kernel: &PlanKernel,
    ) -> Place {
        let name = &graph.node(id).name;
        let routes = dim(&ty.rows).times(kernel.repeat * ty.slots);
        let mut make =
            |part: &str, dtype, shape| self.buffer(format!("{name}.{part}"), BufferKind::Workspace, dtype, shape);
        let offsets = make("offsets", DType::I32, vec![Expr::Const(kernel.experts() + 1)]);
        let map = make("map", DType::I32, vec![routes.clone()]);
        let positions = make("positions", DType::I32, vec![routes.clone()]);
        let scale = kernel.scale.then(|| make("scale", DType::F32, vec![routes]));
        let place = Place::Plan {
            idx,
            w,
            offsets,
            map,
            positions,
            scale,
            first: kernel.first,
            experts: kernel.experts(),
            holes: !kernel.holes.is_empty(),
        };
        self.places.insert(id, place.clone());
        place
    }

    /// Memory for rows in sorted order.
    pub(crate) fn ragged(
        &mut self,
        graph: &Graph,
        id: NodeId,
        plan: NodeId,
        (dtype, width): (DType, u64),
    ) -> Result<Place, CodegenError> {
        let name = graph.node(id).name.clone();
        let (Type::Ragged(ty), Some(Place::Plan { positions, .. })) = (type_of(graph, id)?, self.places.get(&plan))
        else {
            return Err(CodegenError::Unsupported { node: name, what: "the rows have no plan".into() });
        };
        let positions = *positions;
        let rows = dim(&ty.route.rows).times(ty.repeat * ty.route.slots);
        let buffer = self.buffer(name, BufferKind::Workspace, dtype, vec![rows, width.into()]);
        let place = Place::Ragged { buffer, dtype, width, plan, positions };
        self.places.insert(id, place.clone());
        Ok(place)
    }

    /// The buffer of a slot; equal slots are packed once.
    pub(crate) fn weight(&mut self, slots: &mut Vec<Slot>, slot: Slot) -> usize {
        let index = match slots.iter().position(|s| *s == slot) {
            Some(index) => index,
            None => {
                slots.push(slot);
                slots.len() - 1
            }
        };
        if let Some(buffer) = self.weights.get(&index) {
            return *buffer;
        }
        let slot = &slots[index];
        let (name, dtype, elements) = (slot.name.clone(), slot.dtype, slot.bytes / slot.dtype.bytes());
        let buffer = self.buffer(name, BufferKind::Weight { slot: index }, dtype, vec![elements.into()]);
        self.weights.insert(index, buffer);
        buffer
    }

    /// Places workspace buffers one after another; returns the buffers and the bytes of the workspace.
    pub(crate) fn finish(mut self) -> (Vec<Buffer>, Expr) {
        let mut end = Expr::Const(0);
        for buffer in &mut self.buffers {
            if buffer.kind == BufferKind::Workspace {
                buffer.offset = end.clone();
                end = end.plus(bytes(buffer).round_up(ALIGN));
            }
        }
        (self.buffers, end)
    }
}

/// Element type of tensors between kernels.
const fn inner(target: Target, ty: moec_ir::DType) -> DType {
    // Reading two bytes instead of four matters only where rows stream through a GPU's memory.
    let _ = (target, ty);
    DType::F32
}

/// Element type of the inner activation of an expert.
pub(crate) fn activation(target: Target, w: DType) -> DType {
    if target.is_gpu() { w } else { cpu::operand_type(target, w) }
}

fn bytes(buffer: &Buffer) -> Expr {
    buffer.shape.iter().fold(Expr::Const(buffer.dtype.bytes()), |n, d| n.times(d.clone()))
}

/// The largest number of tokens for which sizes fit and sorted rows can be counted in 32 bits.
pub(crate) fn max_tokens(buffers: &[Buffer], workspace: &Expr, launches: &[Launch]) -> u64 {
    let fits = |tokens: u64| {
        let sizes = buffers.iter().all(|b| bytes(b).eval(tokens).is_some_and(|n| n < 1 << 62));
        let rows = buffers.iter().filter(|b| b.dtype == DType::I32).all(|b| {
            b.shape.iter().fold(Expr::Const(1), |n, d| n.times(d.clone())).eval(tokens).is_some_and(|n| n < 1 << 31)
        });
        let grids = launches.iter().all(|l| match &l.grid {
            moec_abi::Grid::Cpu(grid) => grid.items.eval(tokens).is_some(),
            moec_abi::Grid::Gpu(grid) => {
                let limits = [(1u64 << 31) - 1, 65_535, 65_535];
                grid.blocks.iter().zip(limits).all(|(n, limit)| n.eval(tokens).is_some_and(|n| n <= limit))
            }
        });
        sizes && rows && grids && workspace.eval(tokens).is_some_and(|n| n < 1 << 62)
    };
    let (mut low, mut high) = (0, 1u64 << 31);
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

/// Whether a route that a kernel gives may have nothing but empty slots: its experts can be forbidden, no score need
/// pass, rows can be dropped, or ids are data.
fn is_sparse(graph: &Graph, route: NodeId) -> bool {
    let Op::Kernel(kernel) = &graph.node(route).op else { return false };
    let empties = |id: NodeId| {
        let Node { op, ty, .. } = kernel.body.node(id);
        let experts = ty.as_ref().and_then(Type::tensor).and_then(|ty| ty.shape.last()?.known());
        let all = |ids: &[u64]| experts.is_some_and(|n| (0..n).all(|id| ids.contains(&id)));
        matches!(op, Op::Adjust(adjust) if adjust.mask || adjust.class_experts.is_some() || all(&adjust.off))
            || matches!(op, Op::Weigh(weigh) if weigh.drop_rows)
            || matches!(op, Op::Select(select) if may_choose_none(&select.rule))
            || matches!(op, Op::Limit(limit) if !matches!(limit.capacity, Some(1..)))
    };
    let of_route = |o: &NodeId| matches!(graph.node(*o).ty, Some(Type::Route(_)));
    kernel.body.ids().into_iter().any(empties)
        || graph.operands(route).iter().filter(|o| of_route(o)).any(|o| is_sparse(graph, *o))
}

/// Whether a rule may choose nothing in any row.
const fn may_choose_none(rule: &SelectRule) -> bool {
    match rule {
        SelectRule::Threshold { min_k, .. } => !matches!(min_k, Some(1..)),
        SelectRule::ExpertChoice { capacity, .. } => !matches!(capacity, Some(1..)),
        SelectRule::Given { .. } => true,
        SelectRule::Topk { .. }
        | SelectRule::Rank { .. }
        | SelectRule::All
        | SelectRule::Topp { .. }
        | SelectRule::GroupTopk { .. }
        | SelectRule::GroupLimited { .. } => false,
    }
}
