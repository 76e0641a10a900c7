//! What a node costs: the numbers behind rooflines.
//!
//! Estimates for a given number of tokens: every slot of a route counts as filled, tokens choose
//! experts uniformly, and each operand and result crosses memory once.

use crate::{
    Dim, Extent, Graph, Node, NodeId, Op, Packing, RaggedType, Type, Weight, WeightSpec,
    ops::{BankPart, Einsum, PartKind, ProductKey},
};
use std::collections::BTreeSet;

/// Cost of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Arithmetic operations; a multiply-add counts as two.
    pub flops: u64,
    /// Bytes of weights that are read, as stored.
    pub weight_bytes: u64,
    /// Bytes of operands and result.
    pub activation_bytes: u64,
}

/// Cost of a node for `tokens` rows; `None` before types are known or when a size exceeds 64 bits.
pub fn cost(graph: &Graph, id: NodeId, tokens: u64) -> Option<Cost> {
    let node = graph.node(id);
    let operands: Option<Vec<&Type>> = graph.operands(id).iter().map(|o| graph.node(*o).ty.as_ref()).collect();
    let operands = operands?;
    let result = node.ty.as_ref()?;
    let mut bytes = type_bytes(result, tokens)?;
    for ty in &operands {
        bytes += type_bytes(ty, tokens)?;
    }
    let (flops, weight_bytes) = match &node.op {
        Op::Input(_) => return Some(Cost::default()),
        Op::Kernel(kernel) => {
            let (mut flops, mut weights) = (0.0, 0.0);
            for inner in kernel.body.order() {
                let inner = cost(&kernel.body, inner, tokens)?;
                flops += inner.flops as f64;
                weights += inner.weight_bytes as f64;
            }
            (flops, weights)
        }
        Op::Experts(op) => bank(graph, &op.bank, operands.first()?.ragged()?, tokens)?,
        Op::Described(op) => {
            let dtype = result.tensor()?.dtype;
            (op.flops_per_token as f64 * tokens as f64, op.parameters as f64 * dtype.bytes() as f64)
        }
        Op::Param(_)
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
        | Op::Combine(_)
        | Op::Ffn(_)
        | Op::Collective(_)
        | Op::Plan(_) => (flops(graph, node, &operands, tokens)?, named_bytes(graph, node)),
    };
    Some(Cost { flops: flops as u64, weight_bytes: weight_bytes as u64, activation_bytes: bytes as u64 })
}

/// Elements of a shape.
fn elements(shape: &[Dim], tokens: u64) -> Option<f64> {
    shape.iter().try_fold(1.0, |n, d| Some(n * d.eval(tokens)? as f64))
}

/// Filled slots of a route, at most.
fn slots(route: &crate::RouteType, tokens: u64) -> Option<f64> {
    Some(route.rows.eval(tokens)? as f64 * route.slots as f64)
}

/// Elements of a value: of rows sorted by expert all of them, of a route its slots.
fn volume(ty: &Type, tokens: u64) -> Option<f64> {
    match ty {
        Type::Tensor(ty) => elements(&ty.shape, tokens),
        Type::Route(route) | Type::Plan(route) => slots(route, tokens),
        Type::Ragged(rows) => Some(row_count(rows, tokens)? * rows.row.iter().product::<u64>() as f64),
    }
}

fn row_count(rows: &RaggedType, tokens: u64) -> Option<f64> {
    Some(slots(&rows.route, tokens)? * rows.repeat as f64)
}

fn type_bytes(ty: &Type, tokens: u64) -> Option<f64> {
    let each = match ty {
        Type::Tensor(ty) => ty.dtype.bytes(),
        Type::Ragged(ty) => ty.dtype.bytes(),
        Type::Route(route) | Type::Plan(route) => 4 + 4 * u64::from(route.weighted),
    };
    Some(volume(ty, tokens)? * each as f64)
}

