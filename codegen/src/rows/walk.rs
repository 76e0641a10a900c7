//! The walk over the body of a row kernel.

use super::{
    InputPart, OutputPart, RowArg, RowKernel,
    combine::{self, Simple, SimplePart, Sorted},
    exec::Exec,
    linear, select, tensor, type_of,
    value::{Choice, Row},
    weigh,
};
use crate::{CodegenError, mlir::V};
use indexmap::IndexMap;
use moec_abi::DType;
use moec_ir::{
    Extent, Graph, NodeId, Op, Type, WeightName, WeightSpec,
    ops::{BinaryFn, Ffn, LimitOn, PartKind, ProductKey, Shape, UnaryFn},
};

/// A value of the body while the kernel is emitted.
#[derive(Clone)]
enum Value<'c> {
    /// A tensor, row by row.
    Row(Row<'c>),
    /// A route.
    Choice(Choice<'c>),
    /// Rows sorted by expert, in memory.
    Sorted(Sorted<'c>),
    /// Rows that were dispatched but not moved: the data and the route.
    Spread { row: Row<'c>, choice: Choice<'c>, weighted: bool },
    /// Simple experts over spread rows; with the weights of the slots if those multiply the rows.
    Simple { parts: Vec<SimplePart<'c>>, scale: Option<Row<'c>> },
}

/// Weights that stand as matrices of `linear` in the body.
pub(super) fn matrices(body: &Graph) -> Vec<&str> {
    let mut names = Vec::new();
    for id in body.order() {
        match &body.node(id).op {
            Op::Linear(op) => names.push(op.w.as_str()),
            Op::ProductKey(ProductKey::Sum { k1, k2, .. }) => names.extend([k1.as_str(), k2.as_str()]),
            Op::Ffn(op) => {
                for spec in [Some(&op.up), op.gate.as_ref(), op.down.as_ref()].into_iter().flatten() {
                    if let WeightSpec::Plain(name) = spec {
                        names.push(name);
                    }
                }
            }
            Op::Input(_)
            | Op::Param(_)
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
            | Op::Plan(_)
            | Op::Described(_)
            | Op::Collective(_)
            | Op::Kernel(_) => {}
        }
    }
    names
}

/// Emits the body and stores its result.
pub(super) fn walk<'c>(kernel: &RowKernel<'_>, x: &Exec<'_, 'c>, pointers: &[V<'c>]) -> Result<(), CodegenError> {
    let body = kernel.body;
    let mut walker = Walker { body, x, weights: IndexMap::new(), values: IndexMap::new() };
    let mut inputs: IndexMap<usize, Vec<(InputPart, V<'c>)>> = IndexMap::new();
    let mut outputs = Vec::new();
    for (arg, pointer) in kernel.args.iter().zip(pointers) {
        match arg {
            RowArg::Input { operand, part } => inputs.entry(*operand).or_default().push((*part, *pointer)),
            RowArg::Weight { name, dtype, .. } => {
                walker.weights.insert(name.clone(), (*pointer, *dtype));
            }
            RowArg::Given(id) => {
                let row = Value::Row(global(*pointer, DType::F32, walker.row_shape(*id)?));
                let row = walker.finish(*id, row);
                walker.values.insert(*id, row);
            }
            RowArg::Output(part) => outputs.push((*part, *pointer)),
        }
    }
    for (operand, id) in body.inputs().into_iter().enumerate() {
        let memory = inputs.get(&operand).cloned().unwrap_or_default();
        let partial = kernel.partial.get(operand).copied().unwrap_or(false);
        let value = walker.input(id, &memory, kernel.operands.get(operand).copied().flatten(), partial)?;
        walker.values.insert(id, value);
    }
    for id in body.order() {
        if !walker.values.contains_key(&id) {
            let value = walker.node(id)?;
            let value = walker.finish(id, value);
            walker.values.insert(id, value);
        }
    }
    let result = body.outputs.first().map(|o| o.node).and_then(|id| walker.values.get(&id).cloned());
    let Some(result) = result else {
        return Err(unsupported(body.name.clone(), "the region has no result"));
    };
    for (part, pointer) in outputs {
        let (row, dtype, ints) = match (&result, part) {
            (Value::Row(row), OutputPart::Data) => (row.clone(), kernel.result, row.ints),
            (Value::Choice(choice), OutputPart::Idx) => (choice.idx.clone(), DType::I32, true),
            (Value::Choice(Choice { w: Some(w), .. }), OutputPart::Weights) => (w.clone(), DType::F32, false),
            _ => return Err(unsupported(body.name.clone(), "the result has no such part")),
        };
        x.each_row(|| {
            row.prepare(x);
            let len = row.len();
            let element = super::exec::element(dtype);
            let start = x.b.mulc(x.token(), i64::try_from(len).unwrap_or(i64::MAX));
            let base = x.b.gep(pointer, element, start);
            x.each(len, row.vector && !ints, |ix| {
                let value = row.get(x, ix);
                if ints {
                    x.b.store(value, x.b.gep(base, "i32", ix.at), 4);
                } else {
                    x.store(value, base, dtype, ix);
                }
            });
        });
    }
    Ok(())
}

fn unsupported(node: String, what: &str) -> CodegenError {
    CodegenError::Unsupported { node, what: what.to_owned() }
}

#[expect(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
const fn narrow(value: f64) -> f32 {
    value as f32
}

struct Walker<'a, 'c> {
    body: &'a Graph,
    x: &'a Exec<'a, 'c>,
    weights: IndexMap<WeightName, (V<'c>, DType)>,
    values: IndexMap<NodeId, Value<'c>>,
}

impl<'c> Walker<'_, 'c> {
    fn fail<T>(&self, id: NodeId, what: &str) -> Result<T, CodegenError> {
        let node = self.body.node(id);
        Err(unsupported(node.name.clone(), &format!("{}: {what}", node.op.name())))
    }

    /// Shape of one row of a tensor value.
    fn row_shape(&self, id: NodeId) -> Result<Vec<u64>, CodegenError> {
        match type_of(self.body, id)? {
            Type::Tensor(tensor) => tensor
                .shape
                .iter()
                .skip(1)
                .map(|d| match d.known() {
                    Some(n) => Ok(n),
                    None => self.fail(id, "the size of a row depends on the number of tokens"),
                })
                .collect(),
            Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => self.fail(id, "a tensor is needed"),
        }
    }

    fn input(
        &self,
        id: NodeId,
        memory: &[(InputPart, V<'c>)],
        dtype: Option<DType>,
        partial: bool,
    ) -> Result<Value<'c>, CodegenError> {
        let find = |part| match memory.iter().find(|(p, _)| *p == part) {
            Some((_, pointer)) => Ok(*pointer),
            None => self.fail(id, "memory of an operand is missing"),
        };
        Ok(match type_of(self.body, id)? {
            Type::Tensor(tensor) if self.is_shared(id) => {
                let shape: Option<Vec<u64>> = tensor.shape.iter().map(moec_ir::Dim::known).collect();
                let Some(shape) = shape else {
                    return self.fail(id, "a value for all rows must have a known size");
                };
                Value::Row(shared(find(InputPart::Data)?, dtype.unwrap_or(DType::F32), shape))
            }
            Type::Tensor(_) => {
                let shape = self.row_shape(id)?;
                let dtype = dtype.unwrap_or(DType::F32);
                Value::Row(global(find(InputPart::Data)?, dtype, shape))
            }
            Type::Route(route) | Type::Plan(route) => {
                let idx = global(find(InputPart::Idx)?, DType::I32, vec![route.slots]);
                let w = if route.weighted {
                    Some(global(find(InputPart::Weights)?, DType::F32, vec![route.slots]))
                } else {
                    None
                };
                Value::Choice(Choice { slots: route.slots, experts: route.experts, idx, w })
            }
            Type::Ragged(ragged) => Value::Sorted(Sorted {
                rows: find(InputPart::Data)?,
                dtype: dtype.unwrap_or(DType::F32),
                width: ragged.row.iter().product(),
                positions: find(InputPart::Positions)?,
                partial,
            }),
        })
    }

    /// Whether the value is the same for all rows wherever it is used.
    fn is_shared(&self, id: NodeId) -> bool {
        let users = self.body.users(id);
        let shared = |user: &NodeId| {
            let operands = self.body.operands(*user);
            (0..operands.len()).all(|i| operands[i] != id || self.body.is_shared_by_rows(*user, i))
        };
        !users.is_empty() && users.iter().all(shared)
    }

    fn row(&self, id: NodeId, operand: usize) -> Result<Row<'c>, CodegenError> {
        match self.body.operands(id).get(operand).and_then(|o| self.values.get(o)) {
            Some(Value::Row(row)) => Ok(row.clone()),
            _ => self.fail(id, "an operand is no tensor of rows"),
        }
    }

    /// The second operand of a selection that is bounded at run time.
    fn bound(&self, id: NodeId, is_there: bool) -> Result<Option<Row<'c>>, CodegenError> {
        if is_there { self.row(id, 1).map(Some) } else { Ok(None) }
    }

    fn choice(&self, id: NodeId, operand: usize) -> Result<Choice<'c>, CodegenError> {
        match self.body.operands(id).get(operand).and_then(|o| self.values.get(o)) {
            Some(Value::Choice(choice)) => Ok(choice.clone()),
            _ => self.fail(id, "an operand is no route"),
        }
    }

    fn memory(&self, id: NodeId, name: &str) -> Result<(V<'c>, DType), CodegenError> {
        match self.weights.get(name) {
            Some(found) => Ok(*found),
            None => self.fail(id, "a weight has no memory"),
        }
    }

    fn sizes(&self, id: NodeId, name: &str) -> Result<Vec<u64>, CodegenError> {
        let Some(weight) = self.body.weights.get(name) else { return self.fail(id, "a weight is not declared") };
        weight
            .shape
            .iter()
            .map(|extent| match extent {
                Extent::Fixed(n) => Ok(*n),
                Extent::PerExpert(_) => self.fail(id, "a weight has one size per expert"),
            })
            .collect()
    }

    /// A weight as a row that is the same for all tokens.
    fn table(&self, id: NodeId, name: &str) -> Result<Row<'c>, CodegenError> {
        let (at, dtype) = self.memory(id, name)?;
        let shape = self.sizes(id, name)?;
        Ok(Row::new(shape, true, move |x, ix| x.load(at, dtype, ix)).cheap())
    }

    fn optional(&self, id: NodeId, name: Option<&WeightName>) -> Result<Option<Row<'c>>, CodegenError> {
        name.map(|n| self.table(id, n)).transpose()
    }

    fn matrix(&self, id: NodeId, name: &str) -> Result<linear::Matrix<'c>, CodegenError> {
        let (at, dtype) = self.memory(id, name)?;
        match self.sizes(id, name)?.as_slice() {
            [n, k] => Ok(linear::Matrix { at, dtype, n: *n, k: *k }),
            _ => self.fail(id, "the weight is no matrix"),
        }
    }

    /// `x W^T + b`.
    fn product(&self, id: NodeId, row: &Row<'c>, w: &str, b: Option<&WeightName>) -> Result<Row<'c>, CodegenError> {
        let y = linear::linear(self.x, row, self.matrix(id, w)?);
        Ok(match self.optional(id, b)? {
            Some(bias) => tensor::binary(&y, &bias, BinaryFn::Add),
            None => y,
        })
    }

    /// Rounds where the model does, and stores what several ops read.
    fn finish(&self, id: NodeId, value: Value<'c>) -> Value<'c> {
        let row = match value {
            Value::Row(row) => row,
            Value::Choice(choice) => {
                let w = match (choice.w, self.body.node(id).round) {
                    (Some(w), Some(dtype)) => Some(tensor::rounded(&w, dtype).stored(self.x)),
                    (w, _) => w,
                };
                return Value::Choice(Choice { w, ..choice });
            }
            Value::Sorted(_) | Value::Spread { .. } | Value::Simple { .. } => return value,
        };
        let row = match self.body.node(id).round {
            Some(dtype) if !row.ints => tensor::rounded(&row, dtype),
            Some(_) | None => row,
        };
        let shared = self.body.users(id).len() > 1;
        Value::Row(if shared && row.len() > 1 { row.stored(self.x) } else { row })
    }

    fn node(&self, id: NodeId) -> Result<Value<'c>, CodegenError> {
        let x = self.x;
        Ok(match &self.body.node(id).op {
            Op::Input(_) => return self.fail(id, "an input was not bound"),
            Op::Param(op) => Value::Row(self.table(id, &op.w)?),
            Op::Linear(op) => Value::Row(self.product(id, &self.row(id, 0)?, &op.w, op.b.as_ref())?),
            Op::Unary(op) => Value::Row(tensor::unary(&self.row(id, 0)?, op.function)),
            Op::Binary(op) => {
                let left = self.row(id, 0)?;
                let right = match (&op.w, op.c) {
                    (Some(w), _) => self.table(id, w)?,
                    (None, Some(c)) => tensor::constant(narrow(c)),
                    (None, None) => self.row(id, 1)?,
                };
                Value::Row(tensor::binary(&left, &right, op.function))
            }
            Op::Norm(op) => {
                let weights = [
                    self.optional(id, op.w.as_ref())?,
                    self.optional(id, op.b.as_ref())?,
                    self.optional(id, op.mean.as_ref())?,
                    self.optional(id, op.var.as_ref())?,
                ];
                Value::Row(tensor::norm(x, &self.row(id, 0)?, op.kind, narrow(op.eps.unwrap_or(1e-6)), weights))
            }
            Op::Softmax(op) => Value::Row(tensor::softmax(x, &self.row(id, 0)?, narrow(op.temp))),
            Op::Reduce(op) => {
                let row = self.row(id, 0)?;
                let axis = self.axis(id, op.axis, row.shape.len() + 1)?;
                Value::Row(tensor::reduce(x, &row, op.function, axis, op.keep))
            }
            Op::Shape(op) => self.shape(id, op)?,
            Op::Gather(op) => self.gather(id, &op.w)?,
            Op::Adjust(_) => self.adjust(id)?,
            Op::Select(op) => {
                match select::select(x, &self.row(id, 0)?, &op.rule, self.bound(id, op.bound)?.as_ref()) {
                    Ok(choice) => Value::Choice(choice),
                    Err(rule) => return self.fail(id, &format!("rule `{rule}` needs the whole batch")),
                }
            }
            Op::ProductKey(op) => self.product_key(id, op)?,
            Op::Weigh(op) => {
                let choice = self.choice(id, 0)?;
                let mut next = 1;
                let operands = self.body.operands(id);
                let scores = match operands.get(1).and_then(|o| self.values.get(o)) {
                    Some(Value::Row(row)) => {
                        next = 2;
                        Some(row.clone())
                    }
                    _ => None,
                };
                let mut listed = |flag: bool| -> Result<Option<Row<'c>>, CodegenError> {
                    if !flag {
                        return Ok(None);
                    }
                    next += 1;
                    Ok(Some(self.choice(id, next - 1)?.idx))
                };
                let (drop, keep) = (listed(op.drop_rows)?, listed(op.keep_rows)?);
                let scale = self.optional(id, op.expert_scale.as_ref())?;
                let weighed =
                    weigh::weigh(x, op, &choice, scores.as_ref(), drop.as_ref(), keep.as_ref(), scale.as_ref());
                Value::Choice(weighed)
            }
            Op::Override(op) => self.overrides(id, op.expert, op.experts)?,
            Op::Dispatch(op) => {
                let (row, choice) = (self.row(id, 0)?, self.choice(id, 1)?);
                let choice = if op.repeat == 1 { choice } else { repeated(&choice, op.repeat) };
                Value::Spread { row, choice, weighted: op.weighted }
            }
            Op::Experts(op) => {
                let Some(Value::Spread { row, choice, weighted }) =
                    self.body.operands(id).first().and_then(|o| self.values.get(o)).cloned()
                else {
                    return self.fail(id, "rows must be dispatched in the same kernel");
                };
                let mut parts = Vec::new();
                for part in &op.bank {
                    let kind = match &part.kind {
                        PartKind::Zero {} => continue,
                        PartKind::Identity {} => Simple::Identity(row.clone()),
                        PartKind::Const { value } => {
                            let (at, dtype) = self.memory(id, value)?;
                            Simple::Table { at, dtype, width: self.sizes(id, value)?.iter().skip(1).product() }
                        }
                        PartKind::Neuron(neuron) => {
                            let vectors = |name: &str| -> Result<(V<'c>, DType, u64), CodegenError> {
                                let (at, dtype) = self.memory(id, name)?;
                                Ok((at, dtype, self.sizes(id, name)?.iter().skip(1).product()))
                            };
                            let (u, v) = (vectors(&neuron.u)?, vectors(&neuron.v)?);
                            Simple::Neuron { x: row.clone(), u, v, act: neuron.act }
                        }
                        PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) => {
                            return self.fail(id, "a part with matrices needs a grouped product");
                        }
                    };
                    if !part.numbers.is_empty() {
                        return self.fail(id, "`numbers` of a part that is computed in place");
                    }
                    parts.push(SimplePart { first: part.ids[0], end: part.ids[1], base: part.base_id, kind });
                }
                Value::Simple { parts, scale: if weighted { choice.w } else { None } }
            }
            Op::Combine(op) => {
                let shape = self.row_shape(id)?;
                let choice = self.choice(id, 1)?;
                match self.body.operands(id).first().and_then(|o| self.values.get(o)).cloned() {
                    Some(Value::Sorted(sorted)) => {
                        let choice = if op.repeat == 1 { choice } else { repeated(&choice, op.repeat) };
                        Value::Row(combine::combine(&sorted, &choice, op.weighted, shape))
                    }
                    Some(Value::Simple { parts, scale }) => {
                        let choice = if op.repeat == 1 { choice } else { repeated(&choice, op.repeat) };
                        Value::Row(combine::combine_simple(x, parts, &choice, (op.weighted, scale), shape))
                    }
                    _ => return self.fail(id, "the first operand has no rows"),
                }
            }
            Op::Ffn(op) => Value::Row(self.ffn(id, op)?),
            Op::Einsum(_) => return self.fail(id, "not a row op"),
            Op::Attention(_) | Op::Transport(_) | Op::Limit(_) | Op::Count(_) => {
                return self.fail(id, "needs the whole batch");
            }
            Op::Plan(_) | Op::Described(_) | Op::Collective(_) | Op::Kernel(_) => {
                return self.fail(id, "not a row op");
            }
        })
    }

    /// Axis of a tensor as an axis of its rows.
    fn axis(&self, id: NodeId, axis: i64, rank: usize) -> Result<usize, CodegenError> {
        let rank = i64::try_from(rank).unwrap_or(i64::MAX);
        let axis = if axis < 0 { axis + rank } else { axis };
        match usize::try_from(axis - 1) {
            Ok(axis) => Ok(axis),
            Err(_) => self.fail(id, "works along the rows, not inside them"),
        }
    }

    fn shape(&self, id: NodeId, op: &Shape) -> Result<Value<'c>, CodegenError> {
        if let (Shape::Concat { .. }, Some(Value::Choice(_))) =
            (op, self.body.operands(id).first().and_then(|o| self.values.get(o)))
        {
            return self.join(id);
        }
        let row = self.row(id, 0)?;
        let rank = row.shape.len() + 1;
        let shape = self.row_shape(id)?;
        Ok(Value::Row(match op {
            Shape::Concat { axis } => {
                let axis = self.axis(id, *axis, rank)?;
                let rows: Vec<Row<'c>> = (0..self.body.operands(id).len())
                    .map(|i| self.row(id, i).map(|r| if r.cheap { r } else { r.stored(self.x) }))
                    .collect::<Result<_, _>>()?;
                tensor::concat(&rows, axis)
            }
            Shape::Slice { axis, range } => {
                let axis = self.axis(id, *axis, rank)?;
                let start = u64::try_from(range[0]).unwrap_or(0);
                tensor::slice(&row, axis, start, start + shape[axis])
            }
            Shape::Reshape { .. } => {
                if shape.iter().product::<u64>() != row.len() {
                    return self.fail(id, "changes the rows");
                }
                row.reshaped(shape)
            }
            Shape::Transpose { perm } => {
                if perm.first() != Some(&0) {
                    return self.fail(id, "moves the rows");
                }
                let perm: Vec<usize> =
                    perm.iter().skip(1).map(|p| usize::try_from(*p).unwrap_or(1).saturating_sub(1)).collect();
                tensor::transpose(&row, &perm)
            }
            Shape::Repeat { n, axis } => tensor::repeat(&row, self.axis(id, *axis, rank)?, *n),
            Shape::Stack { axis } => {
                let axis = self.axis(id, *axis, rank + 1)?;
                let rows: Vec<Row<'c>> = (0..self.body.operands(id).len())
                    .map(|i| {
                        self.row(id, i).map(|r| {
                            let mut one = r.shape.clone();
                            one.insert(axis, 1);
                            if r.cheap { r } else { r.stored(self.x) }.reshaped(one)
                        })
                    })
                    .collect::<Result<_, _>>()?;
                tensor::concat(&rows, axis)
            }
            Shape::Pad { .. } => return self.fail(id, "changes the number of rows"),
        }))
    }

    /// Routes joined slot by slot.
    fn join(&self, id: NodeId) -> Result<Value<'c>, CodegenError> {
        let choices: Vec<Choice<'c>> =
            (0..self.body.operands(id).len()).map(|i| self.choice(id, i)).collect::<Result<_, _>>()?;
        let idx: Vec<Row<'c>> = choices.iter().map(|c| c.idx.clone()).collect();
        let w: Option<Vec<Row<'c>>> = choices.iter().map(|c| c.w.clone()).collect();
        Ok(Value::Choice(Choice {
            slots: choices.iter().map(|c| c.slots).sum(),
            experts: choices.iter().map(|c| c.experts).max().unwrap_or(0),
            idx: tensor::concat(&idx, 0),
            w: w.map(|w| tensor::concat(&w, 0)),
        }))
    }

    fn gather(&self, id: NodeId, name: &str) -> Result<Value<'c>, CodegenError> {
        let ids = match self.body.operands(id).first().and_then(|o| self.values.get(o)) {
            Some(Value::Row(row)) => row.clone(),
            Some(Value::Choice(choice)) => choice.idx.clone(),
            _ => return self.fail(id, "ids are needed"),
        };
        let (at, dtype) = self.memory(id, name)?;
        let sizes = self.sizes(id, name)?;
        let width: u64 = sizes.iter().skip(1).product();
        let rows = sizes.first().copied().unwrap_or(1);
        let ints = self.body.weights.get(name).is_some_and(|w| !w.dtype.is_float());
        let mut shape = ids.shape.clone();
        shape.extend(sizes.iter().skip(1));
        let (inner, c) = (ids.clone(), |n: u64| i64::try_from(n).unwrap_or(i64::MAX));
        let row = Row::new(shape, false, move |x, ix| {
            let b = x.b;
            let which = inner.scalar(x, b.divui(ix.at, b.i64(c(width.max(1)))));
            let which = b.cast("arith.extsi", which, "i64");
            // An id outside of the table must not become an address.
            let which = b.minsi(b.maxsi(which, b.i64(0)), b.i64(c(rows.saturating_sub(1))));
            let place = b.addi(b.mulc(which, c(width)), b.remui(ix.at, b.i64(c(width.max(1)))));
            let value = x.load(at, dtype, super::exec::Ix { at: place, width: 1 });
            if ints { b.cast("arith.fptosi", value, "i32") } else { value }
        })
        .after(&[&ids]);
        Ok(Value::Row(if ints { row.ints() } else { row }))
    }

    fn adjust(&self, id: NodeId) -> Result<Value<'c>, CodegenError> {
        let Op::Adjust(op) = &self.body.node(id).op else { return self.fail(id, "is no adjust") };
        let mut row = self.row(id, 0)?;
        let mut next = 1;
        if let Some(bias) = self.optional(id, op.add.as_ref())? {
            row = tensor::binary(&row, &bias, BinaryFn::Add);
        }
        let forbidden = |x: &Exec<'_, 'c>| x.b.f32(f32::NEG_INFINITY);
        if let Some(classes) = &op.class_experts {
            let class = self.row(id, next)?;
            next += 1;
            let classes: Vec<(i32, Vec<u64>)> =
                classes.iter().map(|(k, ids)| (k.parse().unwrap_or(i32::MIN), ids.clone())).collect();
            let (inner, of_row) = (row.clone(), class.clone());
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let own = of_row.scalar(x, b.i64(0));
                let mut open = b.bool(false);
                for (class, ids) in &classes {
                    let member = ranges(ids).into_iter().fold(b.bool(false), |sum, (low, high)| {
                        let inside = b.andi(b.cmpi("sge", ix.at, b.i64(low)), b.cmpi("slt", ix.at, b.i64(high)));
                        b.ori(sum, inside)
                    });
                    open = b.ori(open, b.andi(member, b.cmpi("eq", own, b.i32(*class))));
                }
                b.select(open, inner.get(x, ix), forbidden(x))
            })
            .after(&[&row, &class]);
        }
        if op.mask {
            let mask = self.row(id, next)?;
            let (inner, m) = (row.clone(), mask.clone());
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let open = b.cmpf("ogt", m.get(x, ix), b.f32(0.0));
                b.select(open, inner.get(x, ix), forbidden(x))
            })
            .after(&[&row, &mask]);
        }
        for (ids, value) in [(&op.off, f32::NEG_INFINITY), (&op.on, f32::INFINITY)] {
            if ids.is_empty() {
                continue;
            }
            let (inner, ids) = (row.clone(), ids.clone());
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let listed = ranges(&ids).into_iter().fold(b.bool(false), |sum, (low, high)| {
                    let inside = b.andi(b.cmpi("sge", ix.at, b.i64(low)), b.cmpi("slt", ix.at, b.i64(high)));
                    b.ori(sum, inside)
                });
                b.select(listed, b.f32(value), inner.get(x, ix))
            })
            .after(&[&row]);
        }
        if let Some(block) = op.causal_block {
            let Some(tokens) = op.tokens else {
                return self.fail(id, "`causal_block` needs `tokens` to be compiled");
            };
            let inner = row.clone();
            let c = |n: u64| i64::try_from(n.max(1)).unwrap_or(i64::MAX);
            row = Row::new(row.shape.clone(), false, move |x, ix| {
                let b = x.b;
                let own = b.divui(b.remui(x.token(), b.i64(c(tokens))), b.i64(c(block)));
                let value = b.select(b.cmpi("sgt", ix.at, own), forbidden(x), inner.get(x, ix));
                b.select(b.cmpi("eq", ix.at, own), b.f32(f32::INFINITY), value)
            })
            .after(&[&row]);
        }
        Ok(Value::Row(row))
    }

    fn product_key(&self, id: NodeId, op: &ProductKey) -> Result<Value<'c>, CodegenError> {
        Ok(match op {
            ProductKey::Scores { k } => {
                Value::Choice(select::product_key(self.x, &self.row(id, 0)?, &self.row(id, 1)?, *k))
            }
            ProductKey::Sum { k1, k2, k } => {
                let query = self.row(id, 0)?.stored(self.x);
                let half = query.len() / 2;
                let first = linear::linear(self.x, &tensor::slice(&query, 0, 0, half), self.matrix(id, k1)?);
                let second = linear::linear(self.x, &tensor::slice(&query, 0, half, 2 * half), self.matrix(id, k2)?);
                Value::Choice(select::product_key(self.x, &first, &second, *k))
            }
            ProductKey::Tucker { core, u, v, k } => {
                let side = |query: usize, keys: usize, factor: &str| -> Result<select::Side<'c>, CodegenError> {
                    let keys = self.row(id, keys)?;
                    let [n, c, r] = keys.shape[..] else { return self.fail(id, "keys are [n, c, r]") };
                    let query = self.row(id, query)?.stored(self.x);
                    Ok(select::Side { query, keys, factor: self.table(id, factor)?, sizes: [n, c, r] })
                };
                let core = self.table(id, core)?;
                Value::Choice(select::tucker(self.x, side(0, 2, u)?, side(1, 3, v)?, &core, *k))
            }
        })
    }

    fn overrides(&self, id: NodeId, expert: u64, experts: u64) -> Result<Value<'c>, CodegenError> {
        let (choice, when) = (self.choice(id, 0)?, self.row(id, 1)?);
        let fixed = i32::try_from(expert).unwrap_or(i32::MAX);
        let is_ints = when.ints;
        let applies = move |x: &Exec<'_, 'c>, when: &Row<'c>| {
            let b = x.b;
            let class = when.scalar(x, b.i64(0));
            if is_ints { b.cmpi("ne", class, b.i32(0)) } else { b.cmpf("une", class, b.f32(0.0)) }
        };
        let (ids, flag) = (choice.idx.clone(), when.clone());
        let idx = Row::new(vec![choice.slots], false, move |x, ix| {
            let b = x.b;
            let own = b.select(b.cmpi("eq", ix.at, b.i64(0)), b.i32(fixed), b.i32(-1));
            b.select(applies(x, &flag), own, ids.get(x, ix))
        })
        .after(&[&choice.idx, &when])
        .ints();
        let w = choice.w.clone().map(|w| {
            let (inner, flag) = (w.clone(), when.clone());
            Row::new(vec![choice.slots], false, move |x, ix| {
                let b = x.b;
                let own = b.select(b.cmpi("eq", ix.at, b.i64(0)), b.f32(1.0), b.f32(0.0));
                b.select(applies(x, &flag), own, inner.get(x, ix))
            })
            .after(&[&w, &when])
        });
        Ok(Value::Choice(Choice {
            slots: choice.slots,
            experts,
            idx: idx.stored(self.x),
            w: w.map(|w| w.stored(self.x)),
        }))
    }

    /// A small feed-forward network, such as the router of a denoiser.
    fn ffn(&self, id: NodeId, op: &Ffn) -> Result<Row<'c>, CodegenError> {
        let plain = |spec: &WeightSpec| match spec {
            WeightSpec::Plain(name) => Ok(name.clone()),
            WeightSpec::Mul { .. }
            | WeightSpec::Base { .. }
            | WeightSpec::Grouped { .. }
            | WeightSpec::Ternary { .. }
            | WeightSpec::Slice { .. }
            | WeightSpec::Take { .. } => self.fail(id, "a composed weight needs a grouped product"),
        };
        let optional = |spec: &Option<WeightSpec>| spec.as_ref().map(plain).transpose();
        if op.a8 {
            return self.fail(id, "int8 activations need a grouped product");
        }
        let input = self.row(id, 0)?;
        let up = self.product(id, &input, &plain(&op.up)?, optional(&op.up_bias)?.as_ref())?;
        let act = op.act.unwrap_or(UnaryFn::Identity);
        let halves = match optional(&op.gate)? {
            Some(gate) => Some((up.clone(), self.product(id, &input, &gate, optional(&op.gate_bias)?.as_ref())?)),
            None if op.packed => {
                let n = up.shape.last().copied().unwrap_or(0) / 2;
                let axis = up.shape.len() - 1;
                let both = up.clone().stored(self.x);
                Some((tensor::slice(&both, axis, 0, n), tensor::slice(&both, axis, n, 2 * n)))
            }
            None => None,
        };
        let hidden = match halves {
            Some((value, gate)) => gated(op, act, value, gate),
            None => tensor::unary(&up, act),
        };
        match optional(&op.down)? {
            Some(down) => self.product(id, &hidden, &down, optional(&op.down_bias)?.as_ref()),
            None => Ok(hidden),
        }
    }
}

