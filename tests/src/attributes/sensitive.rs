//! Differences between compiled and interpreted results that follow from the numbers, not from what is computed.

use super::unseen::typed;
use crate::{
    draw::Draw,
    gallery::{Data, Results},
};
use moec_ir::{
    DType, Graph, Type,
    interp::{Array, ArrayData, MapWeights, Options, Rounding, Value, interpret},
};
use std::collections::BTreeMap;

/// How often all numbers are moved at most: where an iteration ends at one of many places, few draws miss some.
const DRAWS: u64 = 200;

/// Squares and products of larger numbers may leave the range of f32.
const LARGE: f64 = 1e19;

/// Why results may differ from the interpreter's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// The exact result moves as much when the data move by a last place of f32 and values between ops are f32.
    Sensitive,
    /// A value on the way is near the end of the range of f32, or beyond.
    Range,
}

/// The cause of a difference, if it is one of the numbers alone. Everything that is further apart than its limit must
/// have it.
pub(crate) fn cause(
    graph: &Graph,
    data: &Data,
    (expected, found): (&Results, &Results),
    limit: impl Fn(&str, &[f64]) -> f64,
) -> Option<Cause> {
    if largest(graph, data) > LARGE {
        return Some(Cause::Range);
    }
    let rounded = in_f32(graph);
    // Numbers that are further apart than their limits, and how far.
    let mut open = Vec::new();
    for (name, wanted) in expected {
        let got = found.get(name).filter(|got| got.len() == wanted.len())?;
        let limit = limit(name, wanted);
        let apart = (0..wanted.len()).map(|i| (name, i, wanted[i], distance(got[i], wanted[i]) - limit));
        open.extend(apart.filter(|(.., apart)| *apart > 0.0));
    }
    for other in (0..DRAWS).filter_map(|seed| moved(&rounded, data, seed)) {
        open.retain(|(name, i, wanted, apart)| distance(other[*name][*i], *wanted) < *apart);
        if open.is_empty() {
            return Some(Cause::Sensitive);
        }
    }
    None
}

/// How far numbers are apart: what is no number, or infinite, is infinitely far from all others.
fn distance(a: f64, b: f64) -> f64 {
    if a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()) {
        return 0.0;
    }
    let apart = (a - b).abs();
    if apart.is_nan() { f64::INFINITY } else { apart }
}

/// The graph with every value between ops rounded to f32, where it is not rounded further: that alone may lose what
/// stands beside a large number. What iterations carry is rounded as well: one that does not settle ends elsewhere then.
fn in_f32(graph: &Graph) -> Graph {
    let mut rounded = typed(graph);
    for id in graph.ids() {
        let holds_numbers = matches!(rounded.node(id).ty, Some(Type::Tensor(_) | Type::Ragged(_)));
        if graph.node(id).round.is_none() && holds_numbers {
            rounded.set_round(id, Some(DType::F32));
        }
    }
    rounded
}

/// The results of data whose floats are moved by a last place of f32, up, down or not at all.
fn moved(graph: &Graph, data: &Data, seed: u64) -> Option<Results> {
    // The first draw moves nothing: rounding alone may be the cause.
    let mut draw = Draw(seed);
    let mut move_all = |name: &str, array: &Array| match &array.data {
        // Codes are numbers by name only.
        ArrayData::F64(values) if !crate::gallery::is_code(name) => {
            let way = |draw: &mut Draw| if seed == 0 { 1 } else { draw.below(3) };
            let values = values.iter().map(|v| nudged(*v, way(&mut draw))).collect();
            Array { shape: array.shape.clone(), data: ArrayData::F64(values) }
        }
        ArrayData::F64(_) | ArrayData::I64(_) => array.clone(),
    };
    let arrays = data.arrays.iter().map(|(name, array)| (name.clone(), move_all(name, array))).collect();
    let weights = data.weights.0.iter().map(|(name, array)| (name.clone(), move_all(name, array))).collect();
    let options = Options { rounding: Rounding::Single(seed), ..Options::default() };
    let found = interpret(graph, &arrays, &MapWeights(weights), options).ok()?;
    let results: BTreeMap<_, _> = found.into_iter().map(|(name, array)| (name, array.floats())).collect();
    Some(results)
}

/// The number one place down, as it is, or one place up.
fn nudged(value: f64, way: u64) -> f64 {
    #[expect(clippy::cast_possible_truncation, reason = "the data are f32")]
    let value = value as f32;
    f64::from(match way {
        0 => value.next_down(),
        1 => value,
        _ => value.next_up(),
    })
}

/// The largest finite number on the way to the results.
fn largest(graph: &Graph, data: &Data) -> f64 {
    let mut largest = 0f64;
    let mut see = |_: &str, _: &moec_ir::Node, value: &Value| {
        let values: &[f64] = match value {
            Value::Tensor(Array { data: ArrayData::F64(values), .. }) => values,
            Value::Ragged(rows) => &rows.data,
            Value::Route(route) => route.weights.as_deref().unwrap_or(&[]),
            Value::Tensor(Array { data: ArrayData::I64(_), .. }) | Value::Plan(_) => &[],
        };
        largest = values.iter().fold(largest, |m, v| if v.is_finite() { m.max(v.abs()) } else { m });
    };
    let options = Options { rounding: Rounding::Model, trace: Some(&mut see) };
    // A graph without a value was refused before.
    let _ = interpret(graph, &data.arrays, &data.weights, options);
    largest
}
