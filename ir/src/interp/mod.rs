//! The reference interpreter: f64, slow, obvious.
//!
//! It gives every operation its meaning; compiled code is compared with it. Each node is typed
//! with the sizes at hand before it runs, so that operands that do not fit are errors here too.
//!
//! Slots of a route are as many as its type says. Softmax of nothing is NaN, except over the slots
//! of a row, where it is 0.

mod attention;
mod einsum;
mod experts;
mod product_key;
mod ranks;
mod round;
mod route;
mod rows;
mod scores;
mod select;
mod shape;
mod special;
mod tensor;
mod value;
mod weights;

pub use ranks::{Rank, interpret_ranks};
pub use value::{Array, ArrayData, PlanValue, RaggedValue, RouteValue, Value};
pub use weights::{MapWeights, WeightIndex, Weights};

use crate::{
    Graph, Node, NodeId, Op, Output, Part, Type,
    infer::{Cx, OpError},
};
use indexmap::IndexMap;

/// What a run does with `round` of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// Nothing is rounded: the mathematical value.
    #[default]
    Exact,
    /// Values are rounded where the model rounds between ops.
    Model,
    /// As the model, and what an iteration carries from step to step becomes an f32 near it, which this number draws (0:
    /// the nearest). Tells whether an iteration settles or goes where the last bits lead it.
    Single(u64),
}

/// Called with the path of a node (`kernel/node` inside kernels), the node and its value.
pub type Trace<'a> = dyn FnMut(&str, &Node, &Value) + 'a;

/// How to run.
#[derive(Default)]
pub struct Options<'a> {
    /// What happens at nodes with `round`.
    pub rounding: Rounding,
    /// Sees every value, in order of computation.
    pub trace: Option<&'a mut Trace<'a>>,
}

/// Why a graph has no value for these inputs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterpError {
    /// An input is missing, superfluous or of another shape.
    #[error("input `{name}`: {message}")]
    Input {
        /// Name in the interface.
        name: String,
        /// What is and what was needed.
        message: String,
    },
    /// A weight is missing or of another shape.
    #[error("weight `{name}`: {message}")]
    Weight {
        /// Name in the graph.
        name: String,
        /// What is and what was needed.
        message: String,
    },
    /// An operation cannot take its operands.
    #[error("node `{node}` ({op}): {message}")]
    Node {
        /// Path of the node.
        node: String,
        /// Its operation.
        op: &'static str,
        /// What is and what was needed.
        message: String,
    },
}

/// What an operation may use besides operands.
struct Run<'a, 'b> {
    weights: &'a dyn Weights,
    rounding: Rounding,
    /// Number of tokens, if an input tells it.
    tokens: Option<u64>,
    trace: Option<&'a mut Trace<'b>>,
}

/// A message about the operation that runs; the walk adds the node.
struct Failure(String);

impl From<OpError> for Failure {
    fn from(error: OpError) -> Self {
        Self(error.message)
    }
}

impl From<InterpError> for Failure {
    fn from(error: InterpError) -> Self {
        Self(error.to_string())
    }
}

type Step<T> = Result<T, Failure>;

/// Computes the results of a graph.
///
/// # Errors
/// When an input, a weight or an operation does not fit; see [`InterpError`].
pub fn interpret<'a>(
    graph: &Graph,
    inputs: &IndexMap<String, Array>,
    weights: &'a dyn Weights,
    options: Options<'a>,
) -> Result<IndexMap<String, Array>, InterpError> {
    let (bound, tokens) = bind(graph, inputs)?;
    let mut run = Run { weights, rounding: options.rounding, tokens, trace: options.trace };
    let values = walk(graph, bound, &mut run, "")?;
    graph.outputs.iter().map(|o| Ok((o.name.clone(), result(graph, o, &values)?))).collect()
}

