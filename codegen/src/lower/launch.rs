//! Launches of grouped products: one for matrices of one form, several for factors and mixtures.

use super::{
    Kernels, Lowering, TunedProduct,
    forms::{Factors, Form, Stored},
    grouped::Product,
    memory::{self, Place, dim},
    weights::{self, Values},
};
use crate::{
    CodegenError,
    batch::{Quantise, Share, Step},
    codes::Codes,
    cpu,
    gpu::{self, Parameter},
    grouped::{Epilogue, Given, Grouped, RowScale, RowSource},
    plan::PlanKernel,
    rows::type_of,
};
use moec_abi::{Arg, DType, Expr, Grid, Layout};
use moec_ir::{Graph, NodeId, Type, ops::BinaryFn};
use std::borrow::Cow;

/// One kernel of a product. All kernels of a product read the same packed weights.
struct Variant<'g> {
    /// What follows the product's name.
    name: &'static str,
    kernel: Kernels<'g>,
    layout: Layout,
    /// Order of the scales of codes.
    scales: Layout,
    grid: Grid,
}

/// What a product reads and writes besides weights.
#[derive(Clone)]
pub(super) struct Io {
    /// What follows the op's name.
    pub(super) part: String,
    pub(super) a: usize,
    pub(super) out: usize,
    /// Number of tokens.
    pub(super) tokens: Expr,
    /// The plan of the rows.
    pub(super) plan: Option<NodeId>,
}

/// Where the rows of a kernel lie.
#[derive(Clone, Default)]
struct Order {
    offsets: Option<Arg>,
    map: Option<usize>,
    scale: Option<usize>,
}

/// Weights of a kernel.
struct Weights<'a, 'g> {
    names: &'a [u64],
    matrices: Cow<'a, [Values<'g>]>,
    /// Scales, and zeros, of codes.
    factors: [Vec<Values<'g>>; 2],
    biases: &'a [Values<'g>],
}

/// Groups of experts, routed and sorted like experts.
struct Groups {
    /// Group of each expert of the part.
    of: Vec<u64>,
    distinct: Vec<u64>,
    order: Order,
    /// Row in the order of groups, by row in the order of experts.
    join: usize,
}

/// The codes that all matrices consist of, if they are of one format.
fn codes(forms: &[Form]) -> Option<(Codes, Vec<&Stored>)> {
    let stored: Vec<&Stored> = forms
        .iter()
        .map(|form| match form {
            Form::Codes(stored) => Some(stored),
            Form::Values | Form::Factors(_) => None,
        })
        .collect::<Option<_>>()?;
    let first = stored.first()?;
    let (format, dtype) = (first.format, first.dtype);
    stored.iter().all(|s| (s.format, s.dtype) == (format, dtype)).then_some((format, stored))
}

impl<'g> Lowering<'g> {
    /// The launches of one product.
    pub(super) fn launch_product(
        &mut self,
        id: NodeId,
        body: &Graph,
        product: &Product<'g>,
        spec: &Grouped,
        io: &Io,
    ) -> Result<(), CodegenError> {
        let order = self.order(product, spec, io)?;
        if product.forms.iter().all(|form| matches!(form, Form::Values)) {
            let matrices = Cow::Borrowed(product.matrices.as_slice());
            let weights =
                Weights { names: &product.names, matrices, factors: [vec![], vec![]], biases: &product.biases };
            return self.launch_kernels(id, body, spec, io, &order, weights, &[]);
        }
        if let Some((format, stored)) = codes(&product.forms) {
            let w = stored.first().map_or(spec.w, |s| s.dtype);
            let spec = Grouped { w, codes: Some(format), ..spec.clone() };
            let weights = decoded(&product.names, &stored, &product.biases);
            return self.launch_kernels(id, body, &spec, io, &order, weights, &[]);
        }
        self.launch_parts(id, body, product, spec, io, &order)
    }

    /// Where the rows of a product lie.
    fn order(&self, product: &Product<'_>, spec: &Grouped, io: &Io) -> Result<Order, CodegenError> {
        let Some(Place::Plan { offsets, map, scale, first, .. }) = io.plan.and_then(|p| self.memory.place(p)) else {
            return Ok(Order::default());
        };
        let bytes = Expr::Const((product.ids[0] - first) * 4);
        let scale = match (spec.scale, scale) {
            (RowScale::None, _) => None,
            (RowScale::Input | RowScale::Output, Some(scale)) => Some(*scale),
            (RowScale::Input | RowScale::Output, None) => {
                return Err(CodegenError::Unsupported {
                    node: spec.symbol.clone(),
                    what: "the plan has no weights".into(),
                });
            }
        };
        let map = (spec.rows == RowSource::Gathered).then_some(*map);
        Ok(Order { offsets: Some(Arg::Offset { buffer: *offsets, bytes }), map, scale })
    }

