//! Expert banks and dense products as grouped products.

use super::{
    Lowering,
    forms::{self, Form},
    launch::Io,
    memory::{self, Place, dim},
    weights::{self, Values},
};
use crate::{
    CodegenError,
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    rows::type_of,
};
use moec_abi::{DType, Expr};
use moec_ir::{
    Graph, NodeId, Op, Type, View, WeightSpec,
    ops::{BinaryFn, Dispatch, Ffn, Kernel, LimitOn, Linear, PartKind, UnaryFn},
};
use std::borrow::Cow;

/// One product of a kernel op: matrices of some experts, and what happens to the sums.
pub(super) struct Product<'g> {
    /// Experts in the route.
    pub(super) ids: [u64; 2],
    /// Experts as they count in names.
    pub(super) names: Vec<u64>,
    /// Matrices, each with further views; gate before up.
    pub(super) matrices: Vec<Values<'g>>,
    /// How each of them is stored and multiplied.
    pub(super) forms: Vec<Form>,
    /// Biases of the matrices.
    pub(super) biases: Vec<Values<'g>>,
    epilogue: Epilogue,
    /// Whether rows of the operand are rounded to signed bytes.
    a8: bool,
    /// Rows of one matrix.
    n: u64,
    /// Columns of one matrix.
    pub(super) k: u64,
}

#[expect(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
const fn narrow(value: f64) -> f32 {
    value as f32
}

fn binary(function: BinaryFn, x: Epilogue, y: Epilogue) -> Epilogue {
    Epilogue::Binary(function, Box::new(x), Box::new(y))
}

/// The activation of a feed-forward part over its sums (0 = gate or the only one, 1 = up).
fn activation(ffn: &Ffn) -> Epilogue {
    let act = |x: Epilogue| match ffn.act {
        Some(UnaryFn::Identity) | None => x,
        Some(function) => Epilogue::Unary(function, Box::new(x)),
    };
    if ffn.gate.is_none() && !ffn.packed {
        return act(Epilogue::Sum(0));
    }
    let clamp = |x: Epilogue, on: LimitOn| match ffn.limit {
        Some(limit) if ffn.limit_on == on => binary(BinaryFn::Min, x, Epilogue::Constant(narrow(limit))),
        Some(_) | None => x,
    };
    let gate = clamp(Epilogue::Sum(0), LimitOn::Gate);
    let gate = match ffn.alpha {
        Some(alpha) => {
            let scaled = binary(BinaryFn::Mul, gate.clone(), Epilogue::Constant(narrow(alpha)));
            binary(BinaryFn::Mul, gate, Epilogue::Unary(UnaryFn::Sigmoid, Box::new(scaled)))
        }
        None => act(gate),
    };
    let gate = clamp(gate, LimitOn::Act);
    let mut up = Epilogue::Sum(1);
    if let Some(limit) = ffn.limit {
        up = binary(BinaryFn::Min, up, Epilogue::Constant(narrow(limit)));
        up = binary(BinaryFn::Max, up, Epilogue::Constant(narrow(-limit)));
    }
    if ffn.up_add != 0.0 {
        up = binary(BinaryFn::Add, up, Epilogue::Constant(narrow(ffn.up_add)));
    }
    binary(BinaryFn::Mul, gate, up)
}

/// What a plan must provide to the ops that use it.
pub(super) struct Needs {
    /// Experts from the first to the last that has rows.
    pub(super) range: [u64; 2],
    /// Experts between them that have none.
    pub(super) holes: Vec<[u64; 2]>,
    /// Whether weights are needed in sorted order.
    pub(super) scale: bool,
    /// Tokens that a row of the route covers.
    pub(super) repeat: u64,
}

