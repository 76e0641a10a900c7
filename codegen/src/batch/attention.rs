//! Attention over given queries, keys and values, with a running softmax.
//!
//! A unit is a query and a few outputs: it reads each key that it sees once, and keeps the
//! largest logit, the sum and the outputs in registers.

use super::{
    cx::{Array, Cx, c},
    unsupported,
};
use crate::{
    CodegenError, math,
    mlir::V,
    rows::{InputPart, type_of},
};
use moec_ir::{Dim, Graph, NodeId, Type, ops::Attention};

/// Outputs of a unit: the largest divisor of the width that registers can hold.
fn outputs(n: u64) -> u64 {
    (1..=16).rev().find(|w| n.is_multiple_of(*w)).unwrap_or(1)
}

/// Width of the result, which is known.
fn width(body: &Graph, id: NodeId) -> Result<u64, CodegenError> {
    let last = match type_of(body, id)? {
        Type::Tensor(tensor) => tensor.shape.last().and_then(Dim::known),
        Type::Ragged(ragged) => ragged.row.last().copied(),
        Type::Route(_) | Type::Plan(_) => None,
    };
    match last {
        Some(n) => Ok(n),
        None => unsupported(body, id, "the width of the values depends on the number of tokens"),
    }
}

/// Queries times parts of the output row.
pub(super) fn units(body: &Graph, id: NodeId) -> Result<Dim, CodegenError> {
    let n = width(body, id)?;
    let queries = match type_of(body, id)? {
        Type::Tensor(tensor) => super::lead(body, id, &tensor.shape)?,
        Type::Ragged(ragged) => {
            super::volume(body, id, &[ragged.route.rows.clone(), Dim::Const(ragged.route.slots * ragged.repeat)])?
        }
        Type::Route(_) | Type::Plan(_) => return unsupported(body, id, "a tensor is needed"),
    };
    super::volume(body, id, &[queries, Dim::Const(n / outputs(n).max(1))])
}

/// One query over keys and values of one head.
struct Query<'a, 'b, 'c> {
    cx: &'a Cx<'b, 'c>,
    q: Array<'c>,
    k: Array<'c>,
    v: Array<'c>,
    /// First element of the query.
    start: V<'c>,
    /// Elements of query and keys.
    d: V<'c>,
    scale: V<'c>,
    /// First element of key and value `0`, and elements between neighbours.
    key: (V<'c>, V<'c>),
    value: (V<'c>, V<'c>),
    /// Outputs of the unit.
    outputs: u64,
}

impl<'c> Query<'_, '_, 'c> {
    fn init(&self) -> Vec<V<'c>> {
        let b = self.cx.b;
        let mut state = vec![b.f32(f32::NEG_INFINITY)];
        state.resize_with(self.outputs as usize + 2, || b.f32(0.0));
        state
    }

    /// Takes key `u` into the running sums.
    fn step(&self, u: V<'c>, state: &[V<'c>]) -> Vec<V<'c>> {
        let (cx, b) = (self.cx, self.cx.b);
        let base = b.addi(self.key.0, b.muli(u, self.key.1));
        let dot = b.for_(b.i64(0), self.d, b.i64(1), &[b.f32(0.0)], |i, sum| {
            let (x, y) = (cx.float(&self.q, b.addi(self.start, i)), cx.float(&self.k, b.addi(base, i)));
            vec![b.fma(x, y, sum[0])]
        })[0];
        let logit = b.mulf(dot, self.scale);
        let top = b.maximumf(state[0], logit);
        let (old, new) = (math::exp(b, b.subf(state[0], top)), math::exp(b, b.subf(logit, top)));
        let mut next = vec![top, b.fma(state[1], old, new)];
        let base = b.addi(self.value.0, b.muli(u, self.value.1));
        for (j, sum) in state[2..].iter().enumerate() {
            let value = cx.float(&self.v, b.addc(base, c(j as u64)));
            next.push(b.fma(*sum, old, b.mulf(new, value)));
        }
        next
    }

    /// Takes keys `first..end`.
    fn run(&self, first: V<'c>, end: V<'c>, state: &[V<'c>]) -> Vec<V<'c>> {
        let b = self.cx.b;
        b.for_(first, end, b.i64(1), state, |u, state| self.step(u, state))
    }

    /// Writes the outputs from element `at` on; 0 when no key was seen.
    fn finish(&self, state: &[V<'c>], at: V<'c>) -> Result<(), CodegenError> {
        let b = self.cx.b;
        let none = b.cmpf("oeq", state[1], b.f32(0.0));
        for (j, sum) in state[2..].iter().enumerate() {
            let y = b.select(none, b.f32(0.0), b.divf(*sum, state[1]));
            self.cx.put(y, b.addc(at, c(j as u64)))?;
        }
        Ok(())
    }
}

/// `1 / sqrt(d)`.
fn scale<'c>(cx: &Cx<'_, 'c>, d: V<'c>) -> V<'c> {
    let b = cx.b;
    b.divf(b.f32(1.0), math::sqrt(b, b.cast("arith.sitofp", d, "f32")))
}

