//! f16 and bf16 arithmetic, single and packed in pairs.
//!
//! Sums and products are formed in f32 or f64, whose precision is more than twice that of the format, so that the
//! second rounding changes nothing.

use super::Decoder;
use super::float::{max32, min32, unary};
use crate::Error;
use crate::num::{self, Format, Round};
use crate::op::{Kernel, V};
use crate::syntax::{Name, Operands, Ty};

/// Bits of the immediate.
const PACKED: u64 = 1;
const BF16: u64 = 2;
const SAT: u64 = 4;
const RELU: u64 = 8;
const NAN: u64 = 16;
const FTZ: u64 = 32;

fn format(imm: u64) -> Format {
    if imm & BF16 != 0 { num::BF16 } else { num::F16 }
}

fn load(x: u16, imm: u64) -> f32 {
    let f = if imm & BF16 != 0 { num::bf16_to_f32(x) } else { num::f16_to_f32(x) };
    let subnormal = imm & FTZ != 0 && f.abs() < if imm & BF16 != 0 { f32::MIN_POSITIVE } else { 6.103_515_6e-5 };
    if subnormal { 0.0f32.copysign(f) } else { f }
}

fn store(x: f64, imm: u64) -> u16 {
    let mut x = x;
    if imm & SAT != 0 {
        x = if x > 0.0 { x.min(1.0) } else { 0.0 };
    }
    if imm & RELU != 0 && x <= 0.0 {
        x = 0.0;
    }
    num::encode(x, format(imm), Round::NearestEven, false) as u16
}

macro_rules! half_kernel {
    (|$x:ident, $y:ident, $z:ident, $i:ident| $e:expr) => {{
        fn one(a: u16, b: u16, c: u16, $i: u64) -> u16 {
            let ($x, $y, $z) = (load(a, $i), load(b, $i), load(c, $i));
            let _ = ($y, $z);
            store(f64::from($e), $i)
        }
        fn k(a: &V, b: &V, c: &V, imm: u64, o: &mut V) {
            for l in 0..32 {
                let low = one(a[l] as u16, b[l] as u16, c[l] as u16, imm);
                let high = if imm & PACKED != 0 {
                    one((a[l] >> 16) as u16, (b[l] >> 16) as u16, (c[l] >> 16) as u16, imm)
                } else {
                    0
                };
                o[l] = u64::from(low) | u64::from(high) << 16;
            }
        }
        k as Kernel
    }};
}

/// Sign manipulation keeps the bits of NaN.
macro_rules! bits_kernel {
    (|$x:ident| $e:expr) => {{
        fn k(a: &V, _: &V, _: &V, imm: u64, o: &mut V) {
            for l in 0..32 {
                let $x = a[l] as u32;
                let r: u32 = $e;
                o[l] = u64::from(if imm & PACKED != 0 { r } else { r & 0xffff });
            }
        }
        k as Kernel
    }};
}

/// One element of a packed atomic or reduction.
pub(crate) fn combine(op: crate::op::Rmw, bf16: bool, a: u16, b: u16) -> u16 {
    let imm = if bf16 { BF16 } else { 0 };
    let (x, y) = (load(a, imm), load(b, imm));
    match op {
        crate::op::Rmw::Min => store(f64::from(min32(x, y, false)), imm),
        crate::op::Rmw::Max => store(f64::from(max32(x, y, false)), imm),
        _ => store(f64::from(x) + f64::from(y), imm),
    }
}

impl Decoder<'_> {
    pub(super) fn half(&mut self, p: Name<'_>, o: Operands<'_>, ty: Ty) -> Result<bool, Error> {
        let has = |s: &str| p.contains(&s);
        let mut imm = 0;
        for (bit, on) in [
            (PACKED, matches!(ty, Ty::F16x2 | Ty::Bf16x2)),
            (BF16, matches!(ty, Ty::Bf16 | Ty::Bf16x2)),
            (SAT, has("sat")),
            (RELU, has("relu")),
            (NAN, has("NaN")),
            (FTZ, has("ftz")),
        ] {
            imm |= if on { bit } else { 0 };
        }
        let found = match p[0] {
            "add" => (half_kernel!(|x, y, _z, _i| f64::from(x) + f64::from(y)), 2),
            "sub" => (half_kernel!(|x, y, _z, _i| f64::from(x) - f64::from(y)), 2),
            "mul" => (half_kernel!(|x, y, _z, _i| f64::from(x) * f64::from(y)), 2),
            "fma" => (half_kernel!(|x, y, z, _i| num::add_odd(f64::from(x) * f64::from(y), f64::from(z))), 3),
            "min" => (half_kernel!(|x, y, _z, i| min32(x, y, i & NAN != 0)), 2),
            "max" => (half_kernel!(|x, y, _z, i| max32(x, y, i & NAN != 0)), 2),
            "neg" => (bits_kernel!(|x| x ^ 0x8000_8000), 1),
            "abs" => (bits_kernel!(|x| x & 0x7fff_7fff), 1),
            "ex2" => (half_kernel!(|x, _y, _z, _i| f64::from(x).exp2()), 1),
            "tanh" => (half_kernel!(|x, _y, _z, _i| f64::from(x).tanh()), 1),
            name => {
                debug_assert!(unary(name).is_none() || !matches!(name, "ex2" | "tanh"));
                return Ok(false);
            }
        };
        self.operate(found.0, found.1, ty, o, imm)
    }
}