/// `act(gate) * (value + up_add)` with the clamps.
fn gated<'c>(op: &Ffn, act: UnaryFn, value: Row<'c>, gate: Row<'c>) -> Row<'c> {
    let constant = |v: f64| tensor::constant(narrow(v));
    let clamp = |row: Row<'c>, on: LimitOn| match op.limit {
        Some(limit) if op.limit_on == on => tensor::binary(&row, &constant(limit), BinaryFn::Min),
        Some(_) | None => row,
    };
    let gate = clamp(gate, LimitOn::Gate);
    let gate = match op.alpha {
        Some(alpha) => {
            let scaled = tensor::binary(&gate, &constant(alpha), BinaryFn::Mul);
            tensor::binary(&gate, &tensor::unary(&scaled, UnaryFn::Sigmoid), BinaryFn::Mul)
        }
        None => tensor::unary(&gate, act),
    };
    let gate = clamp(gate, LimitOn::Act);
    let value = match op.limit {
        Some(limit) => {
            let above = tensor::binary(&value, &constant(limit), BinaryFn::Min);
            tensor::binary(&above, &constant(-limit), BinaryFn::Max)
        }
        None => value,
    };
    let value = if op.up_add == 0.0 { value } else { tensor::binary(&value, &constant(op.up_add), BinaryFn::Add) };
    tensor::binary(&gate, &value, BinaryFn::Mul)
}

