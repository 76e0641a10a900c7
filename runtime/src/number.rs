//! Element types: decoding to and encoding from f32 and f64.

use half::{bf16, f16};
use moec_abi::DType;
use std::sync::LazyLock;

/// Values of the 256 codes of an 8-bit float.
pub(crate) struct Table(pub(crate) [f32; 256]);

fn minifloat(code: u8, exponent_bits: u32, mantissa_bits: u32, finite_only: bool) -> f32 {
    let mask = (1u32 << mantissa_bits) - 1;
    let mantissa = u32::from(code) & mask;
    let exponent = (u32::from(code) >> mantissa_bits) & ((1 << exponent_bits) - 1);
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let top = (1u32 << exponent_bits) - 1;
    let bias = i32::from((1i16 << (exponent_bits - 1)) - 1);
    let scale = |e: u32| 2f32.powi(e.cast_signed() - bias - mantissa_bits.cast_signed());
    if exponent == top && finite_only && mantissa == mask {
        f32::NAN
    } else if exponent == top && !finite_only {
        if mantissa == 0 { sign * f32::INFINITY } else { f32::NAN }
    } else if exponent == 0 {
        sign * mantissa as f32 * scale(1)
    } else {
        sign * (mantissa + mask + 1) as f32 * scale(exponent)
    }
}

fn table(exponent_bits: u32, mantissa_bits: u32, finite_only: bool) -> Table {
    let mut values = [0.0; 256];
    for (code, value) in (0u8..=255).zip(&mut values) {
        *value = minifloat(code, exponent_bits, mantissa_bits, finite_only);
    }
    Table(values)
}

/// OCP E4M3: no infinities, one NaN per sign.
pub(crate) static E4M3: LazyLock<Table> = LazyLock::new(|| table(4, 3, true));
/// OCP E5M2.
pub(crate) static E5M2: LazyLock<Table> = LazyLock::new(|| table(5, 2, false));
/// OCP E2M1, the codes of MXFP4.
pub(crate) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The power of two of an OCP E8M0 code; 255 is NaN.
pub(crate) fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// The code nearest to `value`, ties to even; too large values saturate, as OCP conversions do.
fn encode_minifloat(value: f64, table: &Table) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let size = value.abs();
    if value.is_nan() {
        return sign | 0x7f;
    }
    // Codes 0..0x7f rise with the value; find the last one that is not above.
    let finite = |code: u8| table.0[usize::from(code)].is_finite();
    let top = (0..=0x7fu8).rev().find(|&c| finite(c)).unwrap_or(0);
    let below = (0..=top).rev().find(|&c| f64::from(table.0[usize::from(c)]) <= size).unwrap_or(0);
    if below == top {
        return sign | top;
    }
    let (low, high) = (f64::from(table.0[usize::from(below)]), f64::from(table.0[usize::from(below) + 1]));
    let up = match (size - low).total_cmp(&(high - size)) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => below % 2 == 1,
    };
    sign | (below + u8::from(up))
}

/// Decodes little-endian element `index` of `bytes`; the caller has checked the length.
pub(crate) fn decode(dtype: DType, bytes: &[u8], index: usize) -> f64 {
    fn take<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&bytes[index * N..index * N + N]);
        out
    }
    match dtype {
        DType::F64 => f64::from_le_bytes(take(bytes, index)),
        DType::F32 => f64::from(f32::from_le_bytes(take(bytes, index))),
        DType::Bf16 => f64::from(bf16::from_le_bytes(take(bytes, index))),
        DType::F16 => f64::from(f16::from_le_bytes(take(bytes, index))),
        DType::F8e4m3 => f64::from(E4M3.0[usize::from(bytes[index])]),
        DType::F8e5m2 => f64::from(E5M2.0[usize::from(bytes[index])]),
        DType::U8 => f64::from(bytes[index]),
        DType::I8 => f64::from(bytes[index].cast_signed()),
        DType::I32 => f64::from(i32::from_le_bytes(take(bytes, index))),
        DType::I64 => i64::from_le_bytes(take(bytes, index)) as f64,
    }
}

