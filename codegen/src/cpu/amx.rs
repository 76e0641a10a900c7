//! The matrix-unit kernel: 32 x 32 sums in four tile registers.

use super::{Chunk, Kernel, Tile, tile::Level};
use crate::mlir::V;

/// Tile registers: sums 0 to 3 (row tile times 2 plus column tile), operand 4 and 5, weights 6 and 7.
const OPERAND: u8 = 4;
const WEIGHTS: u8 = 6;

/// Which weights a tile fetches while it computes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fetch {
    /// Those that it needs soon itself: it is the only one of the chunk.
    Own,
    /// A share of those of the next unit, which so many tiles fetch together: 2 or 4.
    Ahead(u64),
    /// None.
    None,
}

impl<'c> Kernel<'_, 'c> {
    fn tile_number(&self, register: u8) -> V<'c> {
        self.b.op("arith.constant", &[], "i8", &[("value", &format!("{register} : i8"))])
    }

    fn load_tile(&self, register: u8, from: V<'c>, stride: u64) {
        self.b.intrinsic0("llvm.x86.tileloadd64", &[self.tile_number(register), from, self.c(stride)]);
    }

    /// Runs `body` with all tile registers set to 16 rows of 64 bytes.
    pub(super) fn with_tiles(&self, body: impl FnOnce()) {
        let b = self.b;
        // The first bytes of the scratch serve as the configuration before anything is packed there.
        for (i, word) in [1_i32, 0, 0, 0].iter().enumerate() {
            b.store(b.i32(*word), self.at(self.scratch, i as u64 * 4), 4);
        }
        for i in 0..4 {
            b.store(b.i32(0x0040_0040), self.at(self.scratch, 16 + i * 4), 4);
            b.store(b.i32(0), self.at(self.scratch, 32 + i * 4), 4);
        }
        for i in 0..2 {
            b.store(b.i32(0x1010_1010), self.at(self.scratch, 48 + i * 4), 4);
            b.store(b.i32(0), self.at(self.scratch, 56 + i * 4), 4);
        }
        b.intrinsic0("llvm.x86.ldtilecfg", &[self.scratch]);
        body();
        b.intrinsic0("llvm.x86.tilerelease", &[]);
    }

    /// Runs a tile of up to 32 rows: 16 rows at a time when there are no more.
    pub(super) fn matrix_tile(&self, tile: Tile<'c>, chunk: Chunk<'c>) {
        let b = self.b;
        let few = b.cmpi("sle", tile.rows, self.c(16));
        let alone = b.cmpi("sle", chunk.rows, self.c(32));
        // The first tiles of a chunk fetch the next unit, so that it is there when they are done.
        let early = |tiles| b.cmpi("slt", tile.index, self.c(tiles));
        let low = b.cmpi("sle", chunk.rows, self.c(96));
        let fetch = |fetch| self.tile_sums(tile, 2, fetch);
        self.either(
            few,
            || self.tile_sums(tile, 1, Fetch::Own),
            || {
                let four = || self.either(early(4), || fetch(Fetch::Ahead(4)), || fetch(Fetch::None));
                let shared = || self.either(b.andi(low, early(2)), || fetch(Fetch::Ahead(2)), four);
                self.either(alone, || fetch(Fetch::Own), shared);
            },
        );
    }

    /// Address and stride of the sums of row tile `i` and column tile `j`.
    fn sums_of(&self, tile: Tile<'c>, i: u64, j: u64) -> (V<'c>, u64) {
        let (at, stride) = match self.spec.matrices {
            // Two matrices: one plane of 32 x 16 sums each.
            2 => (j * 32 * 64 + i * 16 * 64, 64),
            _ => (i * 16 * 128 + j * 64, 128),
        };
        (self.at(tile.sums, at), stride)
    }

    fn tile_sums(&self, tile: Tile<'c>, row_tiles: u8, fetch: Fetch) {
        let (b, s) = (self.b, self.schedule);
        let sums = |run: &dyn Fn(u8, V<'c>, u64)| {
            for i in 0..row_tiles {
                for j in 0..2 {
                    let (at, stride) = self.sums_of(tile, u64::from(i), u64::from(j));
                    run(i * 2 + j, at, stride);
                }
            }
        };
        let zero = || sums(&|register, _, _| b.intrinsic0("llvm.x86.tilezero", &[self.tile_number(register)]));
        if s.k_blocks(self.spec) == 1 {
            zero();
        } else {
            let continued = || sums(&|register, at, stride| self.load_tile(register, at, stride));
            self.either(tile.fresh, zero, continued);
        }
        // A share of the next unit: one of its panels, or half of one, from four pages or more at a time.
        let lines = if let Fetch::Ahead(tiles) = fetch { 32 / tiles } else { 0 };
        let shares = if let Fetch::Ahead(tiles) = fetch { tiles / 2 } else { 1 };
        let quarter = b.mulc(tile.steps, (lines * 16).cast_signed());
        let panel = b.andi(b.divui(tile.index, self.c(shares)), self.c(1));
        let share = b.mulc(b.muli(b.remui(tile.index, self.c(shares)), quarter), 4);
        let ahead = b.gep(tile.ahead, "i8", b.addi(share, b.mulc(panel, s.panel_bytes(self.spec).cast_signed())));
        let quarters: Vec<_> = (0..4).map(|i| b.gep(ahead, "i8", b.mulc(quarter, i))).collect();
        b.for_(self.c(0), tile.steps, self.c(1), &[tile.a, tile.w, tile.w1], |step, places| {
            let (a, weights) = places.split_first().expect("the operand comes first");
            // Decoded weights are in the scratch.
            if fetch == Fetch::Own && self.spec.codes.is_none() {
                let panel = s.panel_bytes(self.spec);
                self.fetch_panels([tile.w, tile.w1], [tile.next, self.at(tile.next, panel)], step, tile.steps);
            }
            for line in 0..lines {
                let from = b.gep(quarters[line as usize % 4], "i8", b.mulc(step, (lines * 16).cast_signed()));
                self.fetch(self.at(from, line / 4 * 64), Level::Second);
            }
            for i in 0..row_tiles {
                self.load_tile(OPERAND + i, self.at(*a, u64::from(i) * s.k_block * 32), 64);
            }
            for (j, w) in (0..).zip(weights) {
                self.load_tile(WEIGHTS + j, *w, 64);
                for i in 0..row_tiles {
                    let registers = [i * 2 + j, OPERAND + i, WEIGHTS + j].map(|r| self.tile_number(r));
                    b.intrinsic0("llvm.x86.tdpbf16ps", &registers);
                }
            }
            places.iter().map(|place| self.at(*place, 1024)).collect()
        });
        let number = |register| self.tile_number(register);
        sums(&|register, at, stride| {
            b.intrinsic0("llvm.x86.tilestored64", &[number(register), at, self.c(stride)]);
        });
    }
}