/// Inputs in order, and the number of tokens that their shapes imply.
fn bind(graph: &Graph, inputs: &IndexMap<String, Array>) -> Result<(Vec<Value>, Option<u64>), InterpError> {
    let mut tokens: Option<u64> = None;
    let mut bound = Vec::new();
    for id in graph.inputs() {
        let Op::Input(input) = &graph.node(id).op else { continue };
        let wrong = |message: String| InterpError::Input { name: input.name.clone(), message };
        let array = inputs.get(&input.name).ok_or_else(|| wrong("is missing".to_owned()))?;
        array.check().map_err(wrong)?;
        if input.ty.shape.len() != array.shape.len() {
            return Err(wrong(format!("has shape {:?}, {} is needed", array.shape, input.ty)));
        }
        if !input.ty.dtype.is_float() && array.ints().is_none() {
            return Err(wrong(format!("holds floats, {} is needed", input.ty)));
        }
        for (dim, size) in input.ty.shape.iter().zip(&array.shape) {
            let size = *size as u64;
            if *dim == crate::Dim::Tokens && *tokens.get_or_insert(size) != size {
                return Err(wrong(format!("has {size} tokens, another input {tokens:?}")));
            }
        }
        bound.push(Value::Tensor(array.clone()));
    }
    for id in graph.inputs() {
        let Op::Input(input) = &graph.node(id).op else { continue };
        let Some(array) = inputs.get(&input.name) else { continue };
        let fits = input.ty.shape.iter().zip(&array.shape).all(|(dim, size)| match tokens {
            Some(t) => dim.eval(t) == Some(*size as u64),
            None => dim.known().is_none_or(|n| n == *size as u64),
        });
        if !fits {
            let message = format!("has shape {:?}, {} is needed", array.shape, input.ty);
            return Err(InterpError::Input { name: input.name.clone(), message });
        }
    }
    Ok((bound, tokens))
}

/// Values of all nodes, by index.
fn walk(
    graph: &Graph,
    inputs: Vec<Value>,
    run: &mut Run<'_, '_>,
    prefix: &str,
) -> Result<Vec<Option<Value>>, InterpError> {
    let mut values: Vec<Option<Value>> = Vec::new();
    let mut inputs = inputs.into_iter();
    for id in graph.order() {
        let value = node_value(graph, id, &values, &mut inputs, run, prefix)?;
        keep(&mut values, id, value);
    }
    Ok(values)
}

fn keep(values: &mut Vec<Option<Value>>, id: NodeId, value: Value) {
    if values.len() <= id.index() {
        values.resize(id.index() + 1, None);
    }
    values[id.index()] = Some(value);
}

/// The value as the node stores it.
fn rounded(value: Value, node: &Node, run: &Run<'_, '_>) -> Step<Value> {
    match (run.rounding, node.round) {
        (Rounding::Model | Rounding::Single(_), Some(dtype)) => round::round(value, dtype),
        (Rounding::Exact, _) | (_, None) => Ok(value),
    }
}

/// The value of one node; `inputs` are those that no node took yet.
fn node_value(
    graph: &Graph,
    id: NodeId,
    values: &[Option<Value>],
    inputs: &mut impl Iterator<Item = Value>,
    run: &mut Run<'_, '_>,
    prefix: &str,
) -> Result<Value, InterpError> {
    let node = graph.node(id);
    let path = format!("{prefix}{}", node.name);
    let fail = |Failure(message)| InterpError::Node { node: path.clone(), op: node.op.name(), message };
    let missing = || Failure("an operand has no value".to_owned());
    let mut operands = Vec::new();
    for operand in graph.operands(id) {
        operands.push(values.get(operand.index()).and_then(Option::as_ref).ok_or_else(missing).map_err(fail)?);
    }
    let value = if matches!(node.op, Op::Input(_)) {
        inputs.next().ok_or_else(missing).map_err(fail)?
    } else if let Op::Kernel(kernel) = &node.op {
        let body = &kernel.body;
        let arguments = operands.into_iter().cloned().collect();
        let inner = walk(body, arguments, run, &format!("{path}/"))?;
        let returned = body.outputs.first().and_then(|o| inner.get(o.node.index()).cloned().flatten());
        returned.ok_or_else(|| Failure("the body returns nothing".to_owned())).map_err(fail)?
    } else {
        step(&node.op, &operands, graph, run).map_err(fail)?
    };
    let value = rounded(value, node, run).map_err(fail)?;
    if let Some(trace) = run.trace.as_mut() {
        trace(&path, node, &value);
    }
    Ok(value)
}