    /// A product whose matrices are factors, or have different forms: each alone, the last with the sums of the others.
    fn launch_parts(
        &mut self,
        id: NodeId,
        body: &Graph,
        product: &Product<'g>,
        spec: &Grouped,
        io: &Io,
        order: &Order,
    ) -> Result<(), CodegenError> {
        let count = product.matrices.len();
        let mut sums: Vec<(Given, usize, Option<usize>)> = Vec::new();
        let mut groups: Vec<Groups> = Vec::new();
        for (m, (values, form)) in product.matrices.iter().zip(&product.forms).enumerate() {
            let last = m + 1 == count;
            let part = format!("{}_matrix{m}", io.part);
            let mut spec = Grouped {
                symbol: format!("{}_matrix{m}", spec.symbol),
                matrices: 1,
                first: if last { m } else { 0 },
                ..spec.clone()
            };
            let mut given = std::mem::take(&mut sums);
            let mut kernel = (Io { part: part.clone(), ..io.clone() }, order.clone());
            if !last {
                let rows = self.sorted_rows(&spec, io);
                let out = self.scratch(id, &part, DType::F32, vec![rows, spec.n.into()]);
                sums = given.clone();
                sums.push((Given { sum: m, mapped: false }, out, None));
                given.clear();
                kernel.0.out = out;
                kernel.1.scale = None;
                spec = Grouped {
                    bias: false,
                    scale: RowScale::None,
                    epilogue: Epilogue::Sum(0),
                    out: DType::F32,
                    out_stride: spec.n,
                    ..spec
                };
            }
            let biases = if last { product.biases.as_slice() } else { &[] };
            let names = product.names.as_slice();
            let plain = |matrices| Weights { names, matrices, factors: [vec![], vec![]], biases };
            let weights = match form {
                Form::Values => plain(Cow::Borrowed(std::slice::from_ref(values))),
                Form::Codes(stored) => {
                    spec = Grouped { w: stored.dtype, codes: Some(stored.format), ..spec };
                    decoded(names, &[stored], biases)
                }
                Form::Factors(factors) => {
                    if let Some(base) = &factors.base {
                        let out = self.launch_base(id, body, base, factors.dtype, &spec, &kernel.0)?;
                        let map = order.map;
                        given.push((Given { sum: spec.first, mapped: map.is_some() }, out, map));
                    }
                    self.launch_right(id, body, product, factors, (&mut spec, &mut kernel), &mut groups)?;
                    plain(Cow::Owned(vec![Values::Matrix(factors.left.clone())]))
                }
            };
            spec.given = given.iter().map(|(given, ..)| *given).collect();
            let given: Vec<_> = given.into_iter().map(|(_, buffer, map)| (buffer, map)).collect();
            self.launch_kernels(id, body, &spec, &kernel.0, &kernel.1, weights, &given)?;
        }
        Ok(())
    }

    /// All rows of the operand times the matrix that experts share; gives the buffer of the result.
    fn launch_base(
        &mut self,
        id: NodeId,
        body: &Graph,
        base: &moec_abi::Matrix,
        w: DType,
        spec: &Grouped,
        io: &Io,
    ) -> Result<usize, CodegenError> {
        let part = format!("{}_base", io.part);
        let out = self.scratch(id, &part, DType::F32, vec![io.tokens.clone(), spec.n.into()]);
        let spec = Grouped {
            symbol: format!("{}_base", spec.symbol),
            experts: 1,
            rows: RowSource::Dense,
            rows_per_token: 1,
            w,
            ..alone(spec)
        };
        let io = Io { part, out, ..io.clone() };
        let matrices = Cow::Owned(vec![Values::Matrix(base.clone())]);
        let weights = Weights { names: &[0], matrices, factors: [vec![], vec![]], biases: &[] };
        self.launch_kernels(id, body, &spec, &io, &Order::default(), weights, &[])?;
        Ok(out)
    }

