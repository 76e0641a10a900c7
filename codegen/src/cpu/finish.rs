//! From sums to results: bias, scales, epilogue, rounding and masked stores.

use super::Kernel;
use crate::{grouped::RowScale, mlir::V};
use moec_abi::DType;

impl<'c> Kernel<'_, 'c> {
    /// Turns the sums of a tile into results. `first` is its first row in sorted order.
    pub(super) fn finish(&self, expert: V<'c>, first: V<'c>, rows: V<'c>, unit: V<'c>, sums: V<'c>) {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        let lanes = self.lanes as u64;
        let start = b.mulc(unit, s.unit_width(spec).cast_signed());
        let vectors = b.minsi(b.ceil_div(b.subi(self.c(spec.n), start), self.c(lanes)), self.c(s.nv as u64));
        let row_bytes = (s.nv * s.lanes * 4) as i64;
        b.each(self.c(0), rows, |r| {
            let p = b.addi(first, r);
            let scale = self.scale.map(|scale| {
                let factor = b.load(b.gep(scale, "f32", p), "f32", 4);
                b.splat(factor, &self.vector("f32"))
            });
            let given: Vec<_> = self
                .given
                .iter()
                .map(|(numbers, map)| {
                    let row = map.map_or(p, |map| b.cast("arith.extsi", b.load(b.gep(map, "i32", p), "i32", 4), "i64"));
                    b.gep(*numbers, "f32", b.mulc(row, spec.n.cast_signed()))
                })
                .collect();
            let out = b.gep(self.out, "i8", b.mulc(p, (spec.out_stride * spec.out.bytes()).cast_signed()));
            let sums = b.gep(sums, "i8", b.mulc(r, row_bytes));
            b.each(self.c(0), vectors, |v| {
                let column = b.addi(start, b.mulc(v, lanes.cast_signed()));
                let sums = b.gep(sums, "i8", b.mulc(v, (lanes * 4).cast_signed()));
                self.result(expert, column, (sums, &given), scale, out);
            });
        });
    }

    fn vector(&self, element: &str) -> String {
        format!("vector<{}x{element}>", self.lanes)
    }

    /// One vector of results, from the sums of the matrices and rows of given numbers.
    fn result(&self, expert: V<'c>, column: V<'c>, (from, given): (V<'c>, &[V<'c>]), scale: Option<V<'c>>, out: V<'c>) {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        let own: Vec<_> = (0..spec.matrices)
            .map(|m| b.load(self.at(from, (m * s.mr * s.nv * s.lanes * 4) as u64), &self.vector("f32"), 4))
            .collect();
        let given: Vec<_> = given.iter().map(|row| self.load_some(b.gep(*row, "f32", column), column)).collect();
        let sums: Vec<_> = spec
            .start(b, &own, &given, b.f32s(0.0, self.lanes))
            .into_iter()
            .enumerate()
            .map(|(m, mut sum)| {
                if let (RowScale::Input, Some(scale)) = (spec.scale, scale) {
                    sum = b.mulf(sum, scale);
                }
                match self.bias {
                    None => sum,
                    Some(bias) => {
                        let matrix = b.addc(b.mulc(expert, spec.sums() as i64), m as i64);
                        let place = b.addi(b.mulc(matrix, spec.n.cast_signed()), column);
                        b.addf(sum, self.load_some(b.gep(bias, "f32", place), column))
                    }
                }
            })
            .collect();
        let mut y = spec.epilogue.emit(b, &sums);
        if let (RowScale::Output, Some(scale)) = (spec.scale, scale) {
            y = b.mulf(y, scale);
        }
        if spec.out == DType::Bf16 {
            self.store_some(self.bf16(y), out, "i16", column, from);
        } else {
            self.store_some(y, out, "f32", column, from);
        }
    }

    /// The upper halves of floats, rounded to nearest even; NaN stays NaN.
    fn bf16(&self, x: V<'c>) -> V<'c> {
        let b = self.b;
        let n = self.lanes;
        let bits = b.bitcast(x, &self.vector("i32"));
        let odd = b.andi(b.shrui(bits, b.i32s(16, n)), b.i32s(1, n));
        let rounded = b.addi(bits, b.addi(odd, b.i32s(0x7fff, n)));
        let quiet = b.ori(bits, b.i32s(0x0040_0000, n));
        let bits = b.select(b.cmpf("uno", x, x), quiet, rounded);
        b.cast("arith.trunci", b.shrui(bits, b.i32s(16, n)), &self.vector("i16"))
    }

    /// Which places of a vector at `column` lie inside the matrix.
    fn inside(&self, column: V<'c>) -> V<'c> {
        let b = self.b;
        let places: Vec<_> = (0..self.lanes).map(|i| i.to_string()).collect();
        let ty = self.vector("i32");
        let places = b.op("arith.constant", &[], &ty, &[("value", &format!("dense<[{}]> : {ty}", places.join(", ")))]);
        let left = b.cast("arith.trunci", b.subi(self.c(self.spec.n), column), "i32");
        b.cmpi("slt", places, b.splat(left, &ty))
    }

    /// Whether the vector at `column` lies inside the matrix; `None`: every one does.
    fn whole(&self, column: V<'c>) -> Option<V<'c>> {
        let lanes = self.lanes as u64;
        let n = self.spec.n;
        (!n.is_multiple_of(lanes)).then(|| self.b.cmpi("sle", self.b.addc(column, lanes.cast_signed()), self.c(n)))
    }

    fn load_some(&self, from: V<'c>, column: V<'c>) -> V<'c> {
        let b = self.b;
        let ty = self.vector("f32");
        let Some(whole) = self.whole(column) else {
            return b.load(from, &ty, 4);
        };
        let load = || vec![b.load(from, &ty, 4)];
        b.if_else(whole, &[&ty], load, || {
            let mask = self.inside(column);
            let zeros = b.f32s(0.0, self.lanes);
            vec![b.op("llvm.intr.masked.load", &[from, mask, zeros], &ty, &[("alignment", "4 : i32")])]
        })[0]
    }

    /// Stores the places of a vector that lie inside the matrix. `spare` is memory for a vector.
    fn store_some(&self, value: V<'c>, row: V<'c>, element: &str, column: V<'c>, spare: V<'c>) {
        let b = self.b;
        let align = if element == "f32" { 4 } else { 2 };
        let to = b.gep(row, element, column);
        let Some(whole) = self.whole(column) else {
            return b.store(value, to, align);
        };
        let all = || {
            b.store(value, to, align);
            Vec::new()
        };
        // One by one: LLVM 22 stores two places for one when it simplifies masked stores of a truncation.
        let some = || {
            b.store(value, spare, align);
            b.each(self.c(0), b.subi(self.c(self.spec.n), column), |i| {
                b.store(b.load(b.gep(spare, element, i), element, align), b.gep(to, element, i), align);
            });
            Vec::new()
        };
        b.if_else(whole, &[], all, some);
    }
}
