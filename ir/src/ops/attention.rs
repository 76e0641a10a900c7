//! Attention with given queries, keys and values.

use super::{is_yes, yes};
use crate::{
    RaggedType, TensorType, Type, codes,
    infer::{Cx, OpError, OpResult, arity, sizes, want_known, want_route, want_tensor},
};
use serde::{Deserialize, Serialize};

/// `%o = attention %q, %k, %v`: `softmax(q k^T / sqrt d) v`, `q` is `[T, h, d]`.
///
/// With `block` there is a fourth operand, a route with rows `head*T + t` that lists the key
/// blocks to read; always causal inside. A ragged `q` (one head per slot) shares `k`, `v` `[T, d]`
/// and is always causal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// A token sees no later token.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub causal: bool,
    /// Keys in a block, when a route selects blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<u64>,
}

impl Attention {
    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        if let Some(Type::Ragged(q)) = operands.first() {
            return self.infer_ragged(q, operands);
        }
        let (q, k, v, blocks) = if self.block.is_some() {
            let [q, k, v, blocks] = arity(operands)?;
            (q, k, v, Some(want_route(blocks, "the fourth operand")?))
        } else {
            let [q, k, v] = arity(operands)?;
            (q, k, v, None)
        };
        let q = want_tensor(q, "the query")?;
        let [k, v] = [&want_tensor(k, "the keys")?.shape, &want_tensor(v, "the values")?.shape];
        let misfit = || {
            let text = format!("q {}, k {}, v {} do not fit", sizes(&q.shape), sizes(k), sizes(v));
            OpError::new(codes::SHAPE, text).help("q is [T, heads, d], k [T, heads, d], v [T, heads, n]")
        };
        let ([tq, hq, dq], [tk, hk, dk], [tv, hv, dv]) = (q.shape.as_slice(), k.as_slice(), v.as_slice()) else {
            return Err(misfit());
        };
        let crossed = !self.causal && blocks.is_none();
        if hq != hk || hk != hv || dq != dk || tk != tv || (tq != tk && !crossed) {
            return Err(misfit());
        }
        if let (Some(route), Some(block)) = (blocks, self.block) {
            if !self.causal {
                return Err(OpError::new(codes::ATTRIBUTE, "attention over chosen blocks is always causal"));
            }
            if block == 0 {
                return Err(OpError::new(codes::VALUE, "`block` is 0, at least one key is needed"));
            }
            if hq.clone().mul(tq.clone()).as_ref() != Some(&route.rows) {
                let text = format!("the route has {} rows, heads * T is {hq} * {tq}", route.rows);
                return Err(OpError::new(codes::SHAPE, text));
            }
        }
        let shape = vec![tq.clone(), hq.clone(), dv.clone()];
        Ok(Type::Tensor(TensorType { dtype: q.dtype, shape }))
    }

    /// One query head per slot; keys and values are shared.
    fn infer_ragged(&self, q: &RaggedType, operands: &[&Type]) -> OpResult<Type> {
        let [_, k, v] = arity(operands)?;
        let [k, v] = [&want_tensor(k, "the keys")?.shape, &want_tensor(v, "the values")?.shape];
        let ([_, dk], [_, dv]) = (k.as_slice(), v.as_slice()) else {
            return Err(OpError::new(
                codes::SHAPE,
                format!("keys {} and values {} must be [T, d]", sizes(k), sizes(v)),
            ));
        };
        let rows = q.route.rows.clone().mul(q.repeat.into()).ok_or_else(crate::infer::overflow)?;
        if k.first() != v.first() || k.first() != Some(&rows) {
            let text = format!("keys {} and values {} must have the {rows} rows of the query", sizes(k), sizes(v));
            return Err(OpError::new(codes::SHAPE, text));
        }
        if q.row != [want_known(dk, "the keys")?] {
            let text = format!("a query of {} meets keys of {dk}", crate::infer::numbers(&q.row));
            return Err(OpError::new(codes::SHAPE, text));
        }
        if !self.causal || self.block.is_some() {
            return Err(OpError::new(codes::ATTRIBUTE, "a query per slot is always causal and reads no blocks"));
        }
        Ok(Type::Ragged(RaggedType { row: vec![want_known(dv, "the values")?], ..q.clone() }))
    }
}
