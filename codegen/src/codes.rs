//! Weights that are stored as codes, and decoded by the kernel that multiplies.

use crate::{
    math,
    mlir::{Builder, V},
};
use moec_abi::DType;

/// What a code stands for, before its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// An unsigned integer.
    Integer {
        /// The code that stands for zero, before the zero of the group is taken away too.
        offset: u64,
    },
    /// OCP E4M3: a sign, four bits of exponent, three of mantissa.
    E4m3,
    /// OCP E2M1: a sign, two bits of exponent, one of mantissa.
    E2m1,
}

/// How weights are stored as codes that the kernel decodes: a weight is `(number - zero) * scale`.
///
/// A byte holds `8 / bits` neighbouring inputs of an output, the first in its lowest bits. A scale (and a zero, if
/// there are any) serves `group` neighbouring inputs of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codes {
    /// Bits of a code: 2, 4 or 8.
    pub bits: u64,
    /// What it stands for.
    pub number: Number,
    /// Inputs that share a scale.
    pub group: u64,
    /// Whether there are zeros, one for each scale.
    pub zero: bool,
    /// Type of the scales: f32, or u8 for a power of two (E8M0).
    pub scale: DType,
}

impl Codes {
    /// Codes in a byte.
    pub const fn per_byte(&self) -> u64 {
        8 / self.bits
    }

    /// Scales of one output whose sums run over `k` inputs.
    pub const fn groups(&self, k: u64) -> u64 {
        k.div_ceil(self.group)
    }

    /// Whether all weights are exact in bf16.
    const fn narrow(&self) -> bool {
        matches!(self.number, Number::E2m1) && matches!(self.scale, DType::U8)
    }

    /// The scales at an address.
    pub fn scales<'c>(&self, b: &Builder<'c>, at: V<'c>, places: Places) -> V<'c> {
        if self.scale != DType::U8 {
            return b.load(at, &places.ty("f32"), 4);
        }
        power(b, b.cast("arith.extui", b.load(at, &places.ty("i8"), 1), &places.ty("i32")), places)
    }

    /// `code` (i32) as a weight of type `w`, held as f32.
    pub fn decode<'c>(
        &self,
        b: &Builder<'c>,
        (code, places): (V<'c>, Places),
        (scale, zero): (V<'c>, Option<V<'c>>),
        w: DType,
    ) -> V<'c> {
        let value = self.number(b, code, places);
        let value = b.mulf(zero.map_or(value, |zero| b.subf(value, zero)), scale);
        if w != DType::Bf16 || self.narrow() {
            return value;
        }
        // To nearest, ties to even, as packing rounds; weights are finite.
        let raw = b.bitcast(value, &places.ty("i32"));
        let odd = b.andi(b.shrui(raw, places.integer(b, 16)), places.integer(b, 1));
        let rounded = b.addi(raw, b.addi(odd, places.integer(b, 0x7fff)));
        b.bitcast(b.andi(rounded, places.integer(b, -0x1_0000)), &places.ty("f32"))
    }

    /// What codes of few bits stand for.
    pub fn table(&self) -> Option<Vec<f32>> {
        let halves = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
        match self.number {
            Number::Integer { offset } if self.bits <= 4 => {
                Some((0..1_u64 << self.bits).map(|code| code as f32 - offset as f32).collect())
            }
            Number::E2m1 => Some(halves.iter().map(|value| *value as f32 / 2.0).collect()),
            Number::Integer { .. } | Number::E4m3 => None,
        }
    }

    /// The number that a code stands for.
    pub(crate) fn number<'c>(&self, b: &Builder<'c>, code: V<'c>, places: Places) -> V<'c> {
        match self.number {
            Number::Integer { offset } => {
                let value = b.cast("arith.uitofp", code, &places.ty("f32"));
                b.subf(value, math::constant(b, value, offset as f32))
            }
            Number::E4m3 => small_float(b, (code, places), 4, 3),
            Number::E2m1 => small_float(b, (code, places), 2, 1),
        }
    }
}

/// How many codes are decoded at a time: one (`None`), or a vector of them.
#[derive(Clone, Copy, Debug)]
pub struct Places(pub Option<usize>);

impl Places {
    fn ty(self, element: &str) -> String {
        self.0.map_or_else(|| element.to_owned(), |n| format!("vector<{n}x{element}>"))
    }

    fn integer<'c>(self, b: &Builder<'c>, value: i32) -> V<'c> {
        self.0.map_or_else(|| b.i32(value), |n| b.i32s(value, n))
    }
}

/// The power of two of an E8M0 exponent (i32).
pub fn power<'c>(b: &Builder<'c>, exponent: V<'c>, places: Places) -> V<'c> {
    let normal = b.shli(exponent, places.integer(b, 23));
    // 2^-127 is no normal number.
    let zero = b.cmpi("eq", exponent, places.integer(b, 0));
    b.bitcast(b.select(zero, places.integer(b, 0x0040_0000), normal), &places.ty("f32"))
}

/// A float of few bits without infinities: its bits are put where f32 has them. A subnormal number becomes the fraction
/// of a normal one, less its leading one: products with subnormal f32 are slow on many processors.
fn small_float<'c>(b: &Builder<'c>, (code, places): (V<'c>, Places), exponent: u32, mantissa: u32) -> V<'c> {
    let (c, float) = (|value| places.integer(b, value), |bits| b.bitcast(bits, &places.ty("f32")));
    let size = exponent + mantissa;
    let magnitude = b.andi(code, c((1 << size) - 1));
    let sign = b.shli(b.shrui(code, c(size.cast_signed())), c(31));
    let bias = 128 - (1 << (exponent - 1));
    let fraction = b.shli(magnitude, c((23 - mantissa).cast_signed()));
    let one = c((bias + 1) << 23);
    let subnormal = b.subf(float(b.addi(fraction, one)), float(one));
    let normal = float(b.addi(fraction, c(bias << 23)));
    let value = b.select(b.cmpi("ult", magnitude, c(1 << mantissa)), subnormal, normal);
    float(b.ori(b.bitcast(value, &places.ty("i32")), sign))
}
