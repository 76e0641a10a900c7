//! Tensor ops of a row kernel.

use super::{
    exec::{Exec, Fold, Ix},
    value::Row,
};
use crate::{
    math,
    mlir::{Builder, V},
};
use moec_ir::ops::{BinaryFn, NormKind, ReduceFn, UnaryFn};
use std::{cell::Cell, rc::Rc};

/// Position in a broadcast operand that belongs to position `ix` of a result with `shape`.
///
/// Both shapes are aligned at the end; sizes of 1 repeat.
fn broadcast_index<'c>(b: &Builder<'c>, at: V<'c>, shape: &[u64], operand: &[u64]) -> V<'c> {
    let c = |n: u64| b.i64(i64::try_from(n).unwrap_or(i64::MAX));
    let mut index = b.i64(0);
    let (mut below, mut stride) = (1u64, 1u64);
    for (axis, size) in shape.iter().rev().enumerate() {
        let own = operand.iter().rev().nth(axis).copied().unwrap_or(1);
        if own > 1 {
            let coordinate = b.remui(b.divui(at, c(below)), c(*size));
            index = b.addi(index, b.muli(coordinate, c(stride)));
            stride *= own;
        }
        below *= *size;
    }
    index
}

/// The shape of two rows broadcast against each other.
fn broadcast(a: &[u64], b: &[u64]) -> Vec<u64> {
    let rank = a.len().max(b.len());
    (0..rank)
        .map(|i| {
            let size = |s: &[u64]| (i + s.len()).checked_sub(rank).map_or(1, |j| s[j]);
            size(a).max(size(b))
        })
        .collect()
}

/// The operand, numbers, as seen from a result of this shape.
pub(crate) fn spread<'c>(row: &Row<'c>, shape: &[u64]) -> Row<'c> {
    let total: u64 = shape.iter().product();
    if row.len() == total {
        return row.clone().reshaped(shape.to_vec());
    }
    let (inner, own, to) = (row.clone(), row.shape.clone(), shape.to_vec());
    if row.len() == 1 {
        return Row::new(to, true, move |x, ix| {
            let one = inner.scalar(x, x.b.i64(0));
            if ix.width == 1 { one } else { x.b.splat(one, &format!("vector<{}xf32>", ix.width)) }
        })
        .after(&[row]);
    }
    Row::new(to.clone(), false, move |x, ix| {
        let at = broadcast_index(x.b, ix.at, &to, &own);
        inner.scalar(x, at)
    })
    .after(&[row])
}

/// One function of every element.
pub(crate) fn unary<'c>(row: &Row<'c>, function: UnaryFn) -> Row<'c> {
    let inner = row.clone();
    Row::new(row.shape.clone(), row.vector, move |x, ix| math::unary(x.b, function, inner.get(x, ix))).after(&[row])
}

/// One function of every pair of elements, with broadcasting.
pub(crate) fn binary<'c>(left: &Row<'c>, right: &Row<'c>, function: BinaryFn) -> Row<'c> {
    let shape = broadcast(&left.shape, &right.shape);
    let (l, r) = (spread(left, &shape), spread(right, &shape));
    let vector = l.vector && r.vector;
    Row::new(shape, vector, move |x, ix| math::binary(x.b, function, l.get(x, ix), r.get(x, ix))).after(&[left, right])
}

/// The same number everywhere.
pub(crate) fn constant<'c>(value: f32) -> Row<'c> {
    Row::new(Vec::new(), true, move |x, ix| if ix.width == 1 { x.b.f32(value) } else { x.b.f32s(value, ix.width) })
        .cheap()
}

/// Values rounded to a narrower type and back.
pub(crate) fn rounded<'c>(row: &Row<'c>, ty: moec_ir::DType) -> Row<'c> {
    let inner = row.clone();
    Row::new(row.shape.clone(), row.vector, move |x, ix| x.round(inner.get(x, ix), ty, ix.width)).after(&[row])
}

/// Applies `each` to every group of the last axis: it gets the base position of the group.
///
/// Rows of rank 1 (the usual case) have a single group at 0.
fn groups<'c>(x: &Exec<'_, 'c>, shape: &[u64], each: impl Fn(V<'c>)) {
    let last = shape.last().copied().unwrap_or(1);
    let total: u64 = shape.iter().product();
    if total == last {
        each(x.b.i64(0));
    } else {
        x.repeat(total / last.max(1), |g| each(x.b.mulc(g, i64::try_from(last).unwrap_or(i64::MAX))));
    }
}