/// Bytes of one tensor as stored: packed codes and their scales.
fn stored_bytes(weight: &Weight, e: usize) -> f64 {
    let count: f64 = weight.shape.iter().map(|x| x.of(e).unwrap_or_else(|| x.max()) as f64).product();
    let each = match &weight.source.packing {
        Packing::Plain => weight.dtype.bytes() as f64,
        Packing::Fp8Block { block: [rows, columns], .. } => 1.0 + 4.0 / (*rows as f64 * *columns as f64).max(1.0),
        Packing::Mxfp4 { .. } => 0.5 + 1.0 / 32.0,
    };
    count * each
}

/// Bytes of the weights that a node names, each once.
fn named_bytes(graph: &Graph, node: &Node) -> f64 {
    let names: BTreeSet<_> = node.op.weights().into_iter().collect();
    names.into_iter().filter_map(|n| graph.weights.get(n)).map(|w| stored_bytes(w, 0)).sum()
}

/// Operations of everything but experts, kernels and described layers.
fn flops(graph: &Graph, node: &Node, operands: &[&Type], tokens: u64) -> Option<f64> {
    let out = volume(node.ty.as_ref()?, tokens)?;
    let first = match operands.first() {
        Some(ty) => volume(ty, tokens)?,
        None => 0.0,
    };
    let matrix =
        |name: &str| graph.weights.get(name).map_or(0.0, |w| w.shape.iter().map(Extent::max).product::<u64>() as f64);
    Some(match &node.op {
        Op::Input(_) | Op::Param(_) | Op::Shape(_) | Op::Gather(_) | Op::Dispatch(_) | Op::Plan(_) => 0.0,
        Op::Kernel(_) | Op::Experts(_) | Op::Described(_) | Op::Collective(_) => 0.0,
        Op::Linear(op) => {
            let columns = graph.weights.get(&op.w).and_then(|w| w.shape.last()).map_or(1, Extent::max);
            2.0 * first / (columns as f64).max(1.0) * matrix(&op.w)
        }
        Op::Ffn(op) => {
            let rows = first / last_size(operands.first()?)?;
            rows * op.specs().iter().map(|(_, spec)| spec_flops(graph, spec, 0)).sum::<f64>()
        }
        Op::Unary(_) | Op::Binary(_) | Op::Adjust(_) => out,
        Op::Norm(_) | Op::Softmax(_) => 4.0 * out,
        Op::Reduce(_) => first,
        Op::Einsum(op) => einsum(op, operands, tokens)?,
        Op::Attention(_) => attention(operands, tokens)?,
        Op::Transport(op) => match op {
            crate::ops::Transport::Sinkhorn { iters, .. } => 4.0 * out * (*iters as f64 + 1.0),
            crate::ops::Transport::Sparse { steps, .. } => 8.0 * out * (*steps as f64 + 1.0),
        },
        Op::Select(_) => first,
        Op::ProductKey(op) => match op {
            ProductKey::Sum { k1, .. } => first * 2.0 * rows_of(graph, k1) + out * op.k() as f64,
            ProductKey::Scores { .. } => out * op.k() as f64,
            ProductKey::Tucker { .. } => 2.0 * first * volume(operands.get(2)?, tokens)?,
        },
        Op::Limit(_) | Op::Override(_) | Op::Count(_) => first,
        Op::Weigh(_) => 4.0 * out,
        Op::Combine(_) => 2.0 * first,
    })
}

fn rows_of(graph: &Graph, name: &str) -> f64 {
    graph.weights.get(name).and_then(|w| w.shape.first()).map_or(0, Extent::max) as f64
}

fn last_size(ty: &Type) -> Option<f64> {
    ty.tensor()?.shape.last()?.known().map(|n| (n as f64).max(1.0))
}