/// A value in global memory that is the same for all rows.
fn shared<'c>(pointer: V<'c>, dtype: DType, shape: Vec<u64>) -> Row<'c> {
    let ints = matches!(dtype, DType::I32 | DType::I64);
    // Numbers are wanted wherever such values stand.
    Row::new(shape, !ints, move |x, ix| x.load(pointer, dtype, ix)).cheap()
}

/// A row of a tensor in global memory.
fn global<'c>(pointer: V<'c>, dtype: DType, shape: Vec<u64>) -> Row<'c> {
    let len = i64::try_from(shape.iter().product::<u64>()).unwrap_or(i64::MAX);
    let ints = matches!(dtype, DType::I32 | DType::I64);
    let row = Row::new(shape, !ints, move |x, ix| {
        let b = x.b;
        let at = b.addi(b.mulc(x.token(), len), ix.at);
        match dtype {
            DType::I32 => b.load(b.gep(pointer, "i32", at), "i32", 4),
            DType::I64 => b.cast("arith.trunci", b.load(b.gep(pointer, "i64", at), "i64", 8), "i32"),
            DType::F64
            | DType::F32
            | DType::Bf16
            | DType::F16
            | DType::F8e4m3
            | DType::F8e5m2
            | DType::U8
            | DType::I8 => x.load(pointer, dtype, super::exec::Ix { at, width: ix.width }),
        }
    })
    .cheap();
    if ints { row.ints() } else { row }
}