/// Encodes `value` as element `index` of `bytes`, rounding to nearest even; integers saturate.
pub(crate) fn encode(dtype: DType, value: f64, bytes: &mut [u8], index: usize) {
    let mut put = |data: &[u8]| bytes[index * data.len()..(index + 1) * data.len()].copy_from_slice(data);
    match dtype {
        DType::F64 => put(&value.to_le_bytes()),
        DType::F32 => put(&(value as f32).to_le_bytes()),
        DType::Bf16 => put(&bf16::from_f64(value).to_le_bytes()),
        DType::F16 => put(&f16::from_f64(value).to_le_bytes()),
        DType::F8e4m3 => put(&[encode_minifloat(value, &E4M3)]),
        DType::F8e5m2 => put(&[encode_minifloat(value, &E5M2)]),
        DType::U8 => put(&[value.round_ties_even() as u8]),
        DType::I8 => put(&(value.round_ties_even() as i8).to_le_bytes()),
        DType::I32 => put(&(value.round_ties_even() as i32).to_le_bytes()),
        DType::I64 => put(&(value.round_ties_even() as i64).to_le_bytes()),
    }
}

/// `value` rounded to `dtype`.
pub(crate) fn round(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F64 => value,
        DType::F32 => f64::from(value as f32),
        DType::Bf16 => f64::from(bf16::from_f64(value)),
        DType::F16 => f64::from(f16::from_f64(value)),
        DType::F8e4m3 => f64::from(E4M3.0[usize::from(encode_minifloat(value, &E4M3))]),
        DType::F8e5m2 => f64::from(E5M2.0[usize::from(encode_minifloat(value, &E5M2))]),
        DType::U8 => f64::from(value.round_ties_even() as u8),
        DType::I8 => f64::from(value.round_ties_even() as i8),
        DType::I32 => f64::from(value.round_ties_even() as i32),
        DType::I64 => (value.round_ties_even() as i64) as f64,
    }
}

/// `value` rounded to `dtype`, for the float types that f32 holds.
pub(crate) fn round_f32(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::F64 | DType::F32 => value,
        DType::Bf16 => bf16_from(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
            round(dtype, f64::from(value)) as f32
        }
    }
}

/// bfloat16 nearest to `value`; branch-free but for NaN, so that loops become vector code.
#[inline]
pub(crate) fn bf16_from(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    bf16::from_bits(((if value.is_nan() { quiet } else { rounded }) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats_have_the_ocp_extremes() {
        assert_eq!(E4M3.0[0x7e], 448.0);
        assert!(E4M3.0[0x7f].is_nan() && E4M3.0[0xff].is_nan());
        assert_eq!(E4M3.0[1], 2f32.powi(-9));
        assert_eq!(E5M2.0[0x7b], 57344.0);
        assert_eq!(E5M2.0[0x7c], f32::INFINITY);
        assert_eq!(E5M2.0[1], 2f32.powi(-16));
    }

    #[test]
    fn every_code_of_an_eight_bit_float_survives_a_round_trip() {
        for (dtype, table) in [(DType::F8e4m3, &E4M3), (DType::F8e5m2, &E5M2)] {
            for code in 0..=255u8 {
                let value = f64::from(table.0[usize::from(code)]);
                if value.is_finite() {
                    let mut byte = [0];
                    encode(dtype, value, &mut byte, 0);
                    assert_eq!(byte[0], code, "{dtype:?} {value}");
                }
            }
        }
    }

    #[test]
    fn bf16_rounding_equals_the_half_crate() {
        for bits in (0..=u32::MAX).step_by(9973) {
            let value = f32::from_bits(bits);
            assert_eq!(bf16_from(value).to_bits(), bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn shared_exponents_are_powers_of_two() {
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(0), 2f32.powi(-127));
        assert_eq!(e8m0(254), 2f32.powi(127));
        assert!(e8m0(255).is_nan());
    }
}