fn offset<'c>(b: &Builder<'c>, ix: Ix<'c>, base: V<'c>) -> Ix<'c> {
    Ix { at: b.addi(ix.at, base), width: ix.width }
}

fn splat<'c>(b: &Builder<'c>, value: V<'c>, width: usize) -> V<'c> {
    if width == 1 { value } else { b.splat(value, &format!("vector<{width}xf32>")) }
}

/// Softmax of the last axis.
pub(crate) fn softmax<'c>(x: &Exec<'_, 'c>, row: &Row<'c>, temperature: f32) -> Row<'c> {
    let row = row.clone().stored(x);
    let n = row.shape.last().copied().unwrap_or(1);
    let result = x.alloc(row.len() * 4);
    x.each_row(|| {
        groups(x, &row.shape, |base| {
            let b = x.b;
            let scaled = |ix: Ix<'c>| {
                let v = row.get(x, offset(b, ix, base));
                if temperature.to_bits() == 1f32.to_bits() { v } else { b.divf(v, math::constant(b, v, temperature)) }
            };
            let top = x.fold(n, row.vector, Fold::Max, scaled);
            x.each(n, row.vector, |ix| {
                let e = math::exp(b, b.subf(scaled(ix), splat(b, top, ix.width)));
                x.store(e, x.at(result), moec_abi::DType::F32, offset(b, ix, base));
            });
            let kept = |ix: Ix<'c>| x.load(x.at(result), moec_abi::DType::F32, offset(b, ix, base));
            let sum = x.fold(n, true, Fold::Sum, kept);
            x.each(n, true, |ix| {
                let p = b.divf(kept(ix), splat(b, sum, ix.width));
                x.store(p, x.at(result), moec_abi::DType::F32, offset(b, ix, base));
            });
        });
    });
    Row::from_scratch(result, row.shape)
}

/// Normalisation of the last axis; `w`, `b`, `mean`, `var` are rows of its length.
pub(crate) fn norm<'c>(
    x: &Exec<'_, 'c>,
    row: &Row<'c>,
    kind: NormKind,
    eps: f32,
    weights: [Option<Row<'c>>; 4],
) -> Row<'c> {
    let [w, bias, mean, var] = weights;
    let affine = |y: Row<'c>| {
        let y = w.as_ref().map_or(y.clone(), |w| binary(&y, w, BinaryFn::Mul));
        bias.as_ref().map_or(y.clone(), |b| binary(&y, b, BinaryFn::Add))
    };
    if kind == NormKind::Batch {
        let centred = mean.as_ref().map_or(row.clone(), |m| binary(row, m, BinaryFn::Sub));
        let deviation = var.as_ref().map(|v| unary(&binary(v, &constant(eps), BinaryFn::Add), UnaryFn::Sqrt));
        return deviation.map_or(centred.clone(), |d| binary(&centred, &d, BinaryFn::Div));
    }
    let row = row.clone().stored(x);
    let n = row.shape.last().copied().unwrap_or(1);
    let groups_count = (row.len() / n.max(1)).max(1);
    // Per group: the offset that is subtracted and the divisor.
    let statistics = x.alloc(groups_count * 8);
    x.each_row(|| {
        groups(x, &row.shape, |base| {
            let b = x.b;
            let count = b.f32(precise(n));
            let centre = if kind == NormKind::Layer {
                b.divf(x.fold(n, row.vector, Fold::Sum, |ix| row.get(x, offset(b, ix, base))), count)
            } else {
                b.f32(0.0)
            };
            let squares = x.fold(n, row.vector, Fold::Sum, |ix| {
                let d = b.subf(row.get(x, offset(b, ix, base)), splat(b, centre, ix.width));
                b.mulf(d, d)
            });
            let divisor = if kind == NormKind::L2 {
                let length = math::sqrt(b, squares);
                let floor = b.f32(1e-12);
                b.select(b.cmpf("olt", length, floor), floor, length)
            } else {
                math::sqrt(b, b.addf(b.divf(squares, count), b.f32(eps)))
            };
            let group = b.divui(base, b.i64(i64::try_from(n.max(1)).unwrap_or(i64::MAX)));
            x.single(|| {
                let at = b.gep(x.at(statistics), "f32", b.mulc(group, 2));
                b.store(centre, at, 4);
                b.store(divisor, b.gepc(at, "f32", 1), 4);
            });
        });
    });
    let (inner, single) = (row.clone(), groups_count == 1);
    let normalised = Row::new(row.shape.clone(), row.vector && single, move |x, ix| {
        let b = x.b;
        let group = if single { b.i64(0) } else { b.divui(ix.at, b.i64(i64::try_from(n.max(1)).unwrap_or(i64::MAX))) };
        let at = b.gep(x.at(statistics), "f32", b.mulc(group, 2));
        let (centre, divisor) = (b.load(at, "f32", 4), b.load(b.gepc(at, "f32", 1), "f32", 4));
        b.divf(b.subf(inner.get(x, ix), splat(b, centre, ix.width)), splat(b, divisor, ix.width))
    })
    .after(&[&row]);
    affine(normalised)
}

