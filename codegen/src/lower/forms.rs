//! Forms of weights: what is multiplied as it is stored, what is decoded by the kernel, and what stays a product.
//!
//! A composed weight is a value, not an order of computation. Codes stay codes in the packed weights, so that a kernel
//! reads no more than they take. Factors stay apart where that is less work: `A_e (B_g x)`, with `B_g x` computed once
//! for all experts of a group that a token uses, and `W x + s B_e (A_e x)` with `W x` computed once per token.

use super::weights::{self, Values};
use crate::{
    CodegenError,
    grouped::{Codes, RowSource},
};
use moec_abi::{DType, Matrix, Packing, Recipe, Source, View};
use moec_ir::{Graph, NodeId, WeightSpec};

/// How a matrix is stored and multiplied.
#[derive(Clone, Debug)]
pub(super) enum Form {
    /// As values.
    Values,
    /// As codes that the kernel decodes.
    Codes(Stored),
    /// As factors, one product after the other.
    Factors(Factors),
}

/// Codes and what turns them into weights.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) format: Codes,
    /// Bytes of codes.
    pub(super) codes: Matrix,
    /// Scales and zeros: a row for each output.
    pub(super) scale: Matrix,
    pub(super) zero: Option<Matrix>,
}

/// `left (factor (right x))`, and `base x` if there is a base.
#[derive(Clone, Debug)]
pub(super) struct Factors {
    pub(super) left: Matrix,
    pub(super) right: Matrix,
    /// Number of the right matrix of each expert of the part, where they are not its own.
    pub(super) groups: Option<Vec<u64>>,
    pub(super) factor: f64,
    pub(super) base: Option<Matrix>,
    /// Columns of the left factor.
    pub(super) inner: u64,
    /// Element type that holds the factors exactly.
    pub(super) dtype: DType,
}

/// Whether the matrix is the same for all experts.
fn is_shared(matrix: &Matrix) -> bool {
    !matrix.source.tensor.contains("{e}") && !by_expert(matrix)
}

/// Whether views pick the expert's part.
fn by_expert(matrix: &Matrix) -> bool {
    matrix.source.view.iter().any(|v| matches!(v, View::Expert | View::ExpertRows { .. }))
}

/// A matrix that a recipe computes, with further views.
fn composed(name: &str, recipe: Recipe, sizes: (u64, u64), views: &[moec_ir::View]) -> Matrix {
    let packing = Packing::Composed(Box::new(recipe));
    let source = Source { tensor: name.to_owned(), packing, view: Vec::new(), dtype: DType::F32 };
    rows(Matrix { source, rows: vec![sizes.0], columns: vec![sizes.1] }, views)
}

/// The rows that views leave.
fn rows(mut matrix: Matrix, views: &[moec_ir::View]) -> Matrix {
    for view in views {
        if let moec_ir::View::Slice { axis: 0, start, len, step } = view {
            matrix.source.view.push(View::Slice { axis: 0, start: *start, len: *len, step: *step });
            matrix.rows = vec![*len];
        }
    }
    matrix
}

