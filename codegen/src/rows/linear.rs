//! Products of rows with a matrix inside a row kernel: router logits and small projections.
//!
//! Large products are grouped kernels of their own; here the matrix is small enough that reading
//! it once per block of rows (CPU) or per row (warp) is cheaper than another launch.

use super::{
    exec::{CPU_ROWS, Exec, Ix},
    value::Row,
};
use crate::{Target, mlir::V};
use moec_abi::{DType, Layout};

fn c(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Output columns that a CPU thread computes together.
const fn panel(target: Target) -> u64 {
    2 * target.lanes() as u64
}

/// How the matrix of a `linear` in a row kernel is packed.
pub(crate) const fn layout(target: Target) -> Layout {
    if target.is_gpu() {
        Layout::Rows { columns: 1 }
    } else {
        Layout::Panels { panel: panel(target), depth: 1, columns: 1 }
    }
}

/// A packed matrix `[n, k]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'c> {
    /// Address.
    pub(crate) at: V<'c>,
    /// Element type.
    pub(crate) dtype: DType,
    /// Outputs.
    pub(crate) n: u64,
    /// Inputs.
    pub(crate) k: u64,
}

/// `x W^T` over the last axis (without bias).
pub(crate) fn linear<'c>(x: &Exec<'_, 'c>, row: &Row<'c>, w: Matrix<'c>) -> Row<'c> {
    let outer = row.len() / w.k.max(1);
    let mut shape = row.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = w.n;
    }
    if x.is_warp() { warp(x, row, w, outer, shape) } else { cpu(x, row, w, outer, shape) }
}

/// One warp: lanes split the sum, four outputs at a time share the loads of the row.
fn warp<'c>(x: &Exec<'_, 'c>, row: &Row<'c>, w: Matrix<'c>, outer: u64, shape: Vec<u64>) -> Row<'c> {
    const TOGETHER: u64 = 4;
    let row = if row.cheap { row.clone() } else { row.clone().stored(x) };
    let result = x.alloc((outer * w.n) * 4);
    let (lane, b) = (x.lane().unwrap_or_else(|| unreachable!("a warp has lanes")), x.b);
    x.each_row(|| {
        row.prepare(x);
        x.repeat(outer, |o| {
            let base = b.mulc(o, c(w.k));
            x.repeat(w.n.div_ceil(TOGETHER), |group| {
                let first = b.mulc(group, c(TOGETHER));
                // Past the end the last output is computed again.
                let columns: Vec<V<'c>> =
                    (0..TOGETHER).map(|j| b.minsi(b.addc(first, c(j)), b.i64(c(w.n - 1)))).collect();
                let starts: Vec<V<'c>> = columns.iter().map(|n| b.mulc(*n, c(w.k))).collect();
                let zero = b.f32(0.0);
                let init = vec![zero; starts.len()];
                let sums = x.turns(lane, c(w.k), &init, |k, acc| {
                    let value = row.scalar(x, b.addi(base, k));
                    starts
                        .iter()
                        .zip(acc)
                        .map(|(start, sum)| {
                            let weight = x.load(w.at, w.dtype, Ix { at: b.addi(*start, k), width: 1 });
                            b.fma(value, weight, *sum)
                        })
                        .collect()
                });
                for (column, sum) in columns.iter().zip(sums) {
                    let total = x.total(sum);
                    x.single(|| {
                        let at = b.addi(b.mulc(o, c(w.n)), *column);
                        b.store(total, b.gep(x.at(result), "f32", at), 4);
                    });
                }
            });
        });
    });
    Row::from_scratch(result, shape)
}

/// A block of rows against panels of two vectors: every weight is loaded once for all rows.
fn cpu<'c>(x: &Exec<'_, 'c>, row: &Row<'c>, w: Matrix<'c>, outer: u64, shape: Vec<u64>) -> Row<'c> {
    let (b, lanes) = (x.b, x.target.lanes());
    let wide = panel(x.target);
    let row = row.clone().in_scratch(x);
    let padded = w.n.next_multiple_of(wide);
    // Rows are padded to whole panels, so that stores need no mask.
    let result = x.alloc((outer * padded) * 4);
    let (_, rows) = x.block();
    let vector = format!("vector<{lanes}xf32>");
    let tile = |height: u64| {
        b.each(b.i64(0), b.i64(c(outer)), |o| {
            // Rows past the end repeat the last one.
            let last = b.addc(rows, -1);
            let sources: Vec<V<'c>> = (0..height)
                .map(|r| b.gep(row.place(x, b.minsi(b.i64(c(r)), last)), "f32", b.mulc(o, c(w.k))))
                .collect();
            b.each(b.i64(0), b.i64(c(padded / wide)), |p| {
                let start = b.mulc(p, c(wide * w.k));
                let init = vec![b.f32s(0.0, lanes); usize::try_from(height).unwrap_or(1) * 2];
                let sums = b.for_(b.i64(0), b.i64(c(w.k)), b.i64(1), &init, |k, acc| {
                    let at = b.addi(start, b.mulc(k, c(wide)));
                    let weights: Vec<V<'c>> = (0..2)
                        .map(|v| x.load(w.at, w.dtype, Ix { at: b.addc(at, v * c(lanes as u64)), width: lanes }))
                        .collect();
                    sources
                        .iter()
                        .enumerate()
                        .flat_map(|(r, source)| {
                            let value = b.load(b.gep(*source, "f32", k), "f32", 4);
                            let value = b.splat(value, &vector);
                            [b.fma(value, weights[0], acc[2 * r]), b.fma(value, weights[1], acc[2 * r + 1])]
                        })
                        .collect()
                });
                for r in 0..usize::try_from(height).unwrap_or(1) {
                    let target = x.at_row(result, b.i64(c(r as u64)));
                    let column = b.addi(b.mulc(o, c(padded)), b.mulc(p, c(wide)));
                    for v in 0..2 {
                        let at = b.addc(column, c((v * lanes) as u64));
                        b.store(sums[2 * r + v], b.gep(target, "f32", at), 4);
                    }
                }
            });
        });
    };
    // Decoding has one row; it should not pay for eight.
    b.if_else(
        b.cmpi("eq", rows, b.i64(1)),
        &[],
        || {
            tile(1);
            Vec::new()
        },
        || {
            tile(CPU_ROWS);
            Vec::new()
        },
    );
    let stored = Row::from_scratch(result, vec![outer * padded]);
    if outer == 1 {
        return stored.narrowed(shape);
    }
    let n = w.n;
    super::tensor::mapped(&stored, shape, false, move |b, at| {
        let o = b.divui(at, b.i64(c(n)));
        b.addi(b.mulc(o, c(padded)), b.remui(at, b.i64(c(n))))
    })
}
