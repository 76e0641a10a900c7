//! Weight slots: what a kernel reads, from what the graph names.

use super::memory::dtype;
use crate::CodegenError;
use moec_abi::{DType, Layout, Matrix, Packing, Recipe, Slot, Source, View};
use moec_ir::{Extent, Graph, NodeId, WeightSpec};
use std::borrow::Cow;

fn unsupported<T>(graph: &Graph, node: NodeId, what: impl Into<String>) -> Result<T, CodegenError> {
    Err(CodegenError::Unsupported { node: graph.node(node).name.clone(), what: what.into() })
}

fn source(source: &moec_ir::Source, ty: moec_ir::DType) -> Source {
    let packing = match &source.packing {
        moec_ir::Packing::Plain => Packing::Plain,
        moec_ir::Packing::Fp8Block { scale, block } => Packing::Fp8Block { scale: scale.clone(), block: *block },
        moec_ir::Packing::Mxfp4 { scales } => Packing::Mxfp4 { scales: scales.clone() },
    };
    let view = source
        .view
        .iter()
        .map(|step| match step {
            moec_ir::View::Expert => View::Expert,
            moec_ir::View::Index { index } => View::Index { index: *index },
            moec_ir::View::ExpertRows { rows } => View::ExpertRows { rows: *rows },
            moec_ir::View::Slice { axis, start, len, step } => {
                View::Slice { axis: *axis, start: *start, len: *len, step: *step }
            }
            moec_ir::View::Transpose => View::Transpose,
            moec_ir::View::Reshape { shape } => View::Reshape { shape: shape.clone() },
        })
        .collect();
    Source { tensor: source.tensor.clone(), packing, view, dtype: dtype(ty) }
}

/// Sizes of an extent as the program lists them: one for all experts, or one each.
fn extent(extent: &Extent) -> Vec<u64> {
    match extent {
        Extent::Fixed(n) => vec![*n],
        Extent::PerExpert(n) => n.clone(),
    }
}

/// A matrix (or vector, as one column) of the graph.
fn matrix(graph: &Graph, node: NodeId, outer: &Graph, name: &str) -> Result<Matrix, CodegenError> {
    let Some(weight) = graph.weights.get(name) else {
        return unsupported(outer, node, format!("weight `{name}` is not declared"));
    };
    let (rows, columns) = match weight.shape.as_slice() {
        [] => (vec![1], vec![1]),
        [n] => (extent(n), vec![1]),
        [rows, columns] => (extent(rows), extent(columns)),
        more => {
            let total = more.iter().map(Extent::max).product::<u64>();
            let last = more.last().map_or(1, Extent::max);
            (vec![total / last.max(1)], vec![last])
        }
    };
    Ok(Matrix { source: source(&weight.source, weight.dtype), rows, columns })
}

/// The value of a weight specification, sizes by the expert's number.
pub(super) fn of_spec(graph: &Graph, node: NodeId, outer: &Graph, spec: &WeightSpec) -> Result<Matrix, CodegenError> {
    let part = |name: &str| matrix(graph, node, outer, name);
    let composed = |recipe: Recipe, rows: Vec<u64>, columns: Vec<u64>| {
        let tensor = spec.names().first().map_or_else(String::new, |n| (*n).clone());
        let packing = Packing::Composed(Box::new(recipe));
        let source = Source { tensor, packing, view: Vec::new(), dtype: DType::F32 };
        Matrix { source, rows, columns }
    };
    Ok(match spec {
        WeightSpec::Plain(name) => part(name)?,
        WeightSpec::Mul { mul: [a, b], group } => {
            let (left, right) = (part(a)?, part(b)?);
            // Sizes of a factor of the group are those of the expert's group.
            let sizes = |name: &str, sizes: &[u64]| match sizes {
                [one] => vec![*one],
                each => {
                    let entry = |(e, g): (u64, &u64)| usize::try_from(WeightSpec::entry(name, e, *g)).ok();
                    let of = |at| entry(at).and_then(|at| each.get(at)).copied().unwrap_or(0);
                    (0..).zip(group).map(of).collect()
                }
            };
            let (rows, columns) = (sizes(a, &left.rows), sizes(b, &right.columns));
            composed(Recipe::Product { left, right, groups: group.clone() }, rows, columns)
        }
        WeightSpec::Base { base, a, b, scale } => {
            let base = part(base)?;
            let (rows, columns) = (base.rows.clone(), base.columns.clone());
            composed(Recipe::Adapted { base, a: part(a)?, b: part(b)?, scale: scale.to_bits() }, rows, columns)
        }
        WeightSpec::Grouped { codes, scale, zero, group_size, .. } => {
            let codes = part(codes)?;
            let (rows, columns) = (codes.rows.clone(), codes.columns.clone());
            let (scale, zero) = (part(scale)?, part(zero)?);
            composed(Recipe::Grouped { codes, scale, zero, group_size: *group_size }, rows, columns)
        }
        WeightSpec::Ternary { codes, scale } => {
            let vector = graph.weights.get(scale).is_some_and(|w| w.shape.len() == 1);
            let (codes, mut scale) = (part(codes)?, part(scale)?);
            if vector {
                // Aligned at the last axis.
                std::mem::swap(&mut scale.rows, &mut scale.columns);
            }
            let (rows, columns) = (codes.rows.clone(), codes.columns.clone());
            composed(Recipe::Scaled { codes, scale }, rows, columns)
        }
        WeightSpec::Slice { slice, axis, n } => {
            let mut dense = part(slice)?;
            let sizes = if *axis == 0 { &mut dense.rows } else { &mut dense.columns };
            sizes.iter_mut().for_each(|size| *size /= (*n).max(1));
            let view = View::ExpertRows { rows: sizes.first().copied().unwrap_or(0) };
            let views = &mut dense.source.view;
            if *axis == 0 {
                views.push(view);
            } else {
                views.extend([View::Transpose, view, View::Transpose]);
            }
            dense
        }
        WeightSpec::Take { take, ids, axis } => {
            let (dense, ids) = (part(take)?, part(ids)?);
            let (mut rows, mut columns) = (dense.rows.clone(), dense.columns.clone());
            if *axis == 0 {
                rows.clone_from(&ids.rows);
            } else {
                columns.clone_from(&ids.rows);
            }
            composed(Recipe::Take { dense, ids, axis: *axis }, rows, columns)
        }
    })
}

