//! A value that the caller passes in.

use crate::{
    TensorType, Type,
    infer::{Cx, OpResult, arity},
};
use serde::{Deserialize, Serialize};

/// `%x = input {name = "x", type = f32[T, 64]}`
///
/// Inputs called `state_<n>_in` pair with an output `state_<n>`: mutable buffers that the caller keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Name in the interface.
    pub name: String,
    /// Type of the value.
    #[serde(rename = "type")]
    pub ty: TensorType,
}

impl Input {
    /// The stated type. In a kernel body the operand decides instead.
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [] = arity(operands)?;
        Ok(Type::Tensor(self.ty.clone()))
    }
}
