//! Comparisons and selections.

use super::kernel::raw;
use super::{Decoder, last_type};
use crate::Error;
use crate::num;
use crate::op::{Kernel, NONE, V};
use crate::syntax::{Name, Operand, Operands, Ty};

/// The comparison codes of `setp`, in the order of [`compare`].
const COMPARE: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
];

macro_rules! compare_kernels {
    ($t:ty, $code:expr) => {
        match $code {
            0 => raw!(|x, y| u64::from(x as $t == y as $t)),
            1 => raw!(|x, y| u64::from(x as $t != y as $t)),
            2 | 6 => raw!(|x, y| u64::from((x as $t) < y as $t)),
            3 | 7 => raw!(|x, y| u64::from(x as $t <= y as $t)),
            4 | 8 => raw!(|x, y| u64::from(x as $t > y as $t)),
            5 | 9 => raw!(|x, y| u64::from(x as $t >= y as $t)),
            _ => return None,
        }
    };
}

macro_rules! compare_floats {
    ($load:expr, $code:expr) => {
        match $code {
            0 => raw!(|x, y, _z, i| u64::from($load(x, i) == $load(y, i))),
            1 => raw!(|x, y, _z, i| u64::from($load(x, i) < $load(y, i) || $load(x, i) > $load(y, i))),
            2 => raw!(|x, y, _z, i| u64::from($load(x, i) < $load(y, i))),
            3 => raw!(|x, y, _z, i| u64::from($load(x, i) <= $load(y, i))),
            4 => raw!(|x, y, _z, i| u64::from($load(x, i) > $load(y, i))),
            5 => raw!(|x, y, _z, i| u64::from($load(x, i) >= $load(y, i))),
            10 => raw!(|x, y, _z, i| u64::from(!($load(x, i) < $load(y, i) || $load(x, i) > $load(y, i)))),
            11 => raw!(|x, y, _z, i| u64::from($load(x, i) != $load(y, i))),
            12 => raw!(|x, y, _z, i| u64::from(!($load(x, i) >= $load(y, i)))),
            13 => raw!(|x, y, _z, i| u64::from(!($load(x, i) > $load(y, i)))),
            14 => raw!(|x, y, _z, i| u64::from(!($load(x, i) <= $load(y, i)))),
            15 => raw!(|x, y, _z, i| u64::from(!($load(x, i) < $load(y, i)))),
            16 => raw!(|x, y, _z, i| u64::from(!$load(x, i).is_nan() && !$load(y, i).is_nan())),
            17 => raw!(|x, y, _z, i| u64::from($load(x, i).is_nan() || $load(y, i).is_nan())),
            _ => return None,
        }
    };
}

#[inline(always)]
fn load32(x: u64, ftz: u64) -> f32 {
    let f = f32::from_bits(x as u32);
    if ftz & 1 == 1 { num::flush(f) } else { f }
}

#[inline(always)]
fn load64(x: u64, _: u64) -> f64 {
    f64::from_bits(x)
}

#[inline(always)]
fn load_half(x: u64, _: u64) -> f32 {
    num::f16_to_f32(x as u16)
}

#[inline(always)]
fn load_bf16(x: u64, _: u64) -> f32 {
    num::bf16_to_f32(x as u16)
}

#[expect(
    clippy::neg_cmp_op_on_partial_ord,
    reason = "the negations are true for NaN, as the unordered comparisons are"
)]
fn compare(code: usize, ty: Ty) -> Option<Kernel> {
    Some(match ty {
        Ty::U16 | Ty::B16 => compare_kernels!(u16, code),
        Ty::S16 => compare_kernels!(i16, code),
        Ty::U32 | Ty::B32 => compare_kernels!(u32, code),
        Ty::S32 => compare_kernels!(i32, code),
        Ty::U64 | Ty::B64 => compare_kernels!(u64, code),
        Ty::S64 => compare_kernels!(i64, code),
        Ty::F32 => compare_floats!(load32, code),
        Ty::F64 => compare_floats!(load64, code),
        Ty::F16 => compare_floats!(load_half, code),
        Ty::Bf16 => compare_floats!(load_bf16, code),
        _ => return None,
    })
}