/// Rows and columns, if they are the same for all these experts.
pub(super) fn uniform(matrix: &Matrix, numbers: &[u64]) -> Option<(u64, u64)> {
    let mut sizes = numbers.iter().map(|e| matrix.size_of(*e));
    let first = sizes.next()??;
    sizes.all(|size| size == Some(first)).then_some(first)
}

/// Values of a matrix or vector of a slot.
#[derive(Clone, Debug)]
pub(super) enum Values<'g> {
    /// A weight, with further views.
    Of(Cow<'g, WeightSpec>, Vec<moec_ir::View>),
    /// A matrix of the program.
    Matrix(Matrix),
    /// So many zeros.
    Zeros(u64),
}

/// Zeros in place of a vector.
fn zeros(n: u64) -> Matrix {
    let packing = Packing::Composed(Box::new(Recipe::Zero { shape: [n, 1] }));
    let source = Source { tensor: "zero".to_owned(), packing, view: Vec::new(), dtype: DType::F32 };
    Matrix { source, rows: vec![n], columns: vec![1] }
}

/// Element type in which weights of the graph are packed for products.
pub(super) fn packed_type(graph: &Graph, spec: &WeightSpec) -> DType {
    // Composed values are computed, so that they need the full type.
    let narrow = matches!(spec, WeightSpec::Plain(_) | WeightSpec::Slice { .. } | WeightSpec::Take { .. })
        && spec.names().first().and_then(|n| graph.weights.get(*n)).is_some_and(|w| w.dtype == moec_ir::DType::Bf16);
    if narrow { DType::Bf16 } else { DType::F32 }
}

/// A slot with one weight that is not per expert.
pub(super) fn whole(
    graph: &Graph,
    node: NodeId,
    outer: &Graph,
    name: &str,
    layout: Layout,
    dtype: DType,
) -> Result<Slot, CodegenError> {
    let matrix = matrix(graph, node, outer, name)?;
    match slot(name.to_owned(), &[0], vec![matrix], layout, dtype) {
        Some(slot) => Ok(slot),
        None => unsupported(outer, node, format!("weight `{name}` is too large")),
    }
}

/// A slot with the matrices of these experts, by their numbers in weight names.
pub(super) fn bank(
    graph: &Graph,
    node: NodeId,
    outer: &Graph,
    specs: &[Values<'_>],
    numbers: &[u64],
    layout: Layout,
    dtype: DType,
) -> Result<Slot, CodegenError> {
    let mut matrices = Vec::new();
    let mut names = Vec::new();
    for values in specs {
        let (spec, views) = match values {
            Values::Of(spec, views) => (spec, views),
            Values::Matrix(matrix) => {
                let (rows, columns) = uniform(matrix, numbers).map_or_else(
                    || unsupported(outer, node, "experts of one part differ in size; split the part"),
                    Ok,
                )?;
                names.push(matrix.source.tensor.as_str());
                matrices.push(Matrix { rows: vec![rows], columns: vec![columns], ..matrix.clone() });
                continue;
            }
            Values::Zeros(n) => {
                names.push("zero");
                matrices.push(zeros(*n));
                continue;
            }
        };
        let mut one = of_spec(graph, node, outer, spec)?;
        let (rows, columns) = uniform(&one, numbers)
            .map_or_else(|| unsupported(outer, node, "experts of one part differ in size; split the part"), Ok)?;
        (one.rows, one.columns) = (vec![rows], vec![columns]);
        for view in views {
            if let moec_ir::View::Slice { axis: 0, start, len, step } = view {
                one.source.view.push(View::Slice { axis: 0, start: *start, len: *len, step: *step });
                one.rows = vec![*len];
            }
        }
        names.push(spec.names().first().map_or("", |n| n.as_str()));
        matrices.push(one);
    }
    match slot(names.join("+"), numbers, matrices, layout, dtype) {
        Some(slot) => Ok(slot),
        None => unsupported(outer, node, format!("the matrices {} differ in size", names.join(", "))),
    }
}

fn slot(name: String, numbers: &[u64], matrices: Vec<Matrix>, layout: Layout, dtype: DType) -> Option<Slot> {
    let first_expert = numbers.first().copied().unwrap_or(0);
    let consecutive = numbers.iter().zip(first_expert..).all(|(number, e)| *number == e);
    let mut slot = Slot {
        name,
        experts: numbers.len() as u64,
        first_expert,
        numbers: if consecutive { Vec::new() } else { numbers.to_vec() },
        matrices,
        layout,
        dtype,
        bytes: 0,
        offsets: Vec::new(),
    };
    slot.place(1)?;
    Some(slot)
}
