//! Forms of weights: what is multiplied as it is stored, what is decoded by the kernel, and what stays a product.
//!
//! A composed weight is a value, not an order of computation. Codes stay codes in the packed weights, so that a kernel
//! reads no more than they take. Factors stay apart where that is less work: `A_e (B_g x)`, with `B_g x` computed once
//! for all experts of a group that a token uses, and `W x + s B_e (A_e x)` with `W x` computed once per token.

use super::weights::{self, Values};
use crate::{
    CodegenError,
    codes::{Codes, Number},
    grouped::RowSource,
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
    /// Type of the decoded weights.
    pub(super) dtype: DType,
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

/// The form of a matrix for the experts with these numbers, whose rows come from `from` and are of type `operand`:
/// values of codes are multiplied in that type.
pub(super) fn form(
    body: &Graph,
    node: NodeId,
    outer: &Graph,
    values: &Values<'_>,
    numbers: &[u64],
    (from, operand): (RowSource, DType),
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
        WeightSpec::Plain(_) => Ok(checkpoint(rows(whole, views), k).map_or(Form::Values, Form::Codes)),
        WeightSpec::Slice { .. } | WeightSpec::Take { .. } => Ok(Form::Values),
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
            let (number, group) = (Number::Integer { offset }, (*group_size).max(1));
            let format = Codes { bits, number, group, zero: true, scale: DType::F32 };
            let recipe = Recipe::Packed { codes: part(codes)?, bits, offset };
            let (scale, zero) = (rows(part(scale)?, views), rows(part(zero)?, views));
            let codes = composed(codes, recipe, (n, k.div_ceil(format.per_byte())), views);
            Ok(Form::Codes(Stored { format, codes, scale, zero: Some(zero), dtype: operand }))
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
            let number = Number::Integer { offset: 1 };
            let format = Codes { bits: 2, number, group: k.max(1), zero: false, scale: DType::F32 };
            let recipe = Recipe::Packed { codes: part(codes)?, bits: format.bits, offset: 1 };
            let codes = composed(codes, recipe, (n, k.div_ceil(format.per_byte())), views);
            Ok(Form::Codes(Stored { format, codes, scale: scales, zero: None, dtype: operand }))
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

/// The codes of a matrix of a quantised checkpoint with inputs `k`, where the views keep the rows of its tensor whole.
fn checkpoint(matrix: Matrix, k: u64) -> Option<Stored> {
    let Source { tensor, packing, view, dtype } = matrix.source;
    let whole = |view: &View| {
        matches!(view, View::Expert | View::Index { .. } | View::ExpertRows { .. } | View::Slice { axis: 0, .. })
    };
    if !view.iter().all(whole) || !matches!(dtype, DType::F32 | DType::Bf16) {
        return None;
    }
    let part = |tensor: &String, packing, dtype, columns| {
        let source = Source { tensor: tensor.clone(), packing, view: view.clone(), dtype };
        Matrix { source, rows: matrix.rows.clone(), columns: vec![columns] }
    };
    let (format, codes, scale) = match packing {
        Packing::Fp8Block { scale, block: [rows, columns] } => {
            let group = columns.clamp(1, k.max(1));
            let format = Codes { bits: 8, number: Number::E4m3, group, zero: false, scale: DType::F32 };
            let factors = Packing::Fp8Factors { of: tensor.clone(), rows: rows.max(1) };
            let codes = part(&tensor, Packing::Fp8Codes, DType::U8, k);
            (format, codes, part(&scale, factors, DType::F32, format.groups(k)))
        }
        Packing::Mxfp4 { scales } => {
            let format = Codes { bits: 4, number: Number::E2m1, group: 32, zero: false, scale: DType::U8 };
            let codes = part(&tensor, Packing::Mxfp4Codes, DType::U8, k / 2);
            (format, codes, part(&scales, Packing::Mxfp4Exponents, DType::U8, k / 32))
        }
        Packing::Plain
        | Packing::Fp8Codes
        | Packing::Fp8Factors { .. }
        | Packing::Mxfp4Codes
        | Packing::Mxfp4Exponents
        | Packing::Composed(_) => return None,
    };
    Some(Stored { format, codes, scale, zero: None, dtype })
}

/// Whether two factors are less than their product.
const fn is_less(n: u64, k: u64, inner: u64) -> bool {
    inner > 0 && inner.saturating_mul(n.saturating_add(k)) < n.saturating_mul(k)
}