pub(super) fn plan_needs(graph: &Graph, plan: NodeId) -> Result<Needs, CodegenError> {
    let Type::Plan(ty) = type_of(graph, plan)? else {
        let node = graph.node(plan).name.clone();
        return Err(CodegenError::Unsupported { node, what: "the value is no plan".into() });
    };
    let (mut parts, mut scale, mut repeat) = (Vec::<[u64; 2]>::new(), false, 1);
    let mut users = graph.users(plan);
    while let Some(user) = users.pop() {
        let Op::Kernel(kernel) = &graph.node(user).op else { continue };
        // Rows that are only moved, or read by attention, are those that the next bank needs.
        let banks = kernel.body.order().into_iter().any(|id| matches!(kernel.body.node(id).op, Op::Experts(_)));
        let ragged = |id: &NodeId| matches!(graph.node(*id).ty, Some(Type::Ragged(_)));
        if !banks && ragged(&user) {
            users.extend(graph.users(user).into_iter().filter(ragged));
        }
        for id in kernel.body.order() {
            match &kernel.body.node(id).op {
                Op::Experts(experts) => {
                    for part in &experts.bank {
                        if !matches!(part.kind, PartKind::Zero {}) {
                            parts.push(part.ids);
                        }
                    }
                }
                Op::Dispatch(Dispatch { weighted, repeat: n }) => {
                    scale |= *weighted;
                    repeat = *n;
                }
                _ => {}
            }
        }
    }
    parts.sort_unstable();
    let range = match (parts.first(), parts.iter().map(|p| p[1]).max()) {
        (Some(first), Some(end)) => [first[0], end],
        (None, _) | (_, None) => [0, ty.experts],
    };
    let (mut holes, mut next) = (Vec::new(), range[0]);
    for [start, end] in parts {
        if start > next {
            holes.push([next, start]);
        }
        next = next.max(end);
    }
    Ok(Needs { range, holes, scale, repeat })
}

impl<'g> Lowering<'g> {
    /// A kernel of grouped products: up, down, or dense.
    pub(super) fn products(&mut self, id: NodeId, kernel: &'g Kernel) -> Result<(), CodegenError> {
        let body: &'g Graph = &kernel.body;
        let Some(operand) = self.graph.operands(id).first().copied() else { return self.fail(id, "no operand") };
        let Some(source) = self.memory.place(operand).cloned() else {
            return self.fail(id, "the operand has no memory");
        };
        let mut dispatch = None;
        let mut products = Vec::new();
        for node in body.order() {
            match &body.node(node).op {
                Op::Input(_) => {}
                Op::Dispatch(op) => dispatch = Some(op),
                Op::Experts(op) => {
                    for part in &op.bank {
                        let names: Vec<u64> = part.all_numbers().collect();
                        match &part.kind {
                            PartKind::Zero {} => {}
                            PartKind::Ffn(ffn) => products.push(self.ffn(id, body, ffn, part.ids, names)?),
                            PartKind::Linear(bank) => {
                                let bias = bank.bias.as_ref();
                                products.push(self.matrix(id, body, (&bank.w, bias), part.ids, names)?);
                            }
                            PartKind::Film(_)
                            | PartKind::Const { .. }
                            | PartKind::Neuron(_)
                            | PartKind::Identity {} => {
                                return self.fail(id, "a part of the bank is no grouped product");
                            }
                        }
                    }
                }
                Op::Ffn(ffn) => products.push(self.ffn(id, body, ffn, [0, 1], vec![0])?),
                Op::Linear(linear) => products.push(self.dense(id, body, linear)?),
                op => return self.fail(id, format!("operation `{}` is no grouped product", op.name())),
            }
        }
        if products.is_empty() {
            return self.fail(id, "no product");
        }
        let rows = match (&source, dispatch) {
            (_, Some(_)) => RowSource::Gathered,
            (Place::Ragged { .. }, None) => RowSource::Sorted,
            (_, None) => RowSource::Dense,
        };
        for product in &mut products {
            // Rows that are rounded to bytes are kept as f32.
            let narrow = source.dtype() == Some(DType::Bf16) && !product.a8;
            let from = (rows, if narrow { DType::Bf16 } else { DType::F32 });
            let form = |values| forms::form(body, id, self.graph, values, &product.names, from);
            product.forms = product.matrices.iter().map(form).collect::<Result<_, _>>()?;
        }
        self.launch_products(id, body, &source, dispatch, &products)
    }