/// A multiply for each operand, an add for each term.
fn einsum(op: &Einsum, operands: &[&Type], tokens: u64) -> Option<f64> {
    let ranks = operands.iter().map(|ty| Some(ty.tensor()?.shape.len())).collect::<Option<Vec<_>>>()?;
    let equation = op.equation(&ranks).ok()?;
    let mut axes: indexmap::IndexMap<char, f64> = indexmap::IndexMap::new();
    for (letters, ty) in equation.operands.iter().zip(operands) {
        for (letter, dim) in letters.iter().zip(&ty.tensor()?.shape) {
            let size = axes.entry(*letter).or_insert(1.0);
            *size = size.max(dim.eval(tokens)? as f64);
        }
    }
    Some(axes.values().product::<f64>() * operands.len() as f64)
}

/// Two products over all keys; what a mask or blocks save is left out.
fn attention(operands: &[&Type], tokens: u64) -> Option<f64> {
    let keys = operands.get(1)?.tensor()?.shape.first()?.eval(tokens)? as f64;
    Some(4.0 * volume(operands.first()?, tokens)? * keys)
}

/// Multiply-adds of one row with the weights of expert `e`, with factors kept apart.
fn spec_flops(graph: &Graph, spec: &WeightSpec, e: usize) -> f64 {
    let count = |name: &str, e: usize| {
        graph
            .weights
            .get(name)
            .map_or(0.0, |w| w.shape.iter().map(|x| x.of(e).unwrap_or_else(|| x.max()) as f64).product())
    };
    2.0 * match spec {
        WeightSpec::Plain(name) => count(name, e),
        WeightSpec::Mul { mul: [a, b], group } => {
            let g = group.get(e).copied().unwrap_or(0);
            let factor = |name| count(name, usize::try_from(WeightSpec::entry(name, e as u64, g)).unwrap_or(0));
            factor(a) + factor(b)
        }
        WeightSpec::Base { base, a, b, .. } => count(base, e) + count(a, e) + count(b, e),
        WeightSpec::Grouped { codes, .. } | WeightSpec::Ternary { codes, .. } => count(codes, e),
        WeightSpec::Slice { slice, n, .. } => count(slice, e) / (*n as f64).max(1.0),
        WeightSpec::Take { take, .. } => count(take, e),
    }
}

/// Operations and bytes of a bank: the mean expert for each row, the experts that are hit for the bytes.
fn bank(graph: &Graph, parts: &[BankPart], rows: &RaggedType, tokens: u64) -> Option<(f64, f64)> {
    let experts = rows.route.experts.max(1) as f64;
    let count = row_count(rows, tokens)?;
    let hit = 1.0 - (1.0 - (rows.route.slots as f64 / experts).min(1.0)).powf(rows.route.rows.eval(tokens)? as f64);
    let width: f64 = rows.row.iter().product::<u64>() as f64;
    let (mut flops, mut bytes) = (0.0, 0.0);
    for part in parts {
        let names: BTreeSet<_> = part.weights().into_iter().collect();
        let count = part.ids[1].saturating_sub(part.ids[0]);
        if let PartKind::Neuron(_) | PartKind::Const { .. } = &part.kind {
            let tables: f64 = names.iter().filter_map(|n| graph.weights.get(*n)).map(|w| stored_bytes(w, 0)).sum();
            let share = count as f64 / experts;
            flops += if matches!(part.kind, PartKind::Neuron(_)) { 4.0 * width * share } else { 0.0 };
            bytes += hit * tables;
            continue;
        }
        for e in part.all_numbers() {
            let e = usize::try_from(e).ok()?;
            flops += part.specs().iter().map(|(_, s)| spec_flops(graph, s, e)).sum::<f64>() / experts;
            for name in &names {
                let each = graph.weights.get(*name).map_or(0.0, |w| stored_bytes(w, e));
                // A tensor without expert in its name and view is read once for all.
                let shared =
                    !name.contains("{e}") && graph.weights.get(*name).is_some_and(|w| w.source.view.is_empty());
                bytes += if shared { each / (part.ids[1] - part.ids[0]) as f64 } else { hit * each };
            }
        }
    }
    Some((flops * count, bytes))
}