/// `n` as f32; widths are far below 2^24.
#[expect(clippy::cast_precision_loss, reason = "row widths are below 2^24")]
fn precise(n: u64) -> f32 {
    n as f32
}

/// Reduction of one axis of the row (`axis` counted inside the row).
pub(crate) fn reduce<'c>(x: &Exec<'_, 'c>, row: &Row<'c>, function: ReduceFn, axis: usize, keep: bool) -> Row<'c> {
    let row = row.clone().stored(x);
    let n = row.shape.get(axis).copied().unwrap_or(1);
    let inner: u64 = row.shape.iter().skip(axis + 1).product();
    let outer: u64 = row.shape.iter().take(axis).product();
    let mut shape = row.shape.clone();
    if keep {
        shape[axis] = 1;
    } else {
        shape.remove(axis);
    }
    let fold = match function {
        ReduceFn::Sum | ReduceFn::Mean => Fold::Sum,
        ReduceFn::Max => Fold::Max,
        ReduceFn::Min => Fold::Min,
    };
    let result = x.alloc((outer * inner).max(1) * 4);
    let c = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    x.each_row(|| {
        x.repeat(outer * inner, |place| {
            let b = x.b;
            let base = b.addi(
                b.mulc(b.divui(place, b.i64(c(inner.max(1)))), c(n * inner)),
                b.remui(place, b.i64(c(inner.max(1)))),
            );
            let total = x.fold(n, row.vector && inner == 1, fold, |ix| {
                let at = b.addi(base, b.mulc(ix.at, c(inner)));
                row.get(x, Ix { at, width: ix.width })
            });
            let total = if function == ReduceFn::Mean { b.divf(total, b.f32(precise(n))) } else { total };
            x.single(|| b.store(total, b.gep(x.at(result), "f32", place), 4));
        });
    });
    Row::from_scratch(result, shape)
}

/// Rows joined along an axis of the row.
pub(crate) fn concat<'c>(rows: &[Row<'c>], axis: usize) -> Row<'c> {
    let mut shape = rows[0].shape.clone();
    shape[axis] = rows.iter().map(|r| r.shape[axis]).sum();
    let inner: u64 = shape.iter().skip(axis + 1).product();
    let total = shape[axis];
    let ints = rows[0].ints;
    let parts: Vec<Row<'c>> = rows.to_vec();
    let operands: Vec<&Row<'c>> = rows.iter().collect();
    let c = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let row = Row::new(shape, false, move |x, ix| {
        let b = x.b;
        let place = b.remui(b.divui(ix.at, b.i64(c(inner))), b.i64(c(total)));
        let outer = b.divui(ix.at, b.i64(c(inner * total)));
        let low = b.remui(ix.at, b.i64(c(inner)));
        pick(x, &parts, place, outer, low, axis, inner, 0)
    })
    .after(&operands);
    if ints { row.ints() } else { row }
}

