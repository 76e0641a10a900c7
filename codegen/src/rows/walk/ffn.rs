//! Products and small networks inside a row.

use super::{Walker, narrow};
use crate::{
    CodegenError,
    rows::{linear, tensor, value::Row},
};
use moec_ir::{
    NodeId, WeightName, WeightSpec,
    ops::{BinaryFn, Ffn, LimitOn, UnaryFn},
};

impl<'c> Walker<'_, 'c> {
    /// `x W^T + b`.
    pub(super) fn product(
        &self,
        id: NodeId,
        row: &Row<'c>,
        w: &str,
        b: Option<&WeightName>,
    ) -> Result<Row<'c>, CodegenError> {
        let y = linear::linear(self.x, row, self.matrix(id, w)?);
        Ok(match self.optional(id, b)? {
            Some(bias) => tensor::binary(&y, &bias, BinaryFn::Add),
            None => y,
        })
    }

    /// A small feed-forward network, such as the router of a denoiser.
    pub(super) fn ffn(&self, id: NodeId, op: &Ffn) -> Result<Row<'c>, CodegenError> {
        let plain = |spec: &WeightSpec| match spec {
            WeightSpec::Plain(name) => Ok(name.clone()),
            WeightSpec::Mul { .. }
            | WeightSpec::Base { .. }
            | WeightSpec::Grouped { .. }
            | WeightSpec::Ternary { .. }
            | WeightSpec::Slice { .. }
            | WeightSpec::Take { .. } => self.fail(id, "a composed weight needs a grouped product"),
        };
        let optional = |spec: &Option<WeightSpec>| spec.as_ref().map(plain).transpose();
        if op.a8 {
            return self.fail(id, "int8 activations need a grouped product");
        }
        let input = self.row(id, 0)?;
        let up = self.product(id, &input, &plain(&op.up)?, optional(&op.up_bias)?.as_ref())?;
        let act = op.act.unwrap_or(UnaryFn::Identity);
        let halves = match optional(&op.gate)? {
            Some(gate) => Some((up.clone(), self.product(id, &input, &gate, optional(&op.gate_bias)?.as_ref())?)),
            None if op.packed => {
                let n = up.shape.last().copied().unwrap_or(0) / 2;
                let axis = up.shape.len() - 1;
                let both = up.clone().stored(self.x);
                let half = |at: u64| tensor::slice(&both, axis, [i64::try_from(at).unwrap_or(i64::MAX), 1], n);
                Some((half(0), half(n)))
            }
            None => None,
        };
        let hidden = match halves {
            Some((value, gate)) => gated(op, act, value, gate),
            None => tensor::unary(&up, act),
        };
        match optional(&op.down)? {
            Some(down) => self.product(id, &hidden, &down, optional(&op.down_bias)?.as_ref()),
            None => Ok(hidden),
        }
    }
}

/// `act(gate) * (value + up_add)` with the clamps.
pub(super) fn gated<'c>(op: &Ffn, act: UnaryFn, value: Row<'c>, gate: Row<'c>) -> Row<'c> {
    let constant = |v: f64| tensor::constant(narrow(v));
    let clamp = |row: Row<'c>, on: LimitOn| match op.limit {
        Some(limit) if op.limit_on == on => tensor::binary(&row, &constant(limit), BinaryFn::Min),
        Some(_) | None => row,
    };
    let gate = clamp(gate, LimitOn::Gate);
    let gate = match op.alpha {
        Some(alpha) => {
            let scaled = tensor::binary(&gate, &constant(alpha), BinaryFn::Mul);
            tensor::binary(&gate, &tensor::unary(&scaled, UnaryFn::Sigmoid), BinaryFn::Mul)
        }
        None => tensor::unary(&gate, act),
    };
    let gate = clamp(gate, LimitOn::Act);
    let value = match op.limit {
        Some(limit) => {
            let above = tensor::binary(&value, &constant(limit), BinaryFn::Min);
            tensor::binary(&above, &constant(-limit), BinaryFn::Max)
        }
        None => value,
    };
    let value = if op.up_add == 0.0 { value } else { tensor::binary(&value, &constant(op.up_add), BinaryFn::Add) };
    tensor::binary(&gate, &value, BinaryFn::Mul)
}
