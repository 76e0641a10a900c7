//! Rows of a table.

use crate::{
    Dim, TensorType, Type, WeightName, codes,
    infer::{Cx, OpError, OpResult, arity, fixed},
};
use serde::{Deserialize, Serialize};

/// `%y = gather %ids {w = "tid2eid"}`: rows of a table by integer ids (class tables, hash routing).
/// Ids outside the table are an error at run time; an empty slot of a route, -1, is the last row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gather {
    /// Table; ids index its first axis.
    pub w: WeightName,
}

impl Gather {
    pub(crate) fn infer(&self, cx: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let [ids] = arity(operands)?;
        let mut shape = match ids {
            Type::Tensor(ty) if !ty.dtype.is_float() => ty.shape.clone(),
            Type::Route(route) => vec![route.rows.clone(), Dim::Const(route.slots)],
            Type::Tensor(_) | Type::Plan(_) | Type::Ragged(_) => {
                return Err(OpError::new(codes::KIND, format!("ids must be integers or a route, are {ids}")));
            }
        };
        let table = cx.shape(&self.w)?;
        match table.split_first() {
            Some((_, rows)) => shape.extend(fixed(rows)),
            None => return Err(OpError::new(codes::SHAPE, format!("weight `{}` is a scalar, not a table", self.w))),
        }
        Ok(Type::Tensor(TensorType { dtype: cx.weight(&self.w)?.dtype, shape }))
    }
}
