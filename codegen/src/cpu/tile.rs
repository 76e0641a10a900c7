//! The vector kernels: a register tile of f32 sums.

use super::{
    Engine, Kernel, Tile,
    stream::{Pages, Stream},
};
use crate::mlir::{Builder, V};
use moec_abi::DType;

/// Which weights a tile fetches while it computes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fetch {
    /// Those that are read next.
    Own,
    /// A share of those of the next unit; its own are in the second level.
    Share,
}

impl<'c> Kernel<'_, 'c> {
    /// Runs a tile of any height: one loop for each.
    pub(super) fn vector_tile(&self, tile: Tile<'c>) {
        self.heights(tile, self.schedule.mr);
    }

    fn heights(&self, tile: Tile<'c>, rows: usize) {
        let b = self.b;
        if rows == 1 {
            return self.matrices(tile, 1, Fetch::Own);
        }
        let exact = b.cmpi("eq", tile.rows, self.c(rows as u64));
        let fetch = if rows == self.schedule.mr { Fetch::Share } else { Fetch::Own };
        self.either(exact, || self.matrices(tile, rows, fetch), || self.heights(tile, rows - 1));
    }

    /// Does one or the other.
    pub(super) fn either(&self, condition: V<'c>, then: impl FnOnce(), otherwise: impl FnOnce()) {
        let then = || {
            then();
            Vec::new()
        };
        let otherwise = || {
            otherwise();
            Vec::new()
        };
        self.b.if_else(condition, &[], then, otherwise);
    }

    fn matrices(&self, tile: Tile<'c>, rows: usize, fetch: Fetch) {
        let (b, s) = (self.b, self.schedule);
        let panel = s.panel_bytes(self.spec);
        let sums = (s.mr * s.nv * s.lanes * 4) as u64;
        b.each(self.c(0), self.c(self.spec.matrices as u64), |m| {
            let skip = b.mulc(m, panel.cast_signed());
            let w = b.gep(tile.w, "i8", skip);
            let part = b.muli(tile.index, b.muli(tile.steps, tile.share));
            let ahead = b.gep(tile.ahead, "i8", b.addi(skip, part));
            let sums = b.gep(tile.sums, "i8", b.mulc(m, sums.cast_signed()));
            let skip = |of, bytes| b.gep(of, "i8", b.mulc(m, s.factors_bytes(self.spec, bytes).cast_signed()));
            let scales = tile.scales.map(|of| skip(of, self.scale_bytes()));
            let zeros = tile.zeros.map(|of| skip(of, 4));
            let stream = match s.k_blocks(self.spec) {
                1 => Stream { before: b.addi(tile.stream.before, b.muli(m, tile.steps)), ..tile.stream },
                // A block of inputs is a stream of its own.
                _ => Stream { base: w, ..tile.stream },
            };
            self.sums(Tile { w, scales, zeros, ahead, stream, sums, ..tile }, rows, fetch);
        });
    }

    /// Sums of one matrix.
    fn sums(&self, tile: Tile<'c>, rows: usize, fetch: Fetch) {
        if self.sums_by_group(tile, rows, fetch).is_some() {
            return;
        }
        let (b, s) = (self.b, self.schedule);
        let lanes = self.lanes;
        let floats = format!("vector<{lanes}xf32>");
        let place = |i: usize| self.at(tile.sums, (i * lanes * 4) as u64);
        let zeros = || (0..rows * s.nv).map(|_| b.f32s(0.0, lanes)).collect::<Vec<_>>();
        let init = if s.k_blocks(self.spec) == 1 {
            zeros()
        } else {
            let types = vec![floats.as_str(); rows * s.nv];
            b.if_else(tile.fresh, &types, zeros, || (0..rows * s.nv).map(|i| b.load(place(i), &floats, 4)).collect())
        };
        // Addresses that grow by what is no scale of the processor are carried from turn to turn.
        let init = [vec![tile.w, tile.ahead], init].concat();
        let carried =
            b.for_(self.c(0), tile.steps, self.c(1), &init, |step, carried| self.turn(tile, step, carried, fetch));
        for (i, sum) in carried[2..].iter().enumerate() {
            b.store(*sum, place(i), 4);
        }
    }

    /// One step of the innermost loop. It carries the addresses of its weights and of those that it fetches, and sums.
    pub(super) fn turn(&self, tile: Tile<'c>, step: V<'c>, carried: &[V<'c>], fetch: Fetch) -> Vec<V<'c>> {
        let (b, s, lanes) = (self.b, self.schedule, self.lanes);
        let width = s.step_bytes(self.spec);
        let ([w, ahead], sums) = carried.split_first_chunk().expect("two addresses come first");
        let (mut w, ahead) = (*w, *ahead);
        let a = b.gep(tile.a, "i8", b.mulc(step, (s.depth * s.engine.operand().bytes()).cast_signed()));
        match (fetch, Pages::new(width).filter(|_| s.pages)) {
            (Fetch::Own, Some(pages)) => self.fetch_ahead(pages, tile.stream, step),
            (Fetch::Own, None) | (Fetch::Share, _) => {
                for line in (0..width).step_by(64) {
                    self.fetch(self.at(w, s.prefetch + line), Level::First);
                }
            }
        }
        if fetch == Fetch::Share {
            self.fetch(ahead, Level::Second);
        }
        let mut sums = sums.to_vec();
        let vectors = |from: V<'c>, element: &str| -> Vec<_> {
            let ty = format!("vector<{lanes}x{element}>");
            (0..s.nv).map(|v| b.load(self.at(from, (v * lanes * 4) as u64), &ty, 4)).collect()
        };
        if let Some(codes) = self.spec.codes {
            self.decoded(&codes, tile, w, a, step, &mut sums);
        } else if s.engine == Engine::Pairs {
            self.multiply(a, 0, &vectors(w, "i32"), &mut sums);
        } else if self.spec.w == DType::Bf16 {
            let floats = format!("vector<{lanes}xf32>");
            let half = |from: V<'c>, half: &dyn Fn(V<'c>) -> V<'c>| -> Vec<_> {
                vectors(from, "i32").into_iter().map(|pair| b.bitcast(half(pair), &floats)).collect()
            };
            self.multiply(a, 0, &half(w, &|pair| b.shli(pair, b.i32s(16, lanes))), &mut sums);
            // Read again rather than kept: the sums take the registers.
            w = self.hidden(w);
            self.multiply(a, 1, &half(w, &|pair| b.andi(pair, b.i32s(-65536, lanes))), &mut sums);
        } else {
            self.multiply(a, 0, &vectors(w, "f32"), &mut sums);
        }
        [vec![self.at(w, width), b.gep(ahead, "i8", tile.share)], sums].concat()
    }

    /// Adds input `place` of every row times `w`: an f32, or a pair of bf16.
    pub(super) fn multiply(&self, a: V<'c>, place: u64, w: &[V<'c>], sums: &mut [V<'c>]) {
        let (b, lanes) = (self.b, self.lanes);
        let stride = self.operand_stride();
        let pairs = self.schedule.engine == Engine::Pairs;
        let (element, align) = if pairs { ("i32", 2) } else { ("f32", 4) };
        // Decoding takes the units that also spread a value over a vector in a register; one that an instruction reads
        // from memory is spread on its way. So each product reads its own.
        let apart = pairs && self.spec.codes.is_some();
        let from: Vec<_> = (0..w.len()).map(|v| (0..v).filter(|_| apart).fold(a, |a, _| self.hidden(a))).collect();
        for (row, sums) in sums.chunks_mut(w.len()).enumerate() {
            for ((sum, w), from) in sums.iter_mut().zip(w).zip(&from) {
                let x = b.load(self.at(*from, row as u64 * stride + place * 4), element, align);
                let x = b.splat(x, &format!("vector<{lanes}x{element}>"));
                *sum = if pairs { pair_products(b, *sum, *w, x) } else { b.fma(x, *w, *sum) };
            }
        }
    }

    /// The same address, of which the compiler does not know that it is.
    pub(super) fn hidden(&self, address: V<'c>) -> V<'c> {
        let attributes = [("asm_string", "\"\""), ("constraints", "\"=r,0\"")];
        self.b.op("llvm.inline_asm", &[address], "!llvm.ptr", &attributes)
    }

    /// Asks for a cache line that is read soon. An address outside the weights does no harm.
    pub(super) fn fetch(&self, address: V<'c>, level: Level) {
        let hint = match level {
            Level::First => "3 : i32",
            Level::Second => "2 : i32",
        };
        self.b.op0("llvm.intr.prefetch", &[address], &[("rw", "0 : i32"), ("hint", hint), ("cache", "1 : i32")]);
    }
}

/// `sums` plus the products of pairs of bf16, each pair in an i32.
pub(crate) fn pair_products<'c>(b: &Builder<'c>, sums: V<'c>, x: V<'c>, y: V<'c>) -> V<'c> {
    let [x, y] = [x, y].map(|pairs| b.bitcast(pairs, "vector<32xbf16>"));
    b.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", &[sums, x, y], "vector<16xf32>")
}

/// A cache level to fetch into.
#[derive(Clone, Copy)]
pub(super) enum Level {
    First,
    Second,
}
