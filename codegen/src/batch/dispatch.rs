//! Dispatches that no product fuses: rows are copied into sorted order.

use super::{
    cx::{Cx, c},
    unsupported,
};
use crate::{
    CodegenError,
    mlir::V,
    rows::{InputPart, type_of},
};
use moec_ir::{Dim, Graph, NodeId, Op, Type, ops::Dispatch};

/// Whether the op multiplies rows by their weights.
pub(super) fn is_weighted(body: &Graph, id: NodeId) -> bool {
    matches!(&body.node(id).op, Op::Dispatch(op) if op.weighted)
}

/// Elements of the most rows that there can be.
pub(super) fn units(body: &Graph, id: NodeId) -> Result<Dim, CodegenError> {
    let Type::Ragged(ragged) = type_of(body, id)? else { return unsupported(body, id, "gives no rows") };
    let width = ragged.row.iter().product();
    let slots = Dim::Const(ragged.route.slots * ragged.repeat);
    super::volume(body, id, &[ragged.route.rows.clone(), slots, Dim::Const(width)])
}

/// Element `unit` of the sorted rows.
pub(super) fn emit<'c>(cx: &Cx<'_, 'c>, op: &Dispatch, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let x = cx.array(0)?;
    let Type::Ragged(ragged) = type_of(cx.body, cx.node)? else { return cx.fail("gives no rows") };
    let width = c(ragged.row.iter().product());
    let (row, column) = (b.divui(unit, b.i64(width)), b.remui(unit, b.i64(width)));
    let total = b.load(cx.memory(1, InputPart::Offsets)?, "i32", 4);
    let map = cx.memory(1, InputPart::Map)?;
    let scale = if op.weighted { Some(cx.memory(1, InputPart::Scale)?) } else { None };
    let mut outcome = Ok(());
    b.if_(b.cmpi("slt", row, b.cast("arith.extsi", total, "i64")), || {
        let token = b.cast("arith.extsi", b.load(b.gep(map, "i32", row), "i32", 4), "i64");
        let value = cx.float(&x, b.addi(b.mulc(token, width), column));
        let value = scale.map_or(value, |s| b.mulf(value, b.load(b.gep(s, "f32", row), "f32", 4)));
        outcome = cx.put(value, unit);
    });
    outcome
}