/// The route of a token, when a route row covers `n` tokens.
fn repeated<'c>(choice: &Choice<'c>, n: u64) -> Choice<'c> {
    let n = i64::try_from(n).unwrap_or(1);
    let of = |row: &Row<'c>| {
        let (inner, slots) = (row.clone(), choice.slots);
        let ints = row.ints;
        let seen = Row::new(vec![slots], false, move |x, ix| {
            x.with_token(x.b.divui(x.token(), x.b.i64(n)), || inner.get(x, ix))
        })
        .after(&[row])
        .cheap();
        if ints { seen.ints() } else { seen }
    };
    Choice { slots: choice.slots, experts: choice.experts, idx: of(&choice.idx), w: choice.w.as_ref().map(of) }
}

/// Consecutive runs of ids as half-open ranges.
fn ranges(ids: &[u64]) -> Vec<(i64, i64)> {
    let mut sorted: Vec<i64> = ids.iter().map(|id| i64::try_from(*id).unwrap_or(i64::MAX)).collect();
    sorted.sort_unstable();
    let mut runs: Vec<(i64, i64)> = Vec::new();
    for id in sorted {
        match runs.last_mut() {
            Some((_, end)) if *end == id => *end += 1,
            Some(_) | None => runs.push((id, id + 1)),
        }
    }
    runs
}