/// One operation. The type rule has accepted the operands when the code of the op runs.
fn step(op: &Op, operands: &[&Value], graph: &Graph, run: &Run<'_, '_>) -> Step<Value> {
    let cx = Cx { weights: &graph.weights };
    let types: Vec<Type> = operands.iter().map(|v| v.ty()).collect();
    let ty = op.infer(&cx, &types.iter().collect::<Vec<_>>())?;
    let w = weights::Fetch { cx: &cx, weights: run.weights };
    match op {
        Op::Input(_) | Op::Kernel(_) => Err(Failure("is not computed here".to_owned())),
        Op::Param(op) => Ok(Value::Tensor(w.plain(&op.w)?)),
        Op::Linear(op) => tensor::linear(op, operands, &w),
        Op::Unary(op) => tensor::unary(op.function, operands),
        Op::Binary(op) => tensor::binary(op, operands, &w),
        Op::Norm(op) => tensor::norm(op, operands, &w),
        Op::Softmax(op) => tensor::softmax_op(op, operands),
        Op::Reduce(op) => tensor::reduce(op, operands),
        Op::Einsum(op) => einsum::einsum(op, operands),
        Op::Shape(op) => shape::shape(op, operands, &ty),
        Op::Gather(op) => rows::gather(op, operands, &w),
        Op::Attention(op) => attention::attention(op, operands),
        Op::Adjust(op) => scores::adjust(op, operands, &w, run.tokens),
        Op::Transport(op) => scores::transport(op, operands, run.rounding),
        Op::Select(op) => select::select(op, operands, &ty),
        Op::ProductKey(op) => product_key::product_key(op, operands, &w, &ty),
        Op::Limit(op) => route::limit(op, operands),
        Op::Weigh(op) => route::weigh(op, operands, &w),
        Op::Override(op) => route::override_rows(op, operands),
        Op::Count(_) => route::count(operands),
        Op::Dispatch(op) => rows::dispatch(op, operands),
        Op::Experts(op) => experts::experts(op, operands, &w, &ty),
        Op::Combine(op) => rows::combine(op, operands),
        Op::Ffn(op) => experts::dense(op, operands, &w, &ty),
        Op::Plan(op) => rows::plan(op, operands),
        Op::Collective(_) => Err(Failure("needs the other ranks: interpret all ranks together".to_owned())),
        Op::Described(_) => Err(Failure("a described layer has costs, but no values".to_owned())),
    }
}

/// The part of a value that an output exposes.
fn result(graph: &Graph, output: &Output, values: &[Option<Value>]) -> Result<Array, InterpError> {
    let value = values.get(output.node.index()).and_then(Option::as_ref);
    let part = match (value, output.part) {
        (Some(Value::Tensor(array)), Part::Whole) => Some(array.clone()),
        (Some(Value::Route(route)), Part::Idx) => {
            Some(Array { shape: vec![route.rows, route.slots], data: ArrayData::I64(route.ids.clone()) })
        }
        (Some(Value::Route(route)), Part::Weights) => route
            .weights
            .as_ref()
            .map(|w| Array { shape: vec![route.rows, route.slots], data: ArrayData::F64(w.clone()) }),
        (Some(Value::Tensor(_) | Value::Route(_) | Value::Plan(_) | Value::Ragged(_)) | None, _) => None,
    };
    part.ok_or_else(|| {
        let (node, op) = match graph.contains(output.node) {
            true => (graph.node(output.node).name.clone(), graph.node(output.node).op.name()),
            false => (String::new(), "none"),
        };
        let message = format!("output `{}` asks for {:?}, which it has not", output.name, output.part);
        InterpError::Node { node, op, message }
    })
}
