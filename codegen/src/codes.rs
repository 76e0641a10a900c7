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

    /// The scales at an address: one, or a vector of so many.
    pub fn scales<'c>(&self, b: &Builder<'c>, at: V<'c>, count: Option<usize>) -> V<'c> {
        let ty = |element: &str| count.map_or_else(|| element.to_owned(), |n| format!("vector<{n}x{element}>"));
        if self.scale != DType::U8 {
            return b.load(at, &ty("f32"), 4);
        }
        let exponent = b.cast("arith.extui", b.load(at, &ty("i8"), 1), &ty("i32"));
        let c = |value| math::integer(b, exponent, value);
        let normal = b.shli(exponent, c(23));
        // 2^-127 is no normal number.
        let bits = b.select(b.cmpi("eq", exponent, c(0)), c(0x0040_0000), normal);
        b.bitcast(bits, &ty("f32"))
    }

    /// `code`, an integer or a vector of integers in 32 bits, as a weight; a weight of type `w`, held as f32.
    pub fn decode<'c>(&self, b: &Builder<'c>, code: V<'c>, scale: V<'c>, zero: Option<V<'c>>, w: DType) -> V<'c> {
        let value = self.number(b, code);
        let value = b.mulf(zero.map_or(value, |zero| b.subf(value, zero)), scale);
        if w == DType::Bf16 && !self.narrow() { math::rounded_to_bf16(b, value) } else { value }
    }

    /// The number that a code stands for.
    fn number<'c>(&self, b: &Builder<'c>, code: V<'c>) -> V<'c> {
        match self.number {
            Number::Integer { offset } => {
                let value = math::from_unsigned(b, code);
                b.subf(value, math::constant(b, value, offset as f32))
            }
            Number::E4m3 => small_float(b, code, 4, 3),
            Number::E2m1 => small_float(b, code, 2, 1),
        }
    }
}

/// A float of few bits without infinities: its bits are put where f32 has them. A subnormal number becomes the fraction
/// of a normal one, less its leading one: products with subnormal f32 are slow on many processors.
fn small_float<'c>(b: &Builder<'c>, code: V<'c>, exponent: u32, mantissa: u32) -> V<'c> {
    let c = |value| math::integer(b, code, value);
    let size = exponent + mantissa;
    let magnitude = b.andi(code, c((1 << size) - 1));
    let sign = b.shli(b.shrui(code, c(size.cast_signed())), c(31));
    let bias = 128 - (1 << (exponent - 1));
    let fraction = b.shli(magnitude, c((23 - mantissa).cast_signed()));
    let one = c((bias + 1) << 23);
    let subnormal = b.subf(math::float(b, b.addi(fraction, one)), math::float(b, one));
    let normal = math::float(b, b.addi(fraction, c(bias << 23)));
    let value = b.select(b.cmpi("ult", magnitude, c(1 << mantissa)), subnormal, normal);
    math::float(b, b.ori(math::bits(b, value), sign))
}