    fn launch_products(
        &mut self,
        id: NodeId,
        body: &Graph,
        source: &Place,
        dispatch: Option<&Dispatch>,
        products: &[Product<'g>],
    ) -> Result<(), CodegenError> {
        let graph = self.graph;
        let width = products.iter().map(|p| p.n).max().unwrap_or(0);
        let packed =
            products.iter().flat_map(|p| p.matrices.iter().zip(&p.forms)).map(|(values, form)| match (form, values) {
                (Form::Factors(factors), _) => factors.dtype,
                (Form::Values, Values::Of(spec, _)) => weights::packed_type(body, spec),
                (Form::Codes(stored), _) => stored.dtype,
                (Form::Values, Values::Matrix(_) | Values::Zeros(_)) => DType::F32,
            });
        let narrow = packed.into_iter().all(|t| t == DType::Bf16);
        // Experts may be chosen by numbers below the least normal one, which units for bf16 take for zero.
        let chooses = self.target.bf16_only()
            && graph.users(id).iter().any(|user| matches!(graph.node(*user).ty, Some(Type::Route(_))));
        let w = if narrow && !chooses { DType::Bf16 } else { DType::F32 };
        let inside = match graph.node(id).op {
            // Rows that the model rounds are stored as it rounds them.
            Op::Kernel(Kernel { kind: moec_ir::ops::KernelKind::Down, .. }) => {
                let round = body.outputs.first().and_then(|o| body.node(o.node).round);
                match (self.target.is_gpu(), w, round) {
                    (true, DType::Bf16, Some(moec_ir::DType::Bf16)) => DType::Bf16,
                    (_, _, _) => DType::F32,
                }
            }
            _ if self.feeds_products(id) => memory::activation(self.target, w),
            _ => DType::F32,
        };
        // Where rows come from, and where results go.
        let (rows, plan, place) = match (source, dispatch) {
            (Place::Tensor { .. }, Some(_)) => {
                let Some(plan) = graph.operands(id).get(1).copied() else { return self.fail(id, "no plan") };
                (RowSource::Gathered, Some(plan), self.memory.ragged(graph, id, plan, (inside, width))?)
            }
            (Place::Ragged { plan, .. }, None) => {
                (RowSource::Sorted, Some(*plan), self.memory.ragged(graph, id, *plan, (inside, width))?)
            }
            (Place::Tensor { .. }, None) => (RowSource::Dense, None, self.memory.tensor(graph, id, inside)?),
            _ => return self.fail(id, "the operand is neither a tensor nor rows in sorted order"),
        };
        let (Some(a), Some(a_type), Some(out), Some(out_type)) =
            (source.data(), source.dtype(), place.data(), place.dtype())
        else {
            return self.fail(id, "an operand has no memory");
        };
        let plan_place = plan.and_then(|p| self.memory.place(p)).cloned();
        let (slots, tokens) = match (plan, plan.map(|p| type_of(graph, p)).transpose()?) {
            (Some(_), Some(Type::Plan(route))) => {
                let repeat = dispatch.map_or_else(|| self.repeat_of(id), |d| d.repeat);
                (route.slots, dim(&route.rows).times(repeat))
            }
            _ => (1, self.leading_of_rows(id)?),
        };
        for (i, product) in products.iter().enumerate() {
            let (a, a_type) = match (product.a8, plan) {
                (false, _) => (a, a_type),
                (true, plan) => {
                    let rows = match (source, plan.map(|p| type_of(graph, p)).transpose()?) {
                        (Place::Ragged { .. }, Some(Type::Plan(route))) => tokens.clone().times(route.slots),
                        (_, _) => tokens.clone(),
                    };
                    (self.quantise(id, (source, a, a_type), product, plan_place.as_ref(), rows, i), DType::F32)
                }
            };
            let a_stride = match source {
                Place::Ragged { width, .. } => *width,
                Place::Tensor { .. } | Place::Route { .. } | Place::Plan { .. } => product.k,
            };
            // Nodes of one name are numbered: parts are counted in another way.
            let suffix = if products.len() > 1 { format!("_part{i}") } else { String::new() };
            let spec = Grouped {
                symbol: self.symbol(id, &suffix),
                experts: product.ids[1] - product.ids[0],
                rows,
                rows_per_token: slots,
                matrices: product.matrices.len(),
                first: 0,
                given: Vec::new(),
                k: product.k,
                n: product.n,
                a_stride,
                out_stride: width,
                a: a_type,
                w,
                codes: None,
                out: out_type,
                bias: !product.biases.is_empty(),
                scale: if dispatch.is_some_and(|d| d.weighted) { RowScale::Input } else { RowScale::None },
                epilogue: product.epilogue.clone(),
            };
            let io = Io { part: String::new(), a, out, tokens: tokens.clone(), plan };
            self.launch_product(id, body, product, &spec, &io)?;
        }
        Ok(())
    }

    /// Large products of a row kernel's operand, such as a router's logits: on a GPU they get tensor cores and many
    /// multiprocessors of their own. Gives the nodes of the body and the buffers that hold their values.
    pub(super) fn logits(&mut self, id: NodeId, kernel: &'g Kernel) -> Result<Vec<(NodeId, usize)>, CodegenError> {
        /// Elements from which a matrix is large.
        const LARGE: u64 = 1 << 12;
        let body: &'g Graph = &kernel.body;
        let mut given = Vec::new();
        if !self.target.is_gpu() {
            return Ok(given);
        }
        let (inputs, rows) = (body.inputs(), self.leading(id)?);
        for node in body.order() {
            let Op::Linear(linear) = &body.node(node).op else { continue };
            let operand = body.operands(node).first().and_then(|o| inputs.iter().position(|i| i == o));
            let Some(operand) = operand.and_then(|i| self.graph.operands(id).get(i).copied()) else { continue };
            let Some(Place::Tensor { buffer, dtype: DType::Bf16 }) = self.memory.place(operand).cloned() else {
                continue;
            };
            let of_rows = match type_of(self.graph, operand)? {
                Type::Tensor(tensor) => tensor.shape.len() == 2 && dim(&tensor.shape[0]) == rows,
                Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => false,
            };
            let product = self.dense(id, body, linear)?;
            let narrow = weights::packed_type(body, &WeightSpec::Plain(linear.w.clone())) == DType::Bf16;
            if !of_rows || !narrow || product.n * product.k < LARGE {
                continue;
            }
            let part = format!("_{}", body.node(node).name);
            let spec = Grouped {
                symbol: self.symbol(id, &part.replace(|c: char| !c.is_ascii_alphanumeric(), "_")),
                experts: 1,
                rows: RowSource::Dense,
                rows_per_token: 1,
                matrices: 1,
                first: 0,
                given: Vec::new(),
                k: product.k,
                n: product.n,
                a_stride: product.k,
                out_stride: product.n,
                a: DType::Bf16,
                w: DType::Bf16,
                codes: None,
                out: DType::F32,
                bias: !product.biases.is_empty(),
                scale: RowScale::None,
                epilogue: Epilogue::Sum(0),
            };
            let name = format!("{}{part}", self.graph.node(id).name);
            let out = self.memory.scratch(name, DType::F32, vec![rows.clone(), product.n.into()]);
            let io = Io { part, a: buffer, out, tokens: rows.clone(), plan: None };
            self.launch_product(id, body, &product, &spec, &io)?;
            given.push((node, out));
        }
        Ok(given)
    }

    /// Whether the value is the operand of another product.
    fn feeds_products(&self, id: NodeId) -> bool {
        self.graph.users(id).iter().any(|user| match &self.graph.node(*user).op {
            Op::Kernel(kernel) => {
                matches!(kernel.kind, moec_ir::ops::KernelKind::Down | moec_ir::ops::KernelKind::Dense)
            }
            _ => false,
        })
    }

    /// Tokens per route row of ragged rows.
    fn repeat_of(&self, id: NodeId) -> u64 {
        match type_of(self.graph, id) {
            Ok(Type::Ragged(ragged)) => ragged.repeat,
            Ok(Type::Tensor(_) | Type::Route(_) | Type::Plan(_)) | Err(_) => 1,
        }
    }

    /// Rows of a dense product: all axes but the last.
    fn leading_of_rows(&self, id: NodeId) -> Result<Expr, CodegenError> {
        match type_of(self.graph, id)? {
            Type::Tensor(tensor) => {
                let rows = tensor.shape.split_last().map_or(&[][..], |(_, rows)| rows);
                Ok(rows.iter().fold(Expr::Const(1), |n, d| n.times(dim(d))))
            }
            Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => self.fail(id, "a dense product gives a tensor"),
        }
    }

    /// Rows and columns of a weight for the experts of a part.
    fn sizes(&self, id: NodeId, body: &Graph, spec: &WeightSpec, names: &[u64]) -> Result<(u64, u64), CodegenError> {
        let matrix = weights::of_spec(body, id, self.graph, spec)?;
        match weights::uniform(&matrix, names) {
            Some(sizes) => Ok(sizes),
            None => self.fail(id, "experts of one part differ in size; split the part"),
        }
    }

    fn ffn(
        &self,
        id: NodeId,
        body: &Graph,
        ffn: &'g Ffn,
        ids: [u64; 2],
        names: Vec<u64>,
    ) -> Result<Product<'g>, CodegenError> {
        if ffn.down.is_some() {
            return self.fail(id, "a feed-forward network must be split into two products first");
        }
        let (n, k) = self.sizes(id, body, &ffn.up, &names)?;
        let half = |start: u64, len: u64| vec![View::Slice { axis: 0, start, len, step: 1 }];
        let whole = |spec: &'g WeightSpec| Values::Of(Cow::Borrowed(spec), Vec::new());
        let part = |spec: &'g WeightSpec, view: Vec<View>| Values::Of(Cow::Borrowed(spec), view);
        let (matrices, n) = match &ffn.gate {
            Some(gate) => (vec![whole(gate), whole(&ffn.up)], n),
            // The first half holds the values, the second the gate.
            None if ffn.packed => (vec![part(&ffn.up, half(n / 2, n / 2)), part(&ffn.up, half(0, n / 2))], n / 2),
            None => (vec![whole(&ffn.up)], n),
        };
        let biases = match (&ffn.gate_bias, &ffn.up_bias) {
            (None, None) => Vec::new(),
            // Products with rounded activations take no bias.
            (Some(_) | None, Some(_) | None) if ffn.a8 => Vec::new(),
            (None, Some(up)) if ffn.packed => vec![part(up, half(n, n)), part(up, half(0, n))],
            (None, Some(up)) if ffn.gate.is_none() => vec![whole(up)],
            (gate, up) => [gate, up].map(|bias| bias.as_ref().map_or(Values::Zeros(n), whole)).to_vec(),
        };
        let forms = vec![Form::Values; matrices.len()];
        Ok(Product { ids, names, matrices, forms, biases, epilogue: activation(ffn), a8: ffn.a8, n, k })
    }

