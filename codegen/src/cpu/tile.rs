//! The vector kernels: a register tile of f32 sums.

use super::{
    Engine, Kernel, Tile,
    stream::{Pages, Stream},
};
use crate::{
    codes::{Codes, Places},
    mlir::{Builder, V},
};
use moec_abi::DType;

/// Which weights a tile fetches while it computes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fetch {
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
        let width = s.step_bytes(self.spec);
        // Addresses that grow by what is no scale of the processor are carried from turn to turn.
        let init = [vec![tile.w, tile.ahead], init].concat();
        let carried = b.for_(self.c(0), tile.steps, self.c(1), &init, |step, carried| {
            let ([w, ahead], sums) = carried.split_first_chunk().expect("two addresses come first");
            let (mut w, ahead) = (*w, *ahead);
            let a = b.gep(tile.a, "i8", b.mulc(step, (s.depth * s.engine.operand().bytes()).cast_signed()));
            match (fetch, Pages::new(width)) {
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
            if let Some(codes) = self.spec.codes {
                self.decoded(&codes, tile, w, a, step, &mut sums);
            } else if s.engine == Engine::Pairs {
                let pairs = format!("vector<{lanes}xi32>");
                let w: Vec<_> = (0..s.nv).map(|v| b.load(self.at(w, (v * lanes * 4) as u64), &pairs, 4)).collect();
                self.multiply(a, 0, &w, &mut sums);
            } else if self.spec.w == DType::Bf16 {
                let integers = format!("vector<{lanes}xi32>");
                let half = |from: V<'c>, half: &dyn Fn(V<'c>) -> V<'c>| -> Vec<_> {
                    let pair = |v: usize| b.load(self.at(from, (v * lanes * 4) as u64), &integers, 4);
                    (0..s.nv).map(|v| b.bitcast(half(pair(v)), &floats)).collect()
                };
                self.multiply(a, 0, &half(w, &|pair| b.shli(pair, b.i32s(16, lanes))), &mut sums);
                // Read again rather than kept: the sums take the registers.
                w = self.hidden(w);
                self.multiply(a, 1, &half(w, &|pair| b.andi(pair, b.i32s(-65536, lanes))), &mut sums);
            } else {
                let w: Vec<_> = (0..s.nv).map(|v| b.load(self.at(w, (v * lanes * 4) as u64), &floats, 4)).collect();
                self.multiply(a, 0, &w, &mut sums);
            }
            [vec![self.at(w, width), b.gep(ahead, "i8", tile.share)], sums].concat()
        });
        for (i, sum) in carried[2..].iter().enumerate() {
            b.store(*sum, place(i), 4);
        }
    }

    /// Adds the inputs of a step times weights that are decoded in registers.
    fn decoded(&self, codes: &Codes, tile: Tile<'c>, w: V<'c>, a: V<'c>, step: V<'c>, sums: &mut [V<'c>]) {
        let (b, s, lanes) = (self.b, self.schedule, self.lanes);
        let [bytes, integers] = ["i8", "i32"].map(|element| format!("vector<{lanes}x{element}>"));
        // Bytes of neighbouring inputs, `nv` vectors of outputs each.
        let bytes: Vec<_> = (0..s.nv * (s.depth / codes.per_byte()) as usize)
            .map(|v| b.cast("arith.extui", b.load(self.at(w, (v * lanes) as u64), &bytes, 1), &integers))
            .collect();
        let groups = codes.groups(self.spec.k);
        let factors = |input: u64| {
            let k = b.addc(b.addi(tile.k0, b.mulc(step, s.depth.cast_signed())), input.cast_signed());
            // Inputs past the last one are zero: any scale serves.
            let group = b.minsi(b.divui(k, self.c(codes.group)), self.c(groups - 1));
            let group = if groups == 1 { self.c(0) } else { group };
            let row = |bytes: u64| b.mulc(group, (s.panel() * bytes).cast_signed());
            let scales = tile.scales.map(|of| b.gep(of, "i8", row(codes.scale.bytes())));
            let zeros = tile.zeros.map(|of| b.gep(of, "i8", row(4)));
            let places = 0..s.nv as u64;
            let wide = lanes as u64;
            let scale = |v: u64| {
                scales.map(|of| codes.scales(b, self.at(of, v * wide * codes.scale.bytes()), Places(Some(lanes))))
            };
            let zero = |v: u64| zeros.map(|of| b.load(self.at(of, v * wide * 4), &format!("vector<{lanes}xf32>"), 4));
            (places.clone().map(scale).collect::<Vec<_>>(), places.map(zero).collect::<Vec<_>>())
        };
        let mut shared = factors(0);
        let mut low = Vec::new();
        for input in 0..s.depth {
            if input > 0 && !codes.group.is_multiple_of(s.depth) {
                shared = factors(input);
            }
            let (scales, zeros) = &shared;
            let mask = b.i32s((1 << codes.bits) - 1, lanes);
            let (byte, place) = ((input / codes.per_byte()) as usize, input % codes.per_byte());
            let values = bytes[byte * s.nv..].iter().zip(scales).zip(zeros).filter_map(|((bytes, scale), zero)| {
                let shift = i32::try_from(place * codes.bits).unwrap_or(0);
                let code = b.andi(b.shrui(*bytes, b.i32s(shift, lanes)), mask);
                Some(codes.decode(b, (code, Places(Some(lanes))), ((*scale)?, *zero), self.spec.w))
            });
            let values: Vec<_> = values.collect();
            match s.engine {
                Engine::Pairs if input % 2 == 0 => low = values,
                Engine::Pairs => {
                    let pairs =
                        low.iter().zip(values).map(|(low, high)| pair(b, *low, high, lanes)).collect::<Vec<_>>();
                    self.multiply(a, input / 2, &pairs, sums);
                }
                Engine::Vector | Engine::Matrix => self.multiply(a, input, &values, sums),
            }
        }
    }

    /// Adds input `place` of every row times `w`: an f32, or a pair of bf16.
    fn multiply(&self, a: V<'c>, place: u64, w: &[V<'c>], sums: &mut [V<'c>]) {
        let (b, lanes) = (self.b, self.lanes);
        let stride = self.operand_stride();
        let pairs = self.schedule.engine == Engine::Pairs;
        let (element, align) = if pairs { ("i32", 2) } else { ("f32", 4) };
        for (row, sums) in sums.chunks_mut(w.len()).enumerate() {
            let x = b.load(self.at(a, row as u64 * stride + place * 4), element, align);
            let x = b.splat(x, &format!("vector<{lanes}x{element}>"));
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = if pairs { pair_products(b, *sum, x, *w) } else { b.fma(x, *w, *sum) };
            }
        }
    }

    /// The same address, of which the compiler does not know that it is.
    fn hidden(&self, address: V<'c>) -> V<'c> {
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

/// Two values of bf16, held as f32, as pairs.
pub(super) fn pair<'c>(b: &Builder<'c>, low: V<'c>, high: V<'c>, lanes: usize) -> V<'c> {
    let [low, high] = [low, high].map(|value| b.bitcast(value, &format!("vector<{lanes}xi32>")));
    b.ori(b.shrui(low, b.i32s(16, lanes)), b.andi(high, b.i32s(-0x1_0000, lanes)))
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
