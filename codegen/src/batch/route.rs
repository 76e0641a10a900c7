//! Ops by which rows compete for experts, and counts.
//!
//! Nothing is sorted: whether a row gets a place is a matter of how many rows come before it, and
//! each unit counts them for itself.

use super::{
    cx::{Cx, Slots, c, narrow},
    unsupported,
};
use crate::{
    CodegenError,
    mlir::V,
    rows::{OutputPart, type_of},
};
use moec_ir::{
    Dim, Graph, NodeId, Type,
    ops::{Limit, Priority, SelectRule},
};

/// Units of a capacity limit: experts, or slots where the order of rows is by score.
pub(super) fn claims(body: &Graph, id: NodeId, op: &Limit) -> Result<Dim, CodegenError> {
    let Type::Route(route) = type_of(body, id)? else { return unsupported(body, id, "a route is needed") };
    match op.priority {
        Priority::Position => Ok(Dim::Const(route.experts)),
        Priority::Score => match route.rows.clone().mul(Dim::Const(route.slots)) {
            Some(n) => Ok(n),
            None => unsupported(body, id, "a size exceeds 64 bits"),
        },
    }
}

/// `share * n` rounded up, in f64 as the model's host code does it.
fn share_of<'c>(cx: &Cx<'_, 'c>, share: f64, n: V<'c>) -> V<'c> {
    let b = cx.b;
    let value = format!("{:#018x} : f64", share.to_bits());
    let factor = b.op("arith.constant", &[], "f64", &[("value", &value)]);
    let exact = b.mulf(factor, b.cast("arith.sitofp", n, "f64"));
    let whole = b.cast("arith.fptosi", exact, "i64");
    let below = b.cmpf("olt", b.cast("arith.sitofp", whole, "f64"), exact);
    b.addi(whole, b.cast("arith.extui", below, "i64"))
}

/// Id of slot `at` of a route, i64.
fn id_at<'c>(cx: &Cx<'_, 'c>, route: &Slots<'c>, at: V<'c>) -> V<'c> {
    let b = cx.b;
    b.cast("arith.extsi", b.load(b.gep(route.idx, "i32", at), "i32", 4), "i64")
}

/// Writes slot `at` of the result: as it was, or empty.
fn settle<'c>(cx: &Cx<'_, 'c>, route: &Slots<'c>, at: V<'c>, keep: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let id = b.load(b.gep(route.idx, "i32", at), "i32", 4);
    b.store(b.select(keep, id, b.i32(-1)), b.gep(cx.output(OutputPart::Idx)?, "i32", at), 4);
    if let Some(w) = route.w {
        let weight = b.load(b.gep(w, "f32", at), "f32", 4);
        let weight = b.select(keep, weight, b.f32(0.0));
        b.store(weight, b.gep(cx.output(OutputPart::Weights)?, "f32", at), 4);
    }
    Ok(())
}

/// At most so many rows for each expert.
pub(super) fn limit<'c>(cx: &Cx<'_, 'c>, op: &Limit, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let route = cx.route(0)?;
    let (rows, slots) = (cx.size(&route.ty.rows), b.i64(c(route.ty.slots)));
    let capacity = match (op.fraction, op.capacity) {
        (Some(share), _) => share_of(cx, share, rows),
        (None, capacity) => b.i64(capacity.map_or(i64::MAX, c)),
    };
    if op.priority == Priority::Score {
        return by_score(cx, &route, capacity, unit);
    }
    let mut outcome = Ok(());
    b.for_(b.i64(0), slots, b.i64(1), &[b.i64(0)], |slot, taken| {
        b.for_(b.i64(0), rows, b.i64(1), &[taken[0]], |row, taken| {
            let at = b.addi(b.muli(row, slots), slot);
            let id = id_at(cx, &route, at);
            let mine = b.cmpi("eq", id, unit);
            let keep = b.andi(mine, b.cmpi("slt", taken[0], capacity));
            // Empty slots belong to no expert; the first one carries them over.
            let empty = b.andi(b.cmpi("slt", id, b.i64(0)), b.cmpi("eq", unit, b.i64(0)));
            b.if_(b.ori(mine, empty), || outcome = settle(cx, &route, at, keep));
            vec![b.addi(taken[0], b.cast("arith.extui", keep, "i64"))]
        })
    });
    outcome
}

/// Whether row `a` with score `x` comes before row `d` with score `y`: falling score, NaN last, then position.
fn before<'c>(cx: &Cx<'_, 'c>, (x, a): (V<'c>, V<'c>), (y, d): (V<'c>, V<'c>)) -> V<'c> {
    let b = cx.b;
    let (nan_x, nan_y) = (b.cmpf("uno", x, x), b.cmpf("uno", y, y));
    let above = b.ori(b.cmpf("ogt", x, y), b.andi(b.xori(nan_x, b.bool(true)), nan_y));
    let equal = b.ori(b.cmpf("oeq", x, y), b.andi(nan_x, nan_y));
    b.ori(above, b.andi(equal, b.cmpi("slt", a, d)))
}