    /// The product with the right factor. What is left to do is the product of its result with the left one.
    fn launch_right(
        &mut self,
        id: NodeId,
        body: &Graph,
        product: &Product<'g>,
        factors: &Factors,
        (spec, (io, order)): (&mut Grouped, &mut (Io, Order)),
        known: &mut Vec<Groups>,
    ) -> Result<(), CodegenError> {
        let inside = memory::activation(self.target, factors.dtype);
        let part = format!("{}_inner", io.part);
        let factor = Epilogue::Constant(factors.factor as f32);
        let epilogue = match factors.factor {
            1.0 => Epilogue::Sum(0),
            _ => Epilogue::Binary(BinaryFn::Mul, Box::new(Epilogue::Sum(0)), Box::new(factor)),
        };
        let mut right = Grouped {
            symbol: format!("{}_inner", spec.symbol),
            n: factors.inner,
            out_stride: factors.inner,
            w: factors.dtype,
            out: inside,
            epilogue,
            ..alone(spec)
        };
        let mut names = factors.groups.clone().unwrap_or_else(|| product.names.clone());
        let mut from = order.clone();
        from.scale = None;
        let mut to = Order { map: None, ..order.clone() };
        let mut rows = if spec.rows == RowSource::Dense { RowSource::Dense } else { RowSource::Sorted };
        let shared = spec.rows == RowSource::Gathered
            && names.iter().enumerate().any(|(i, group)| names.iter().take(i).any(|earlier| earlier == group));
        if let (true, Some(plan)) = (shared, io.plan) {
            let groups = match known.iter().position(|g| g.of == names) {
                Some(at) => at,
                None => {
                    let symbol = format!("{}_groups", spec.symbol);
                    let groups = self.groups(id, plan, product.ids, names.clone(), io, &symbol)?;
                    known.push(groups);
                    known.len() - 1
                }
            };
            let groups = &known[groups];
            right.experts = groups.distinct.len() as u64;
            right.rows_per_token = right.rows_per_token.min(right.experts);
            names.clone_from(&groups.distinct);
            from = groups.order.clone();
            to.map = Some(groups.join);
            rows = RowSource::Gathered;
        }
        let height = self.sorted_rows(&right, io);
        let out = self.scratch(id, &part, inside, vec![height, factors.inner.into()]);
        let matrices = Cow::Owned(vec![Values::Matrix(factors.right.clone())]);
        let weights = Weights { names: &names, matrices, factors: [vec![], vec![]], biases: &[] };
        let own = Io { part, out, ..io.clone() };
        self.launch_kernels(id, body, &right, &own, &from, weights, &[])?;
        *spec =
            Grouped { rows, k: factors.inner, a_stride: factors.inner, a: inside, w: factors.dtype, ..spec.clone() };
        io.a = out;
        *order = to;
        Ok(())
    }

    /// Routes tokens to the groups of their experts, and sorts the route.
    fn groups(
        &mut self,
        id: NodeId,
        plan: NodeId,
        ids: [u64; 2],
        of: Vec<u64>,
        io: &Io,
        symbol: &str,
    ) -> Result<Groups, CodegenError> {
        let Some(Place::Plan { idx, positions, .. }) = self.memory.place(plan).cloned() else {
            return self.fail(id, "the plan has no memory");
        };
        let Type::Plan(ty) = type_of(self.graph, plan)?.clone() else { return self.fail(id, "the value is no plan") };
        let mut distinct = of.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (expert, group) in (ids[0]..).zip(&of) {
            let group = distinct.partition_point(|g| g < group) as u64;
            if runs.last().is_none_or(|(_, last)| *last != group) {
                runs.push((expert, group));
            }
        }
        let part = format!("{}_groups", io.part);
        let (rows, slots, repeat) = (dim(&ty.rows), ty.slots, super::grouped::plan_needs(self.graph, plan)?.repeat);
        let routes = rows.clone().times(slots * repeat);
        let mut integers = |what: &str, shape| self.scratch(id, &format!("{part}.{what}"), DType::I32, shape);
        let route = integers("idx", vec![rows.clone(), slots.into()]);
        let offsets = integers("offsets", vec![(distinct.len() as u64 + 1).into()]);
        let map = integers("map", vec![routes.clone()]);
        let shared = integers("positions", vec![routes.clone()]);
        let join = integers("join", vec![routes]);
        let kernel = |step, symbol: String| Share { symbol, step, runs: runs.clone(), end: ids[1], slots, repeat };
        let pick = kernel(Step::Pick, format!("{symbol}_pick"));
        let args = [idx, route].map(Arg::Buffer).into_iter().chain([Arg::Value(rows.clone())]).collect();
        self.launch(id, pick.symbol.clone(), args, pick.grid(self.target, rows.clone()));
        self.name_launch(&format!("{part}_pick"));
        self.kernels.push(Kernels::Share(pick));
        let sort = PlanKernel {
            symbol: symbol.to_owned(),
            first: 0,
            end: distinct.len() as u64,
            holes: Vec::new(),
            slots,
            repeat,
            scale: false,
        };
        let buffers = [route, offsets, map, shared].map(Arg::Buffer);
        let args = buffers.into_iter().chain([Arg::Value(rows)]).collect();
        self.launch(id, sort.symbol.clone(), args, sort.grid(self.target));
        self.name_launch(&part);
        self.kernels.push(Kernels::Plan(sort));
        let link = kernel(Step::Join, format!("{symbol}_join"));
        let buffers = [idx, positions, shared, join].map(Arg::Buffer);
        let args = buffers.into_iter().chain([Arg::Value(io.tokens.clone())]).collect();
        self.launch(id, link.symbol.clone(), args, link.grid(self.target, io.tokens.clone()));
        self.name_launch(&format!("{part}_join"));
        self.kernels.push(Kernels::Share(link));
        let order = Order { offsets: Some(Arg::Buffer(offsets)), map: Some(map), scale: None };
        Ok(Groups { of, distinct, order, join })
    }

