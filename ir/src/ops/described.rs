//! Parts of a model that are described, not compiled.

use super::is_default;
use crate::{
    DType, Dim, TensorType, Type,
    infer::{Cx, OpResult, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%y = described %x {kind = "attention", ..}`: a layer that is not compiled, with its costs.
///
/// Stands in the graph of a whole model, so that planning sees attention, norms, dense FFNs and embeddings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Described {
    /// What it is.
    pub kind: DescribedKind,
    /// Layer of the model, from 0; absent for embeddings and heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<u64>,
    /// Width of the result.
    pub width: u64,
    /// Number of weights.
    pub parameters: u64,
    /// Multiply-adds per token, times two, without the part that grows with the sequence.
    pub flops_per_token: u64,
    /// Bytes of key-value cache per token.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cache_bytes_per_token: u64,
    /// Form of the mixture layer, for kind `moe`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<u64>,
}

/// Kinds of described layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DescribedKind {
    /// Token embedding.
    Embedding,
    /// Any sequence mixer: attention, state space, convolution.
    Attention,
    /// Normalisation.
    Norm,
    /// Dense feed-forward network.
    DenseFfn,
    /// A mixture layer, compiled from its own graph.
    Moe,
    /// Output head.
    Head,
}

impl Described {
    /// Rows of the first operand (`T` without operands), `width` columns.
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let (mut rows, mut dtype) = (Dim::Tokens, DType::F32);
        if let Some(x) = operands.first() {
            let x = want_tensor(x, "the first operand")?;
            rows = x.shape.first().cloned().unwrap_or(Dim::Const(1));
            dtype = if x.dtype.is_float() { x.dtype } else { DType::F32 };
        }
        Ok(Type::Tensor(TensorType { dtype, shape: vec![rows, Dim::Const(self.width)] }))
    }
}
