//! Inputs whose tokens go where a test or a measurement wants them.

use crate::{
    Error,
    reference::Stored,
    run::{Prepared, Tensor, put, random_input},
};
use moec_frontend::FormFacts;
use moec_ir::{
    Graph, NodeId, Op,
    interp::{WeightIndex, Weights as _},
};

/// How tokens spread over experts.
#[derive(Clone, Debug, PartialEq)]
pub enum Routing {
    /// Random rows: with random weights, every expert alike.
    Uniform,
    /// The expert of rank `i` is wanted in proportion to `i^-s`.
    Zipf(f64),
    /// All tokens want the same experts.
    AllToOne,
    /// Every expert alike but the first, which nobody wants.
    OneEmpty,
    /// Inputs that somebody recorded.
    Given(Vec<Tensor>),
}

/// Nodes from which the selection of a graph computes its scores: the weights of plain routers.
fn router(graph: &Graph) -> Option<(NodeId, String)> {
    let select = graph.ids().into_iter().find(|id| matches!(graph.node(*id).op, Op::Select(_)))?;
    let mut open = vec![select];
    let mut seen = Vec::new();
    while let Some(id) = open.pop() {
        if seen.contains(&id) {
            continue;
        }
        seen.push(id);
        if let Op::Linear(linear) = &graph.node(id).op {
            return Some((id, linear.w.clone()));
        }
        open.extend(graph.operands(id));
    }
    None
}

/// Rows that point to the wanted experts: the sum of their rows of the router, which are far from each other.
fn directed(
    prepared: &Prepared,
    graph: &Graph,
    mut inputs: Vec<Tensor>,
    pick: &mut dyn FnMut(u64) -> Vec<usize>,
) -> Result<Vec<Tensor>, Error> {
    let none = || Error::refused("E0407", "the layer has no plain router", "use --routing uniform or file:PATH");
    let (_, weight) = router(graph).ok_or_else(none)?;
    let declared = graph.weights.get(&weight).ok_or_else(none)?;
    let stored = Stored { tensors: prepared.tensors(), prefix: prepared.prefix() };
    let matrix = stored
        .get(&weight, declared, WeightIndex::default())
        .map_err(|e| Error::refused("E0407", format!("the router cannot be read: {e}"), "use --routing uniform"))?;
    let values = matrix.floats();
    let [experts, width] = *matrix.shape.as_slice() else { return Err(none()) };
    let input =
        inputs.iter_mut().find(|t| t.shape.last() == Some(&(width as u64)) && !t.dtype_is_id()).ok_or_else(none)?;
    let mut bytes = Vec::with_capacity(input.bytes.len());
    for token in 0..input.shape.first().copied().unwrap_or(0) {
        let mut row = vec![0.0; width];
        for (strength, expert) in (1..).zip(pick(token).into_iter().rev()) {
            let from = values.get((expert % experts.max(1)) * width..).unwrap_or_default();
            for (sum, value) in row.iter_mut().zip(from) {
                *sum += (1.0 + 0.01 * f64::from(strength)) * value;
            }
        }
        let size = (row.iter().map(|v| v * v).sum::<f64>() / width as f64).sqrt().max(1e-30);
        row.into_iter().try_for_each(|v| put(input.dtype, v / size, &mut bytes)).ok_or_else(none)?;
    }
    input.bytes = bytes;
    Ok(inputs)
}

/// Inputs for `tokens` tokens that are routed so; other sets for other numbers `set`.
///
/// # Errors
/// The layer has no plain router and the routing is not [`Routing::Uniform`], or the inputs do not fit into memory.
pub fn inputs(
    prepared: &Prepared,
    graph: &Graph,
    facts: &FormFacts,
    routing: &Routing,
    tokens: u64,
    set: u64,
) -> Result<Vec<Tensor>, Error> {
    let random = || {
        let buffers = prepared.layer().inputs()?;
        buffers.into_iter().map(|b| random_input(b, tokens, set + 1)).collect::<Result<Vec<_>, Error>>()
    };
    let size = |n: u64| usize::try_from(n).unwrap_or(1).max(1);
    let (experts, top_k) = (size(facts.experts), size(facts.top_k));
    let mut draw = Draw(set.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1));
    let mut drawn = |weights: &[f64]| directed(prepared, graph, random()?, &mut |_| draw.experts(weights, top_k));
    match routing {
        Routing::Given(inputs) => Ok(inputs.clone()),
        Routing::Uniform => random(),
        Routing::AllToOne => directed(prepared, graph, random()?, &mut |_| (0..top_k).collect()),
        Routing::Zipf(s) => drawn(&(1..=experts).map(|i| (i as f64).powf(-s)).collect::<Vec<_>>()),
        Routing::OneEmpty => drawn(&(0..experts).map(|e| if e == 0 { 0.0 } else { 1.0 }).collect::<Vec<_>>()),
    }
}

/// A generator whose draws never change.
struct Draw(u64);

impl Draw {
    /// A number in `[0, 1)`.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `count` different experts (fewer if there are fewer), each in proportion to its weight.
    fn experts(&mut self, weights: &[f64], count: usize) -> Vec<usize> {
        let mut chosen: Vec<usize> = Vec::new();
        while chosen.len() < count.min(weights.len()) {
            let left = |e: &usize| !chosen.contains(e) && weights.get(*e).is_some_and(|w| *w > 0.0);
            let total: f64 = (0..weights.len()).filter(left).filter_map(|e| weights.get(e)).sum();
            let mut at = self.uniform() * total;
            let next = (0..weights.len()).filter(left).find(|e| {
                at -= weights.get(*e).copied().unwrap_or(0.0);
                at <= 0.0
            });
            match next.or((0..weights.len()).rev().find(left)) {
                Some(expert) => chosen.push(expert),
                None => break,
            }
        }
        chosen
    }
}