    /// Rows that a product has at most.
    fn sorted_rows(&self, spec: &Grouped, io: &Io) -> Expr {
        match spec.rows {
            RowSource::Dense => io.tokens.clone(),
            RowSource::Gathered | RowSource::Sorted => io.tokens.clone().times(spec.rows_per_token),
        }
    }

    fn scratch(&mut self, id: NodeId, part: &str, dtype: DType, shape: Vec<Expr>) -> usize {
        let name = format!("{}{part}", self.graph.node(id).name);
        self.memory.scratch(name, dtype, shape)
    }

    /// What follows the op's name in the name of the last launch.
    fn name_launch(&mut self, part: &str) {
        if let Some(launch) = self.launches.last_mut() {
            launch.name.push_str(part);
        }
    }

    /// The kernels of one product, with packed weights.
    #[expect(clippy::too_many_arguments, reason = "what is multiplied, with what, and where")]
    fn launch_kernels(
        &mut self,
        id: NodeId,
        body: &Graph,
        spec: &Grouped,
        io: &Io,
        order: &Order,
        weights: Weights<'_, 'g>,
        given: &[(usize, Option<usize>)],
    ) -> Result<(), CodegenError> {
        let graph = self.graph;
        let variants = self.variants(spec, &io.tokens);
        let Some((layout, scales)) = variants.first().map(|v| (v.layout.clone(), v.scales.clone())) else {
            return self.fail(id, "no kernel");
        };
        let slot = weights::bank(body, id, graph, &weights.matrices, weights.names, layout, spec.packed())?;
        let packed = self.memory.weight(&mut self.slots, slot);
        let mut args = Vec::new();
        let types = [spec.codes.map_or(DType::F32, |codes| codes.scale), DType::F32];
        for (factors, dtype) in weights.factors.iter().zip(types).filter(|(f, _)| !f.is_empty()) {
            let slot = weights::bank(body, id, graph, factors, weights.names, scales.clone(), dtype)?;
            args.push(Arg::Buffer(self.memory.weight(&mut self.slots, slot)));
        }
        if spec.bias {
            let rows = Layout::Rows { columns: 1 };
            let slot = weights::bank(body, id, graph, weights.biases, weights.names, rows, DType::F32)?;
            args.push(Arg::Buffer(self.memory.weight(&mut self.slots, slot)));
        }
        if spec.rows != RowSource::Dense {
            args.extend(order.offsets.clone());
        }
        args.extend([order.map, order.scale].into_iter().flatten().map(Arg::Buffer));
        args.extend(given.iter().flat_map(|(numbers, map)| [Some(*numbers), *map]).flatten().map(Arg::Buffer));
        args.extend([Arg::Buffer(io.out), Arg::Value(io.tokens.clone())]);
        for Variant { name, kernel, grid, .. } in variants {
            let (symbol, weights) = match &kernel {
                Kernels::Gpu(spec, schedule) if schedule.parameters(spec).contains(&Parameter::WeightMap) => {
                    (spec.symbol.clone(), Arg::TensorMap(schedule.weight_map(spec, packed)))
                }
                Kernels::Gpu(spec, _) | Kernels::Cpu(spec, _) => (spec.symbol.clone(), Arg::Buffer(packed)),
                Kernels::Rows(_) | Kernels::Plan(_) | Kernels::Batch(_) | Kernels::Quantise(_) | Kernels::Share(_) => {
                    return self.fail(id, "a product has another kernel");
                }
            };
            let args = [Arg::Buffer(io.a), weights].into_iter().chain(args.clone()).collect();
            self.launch(id, symbol, args, grid);
            self.name_launch(&format!("{}{name}", io.part));
            self.kernels.push(kernel);
        }
        Ok(())
    }