/// The element of the part that holds `place`, as a chain of branches.
#[expect(clippy::too_many_arguments, reason = "a position has four coordinates")]
fn pick<'c>(
    x: &Exec<'_, 'c>,
    parts: &[Row<'c>],
    place: V<'c>,
    outer: V<'c>,
    low: V<'c>,
    axis: usize,
    inner: u64,
    start: u64,
) -> V<'c> {
    let b = x.b;
    let c = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let (first, rest) = (&parts[0], &parts[1..]);
    let size = first.shape[axis];
    let own = || {
        let at = b.addi(b.mulc(outer, c(size)), b.addc(place, -c(start)));
        first.scalar(x, b.addi(b.mulc(at, c(inner)), low))
    };
    if rest.is_empty() {
        return own();
    }
    let ty = if first.ints { "i32" } else { "f32" };
    b.if_else(
        b.cmpi("slt", place, b.i64(c(start + size))),
        &[ty],
        || vec![own()],
        || vec![pick(x, rest, place, outer, low, axis, inner, start + size)],
    )[0]
}

/// The row seen through a map of positions, with another shape.
pub(crate) fn mapped<'c>(
    row: &Row<'c>,
    shape: Vec<u64>,
    vector: bool,
    map: impl Fn(&Builder<'c>, V<'c>) -> V<'c> + 'c,
) -> Row<'c> {
    let inner = row.clone();
    let mut result =
        Row::new(shape, vector && row.vector, move |x, ix| inner.get(x, Ix { at: map(x.b, ix.at), width: ix.width }))
            .after(&[row]);
    result.cheap = row.cheap;
    result.ints = row.ints;
    result
}

/// `len` entries of an axis, from `start` on and `step` apart.
pub(crate) fn slice<'c>(row: &Row<'c>, axis: usize, [start, step]: [i64; 2], len: u64) -> Row<'c> {
    let mut shape = row.shape.clone();
    let c = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let size = c(shape[axis]);
    shape[axis] = len;
    let inner = c(shape.iter().skip(axis + 1).product());
    let outer: u64 = shape.iter().take(axis).product();
    let len = c(len);
    let neighbours = outer == 1 && step == 1;
    mapped(row, shape, neighbours, move |b, at| {
        if neighbours {
            return b.addc(at, start * inner);
        }
        let block = b.divui(at, b.i64(len * inner));
        let within = b.remui(at, b.i64(len * inner));
        let within = if step == 1 {
            within
        } else {
            let entry = b.divui(within, b.i64(inner));
            b.addi(b.mulc(entry, step * inner), b.remui(within, b.i64(inner)))
        };
        b.addi(b.mulc(block, size * inner), b.addc(within, start * inner))
    })
}

/// Each entry of an axis `n` times in a row.
pub(crate) fn repeat<'c>(row: &Row<'c>, axis: usize, n: u64) -> Row<'c> {
    let mut shape = row.shape.clone();
    shape[axis] *= n;
    let inner: u64 = shape.iter().skip(axis + 1).product();
    let c = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    mapped(row, shape, false, move |b, at| {
        let entry = b.divui(at, b.i64(c(inner * n)));
        b.addi(b.mulc(entry, c(inner)), b.remui(at, b.i64(c(inner))))
    })
}

/// Axes of the row in another order.
pub(crate) fn transpose<'c>(row: &Row<'c>, perm: &[usize]) -> Row<'c> {
    let old = row.shape.clone();
    let shape: Vec<u64> = perm.iter().map(|p| old[*p]).collect();
    let strides: Vec<u64> = (0..old.len()).map(|a| old.iter().skip(a + 1).product()).collect();
    let (sizes, order) = (shape.clone(), perm.to_vec());
    let c = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    mapped(row, shape, false, move |b, at| {
        let (mut index, mut below) = (b.i64(0), 1u64);
        for (axis, size) in sizes.iter().enumerate().rev() {
            let coordinate = b.remui(b.divui(at, b.i64(c(below))), b.i64(c(*size)));
            index = b.addi(index, b.mulc(coordinate, c(strides[order[axis]])));
            below *= *size;
        }
        index
    })
}

/// A value that is computed once per row, before its elements are read.
pub(crate) fn once<'c>(compute: impl Fn(&Exec<'_, 'c>) -> V<'c> + 'c) -> Row<'c> {
    let kept: Rc<Cell<Option<V<'c>>>> = Rc::default();
    let sink = Rc::clone(&kept);
    Row::new(Vec::new(), false, move |_, _| {
        kept.get().unwrap_or_else(|| unreachable!("rows are prepared before they are read"))
    })
    .prepared_by(move |x| sink.set(Some(compute(x))))
}
