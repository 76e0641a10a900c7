//! Weight slots: what a kernel reads, from what the graph names.

use super::memory::dtype;
use crate::CodegenError;
use moec_abi::{DType, Layout, Matrix, Packing, Slot, Source, View};
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

/// Element type in which weights of the graph are packed for products.
pub(super) fn packed_type(graph: &Graph, spec: &WeightSpec) -> DType {
    let narrow = spec
        .names()
        .first()
        .and_then(|n| graph.weights.get(*n))
        .is_some_and(|w| w.dtype == moec_ir::DType::Bf16);
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
    match slot(name.to_owned(), [0, 1], vec![matrix], layout, dtype) {
        Some(slot) => Ok(slot),
        None => unsupported(outer, node, format!("weight `{name}` is too large")),
    }
}

/// A slot with the matrices of experts `ids`, as they count inside their bank part.
pub(super) fn bank(
    graph: &Graph,
    node: NodeId,
    outer: &Graph,
    specs: &[(Cow<'_, WeightSpec>, Vec<moec_ir::View>)],
    ids: [u64; 2],
    layout: Layout,
    dtype: DType,
) -> Result<Slot, CodegenError> {
    let mut matrices = Vec::new();
    let mut names = Vec::new();
    for (spec, views) in specs {
        let WeightSpec::Plain(name) = spec.as_ref() else {
            return unsupported(outer, node, "composed weights (`mul`, `base`, `codes`, `slice`, `take`) cannot be compiled yet");
        };
        let mut one = matrix(graph, node, outer, name)?;
        for view in views {
            if let moec_ir::View::Slice { axis: 0, start, len, step } = view {
                one.source.view.push(View::Slice { axis: 0, start: *start, len: *len, step: *step });
                one.rows = vec![*len];
            }
        }
        names.push(name.as_str());
        matrices.push(one);
    }
    match slot(names.join("+"), ids, matrices, layout, dtype) {
        Some(slot) => Ok(slot),
        None => unsupported(outer, node, format!("the matrices {} differ in size", names.join(", "))),
    }
}

fn slot(name: String, ids: [u64; 2], matrices: Vec<Matrix>, layout: Layout, dtype: DType) -> Option<Slot> {
    let mut slot = Slot {
        name,
        experts: ids[1] - ids[0],
        first_expert: ids[0],
        matrices,
        layout,
        dtype,
        bytes: 0,
        offsets: Vec::new(),
    };
    slot.place(1)?;
    Some(slot)
}
