//! Rows of the operand: where they lie, and their packed copy.

use super::{Chunk, Engine, Kernel};
use crate::mlir::V;
use moec_abi::DType;

impl<'c> Kernel<'_, 'c> {
    /// Address of the operand's row for place `p` of the sorted order.
    fn row(&self, p: V<'c>) -> V<'c> {
        let b = self.b;
        let row = self.map.map_or(p, |map| {
            let index = b.load(b.gep(map, "i32", p), "i32", 4);
            b.cast("arith.extsi", index, "i64")
        });
        b.gep(self.a, "i8", b.mulc(row, (self.spec.a_stride * self.spec.a.bytes()).cast_signed()))
    }

    /// Bytes between the rows that a tile reads.
    pub(super) fn operand_stride(&self) -> u64 {
        if self.schedule.direct { self.spec.a_stride * self.spec.a.bytes() } else { self.schedule.packed_stride() }
    }

    /// Address that the tile at `row` of the chunk reads from.
    pub(super) fn operand(&self, chunk: Chunk<'c>, row: V<'c>, k0: V<'c>) -> V<'c> {
        let (b, s) = (self.b, self.schedule);
        if s.direct {
            let row = self.row(b.addi(chunk.first, row));
            return b.gep(row, "i8", b.mulc(k0, self.spec.a.bytes().cast_signed()));
        }
        let bytes = match s.engine {
            Engine::Vector | Engine::Pairs => self.operand_stride(),
            Engine::Matrix => s.k_block * 2,
        };
        b.gep(self.scratch, "i8", b.mulc(row, bytes.cast_signed()))
    }

    /// Copies `columns` inputs (with padding) from `k0` of the chunk's rows into scratch.
    pub(super) fn pack(&self, chunk: Chunk<'c>, k0: V<'c>, columns: V<'c>) {
        let (b, s) = (self.b, self.schedule);
        let real = b.minsi(columns, b.subi(self.c(self.spec.k), k0));
        b.each(self.c(0), chunk.rows, |r| {
            let source = self.row(b.addi(chunk.first, r));
            let source = b.gep(source, "i8", b.mulc(k0, self.spec.a.bytes().cast_signed()));
            match s.engine {
                Engine::Vector | Engine::Pairs => {
                    let to = b.gep(self.scratch, "i8", b.mulc(r, self.operand_stride().cast_signed()));
                    self.pack_row(source, to, real, columns);
                }
                Engine::Matrix => self.pack_tiles(source, r, real, columns),
            }
        });
    }

    /// One row as the vector kernels read it: floats, or bf16 for products of pairs.
    fn pack_row(&self, from: V<'c>, to: V<'c>, real: V<'c>, columns: V<'c>) {
        let b = self.b;
        let lanes = self.lanes as u64;
        let narrow = self.schedule.engine.operand() == DType::Bf16;
        let vectors = b.mulc(b.divui(real, self.c(lanes)), lanes.cast_signed());
        let depth = self.schedule.depth;
        // Where an input of a step lies: beside that of its pair.
        let paired = |i: V<'c>| {
            let (half, inside) = (self.c(depth / 2), b.remui(i, self.c(depth)));
            b.addi(b.subi(i, inside), b.addi(b.mulc(b.remui(inside, half), 2), b.divui(inside, half)))
        };
        let copy = |i: V<'c>, ty: &dyn Fn(&str) -> String| {
            if narrow {
                let values = b.load(b.gep(from, "i16", i), &ty("i16"), 2);
                if ty("i16") == "i16" {
                    return b.store(values, b.gep(to, "i16", paired(i)), 2);
                }
                let place = |p: u64| p - p % depth + self.schedule.pair(p % depth / 2)[(p % 2) as usize];
                let places = (0..lanes).map(|p| place(p) as usize);
                return b.store(b.shuffle([values, values], places, &ty("i16")), b.gep(to, "i16", i), 2);
            }
            let target = b.gep(to, "f32", i);
            if self.spec.a == DType::Bf16 {
                let bits = b.load(b.gep(from, "i16", i), &ty("i16"), 2);
                let wide = b.cast("arith.extui", bits, &ty("i32"));
                let shift = if ty("i32") == "i32" { b.i32(16) } else { b.i32s(16, self.lanes) };
                b.store(b.bitcast(b.shli(wide, shift), &ty("f32")), target, 4);
            } else {
                b.store(b.load(b.gep(from, "f32", i), &ty("f32"), 4), target, 4);
            }
        };
        b.for_(self.c(0), vectors, self.c(lanes), &[], |i, _| {
            copy(i, &|element| format!("vector<{lanes}x{element}>"));
            Vec::new()
        });
        if !self.spec.k.is_multiple_of(lanes) || !self.spec.k.is_multiple_of(self.schedule.k_step()) {
            b.each(vectors, real, |i| copy(i, &str::to_owned));
            b.each(real, columns, |i| {
                if narrow {
                    b.store(b.cast("arith.trunci", b.i32(0), "i16"), b.gep(to, "i16", paired(i)), 2);
                } else {
                    b.store(b.f32(0.0), b.gep(to, "f32", i), 4);
                }
            });
        }
    }

    /// One row of bf16 into tiles of 16 rows by 32 inputs, a kilobyte each.
    fn pack_tiles(&self, from: V<'c>, row: V<'c>, real: V<'c>, columns: V<'c>) {
        let b = self.b;
        let strip = b.mulc(b.divui(row, self.c(16)), (self.schedule.k_block * 32).cast_signed());
        let line = b.mulc(b.remui(row, self.c(16)), 64);
        let to = b.gep(self.scratch, "i8", b.addi(strip, line));
        let whole = b.divui(real, self.c(32));
        b.each(self.c(0), whole, |t| {
            let values = b.load(b.gep(from, "i8", b.mulc(t, 64)), "vector<16xi32>", 2);
            b.store(values, b.gep(to, "i8", b.mulc(t, 1024)), 64);
        });
        if !self.spec.k.is_multiple_of(32) {
            b.each(whole, b.divui(columns, self.c(32)), |t| {
                let to = b.gep(to, "i8", b.mulc(t, 1024));
                b.store(b.i32s(0, 16), to, 64);
                let from = b.gep(from, "i8", b.mulc(t, 64));
                b.each(self.c(0), b.subi(real, b.mulc(t, 32)), |i| {
                    b.store(b.load(b.gep(from, "i16", i), "i16", 2), b.gep(to, "i16", i), 2);
                });
            });
        }
    }
}
