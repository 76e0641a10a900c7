//! The walk over the body of a row kernel.

mod ffn;
mod operands;
mod routes;
mod tensors;

use super::{
    InputPart, OutputPart, RowArg, RowKernel,
    combine::{self, Simple, SimplePart, Sorted},
    exec::Exec,
    select, tensor,
    value::{Choice, Row},
    weigh,
};
use crate::{CodegenError, mlir::V};
use indexmap::IndexMap;
use moec_abi::DType;
use moec_ir::{
    Graph, NodeId, Op, WeightName, WeightSpec,
    ops::{PartKind, ProductKey, SelectRule},
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
                let row = Value::Row(operands::global(*pointer, DType::F32, walker.row_shape(*id)?));
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
    let result = body.outputs.first().map(|o| o.node).and_then(|id| Some((id, walker.values.get(&id).cloned()?)));
    let Some((id, result)) = result else {
        return Err(unsupported(body.name.clone(), "the region has no result"));
    };
    // What is written has the place that the type says, and not a number more.
    if let (Value::Row(row), Ok(shape)) = (&result, walker.row_shape(id))
        && row.len() != shape.iter().product::<u64>()
    {
        return walker.fail(id, "a row has another size than its type says");
    }
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
        // What is the same for all rows may have come with a row axis of its own.
        let row = match self.row_shape(id) {
            Ok(shape) if shape.iter().product::<u64>() == row.len() => row.reshaped(shape),
            Ok(_) | Err(_) => row,
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
                let given = matches!(op.rule, SelectRule::Given { .. });
                let scores = if given { self.held(id, 0)? } else { self.row(id, 0)? };
                match select::select(x, &scores, &op.rule, self.bound(id, op.bound)?.as_ref()) {
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
                let choice = if op.repeat == 1 { choice } else { routes::repeated(&choice, op.repeat) };
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
                        let choice = if op.repeat == 1 { choice } else { routes::repeated(&choice, op.repeat) };
                        Value::Row(combine::combine(&sorted, &choice, op.weighted, shape))
                    }
                    Some(Value::Simple { parts, scale }) => {
                        let choice = if op.repeat == 1 { choice } else { routes::repeated(&choice, op.repeat) };
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
}
