//! The reference: the interpreter of the IR on the weights of a run.

use crate::Error;
use indexmap::IndexMap;
use moec_abi::DType;
use moec_check::compare::floats;
use moec_frontend::weights::{RawTensor, ReadError, materialize};
use moec_ir::{
    Graph, Packing, View, Weight, WeightName,
    interp::{self, Array, InterpError, WeightIndex, Weights},
};
use moec_runtime::Tensors;

/// A tensor of a call, as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Name in the interface.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Elements, little-endian.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// The elements as numbers.
    pub fn numbers(&self) -> Vec<f64> {
        floats(self.dtype, &self.bytes)
    }

    /// Whether the elements are ids rather than numbers.
    pub const fn dtype_is_id(&self) -> bool {
        match self.dtype {
            DType::U8 | DType::I8 | DType::I32 | DType::I64 => true,
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => false,
        }
    }
}

/// Weights of one layer for the interpreter: read when they are asked for, so that experts without tokens cost
/// nothing.
pub(crate) struct Stored<'a> {
    pub(crate) tensors: &'a dyn Tensors,
    pub(crate) prefix: &'a str,
}

const fn stored_type(dtype: DType) -> moec_ir::DType {
    match dtype {
        DType::F64 => moec_ir::DType::F64,
        DType::F32 => moec_ir::DType::F32,
        DType::Bf16 => moec_ir::DType::Bf16,
        DType::F16 => moec_ir::DType::F16,
        DType::F8e4m3 => moec_ir::DType::F8e4m3,
        DType::F8e5m2 => moec_ir::DType::F8e5m2,
        DType::U8 => moec_ir::DType::U8,
        DType::I8 => moec_ir::DType::I8,
        DType::I32 => moec_ir::DType::I32,
        DType::I64 => moec_ir::DType::I64,
    }
}

impl Stored<'_> {
    /// A tensor, or the entry of its first axis that `expert` names.
    fn raw(&self, name: &str, expert: Option<u64>) -> Result<RawTensor, ReadError> {
        let view = self.tensors.find(name).ok_or_else(|| ReadError::Missing(name.to_owned()))?;
        let wrong = |message: String| ReadError::Shape { tensor: name.to_owned(), message };
        let (start, end, shape) = match (expert, view.shape.split_first()) {
            (Some(e), Some((count, rest))) if e < *count => {
                let each = view.bytes() / count;
                (e * each, (e + 1) * each, rest.to_vec())
            }
            (Some(e), _) => return Err(wrong(format!("shape {:?} has no expert {e}", view.shape))),
            (None, _) => (0, view.bytes(), view.shape.clone()),
        };
        let bytes = view.read(start, end).map_err(|e| wrong(e.message))?.into_vec();
        Ok(RawTensor { dtype: stored_type(view.dtype), shape, bytes })
    }
}

impl Weights for Stored<'_> {
    fn get(&self, name: &WeightName, weight: &Weight, index: WeightIndex) -> Result<Array, InterpError> {
        // A stacked tensor is cut before it is decoded: it may hold many gigabytes.
        let tiled = match weight.source.packing {
            Packing::Plain | Packing::Mxfp4 { .. } => false,
            Packing::Fp8Block { .. } => true,
        };
        let cut = (weight.source.view.first() == Some(&View::Expert) && !tiled).then(|| index.expert.unwrap_or(0));
        let mut weight = weight.clone();
        if cut.is_some() {
            weight.source.view.remove(0);
        }
        materialize(&weight, index, self.prefix, &|tensor| self.raw(tensor, cut))
            .map_err(|error| InterpError::Weight { name: name.clone(), message: error.to_string() })
    }
}

/// Results of `graph` by name, in 64-bit arithmetic with the roundings of the model.
pub(crate) fn interpret(
    graph: &Graph,
    inputs: &[Tensor],
    weights: &Stored<'_>,
) -> Result<IndexMap<String, Array>, Error> {
    // A rounding that the model asks for is part of its meaning: logits of 20 in bf16 move a weight by percents.
    let options = interp::Options { rounding: interp::Rounding::Model, trace: None };
    interp::interpret(graph, &arrays(inputs), weights, options)
        .map_err(|e| Error::refused("E0821", format!("the reference cannot be computed: {e}"), "check the weights"))
}

/// Inputs for the interpreter, by name.
pub(crate) fn arrays(inputs: &[Tensor]) -> IndexMap<String, Array> {
    inputs
        .iter()
        .map(|t| {
            let shape = t.shape.iter().map(|n| usize::try_from(*n).unwrap_or(usize::MAX)).collect();
            #[expect(clippy::cast_possible_truncation, reason = "ids were integers")]
            let array = match t.dtype {
                DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => {
                    Array::f64(shape, t.numbers())
                }
                DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
                    Array::i64(shape, t.numbers().into_iter().map(|v| v as i64).collect())
                }
            };
            (t.name.clone(), array)
        })
        .collect()
}