    /// Rows of the operand rounded to signed bytes, in memory of their own.
    pub(super) fn quantise(
        &mut self,
        id: NodeId,
        (source, a, dtype): (&Place, usize, DType),
        product: &Product<'_>,
        plan: Option<&Place>,
        rows: Expr,
        i: usize,
    ) -> usize {
        let (stride, range) = match (source, plan) {
            (Place::Ragged { width, .. }, Some(Place::Plan { offsets, first, .. })) => {
                let bytes = Expr::Const((product.ids[0] - first) * 4);
                (*width, Some(Arg::Offset { buffer: *offsets, bytes }))
            }
            (_, _) => (product.k, None),
        };
        let symbol = self.symbol(id, &format!("_rounded_{i}"));
        let sorted = range.is_some().then_some(product.ids[1] - product.ids[0]);
        let kernel = Quantise { symbol: symbol.clone(), a: dtype, width: product.k, stride, sorted };
        let name = format!("{}.rounded", self.graph.node(id).name);
        let out = self.memory.scratch(name, DType::F32, vec![rows.clone(), stride.into()]);
        let mut args = vec![Arg::Buffer(a)];
        args.extend(range);
        args.extend([Arg::Buffer(out), Arg::Value(rows.clone())]);
        let grid = kernel.grid(self.target, rows);
        self.launch(id, symbol, args, grid);
        self.kernels.push(Kernels::Quantise(kernel));
        out
    }

    /// The kernels of a product, each for its numbers of tokens.
    fn variants(&mut self, spec: &Grouped, tokens: &Expr) -> Vec<Variant<'g>> {
        if !self.target.is_gpu() {
            let schedule = cpu::schedule(spec, self.target);
            self.schedules.push(format!("{}: {schedule:?}", spec.symbol));
            let mut grid = schedule.grid(spec);
            grid.items = substitute(&grid.items, tokens);
            let (layout, scales) = (schedule.layout(spec), schedule.scale_layout());
            return vec![Variant {
                name: "",
                kernel: Kernels::Cpu(spec.clone(), schedule),
                layout,
                scales,
                grid: Grid::Cpu(grid),
            }];
        }
        let choice = self.tuned.choice(spec, self.target);
        self.products.push(TunedProduct { spec: spec.clone(), choice: choice.clone() });
        let variants = gpu::variants_as(spec, self.target, &choice).into_iter().map(
            |gpu::Variant { name, schedule, tokens: range }| {
                let spec = Grouped { symbol: format!("{}{name}", spec.symbol), ..spec.clone() };
                self.schedules.push(format!("{}: {schedule}", spec.symbol));
                let mut grid = schedule.grid(&spec);
                grid.blocks = grid.blocks.map(|e| substitute(&e, tokens));
                grid.tokens = range;
                let (layout, scales) = (schedule.layout(&spec), schedule.scale_layout());
                Variant { name, kernel: Kernels::Gpu(spec, schedule), layout, scales, grid: Grid::Gpu(grid) }
            },
        );
        variants.collect()
    }
}

/// A product with one matrix whose sums are the result.
fn alone(spec: &Grouped) -> Grouped {
    Grouped {
        matrices: 1,
        first: 0,
        given: Vec::new(),
        codes: None,
        bias: false,
        scale: RowScale::None,
        epilogue: Epilogue::Sum(0),
        out: DType::F32,
        out_stride: spec.n,
        ..spec.clone()
    }
}

/// Codes with their scales and zeros.
fn decoded<'a, 'g>(names: &'a [u64], stored: &[&Stored], biases: &'a [Values<'g>]) -> Weights<'a, 'g> {
    let values = |matrix: &moec_abi::Matrix| Values::Matrix(matrix.clone());
    Weights {
        names,
        matrices: stored.iter().map(|s| values(&s.codes)).collect(),
        factors: [
            stored.iter().map(|s| values(&s.scale)).collect(),
            stored.iter().filter_map(|s| s.zero.as_ref()).map(values).collect(),
        ],
        biases,
    }
}

/// The expression with another number of tokens.
fn substitute(e: &Expr, tokens: &Expr) -> Expr {
    let go = |e: &Expr| Box::new(substitute(e, tokens));
    match e {
        Expr::Const(c) => Expr::Const(*c),
        Expr::Tokens => tokens.clone(),
        Expr::Add(a, b) => Expr::Add(go(a), go(b)),
        Expr::Mul(a, b) => Expr::Mul(go(a), go(b)),
        Expr::CeilDiv(a, d) => Expr::CeilDiv(go(a), *d),
        Expr::Min(a, b) => Expr::Min(go(a), go(b)),
        Expr::Max(a, b) => Expr::Max(go(a), go(b)),
    }
}