impl Decoder<'_> {
    pub(super) fn compare(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let set = p[0] == "set";
        let Some(ty) = last_type(p) else { return self.unsupported("type") };
        let Some(code) = COMPARE.iter().position(|c| *c == p[1]) else { return self.unsupported("comparison") };
        let packed = matches!(ty, Ty::F16x2 | Ty::Bf16x2);
        let (low, k) = match ty {
            Ty::F16x2 => (Ty::F16, compare(code, Ty::F16)),
            Ty::Bf16x2 => (Ty::Bf16, compare(code, Ty::Bf16)),
            _ => (ty, compare(code, ty)),
        };
        let Some(k) = k else { return self.unsupported("comparison of this type") };
        let (a, b) = (self.source(&o[1], low)?, self.source(&o[2], low)?);
        let ftz = u64::from(p.contains(&"ftz"));
        let combine = ["and", "or", "xor"].iter().find(|s| p.contains(s));
        let c = match combine {
            Some(_) => {
                let (c, negate) = self.pred(&o[3])?;
                if negate {
                    let t = self.temp(Ty::Pred);
                    self.alu_op(raw!(|x| (x ^ 1) & 1), t, [c, NONE, NONE], 0);
                    t
                } else {
                    c
                }
            }
            None => NONE,
        };
        let join = |s: &str| match s {
            "and" => raw!(|x, y| x & y & 1),
            "or" => raw!(|x, y| (x | y) & 1),
            _ => raw!(|x, y| (x ^ y) & 1),
        };
        let one = matches!(o[0], Operand::Word(_));
        if one && combine.is_none() && !set && !packed {
            let d = self.dest(&o[0])?;
            self.alu_op(k, d, [a, b, NONE], ftz);
            return Ok(());
        }
        let first = self.temp(Ty::Pred);
        let second = self.temp(Ty::Pred);
        self.alu_op(k, first, [a, b, NONE], ftz);
        if packed {
            // The upper halves give the second predicate.
            let (ah, bh) = (self.temp(Ty::B16), self.temp(Ty::B16));
            self.alu_op(raw!(|x| x >> 16 & 0xffff), ah, [a, NONE, NONE], 0);
            self.alu_op(raw!(|x| x >> 16 & 0xffff), bh, [b, NONE, NONE], 0);
            self.alu_op(k, second, [ah, bh, NONE], ftz);
        } else {
            self.alu_op(raw!(|x| (x ^ 1) & 1), second, [first, NONE, NONE], 0);
        }
        if let Some(s) = combine {
            self.alu_op(join(s), first, [first, c, NONE], 0);
            self.alu_op(join(s), second, [second, c, NONE], 0);
        }
        if set {
            let Some(dt) = p.iter().rev().skip(1).find_map(|s| Ty::parse(s)) else {
                return self.unsupported("type of the result");
            };
            let d = self.dest(&o[0])?;
            let yes = match dt {
                Ty::F32 => 0x3f80_0000,
                Ty::U32 | Ty::S32 => 0xffff_ffff,
                Ty::U16 | Ty::S16 => 0xffff,
                Ty::F16 => 0x3c00,
                Ty::Bf16 => 0x3f80,
                Ty::F16x2 => 0x3c00,
                Ty::Bf16x2 => 0x3f80,
                _ => return self.unsupported("type of the result"),
            };
            if packed {
                let (lo, hi) =
                    if dt == Ty::F16x2 || dt == Ty::Bf16x2 { (yes, yes << 16) } else { (0xffff, 0xffff_0000) };
                self.alu_op(
                    raw!(|x, y, _z, i| (if x & 1 == 1 { i & 0xffff } else { 0 })
                        | (if y & 1 == 1 { i & 0xffff_0000 } else { 0 })),
                    d,
                    [first, second, NONE],
                    lo | hi,
                );
            } else {
                self.alu_op(raw!(|x, _y, _z, i| if x & 1 == 1 { i } else { 0 }), d, [first, NONE, NONE], yes);
            }
            return Ok(());
        }
        let (d, q) = self.dest_pair(&o[0])?;
        for (to, from) in [(d, first), (q, second)] {
            self.copy(to, from, 1);
        }
        Ok(())
    }

    pub(super) fn select(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let types: Vec<Ty> = p.iter().filter_map(|s| Ty::parse(s)).collect();
        let Some(ty) = types.first().copied() else { return self.unsupported("type") };
        let (a, b) = (self.source(&o[1], ty)?, self.source(&o[2], ty)?);
        let mask = if ty.bits() >= 64 { u64::MAX } else { (1 << ty.bits()) - 1 };
        if p[0] == "slct" {
            let ct = types.get(1).copied().unwrap_or(Ty::S32);
            let c = self.source(&o[3], ct)?;
            let d = self.dest(&o[0])?;
            let k = if ct == Ty::F32 {
                raw!(|x, y, z, i| if f32::from_bits(z as u32) >= 0.0 { x } else { y } & i)
            } else {
                raw!(|x, y, z, i| if z as i32 >= 0 { x } else { y } & i)
            };
            self.alu_op(k, d, [a, b, c], mask);
            return Ok(());
        }
        let (c, negate) = self.pred(&o[3])?;
        let d = self.dest(&o[0])?;
        let k = if negate {
            raw!(|x, y, z, i| (if z & 1 == 0 { x } else { y }) & i)
        } else {
            raw!(|x, y, z, i| (if z & 1 == 1 { x } else { y }) & i)
        };
        self.alu_op(k, d, [a, b, c], mask);
        Ok(())
    }
}
