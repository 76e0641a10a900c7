//! Codes in the order of fragments: what a lane of a tensor core multiplies of a row lies together in memory.
//!
//! A *line* is 64 inputs of a row. Lane `t` of the four that share a row has 16 of its codes in eight pieces: piece
//! `2c + h` is inputs `16c + 8h + 2t` and the next, as fragments of `mma.sync` and `wgmma` want them. Lines of eight
//! rows are neighbours ([`Layout::Fragments`]), so that a warp reads them in one go, from memory or from a stage,
//! without conflicts between banks. Scales and zeros are in the order `[panel of eight rows][group][row]`.

use super::{
    Kernel,
    device::{asm, vector},
    schedule,
    tile::int,
};
use crate::{
    codes::{self, Codes, Number, Places},
    grouped::Grouped,
    mlir::{Builder, V},
};
use moec_abi::{DType, Layout};

/// Inputs of a line.
pub(super) const LINE: u64 = 64;

/// Rows of a panel.
pub(super) const PANEL: u32 = schedule::BLOCK as u32;

/// Codes in the order of fragments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coded {
    codes: Codes,
    /// Groups of a row.
    pub(super) groups: u64,
    /// Groups of a line.
    pub(super) each: u32,
    /// Lines of a group; `None`: a row has one group.
    span: Option<u64>,
}

/// What turns the codes of a group into weights: a scale (f32; of E2M1 a pair of bf16), and a zero (f32).
#[derive(Clone, Copy)]
pub(super) struct Factor<'c> {
    scale: V<'c>,
    zero: Option<V<'c>>,
}

impl Coded {
    /// The codes of a product of bf16; `None` where groups do not consist of whole pieces of a line.
    pub(super) fn new(spec: &Grouped) -> Option<Self> {
        let codes = spec.codes?;
        let groups = codes.groups(spec.k);
        let (each, span) = match codes.group {
            _ if groups <= 1 => (1, None),
            group if group.is_multiple_of(LINE) => (1, Some(group / LINE)),
            16 => (4, Some(1)),
            32 => (2, Some(1)),
            _ => return None,
        };
        let known = match codes.number {
            Number::Integer { .. } => matches!(codes.bits, 2 | 4 | 8),
            Number::E4m3 => codes.bits == 8 && !codes.zero,
            // Scales are exact in bf16, and so are weights.
            Number::E2m1 => codes.bits == 4 && !codes.zero && codes.scale == DType::U8,
        };
        let narrow = spec.a == DType::Bf16 && spec.w == DType::Bf16;
        (known && narrow).then_some(Self { codes, groups, each, span })
    }

    /// Lanes that have codes of their own: two lanes share each byte of codes of two bits.
    const fn lanes(&self) -> u64 {
        if self.codes.bits == 2 { 2 } else { 4 }
    }

    /// Order of the packed codes, whose rows have a multiple of `columns` bytes.
    pub(super) const fn layout(&self, columns: u64) -> Layout {
        Layout::Fragments { lanes: self.lanes(), unit: self.codes.bits.div_ceil(4), columns }
    }

    /// Bytes of a line.
    pub(super) fn line_bytes(&self) -> u32 {
        (LINE * self.codes.bits / 8) as u32
    }

    /// 32-bit words of a lane's part of a line.
    pub(super) fn words(&self) -> u32 {
        self.line_bytes() / self.lanes() as u32 / 4
    }

    /// Words of a line that each of four lanes loads, where it loads no others.
    pub(super) fn share(&self) -> u32 {
        self.line_bytes() / 16
    }

    /// Byte of a line at which the part of lane `t` starts.
    pub(super) fn part<'c>(&self, b: &Builder<'c>, t: V<'c>) -> V<'c> {
        let owner = if self.lanes() == 2 { b.shrui(t, b.i32(1)) } else { t };
        b.mulc(owner, i64::from(self.words() * 4))
    }

