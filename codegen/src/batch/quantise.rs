//! Rows rounded to signed bytes with one scale per row, for products with int8 activations.
//!
//! The values stay floats: `scale * (W codes)` and `W (scale * codes)` are the same number up to
//! rounding, so every product kernel serves, and only this kernel knows of the codes.

use super::{THREADS, cx::c, function, units};
use crate::{
    Target, math,
    mlir::{Builder, V},
};
use moec_abi::{DType, Expr, Grid};

/// A kernel that rounds rows.
///
/// # Arguments
/// `a` (rows of `stride` elements), `range` (i32: first row, and `experts` entries later one past the last; only
/// if `sorted`), `out` (f32, rows of `stride` elements), and the number of rows (value).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantise {
    /// Symbol of the kernel.
    pub symbol: String,
    /// Element type of the rows.
    pub a: DType,
    /// Elements that are rounded.
    pub width: u64,
    /// Elements between rows.
    pub stride: u64,
    /// Number of experts whose rows are rounded, where rows are sorted by expert.
    pub sorted: Option<u64>,
}

impl Quantise {
    /// Extent of the launch for `rows` rows.
    pub fn grid(&self, target: Target, rows: Expr) -> Grid {
        units(target, rows, 1)
    }

    /// Appends the kernel to the module.
    pub fn emit(&self, b: &Builder<'_>, target: Target) {
        let pointers = vec![true; if self.sorted.is_some() { 3 } else { 2 }];
        function(b, target, &self.symbol, &pointers, THREADS, |place, values| {
            place.each_unit(b, |row| match (self.sorted, values) {
                (Some(experts), [a, range, out]) => {
                    let bound = |e: u64| {
                        let at = b.gep(*range, "i32", b.i64(c(e)));
                        b.cast("arith.extsi", b.load(at, "i32", 4), "i64")
                    };
                    let inside = b.andi(b.cmpi("sge", row, bound(0)), b.cmpi("slt", row, bound(experts)));
                    b.if_(inside, || self.row(b, target, *a, *out, row));
                }
                (_, [a, .., out]) => self.row(b, target, *a, *out, row),
                (_, _) => {}
            });
        });
    }

    fn row<'c>(&self, b: &Builder<'c>, target: Target, a: V<'c>, out: V<'c>, row: V<'c>) {
        let start = b.mulc(row, c(self.stride));
        let name = crate::rows::element(self.a);
        let load = |i: V<'c>| {
            let raw = b.load(b.gep(a, name, b.addi(start, i)), name, u32::try_from(self.a.bytes()).unwrap_or(1));
            if self.a == DType::F32 { raw } else { math::from_bf16(b, target, raw) }
        };
        let width = b.i64(c(self.width));
        let top = b
            .for_(b.i64(0), width, b.i64(1), &[b.f32(1e-5)], |i, top| vec![b.maximumf(top[0], math::abs(b, load(i)))])
            [0];
        let scale = b.divf(top, b.f32(127.0));
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
        let magic = b.f32(12_582_912.0);
        b.each(b.i64(0), width, |i| {
            let code = b.subf(b.addf(b.divf(load(i), scale), magic), magic);
            b.store(b.mulf(code, scale), b.gep(out, "f32", b.addi(start, i)), 4);
        });
    }
}
