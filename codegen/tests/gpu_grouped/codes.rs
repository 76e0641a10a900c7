//! Weights that are codes: drawn, as numbers, and packed.

use crate::case::Numbers;
use half::bf16;
use moec_abi::{DType, Layout};
use moec_codegen::{codes::Number, grouped::Grouped};

/// The codes of all matrices, and what they stand for.
pub(crate) struct Coded {
    /// Weights `[expert][matrix][row][column]`.
    pub(crate) weights: Vec<f64>,
    /// Packed codes, scales and zeros.
    pub(crate) packed: Vec<Vec<u8>>,
}

fn number(number: Number, code: u8) -> f64 {
    let float = |exponent: u32, mantissa: u32| {
        let magnitude = u32::from(code) & ((1 << (exponent + mantissa)) - 1);
        let (e, m) = (magnitude >> mantissa, f64::from(magnitude & ((1 << mantissa) - 1)) / f64::from(1 << mantissa));
        let bias = (1 << (exponent - 1)) - 1;
        let value = if e == 0 { m * 2f64.powi(1 - bias) } else { (1.0 + m) * 2f64.powi(e as i32 - bias) };
        if u32::from(code) >> (exponent + mantissa) & 1 == 1 { -value } else { value }
    };
    match number {
        Number::Integer { offset } => f64::from(code) - offset as f64,
        Number::E4m3 => float(4, 3),
        Number::E2m1 => float(2, 1),
    }
}

/// Draws the weights of a product whose kernel reads them in the order `layout`.
pub(crate) fn draw(spec: &Grouped, layout: &Layout, numbers: &mut Numbers) -> Coded {
    let codes = spec.codes.expect("the product has codes");
    let (matrices, groups) = (spec.matrices as u64, codes.groups(spec.k));
    let bytes_of_row = spec.k.div_ceil(codes.per_byte());
    let mut weights = Vec::new();
    let rows = spec.n.next_multiple_of(8);
    let count = spec.experts * matrices;
    let width = layout.padded_columns(bytes_of_row);
    let mut packed = vec![vec![0; (count * rows * width) as usize]];
    let factors = (count * rows * groups) as usize;
    packed.push(vec![0; factors * codes.scale.bytes() as usize]);
    if codes.zero {
        packed.push(vec![0; factors * 4]);
    }
    // The last code of E4M3 is no number.
    let known = (0..(1u32 << codes.bits) - 1).map(|code| number(codes.number, code as u8).abs());
    let largest = known.fold(1.0, f64::max);
    for (e, m, r) in
        (0..spec.experts).flat_map(|e| (0..matrices).flat_map(move |m| (0..spec.n).map(move |r| (e, m, r))))
    {
        let place = (e * rows / 8 + r / 8) * matrices + m;
        let mut row = vec![0u8; bytes_of_row as usize];
        let mut known = Vec::new();
        for g in 0..groups {
            let at = ((place * groups + g) * 8 + r % 8) as usize;
            let (scale, bytes) = match codes.scale {
                DType::U8 => {
                    let exponent = 117 + (numbers.next().abs() * 6.0) as u8;
                    (2f64.powi(i32::from(exponent) - 127), vec![exponent])
                }
                _ => {
                    let scale = (numbers.next() / largest / (spec.k as f64).sqrt()) as f32;
                    (f64::from(scale), scale.to_le_bytes().to_vec())
                }
            };
            packed[1][at * bytes.len()..][..bytes.len()].copy_from_slice(&bytes);
            let zero = if codes.zero { numbers.next() as f32 * (1 << (codes.bits - 1)) as f32 } else { 0.0 };
            if codes.zero {
                packed[2][at * 4..][..4].copy_from_slice(&zero.to_le_bytes());
            }
            known.push((scale, zero));
        }
        for c in 0..spec.k {
            let code = ((numbers.next() + 1.0) / 2.0 * f64::from(1 << codes.bits)) as u8;
            // Not the NaN.
            let code = if codes.number == Number::E4m3 && code & 0x7f == 0x7f { code - 1 } else { code };
            row[(c / codes.per_byte()) as usize] |= code << (c % codes.per_byte() * codes.bits);
            let (scale, zero) = known[(c / codes.group) as usize];
            let value = (number(codes.number, code) - f64::from(zero)) as f32 * scale as f32;
            // As kernels round: once from f32.
            weights.push(if spec.w == DType::F32 { f64::from(value) } else { bf16::from_f32(value).to_f64() });
        }
        for (c, byte) in (0..).zip(row) {
            let at = match *layout {
                Layout::Interleaved { .. } => (place * 8 + r % 8) * width + c,
                Layout::Fragments { lanes, unit, .. } => {
                    let depth = 8 * lanes * unit;
                    let line = (place * (width / depth) + c / depth) * 8 + r % 8;
                    line * depth + (c / unit % lanes * 8 + c / unit / lanes % 8) * unit + c % unit
                }
                Layout::Rows { .. } | Layout::Panels { .. } => panic!("{layout:?} is not what kernels ask for"),
            };
            packed[0][at as usize] = byte;
        }
    }
    Coded { weights, packed }
}