/// The form of a matrix for the experts with these numbers, whose rows come from `from`.
pub(super) fn form(
    body: &Graph,
    node: NodeId,
    outer: &Graph,
    values: &Values<'_>,
    numbers: &[u64],
    from: RowSource,
) -> Result<Form, CodegenError> {
    let Values::Of(spec, views) = values else { return Ok(Form::Values) };
    let whole = weights::of_spec(body, node, outer, spec)?;
    let Some((n, k)) = weights::uniform(&whole, numbers) else { return Ok(Form::Values) };
    let part = |name: &str| {
        let matrix = weights::of_spec(body, node, outer, &WeightSpec::Plain(name.to_owned()))?;
        Ok::<_, CodegenError>(matrix)
    };
    let narrow = |names: [&String; 2]| {
        let narrow = |name: &String| body.weights.get(name).is_some_and(|w| w.dtype == moec_ir::DType::Bf16);
        if names.into_iter().all(narrow) { DType::Bf16 } else { DType::F32 }
    };
    match &**spec {
        WeightSpec::Plain(_) | WeightSpec::Slice { .. } | WeightSpec::Take { .. } => Ok(Form::Values),
        WeightSpec::Grouped { codes, scale, zero, group_size, bits } => {
            let width = |e: &u64| usize::try_from(*e).ok().and_then(|e| bits.get(e)).copied();
            let widest = numbers.iter().map(width).collect::<Option<Vec<u64>>>().and_then(|b| b.into_iter().max());
            let (bits, offset) = match (widest, body.weights.get(codes).map(|w| w.dtype)) {
                (Some(bits), _) => (moec_ir::stored_bits(bits), 0),
                (None, Some(moec_ir::DType::U8)) => (8, 0),
                (None, Some(moec_ir::DType::I8)) => (8, 128),
                // Nothing says how large codes are.
                (None, _) => return Ok(Form::Values),
            };
            let format = Codes { bits, offset, group: (*group_size).max(1), zero: true };
            let recipe = Recipe::Packed { codes: part(codes)?, bits, offset };
            let (scale, zero) = (rows(part(scale)?, views), rows(part(zero)?, views));
            let codes = composed(codes, recipe, (n, k.div_ceil(format.per_byte())), views);
            Ok(Form::Codes(Stored { format, codes, scale, zero: Some(zero) }))
        }
        WeightSpec::Ternary { codes, scale } => {
            let Some(factors) = body.weights.get(scale) else { return Ok(Form::Values) };
            let sizes = |m: &Matrix| weights::uniform(m, numbers);
            let stored = part(scale)?;
            let scales = match (factors.shape.len(), sizes(&stored)) {
                // One number for all outputs.
                (_, Some((1, 1))) => composed(scale, Recipe::Repeated { row: stored, rows: n }, (n, 1), views),
                (2, Some((outputs, 1))) if outputs == n => rows(stored, views),
                // A number for each input is as large as the matrix.
                (_, _) => return Ok(Form::Values),
            };
            let format = Codes { bits: 2, offset: 1, group: k.max(1), zero: false };
            let recipe = Recipe::Packed { codes: part(codes)?, bits: format.bits, offset: format.offset };
            let codes = composed(codes, recipe, (n, k.div_ceil(format.per_byte())), views);
            Ok(Form::Codes(Stored { format, codes, scale: scales, zero: None }))
        }
        WeightSpec::Mul { mul: [a, b], group } => {
            let (left, mut right) = (part(a)?, part(b)?);
            let Some((_, inner)) = weights::uniform(&left, numbers) else { return Ok(Form::Values) };
            let of = |e: &u64| usize::try_from(*e).ok().and_then(|e| group.get(e)).copied();
            let groups = numbers.iter().map(of).collect::<Option<Vec<u64>>>();
            // A factor that depends on the expert and on the group has no number of its own.
            let mixed = left.source.tensor.contains("{g}")
                || (right.source.tensor.contains("{g}") && right.source.tensor.contains("{e}"))
                || by_expert(&right);
            if mixed || !is_less(n, k, inner) {
                return Ok(Form::Values);
            }
            let groups = if right.source.tensor.contains("{e}") {
                None
            } else {
                right.source.tensor = right.source.tensor.replace("{g}", "{e}");
                groups
            };
            let dtype = narrow([a, b]);
            Ok(Form::Factors(Factors { left: rows(left, views), right, groups, factor: 1.0, base: None, inner, dtype }))
        }
        WeightSpec::Base { base, a, b, scale } => {
            let (shared, right, left) = (part(base)?, part(a)?, part(b)?);
            let Some((_, inner)) = weights::uniform(&left, numbers) else { return Ok(Form::Values) };
            // Rows in sorted order are not those of tokens.
            if from == RowSource::Sorted || !is_shared(&shared) || !is_less(n, k, inner) {
                return Ok(Form::Values);
            }
            let dtype = if narrow([a, b]) == narrow([base, base]) { narrow([a, b]) } else { DType::F32 };
            let (left, base) = (rows(left, views), Some(rows(shared, views)));
            Ok(Form::Factors(Factors { left, right, groups: None, factor: *scale, base, inner, dtype }))
        }
    }
}

/// Whether two factors are less than their product.
const fn is_less(n: u64, k: u64, inner: u64) -> bool {
    inner > 0 && inner.saturating_mul(n.saturating_add(k)) < n.saturating_mul(k)
}