    /// The codes of lane `t`, from the words of its part.
    pub(super) fn own<'c>(&self, b: &Builder<'c>, t: V<'c>, words: &[V<'c>]) -> Vec<V<'c>> {
        if self.lanes() == 4 {
            return words.to_vec();
        }
        let upper = b.shli(b.andi(t, b.i32(1)), b.i32(2));
        words.iter().map(|word| b.shrui(*word, upper)).collect()
    }

    /// Sizes of scales and, if there are any, of zeros, in bytes.
    pub(super) fn sizes(&self) -> impl Iterator<Item = u32> + use<> {
        let zero = self.codes.zero.then_some(4);
        std::iter::once(schedule::size(self.codes.scale)).chain(zero)
    }

    /// Whether the factors of a line serve others too.
    pub(super) const fn lasts(&self) -> bool {
        !matches!(self.span, Some(1))
    }

    /// Whether all lines share their factors.
    pub(super) const fn is_single(&self) -> bool {
        self.span.is_none()
    }

    /// Whether line `of` of `count` that follow each other surely has the groups of the line before it.
    pub(super) const fn follows(&self, of: u32, count: u32) -> bool {
        let (of, count) = (of as u64, count as u64);
        match self.span {
            None => of > 0,
            Some(lines) if lines % count == 0 => of > 0,
            Some(lines) => count % lines == 0 && of % lines > 0,
        }
    }

    /// First group of a line (i32).
    pub(super) fn group<'c>(&self, b: &Builder<'c>, line: V<'c>) -> V<'c> {
        match self.span {
            None => b.i32(0),
            Some(1) => b.mulc(line, i64::from(self.each)),
            Some(lines) => b.divui(line, b.i32(int(lines.cast_signed()))),
        }
    }

    /// Whether a line is the first of its group.
    pub(super) fn is_first<'c>(&self, b: &Builder<'c>, line: V<'c>) -> V<'c> {
        let place = self.span.map_or(line, |lines| b.remui(line, b.i32(int(lines.cast_signed()))));
        b.cmpi("eq", place, b.i32(0))
    }

    /// What stands at the address of a scale, as it is decoded; `raw` is an f32, or an exponent, as i32.
    pub(super) fn factor<'c>(&self, b: &Builder<'c>, raw: &[V<'c>]) -> Factor<'c> {
        let scale = if self.codes.scale == DType::U8 {
            codes::power(b, raw[0], Places(None))
        } else {
            b.bitcast(raw[0], "f32")
        };
        let scale = match self.codes.number {
            Number::Integer { .. } | Number::E4m3 => scale,
            Number::E2m1 => {
                let narrow = b.bitcast(b.cast("arith.truncf", scale, "bf16"), "i16");
                b.mulc(b.cast("arith.extui", narrow, "i32"), 0x1_0001)
            }
        };
        Factor { scale, zero: raw.get(1).map(|zero| b.bitcast(*zero, "f32")) }
    }

    /// The group, of those of a line, to which a block of 16 inputs belongs.
    pub(super) const fn group_of(&self, block: u32) -> usize {
        (block * self.each / 4) as usize
    }

    /// Two neighbouring weights, rounded to bf16: those of a piece of the lane.
    pub(super) fn pair<'c>(&self, b: &Builder<'c>, words: &[V<'c>], piece: u32, factor: Factor<'c>) -> V<'c> {
        let all = 8 / words.len() as u32;
        // Bit of the word at which the piece starts; two lanes may share the bits from there on.
        let (word, start) = (words[(piece / all) as usize], piece % all * (32 / all));
        let bits = self.codes.bits as u32;
        let numbers: [V<'c>; 2] = match self.codes.number {
            Number::Integer { offset } => [0, bits].map(|at| {
                // An integer below 2^23 is the fraction of 2^23 with it added.
                let code = b.andi(b.shrui(word, b.i32((start + at).cast_signed())), b.i32((1 << bits) - 1));
                let sum = b.bitcast(b.ori(code, b.i32(0x4b00_0000)), "f32");
                b.subf(sum, b.f32((0x80_0000 + offset) as f32))
            }),
            Number::E4m3 => {
                let (half, scale) = (if start == 0 { "l" } else { "h" }, factor.scale);
                let text = format!(
                    "{{ .reg .b16 l, h, a, b; .reg .b32 x; .reg .f32 p, q; mov.b32 {{l, h}}, $1; \
                     cvt.rn.f16x2.e4m3x2 x, {half}; mov.b32 {{a, b}}, x; cvt.f32.f16 p, a; cvt.f32.f16 q, b; \
                     mul.rn.f32 p, p, $2; mul.rn.f32 q, q, $2; cvt.rn.bf16x2.f32 $0, q, p; }}"
                );
                return asm(b, &text, "=r,r,f", &[word, scale], "i32");
            }
            Number::E2m1 => {
                // Four bits come to the top of a half each: the lower four of the byte to the lower half. Then they go
                // where bf16 has them, which is 2^-126 times the number, for subnormal ones too.
                let j = piece % all;
                let selector = (4 + j) << 12 | j << 8 | j << 4 | j;
                let text = format!(
                    "{{ .reg .b32 x, y; prmt.b32 x, $2, $1, {selector}; shr.u32 y, x, 6; and.b32 y, y, 0x01c001c0; \
                     lop3.b32 x, x, 0x80008000, y, 0xea; mul.rn.bf16x2 x, x, $3; mul.rn.bf16x2 $0, x, $4; }}"
                );
                let (raised, power) = (b.shli(word, b.i32(4)), b.i32(0x7e80_7e80));
                return asm(b, &text, "=r,r,r,r,r", &[word, raised, power, factor.scale], "i32");
            }
        };
        let weights = numbers.map(|n| b.mulf(factor.zero.map_or(n, |zero| b.subf(n, zero)), factor.scale));
        let narrow = b.cast("arith.truncf", vector(b, &weights), "vector<2xbf16>");
        b.bitcast(narrow, "i32")
    }
}

impl<'c> Kernel<'_, 'c> {
    /// Panels of an expert, of all matrices.
    pub(super) fn panels(&self) -> i64 {
        let panels = schedule::packed_rows(self.spec) / u64::from(PANEL);
        i64::try_from(panels).expect("weights fit in memory")
    }

    /// Addresses of scales and, if there are any, of zeros.
    pub(super) fn factor_args(&self) -> impl Iterator<Item = V<'c>> {
        self.args.scales.into_iter().chain(self.args.zeros)
    }
}
