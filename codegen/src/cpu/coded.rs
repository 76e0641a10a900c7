//! Weights that are stored as codes, for the vector kernels: decoded in registers, in every tile.

use super::{Engine, Kernel, Tile, tile::Fetch};
use crate::{
    codes::{Codes, Number, Places},
    mlir::{Builder, V},
};

/// Places of a vector of 16-bit words on processors that look values up in a register.
const WORDS: usize = 32;

impl<'c> Kernel<'_, 'c> {
    /// The codes whose scales multiply the sums of a group of inputs instead of each weight: wherever groups are whole
    /// steps, and blocks of inputs whole groups.
    fn scaled_late(&self) -> Option<Codes> {
        let (s, k) = (self.schedule, self.spec.k);
        self.spec.codes.filter(|codes| {
            let steps = codes.group.is_multiple_of(s.depth);
            let blocks = s.k_blocks(self.spec) == 1 || s.k_block.is_multiple_of(codes.group);
            !codes.zero && (codes.groups(k) == 1 || steps && blocks)
        })
    }

    /// Sums of one matrix, group by group; `None`: the scales of these weights belong into the weights.
    pub(super) fn sums_by_group(&self, tile: Tile<'c>, rows: usize, fetch: Fetch) -> Option<()> {
        let codes = self.scaled_late()?;
        let (b, s, lanes) = (self.b, self.schedule, self.lanes);
        let floats = format!("vector<{lanes}xf32>");
        let place = |i: usize| self.at(tile.sums, (i * lanes * 4) as u64);
        let count = rows * s.nv;
        let clear = || {
            (0..count).for_each(|i| b.store(b.f32s(0.0, lanes), place(i), 4));
            Vec::new()
        };
        if s.k_blocks(self.spec) == 1 {
            clear();
        } else {
            b.if_else(tile.fresh, &[], clear, Vec::new);
        }
        let one = codes.groups(self.spec.k) == 1;
        let steps = if one { tile.steps } else { self.c(codes.group / s.depth) };
        let first_group = if one { self.c(0) } else { b.divui(tile.k0, self.c(codes.group)) };
        let addresses = [tile.w, tile.ahead];
        b.for_(self.c(0), tile.steps, steps, &addresses, |start, addresses| {
            let here = b.minsi(steps, b.subi(tile.steps, start));
            let zeros = (0..count).map(|_| b.f32s(0.0, lanes)).collect();
            let init = [addresses.to_vec(), zeros].concat();
            let carried = b.for_(self.c(0), here, self.c(1), &init, |i, carried| {
                self.turn(tile, b.addi(start, i), carried, fetch)
            });
            let group = b.addi(first_group, b.divui(start, steps));
            let scales: Vec<_> = (0..s.nv).filter_map(|v| self.scale_of(&codes, tile, group, v)).collect();
            for (i, sum) in carried[2..].iter().enumerate() {
                let before = b.load(place(i), &floats, 4);
                let scale = scales.get(i % s.nv).copied().expect("codes have scales");
                b.store(b.fma(*sum, scale, before), place(i), 4);
            }
            carried[..2].to_vec()
        });
        Some(())
    }

    /// The scales of vector `v` of outputs for a group of inputs.
    fn scale_of(&self, codes: &Codes, tile: Tile<'c>, group: V<'c>, v: usize) -> Option<V<'c>> {
        let (b, bytes) = (self.b, codes.scale.bytes());
        let row = b.gep(tile.scales?, "i8", b.mulc(group, (self.schedule.panel() * bytes).cast_signed()));
        Some(codes.scales(b, self.at(row, (v * self.lanes) as u64 * bytes), Places(Some(self.lanes))))
    }

    /// The zeros of vector `v` of outputs for a group of inputs.
    fn zero_of(&self, tile: Tile<'c>, group: V<'c>, v: usize) -> Option<V<'c>> {
        let b = self.b;
        let row = b.gep(tile.zeros?, "i8", b.mulc(group, (self.schedule.panel() * 4).cast_signed()));
        Some(b.load(self.at(row, (v * self.lanes * 4) as u64), &format!("vector<{}xf32>", self.lanes), 4))
    }

    /// Adds the inputs of a step times weights that are decoded in registers.
    pub(super) fn decoded(&self, codes: &Codes, tile: Tile<'c>, w: V<'c>, a: V<'c>, step: V<'c>, sums: &mut [V<'c>]) {
        let s = self.schedule;
        let late = self.scaled_late().is_some();
        let input = |input: u64| -> Vec<V<'c>> {
            if late {
                return (0..s.nv).map(|v| self.number(codes, w, v, input)).collect();
            }
            let group = self.group_of(codes, tile, step, input);
            (0..s.nv).map(|v| self.weight(codes, tile, self.code(codes, w, v, input), group, v)).collect()
        };
        match s.engine {
            Engine::Pairs => {
                for at in 0..s.depth / 2 {
                    let looked_up = if late { self.number_pairs(codes, w, at) } else { None };
                    let pairs = looked_up.unwrap_or_else(|| {
                        let [low, high] = s.pair(at).map(input);
                        low.iter().zip(high).map(|(low, high)| pair(self.b, *low, high, self.lanes)).collect()
                    });
                    self.multiply(a, at, &pairs, sums);
                }
            }
            Engine::Vector | Engine::Matrix => (0..s.depth).for_each(|at| self.multiply(a, at, &input(at), sums)),
        }
    }

    /// The group of an input of a step.
    fn group_of(&self, codes: &Codes, tile: Tile<'c>, step: V<'c>, input: u64) -> V<'c> {
        let (b, depth) = (self.b, self.schedule.depth);
        let groups = codes.groups(self.spec.k);
        if groups == 1 {
            return self.c(0);
        }
        // Where groups are whole steps, all inputs of a step share one.
        let input = if codes.group.is_multiple_of(depth) { 0 } else { input };
        let k = b.addc(b.addi(tile.k0, b.mulc(step, depth.cast_signed())), input.cast_signed());
        // Inputs past the last one are zero: any scale serves.
        b.minsi(b.divui(k, self.c(codes.group)), self.c(groups - 1))
    }

    /// A code as a weight, held as f32.
    fn weight(&self, codes: &Codes, tile: Tile<'c>, code: V<'c>, group: V<'c>, v: usize) -> V<'c> {
        let scale = self.scale_of(codes, tile, group, v).expect("codes have scales");
        codes.decode(self.b, (code, Places(Some(self.lanes))), (scale, self.zero_of(tile, group, v)), self.spec.w)
    }

    /// The inputs of a step of vector `v` of outputs, in the low bits of i32: neighbours of one output lie together.
    fn word(&self, codes: &Codes, w: V<'c>, v: usize) -> V<'c> {
        let (b, lanes) = (self.b, self.lanes);
        let bits = self.schedule.depth * codes.bits;
        let stored = b.load(self.at(w, (v * lanes) as u64 * bits / 8), &format!("vector<{lanes}xi{bits}>"), 1);
        if bits == 32 { stored } else { b.cast("arith.extui", stored, &format!("vector<{lanes}xi32>")) }
    }

    /// The codes of an input of a step.
    fn code(&self, codes: &Codes, w: V<'c>, v: usize, input: u64) -> V<'c> {
        let (b, lanes) = (self.b, self.lanes);
        let shift = i32::try_from(input * codes.bits).unwrap_or(0);
        b.andi(b.shrui(self.word(codes, w, v), b.i32s(shift, lanes)), b.i32s((1 << codes.bits) - 1, lanes))
    }

    /// The numbers of an input of a step, without their scales.
    fn number(&self, codes: &Codes, w: V<'c>, v: usize, input: u64) -> V<'c> {
        let (b, lanes) = (self.b, self.lanes);
        let computed = || codes.number(b, self.code(codes, w, v, input), Places(Some(lanes)));
        let Some(table) = codes.table() else { return computed() };
        let shift = i32::try_from(input * codes.bits).unwrap_or(0);
        let index = b.shrui(self.word(codes, w, v), b.i32s(shift, lanes));
        // A lookup takes as many of the lowest bits as there are places; what is above a shorter code makes no difference
        // in a table that repeats.
        let look_up = |name: &str| {
            let table = b.i32_table(table.iter().cycle().take(lanes).map(|value| value.to_bits().cast_signed()));
            let floats = format!("vector<{lanes}xf32>");
            let table = b.bitcast(table, &floats);
            b.intrinsic(name, &[table, index], &floats)
        };
        match (lanes, codes.number) {
            (16, _) => look_up("llvm.x86.avx512.permvar.sf.512"),
            (8, _) if table.len() <= lanes => look_up("llvm.x86.avx2.permps"),
            // The upper half of the codes are the negative numbers.
            (8, Number::E2m1) => {
                let magnitude = b.bitcast(look_up("llvm.x86.avx2.permps"), "vector<8xi32>");
                let sign = b.andi(b.shli(index, b.i32s(28, lanes)), b.i32s(i32::MIN, lanes));
                b.bitcast(b.ori(magnitude, sign), "vector<8xf32>")
            }
            (_, Number::Integer { .. } | Number::E4m3 | Number::E2m1) => computed(),
        }
    }

    /// The numbers of pair `at` of a step, for each vector of outputs; `None` where nothing looks them up.
    fn number_pairs(&self, codes: &Codes, w: V<'c>, at: u64) -> Option<Vec<V<'c>>> {
        let (b, s) = (self.b, self.schedule);
        let narrow = |value: f32| (value.to_bits() >> 16).cast_signed();
        let words = match (codes.table(), codes.number) {
            (Some(table), Number::Integer { .. } | Number::E4m3 | Number::E2m1) => {
                let table = b.i16_table(table.iter().cycle().take(WORDS).map(|value| narrow(*value)));
                // Read again for each pair rather than kept: the sums take the registers.
                let w = (0..at).fold(w, |w, _| self.hidden(w));
                let shift = b.i16_table((0..WORDS).map(|_| (at * codes.bits) as i32));
                let look_up = |v: usize| {
                    let stored = b.load(self.at(w, (v * 2 * WORDS) as u64), &words(), 1);
                    // A lookup takes the lowest five bits; what is above a shorter code makes no difference in a table
                    // that repeats.
                    let index = if at == 0 { stored } else { b.shrui(stored, shift) };
                    b.intrinsic("llvm.x86.avx512.permvar.hi.512", &[table, index], &words())
                };
                (0..s.nv).map(look_up).collect::<Vec<_>>()
            }
            (None, Number::E4m3) => (0..s.nv).step_by(2).flat_map(|v| self.e4m3_words(w, v)).collect(),
            (None, Number::Integer { .. } | Number::E2m1) => return None,
        };
        Some(words.into_iter().map(|found| b.bitcast(found, &format!("vector<{}xi32>", self.lanes))).collect())
    }

    /// Vectors `v` and, if there is one, `v + 1` of E4M3 codes as bf16. The halves of the magnitudes are looked up.
    fn e4m3_words(&self, w: V<'c>, v: usize) -> Vec<V<'c>> {
        let b = self.b;
        let count = (self.schedule.nv - v).min(2);
        let bytes = format!("vector<{}xi8>", 2 * WORDS);
        let at = self.at(w, (v * WORDS) as u64);
        let stored = match count {
            1 => {
                let half = b.load(at, &format!("vector<{WORDS}xi8>"), 1);
                b.shuffle([half, half], (0..2 * WORDS).map(|i| i % WORDS), &bytes)
            }
            _ => b.load(at, &bytes, 1),
        };
        // The instruction that puts halves side by side takes the first eight bytes of every sixteen, or the last.
        let eights = b.bitcast(stored, "vector<8xi64>");
        let codes = [0, 4, 1, 5, 2, 6, 3, 7].into_iter();
        let codes = b.bitcast(b.shuffle([eights, eights], codes, "vector<8xi64>"), &bytes);
        let look_up = |half: &dyn Fn(u32) -> u32| {
            let table = |first: u32| {
                let word = |i: u32| half(first + 2 * i) | half(first + 2 * i + 1) << 8;
                b.bitcast(b.i16_table((0..WORDS as u32).map(|i| word(i).cast_signed())), &bytes)
            };
            b.intrinsic("llvm.x86.avx512.vpermi2var.qi.512", &[table(0), codes, table(2 * WORDS as u32)], &bytes)
        };
        let low = look_up(&|code| e4m3(code) & 0xff);
        let sign = b.bitcast(b.i16_table((0..WORDS).map(|_| -0x7f80)), &bytes);
        let high = b.ori(look_up(&|code| e4m3(code) >> 8), b.andi(codes, sign));
        let beside = |first: usize| {
            let places = (0..2 * WORDS).map(|i| i / 16 * 16 + first + i % 16 / 2 + i % 2 * 2 * WORDS);
            b.bitcast(b.shuffle([low, high], places, &bytes), &words())
        };
        [0, 8].into_iter().take(count).map(beside).collect()
    }
}

/// Type of a vector of 16-bit words.
fn words() -> String {
    format!("vector<{WORDS}xi16>")
}

/// A magnitude of E4M3 as bf16.
fn e4m3(code: u32) -> u32 {
    let (exponent, mantissa) = (code >> 3, (code & 7) as f32 / 8.0);
    let value = if exponent == 0 { mantissa / 64.0 } else { (1.0 + mantissa) * 2f32.powi(exponent.cast_signed() - 7) };
    value.to_bits() >> 16
}

/// Two values of bf16, held as f32, as pairs.
pub(super) fn pair<'c>(b: &Builder<'c>, low: V<'c>, high: V<'c>, lanes: usize) -> V<'c> {
    let [low, high] = [low, high].map(|value| b.bitcast(value, &format!("vector<{lanes}xi32>")));
    b.ori(b.shrui(low, b.i32s(16, lanes)), b.andi(high, b.i32s(-0x1_0000, lanes)))
}