    /// A product of all rows with one matrix.
    fn dense(&self, id: NodeId, body: &Graph, linear: &Linear) -> Result<Product<'g>, CodegenError> {
        let w = WeightSpec::Plain(linear.w.clone());
        let (n, k) = self.sizes(id, body, &w, &[0])?;
        let bias = linear.b.clone().map(|b| Values::Of(Cow::Owned(WeightSpec::Plain(b)), Vec::new()));
        Ok(Product {
            ids: [0, 1],
            names: vec![0],
            matrices: vec![Values::Of(Cow::Owned(w), Vec::new())],
            forms: vec![Form::Values],
            biases: bias.into_iter().collect(),
            epilogue: Epilogue::Sum(0),
            a8: false,
            n,
            k,
        })
    }

    fn matrix(
        &self,
        id: NodeId,
        body: &Graph,
        (w, bias): (&'g WeightSpec, Option<&'g WeightSpec>),
        ids: [u64; 2],
        names: Vec<u64>,
    ) -> Result<Product<'g>, CodegenError> {
        let (n, k) = self.sizes(id, body, w, &names)?;
        Ok(Product {
            ids,
            names,
            matrices: vec![Values::Of(Cow::Borrowed(w), Vec::new())],
            forms: vec![Form::Values],
            biases: bias.map(|b| vec![Values::Of(Cow::Borrowed(b), Vec::new())]).unwrap_or_default(),
            epilogue: Epilogue::Sum(0),
            a8: false,
            n,
            k,
        })
    }
}