pub(super) fn emit<'c>(cx: &Cx<'_, 'c>, op: &Attention, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    if matches!(cx.ty(0)?, Type::Ragged(_)) {
        return per_slot(cx, unit);
    }
    let (q, k, v) = (cx.array(0)?, cx.array(1)?, cx.array(2)?);
    let ([queries, heads, d], Some(keys)) = (&q.shape[..], k.shape.first()) else {
        return cx.fail("queries are [T, heads, d]");
    };
    let (queries, heads, d, keys) = (cx.size(queries), cx.size(heads), cx.size(d), cx.size(keys));
    let n = width(cx.body, cx.node)?;
    let parts = b.i64(c(n / outputs(n).max(1)));
    let (row, part) = (b.divui(unit, parts), b.remui(unit, parts));
    let (t, h) = (b.divui(row, heads), b.remui(row, heads));
    let first = b.mulc(part, c(outputs(n)));
    let query = Query {
        start: b.muli(row, d),
        scale: scale(cx, d),
        key: (b.muli(h, d), b.muli(heads, d)),
        value: (b.addi(b.mulc(h, c(n)), first), b.mulc(heads, c(n))),
        outputs: outputs(n),
        cx,
        q,
        k,
        v,
        d,
    };
    let state = match op.block {
        None => {
            let end = if op.causal { b.minsi(b.addc(t, 1), keys) } else { keys };
            query.run(b.i64(0), end, &query.init())
        }
        Some(block) => {
            let route = cx.route(3)?;
            let slots = c(route.ty.slots);
            let base = b.mulc(b.addi(b.muli(h, queries), t), slots);
            b.for_(b.i64(0), b.i64(slots), b.i64(1), &query.init(), |slot, state| {
                let id = b.load(b.gep(route.idx, "i32", b.addi(base, slot)), "i32", 4);
                let id = b.cast("arith.extsi", id, "i64");
                let empty = b.cmpi("slt", id, b.i64(0));
                let start = b.mulc(b.maxsi(id, b.i64(0)), c(block));
                let end = b.minsi(b.minsi(b.addc(start, c(block)), keys), b.addc(t, 1));
                // Keys outside of the chosen blocks are not read.
                query.run(start, b.select(empty, start, end), state)
            })
        }
    };
    query.finish(&state, b.addi(b.mulc(row, c(n)), first))
}

/// One query for each filled slot, over keys and values that all share.
fn per_slot<'c>(cx: &Cx<'_, 'c>, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let (q, k, v) = (cx.array(0)?, cx.array(1)?, cx.array(2)?);
    let Some(d) = k.shape.last().map(|d| cx.size(d)) else { return cx.fail("keys are [T, d]") };
    let n = width(cx.body, cx.node)?;
    let parts = b.i64(c(n / outputs(n).max(1)));
    let (row, part) = (b.divui(unit, parts), b.remui(unit, parts));
    let first = b.mulc(part, c(outputs(n)));
    let total = b.load(cx.memory(0, InputPart::Offsets)?, "i32", 4);
    let filled = b.cmpi("slt", row, b.cast("arith.extsi", total, "i64"));
    let map = cx.memory(0, InputPart::Map)?;
    let query = Query {
        start: b.muli(row, d),
        scale: scale(cx, d),
        key: (b.i64(0), d),
        value: (first, b.i64(c(n))),
        outputs: outputs(n),
        cx,
        q,
        k,
        v,
        d,
    };
    let mut outcome = Ok(());
    b.if_(filled, || {
        let token = b.cast("arith.extsi", b.load(b.gep(map, "i32", row), "i32", 4), "i64");
        let state = query.run(b.i64(0), b.addc(token, 1), &query.init());
        outcome = query.finish(&state, b.addi(b.mulc(row, c(n)), first));
    });
    outcome
}