/// Slot `unit` stays when fewer than `capacity` claims on its expert come before it.
fn by_score<'c>(cx: &Cx<'_, 'c>, route: &Slots<'c>, capacity: V<'c>, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let scores = cx.array(1)?;
    let (rows, slots) = (cx.size(&route.ty.rows), b.i64(c(route.ty.slots)));
    let first = |row: V<'c>| {
        let id = id_at(cx, route, b.muli(row, slots));
        let at = b.addi(b.mulc(row, c(route.ty.experts)), b.maxsi(id, b.i64(0)));
        b.select(b.cmpi("slt", id, b.i64(0)), b.f32(0.0), cx.float(&scores, at))
    };
    let (row, slot) = (b.divui(unit, slots), b.remui(unit, slots));
    let (own, mine) = (id_at(cx, route, unit), first(row));
    let rank = b.for_(b.i64(0), rows, b.i64(1), &[b.i64(0)], |other, rank| {
        let earlier = before(cx, (first(other), other), (mine, row));
        b.for_(b.i64(0), b.addc(slot, 1), b.i64(1), &[rank[0]], |j, rank| {
            let same = b.cmpi("eq", id_at(cx, route, b.addi(b.muli(other, slots), j)), own);
            let counts = b.ori(b.cmpi("slt", j, slot), earlier);
            vec![b.addi(rank[0], b.cast("arith.extui", b.andi(same, counts), "i64"))]
        })
    })[0];
    let keep = b.andi(b.cmpi("sge", own, b.i64(0)), b.cmpi("slt", rank, capacity));
    settle(cx, route, unit, keep)
}

/// Rows of expert `unit`.
pub(super) fn count<'c>(cx: &Cx<'_, 'c>, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let route = cx.route(0)?;
    let places = b.mulc(cx.size(&route.ty.rows), c(route.ty.slots));
    let total = b.for_(b.i64(0), places, b.i64(1), &[b.i64(0)], |at, sum| {
        let mine = b.cmpi("eq", id_at(cx, &route, at), unit);
        vec![b.addi(sum[0], b.cast("arith.extui", mine, "i64"))]
    })[0];
    cx.put(b.cast("arith.sitofp", total, "f32"), unit)
}

/// The experts that choose row `unit`, by rising id.
pub(super) fn expert_choice<'c>(cx: &Cx<'_, 'c>, rule: &SelectRule, unit: V<'c>) -> Result<(), CodegenError> {
    let b = cx.b;
    let SelectRule::ExpertChoice { capacity, factor } = rule else { return cx.fail("the rule is a row op") };
    let scores = cx.array(0)?;
    let (Some(rows), Type::Route(ty)) = (scores.shape.first().map(|d| cx.size(d)), type_of(cx.body, cx.node)?) else {
        return cx.fail("scores have rows");
    };
    let experts = c(ty.experts);
    let out = cx.output(OutputPart::Idx)?;
    let base = b.mulc(unit, experts);
    let allowed = |score: V<'c>| b.cmpf("ogt", score, b.f32(narrow(f64::NEG_INFINITY)));
    // A row that is forced has a place, but it competes with no other.
    let competes = |score: V<'c>| b.andi(allowed(score), b.cmpf("olt", score, b.f32(narrow(f64::INFINITY))));
    let filled = b.for_(b.i64(0), b.i64(experts), b.i64(1), &[b.i64(0)], |e, filled| {
        let score = |row: V<'c>| cx.float(&scores, b.addi(b.mulc(row, experts), e));
        let own = score(unit);
        let seen = b.for_(b.i64(0), rows, b.i64(1), &[b.i64(0), b.i64(0)], |row, seen| {
            let other = score(row);
            let ahead = b.andi(allowed(other), before(cx, (other, row), (own, unit)));
            let one = |flag: V<'c>| b.cast("arith.extui", flag, "i64");
            vec![b.addi(seen[0], one(ahead)), b.addi(seen[1], one(competes(other)))]
        });
        let places = match (capacity, factor) {
            (Some(n), _) => b.i64(c(*n)),
            (None, share) => share_of(cx, share.unwrap_or(0.0), seen[1]),
        };
        let chosen = b.andi(competes(own), b.cmpi("slt", seen[0], places));
        b.if_(chosen, || {
            let at = b.addi(base, filled[0]);
            b.store(b.cast("arith.trunci", e, "i32"), b.gep(out, "i32", at), 4);
        });
        vec![b.addi(filled[0], b.cast("arith.extui", chosen, "i64"))]
    })[0];
    b.each(filled, b.i64(experts), |slot| b.store(b.i32(-1), b.gep(out, "i32", b.addi(base, slot)), 4));
    Ok(())
}
