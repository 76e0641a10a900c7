//! Split products of three and more operands into pairs.
//!
//! Before: one sum over all axes of all operands at once. After: pairs, cheapest first, so that an
//! axis that only two operands share is summed before the others multiply the work.

use crate::{Changed, Pass, PassCx};
use moec_ir::{Dim, Graph, NodeId, Op, Type, ops::Einsum};
use std::collections::BTreeMap;

pub(crate) const PASS: Pass =
    Pass { name: "split-einsums", about: "products of several operands, two at a time and cheapest first", run };

/// Tokens for which costs are compared.
const TOKENS: u64 = 4096;

type Operand = (NodeId, Vec<char>);

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if let Op::Einsum(op) = &graph.node(id).op
            && let Some((letters, result)) = op.letters(&ranks(graph, id))
            && letters.len() > 2
            && let Some(sizes) = sizes(graph, id, &letters)
        {
            let operands: Vec<Operand> = graph.operands(id).into_iter().zip(letters).collect();
            cx.remark(graph, id, format!("{} operands, two at a time", operands.len()));
            split(graph, id, operands, &result, &sizes);
            changed = Changed::Yes;
        }
    }
    changed
}

/// Axes of each operand.
fn ranks(graph: &Graph, id: NodeId) -> Vec<usize> {
    let rank = |id: NodeId| graph.node(id).ty.as_ref().and_then(Type::tensor).map_or(0, |ty| ty.shape.len());
    graph.operands(id).into_iter().map(rank).collect()
}

/// Size of each letter; `None` where one stands for different sizes, which then repeat.
fn sizes(graph: &Graph, id: NodeId, letters: &[Vec<char>]) -> Option<BTreeMap<char, Dim>> {
    let mut sizes: BTreeMap<char, Dim> = BTreeMap::new();
    for (operand, axes) in graph.operands(id).into_iter().zip(letters) {
        let Some(Type::Tensor(ty)) = &graph.node(operand).ty else { return None };
        for (letter, dim) in axes.iter().zip(&ty.shape) {
            if sizes.insert(*letter, dim.clone()).is_some_and(|known| known != *dim) {
                return None;
            }
        }
    }
    Some(sizes)
}

/// Letters of a product of two operands that something else still needs.
fn kept(a: &[char], b: &[char], rest: &[&Operand], result: &[char]) -> Vec<char> {
    let mut kept: Vec<char> = Vec::new();
    for letter in a.iter().chain(b) {
        let needed = result.contains(letter) || rest.iter().any(|(_, axes)| axes.contains(letter));
        if needed && !kept.contains(letter) {
            kept.push(*letter);
        }
    }
    kept
}

fn cost(a: &[char], b: &[char], sizes: &BTreeMap<char, Dim>) -> u64 {
    let mut seen: Vec<char> = Vec::new();
    a.iter().chain(b).fold(1u64, |cost, letter| {
        if seen.contains(letter) {
            return cost;
        }
        seen.push(*letter);
        cost.saturating_mul(sizes.get(letter).and_then(|d| d.eval(TOKENS)).unwrap_or(u64::MAX))
    })
}

fn equation(a: &[char], b: &[char], result: &[char]) -> Einsum {
    let [a, b, result] = [a, b, result].map(|letters| letters.iter().collect::<String>());
    Einsum { eq: format!("{a},{b}->{result}") }
}

fn split(graph: &mut Graph, id: NodeId, mut operands: Vec<Operand>, result: &[char], sizes: &BTreeMap<char, Dim>) {
    let mut last = None;
    while operands.len() > 1 {
        let pairs = (0..operands.len()).flat_map(|i| (i + 1..operands.len()).map(move |j| (i, j)));
        let Some((i, j)) = pairs.min_by_key(|(i, j)| cost(&operands[*i].1, &operands[*j].1, sizes)) else { return };
        let (y, b) = operands.remove(j);
        let (x, a) = operands.remove(i);
        let rest: Vec<&Operand> = operands.iter().collect();
        let letters = if rest.is_empty() { result.to_vec() } else { kept(&a, &b, &rest, result) };
        let product = graph.add("", Op::Einsum(equation(&a, &b, &letters)), &[x, y]);
        operands.push((product, letters));
        last = Some(product);
    }
    if let Some(product) = last {
        let round = graph.node(id).round;
        graph.set_round(product, round);
        graph.replace_uses(id, product);
        graph.remove(id);
    }
}
