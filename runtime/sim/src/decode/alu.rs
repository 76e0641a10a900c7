//! Integer, logic, comparison and data-movement instructions.

use super::{Decoder, last_type};
use crate::Error;
use crate::num;
use crate::op::{Kernel, NONE, Op, Reg, V};
use crate::syntax::{Operand, Ty};

/// A lane value of a native integer type.
trait Lane: Copy {
    fn of(x: u64) -> Self;
    fn bits(self) -> u64;
}

macro_rules! lanes {
    ($($t:ty as $u:ty),*) => { $(impl Lane for $t {
        #[inline(always)]
        fn of(x: u64) -> Self { x as $t }
        #[inline(always)]
        fn bits(self) -> u64 { self as $u as u64 }
    })* };
}
lanes!(u8 as u8, i8 as u8, u16 as u16, i16 as u16, u32 as u32, i32 as u32, u64 as u64, i64 as u64);

/// A kernel from an expression over lane values of type `$t`.
macro_rules! kernel {
    ($t:ty, |$x:ident| $e:expr) => {
        kernel!($t, |$x, _y, _z, _i| $e)
    };
    ($t:ty, |$x:ident, $y:ident| $e:expr) => {
        kernel!($t, |$x, $y, _z, _i| $e)
    };
    ($t:ty, |$x:ident, $y:ident, $z:ident| $e:expr) => {
        kernel!($t, |$x, $y, $z, _i| $e)
    };
    ($t:ty, |$x:ident, $y:ident, $z:ident, $i:ident| $e:expr) => {{
        fn k(a: &V, b: &V, c: &V, $i: u64, o: &mut V) {
            for l in 0..32 {
                let $x = <$t as Lane>::of(a[l]);
                let $y = <$t as Lane>::of(b[l]);
                let $z = <$t as Lane>::of(c[l]);
                let _ = ($y, $z);
                o[l] = ($e).bits();
            }
        }
        Some(k as Kernel)
    }};
}

/// The same kernel for each integer type.
macro_rules! by_int {
    ($ty:expr, $($f:tt)*) => {
        match $ty {
            Ty::U8 | Ty::B8 => kernel!(u8, $($f)*),
            Ty::S8 => kernel!(i8, $($f)*),
            Ty::U16 | Ty::B16 => kernel!(u16, $($f)*),
            Ty::S16 => kernel!(i16, $($f)*),
            Ty::U32 | Ty::B32 => kernel!(u32, $($f)*),
            Ty::S32 => kernel!(i32, $($f)*),
            Ty::U64 | Ty::B64 => kernel!(u64, $($f)*),
            Ty::S64 => kernel!(i64, $($f)*),
            _ => None,
        }
    };
}

macro_rules! raw {
    (|$x:ident| $e:expr) => {
        raw!(|$x, _y, _z, _i| $e)
    };
    (|$x:ident, $y:ident| $e:expr) => {
        raw!(|$x, $y, _z, _i| $e)
    };
    (|$x:ident, $y:ident, $z:ident| $e:expr) => {
        raw!(|$x, $y, $z, _i| $e)
    };
    (|$x:ident, $y:ident, $z:ident, $i:ident| $e:expr) => {{
        fn k(a: &V, b: &V, c: &V, $i: u64, o: &mut V) {
            for l in 0..32 {
                let ($x, $y, $z) = (a[l], b[l], c[l]);
                let _ = ($y, $z);
                o[l] = $e;
            }
        }
        k as Kernel
    }};
}

fn two(name: &str, ty: Ty, p: &[&str]) -> Option<Kernel> {
    let sat = p.contains(&"sat");
    match name {
        "add" if sat => kernel!(i32, |x, y| x.saturating_add(y)).filter(|_| ty == Ty::S32),
        "sub" if sat => kernel!(i32, |x, y| x.saturating_sub(y)).filter(|_| ty == Ty::S32),
        "add" | "sub" if matches!(ty, Ty::B16 | Ty::B32 | Ty::B64) => None,
        "add" => by_int!(ty, |x, y| x.wrapping_add(y)),
        "sub" => by_int!(ty, |x, y| x.wrapping_sub(y)),
        "min" => by_int!(ty, |x, y| x.min(y)),
        "max" => by_int!(ty, |x, y| x.max(y)),
        // Division by zero gives all ones and leaves the dividend as the remainder, as the hardware does.
        "div" if ty.signed() => by_int!(ty, |x, y| if y == 0 { !y } else { x.wrapping_div(y) }),
        "div" => by_int!(ty, |x, y| x.checked_div(y).unwrap_or(!y)),
        "rem" if ty.signed() => by_int!(ty, |x, y| if y == 0 { x } else { x.wrapping_rem(y) }),
        "rem" => by_int!(ty, |x, y| if y == 0 { x } else { x % y }),
        "and" if ty == Ty::Pred => Some(raw!(|x, y| x & y & 1)),
        "or" if ty == Ty::Pred => Some(raw!(|x, y| (x | y) & 1)),
        "xor" if ty == Ty::Pred => Some(raw!(|x, y| (x ^ y) & 1)),
        "and" => by_int!(ty, |x, y| x & y),
        "or" => by_int!(ty, |x, y| x | y),
        "xor" => by_int!(ty, |x, y| x ^ y),
        "mul24" => match (p[1], ty) {
            ("lo", Ty::S32) => kernel!(i32, |x, y| ((i64::from(x << 8 >> 8) * i64::from(y << 8 >> 8)) as i32)),
            ("lo", Ty::U32) => kernel!(u32, |x, y| ((u64::from(x & 0xff_ffff) * u64::from(y & 0xff_ffff)) as u32)),
            ("hi", Ty::S32) => kernel!(i32, |x, y| ((i64::from(x << 8 >> 8) * i64::from(y << 8 >> 8)) >> 16) as i32),
            ("hi", Ty::U32) => {
                kernel!(u32, |x, y| ((u64::from(x & 0xff_ffff) * u64::from(y & 0xff_ffff)) >> 16) as u32)
            }
            _ => None,
        },
        "mul" => match p[1] {
            "lo" => by_int!(ty, |x, y| x.wrapping_mul(y)),
            "hi" => high(ty),
            "wide" => wide(ty),
            _ => None,
        },
        _ => None,
    }
}

fn high(ty: Ty) -> Option<Kernel> {
    match ty {
        Ty::U16 => kernel!(u16, |x, y| ((u32::from(x) * u32::from(y)) >> 16) as u16),
        Ty::S16 => kernel!(i16, |x, y| ((i32::from(x) * i32::from(y)) >> 16) as i16),
        Ty::U32 => kernel!(u32, |x, y| ((u64::from(x) * u64::from(y)) >> 32) as u32),
        Ty::S32 => kernel!(i32, |x, y| ((i64::from(x) * i64::from(y)) >> 32) as i32),
        Ty::U64 => kernel!(u64, |x, y| ((u128::from(x) * u128::from(y)) >> 64) as u64),
        Ty::S64 => kernel!(i64, |x, y| ((i128::from(x) * i128::from(y)) >> 64) as i64),
        _ => None,
    }
}

fn wide(ty: Ty) -> Option<Kernel> {
    Some(match ty {
        Ty::U16 => raw!(|x, y| u64::from(x as u16 as u32 * y as u16 as u32)),
        Ty::S16 => raw!(|x, y| u64::from((x as i16 as i32 * y as i16 as i32) as u32)),
        Ty::U32 => raw!(|x, y| u64::from(x as u32) * u64::from(y as u32)),
        Ty::S32 => raw!(|x, y| (i64::from(x as i32) * i64::from(y as i32)) as u64),
        _ => return None,
    })
}

fn mad_wide(ty: Ty) -> Option<Kernel> {
    Some(match ty {
        Ty::U16 => raw!(|x, y, z| u64::from((x as u16 as u32 * y as u16 as u32).wrapping_add(z as u32))),
        Ty::S16 => raw!(|x, y, z| u64::from((x as i16 as i32 * y as i16 as i32).wrapping_add(z as i32) as u32)),
        Ty::U32 => raw!(|x, y, z| (u64::from(x as u32) * u64::from(y as u32)).wrapping_add(z)),
        Ty::S32 => raw!(|x, y, z| ((i64::from(x as i32) * i64::from(y as i32)) as u64).wrapping_add(z)),
        _ => return None,
    })
}

fn mad_high(ty: Ty) -> Option<Kernel> {
    match ty {
        Ty::U32 => kernel!(u32, |x, y, z| (((u64::from(x) * u64::from(y)) >> 32) as u32).wrapping_add(z)),
        Ty::S32 => kernel!(i32, |x, y, z| (((i64::from(x) * i64::from(y)) >> 32) as i32).wrapping_add(z)),
        Ty::U64 => kernel!(u64, |x, y, z| (((u128::from(x) * u128::from(y)) >> 64) as u64).wrapping_add(z)),
        Ty::S64 => kernel!(i64, |x, y, z| (((i128::from(x) * i128::from(y)) >> 64) as i64).wrapping_add(z)),
        _ => None,
    }
}

fn one(name: &str, ty: Ty, p: &[&str]) -> Option<Kernel> {
    let wide = ty.bits() == 64;
    match name {
        "not" if ty == Ty::Pred => Some(raw!(|x| (x ^ 1) & 1)),
        "not" => by_int!(ty, |x| !x),
        "neg" if ty.signed() => by_int!(ty, |x| x.wrapping_neg_lane()),
        "abs" => match ty {
            Ty::S16 => kernel!(i16, |x| x.wrapping_abs()),
            Ty::S32 => kernel!(i32, |x| x.wrapping_abs()),
            Ty::S64 => kernel!(i64, |x| x.wrapping_abs()),
            _ => None,
        },
        "popc" if wide => Some(raw!(|x| u64::from(x.count_ones()))),
        "popc" => Some(raw!(|x| u64::from((x as u32).count_ones()))),
        "clz" if wide => Some(raw!(|x| u64::from(x.leading_zeros()))),
        "clz" => Some(raw!(|x| u64::from((x as u32).leading_zeros()))),
        "brev" if wide => Some(raw!(|x| x.reverse_bits())),
        "brev" => Some(raw!(|x| u64::from((x as u32).reverse_bits()))),
        "cnot" => by_int!(ty, |x| if x == 0 { 1 } else { 0 }),
        "bfind" => {
            let shift = p.contains(&"shiftamt");
            Some(match (ty, shift) {
                (Ty::U32, false) => raw!(|x| bfind(u64::from(x as u32), 32, false)),
                (Ty::U32, true) => raw!(|x| bfind(u64::from(x as u32), 32, true)),
                (Ty::S32, false) => raw!(|x| bfind(u64::from((x as i32 ^ (x as i32 >> 31)) as u32), 32, false)),
                (Ty::S32, true) => raw!(|x| bfind(u64::from((x as i32 ^ (x as i32 >> 31)) as u32), 32, true)),
                (Ty::U64, false) => raw!(|x| bfind(x, 64, false)),
                (Ty::U64, true) => raw!(|x| bfind(x, 64, true)),
                (Ty::S64, false) => raw!(|x| bfind((x as i64 ^ (x as i64 >> 63)) as u64, 64, false)),
                (Ty::S64, true) => raw!(|x| bfind((x as i64 ^ (x as i64 >> 63)) as u64, 64, true)),
                _ => return None,
            })
        }
        _ => None,
    }
}

/// Negation for every integer lane type, since `wrapping_neg` is not a trait method.
trait NegLane {
    fn wrapping_neg_lane(self) -> Self;
}
macro_rules! neg_lanes {
    ($($t:ty),*) => { $(impl NegLane for $t {
        #[inline(always)]
        fn wrapping_neg_lane(self) -> Self { self.wrapping_neg() }
    })* };
}
neg_lanes!(u8, i8, u16, i16, u32, i32, u64, i64);

fn bfind(x: u64, bits: u32, shift: bool) -> u64 {
    if x == 0 {
        return 0xffff_ffff;
    }
    let top = 63 - x.leading_zeros();
    u64::from(if shift { bits - 1 - top } else { top })
}

fn shift(name: &str, ty: Ty) -> Option<Kernel> {
    Some(match (name, ty.bits()) {
        ("shl", 16) => raw!(|x, y| if y as u32 > 15 { 0 } else { (x << y) & 0xffff }),
        ("shl", 32) => raw!(|x, y| if y as u32 > 31 { 0 } else { u64::from((x as u32) << y as u32) }),
        ("shl", 64) => raw!(|x, y| if y as u32 > 63 { 0 } else { x << y as u32 }),
        ("shr", 16) if ty.signed() => raw!(|x, y| u64::from((x as i16 >> (y as u32).min(15)) as u16)),
        ("shr", 32) if ty.signed() => raw!(|x, y| u64::from((x as i32 >> (y as u32).min(31)) as u32)),
        ("shr", 64) if ty.signed() => raw!(|x, y| (x as i64 >> (y as u32).min(63)) as u64),
        ("shr", 16) => raw!(|x, y| if y as u32 > 15 { 0 } else { (x & 0xffff) >> y as u32 }),
        ("shr", 32) => raw!(|x, y| if y as u32 > 31 { 0 } else { u64::from(x as u32 >> y as u32) }),
        ("shr", 64) => raw!(|x, y| if y as u32 > 63 { 0 } else { x >> y as u32 }),
        _ => return None,
    })
}

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

fn prmt(mode: &str) -> Option<Kernel> {
    #[inline(always)]
    fn pick(a: u64, b: u64, selectors: [u64; 4]) -> u64 {
        let all = (b & 0xffff_ffff) << 32 | (a & 0xffff_ffff);
        let mut out = 0;
        for (i, s) in selectors.into_iter().enumerate() {
            out |= (all >> (8 * (s & 7)) & 0xff) << (8 * i);
        }
        out
    }
    fn generic(a: u64, b: u64, c: u64) -> u64 {
        let all = (b & 0xffff_ffff) << 32 | (a & 0xffff_ffff);
        let mut out = 0;
        for i in 0..4 {
            let s = c >> (4 * i) & 15;
            let byte = all >> (8 * (s & 7)) & 0xff;
            let byte = if s & 8 != 0 { if byte & 0x80 != 0 { 0xff } else { 0 } } else { byte };
            out |= byte << (8 * i);
        }
        out
    }
    Some(match mode {
        "" => raw!(|a, b, c| generic(a, b, c)),
        "f4e" => raw!(|a, b, c| pick(a, b, [c & 3, (c & 3) + 1, (c & 3) + 2, (c & 3) + 3])),
        "b4e" => raw!(|a, b, c| pick(a, b, [c & 3, (c & 3) + 7, (c & 3) + 6, (c & 3) + 5])),
        "rc8" => raw!(|a, b, c| pick(a, b, [c & 3; 4])),
        "ecl" => raw!(|a, b, c| pick(a, b, [c & 3, (c & 3).max(1), (c & 3).max(2), 3])),
        "ecr" => raw!(|a, b, c| pick(a, b, [0, (c & 3).min(1), (c & 3).min(2), c & 3])),
        "rc16" => raw!(|a, b, c| pick(a, b, [(c & 1) * 2, (c & 1) * 2 + 1, (c & 1) * 2, (c & 1) * 2 + 1])),
        _ => return None,
    })
}

fn bfe(x: u64, pos: u64, len: u64, bits: u64, signed: bool) -> u64 {
    let (pos, len) = (pos & 255, len & 255);
    let msb = bits - 1;
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    let x = x & mask;
    let sign = if !signed || len == 0 { 0 } else { x >> (pos + len - 1).min(msb) & 1 };
    let field = if pos > msb { 0 } else { x >> pos };
    let have = len.min(bits.saturating_sub(pos));
    let low = if have >= 64 { field } else { field & ((1 << have) - 1) };
    if sign == 1 { (if have >= 64 { low } else { low | u64::MAX << have }) & mask } else { low }
}

fn bfi(a: u64, b: u64, pos: u64, len: u64, bits: u64) -> u64 {
    let (pos, len) = (pos & 255, len & 255);
    if pos >= bits || len == 0 {
        return b;
    }
    let have = len.min(bits - pos);
    let mask = if have >= 64 { u64::MAX } else { ((1 << have) - 1) << pos };
    (b & !mask) | (a << pos & mask)
}

fn lop3(a: u32, b: u32, c: u32, lut: u64) -> u32 {
    let mut out = 0;
    for i in 0..8u32 {
        if lut >> i & 1 == 1 {
            out |= (if i & 4 != 0 { a } else { !a })
                & (if i & 2 != 0 { b } else { !b })
                & (if i & 1 != 0 { c } else { !c });
        }
    }
    out
}

fn dp(a: u64, b: u64, c: u64, four: bool, a_signed: bool, b_signed: bool, high: bool) -> u64 {
    let byte =
        |x: u64, i: usize, s: bool| if s { i64::from((x >> (8 * i)) as i8) } else { i64::from((x >> (8 * i)) as u8) };
    let half = |x: u64, i: usize, s: bool| {
        if s { i64::from((x >> (16 * i)) as i16) } else { i64::from((x >> (16 * i)) as u16) }
    };
    let mut sum = c as i64;
    if four {
        (0..4).for_each(|i| sum += byte(a, i, a_signed) * byte(b, i, b_signed));
    } else {
        (0..2).for_each(|i| sum += half(a, i, a_signed) * byte(b, i + if high { 2 } else { 0 }, b_signed));
    }
    u64::from(sum as u32)
}

impl Decoder<'_> {
    /// Pairs of 16-bit integers in one register (sm_90).
    fn pairs(&mut self, p: &[&str], o: &[Operand]) -> Result<bool, Error> {
        fn each(a: u64, b: u64, f: impl Fn(u16, u16) -> u16) -> u64 {
            u64::from(f(a as u16, b as u16)) | u64::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
        }
        let signed = p.last() == Some(&"s16x2");
        let k = match (p[0], signed) {
            ("add", _) => raw!(|a, b| each(a, b, u16::wrapping_add)),
            ("sub", _) => raw!(|a, b| each(a, b, u16::wrapping_sub)),
            ("min", false) => raw!(|a, b| each(a, b, u16::min)),
            ("max", false) => raw!(|a, b| each(a, b, u16::max)),
            ("min", true) => raw!(|a, b| each(a, b, |x, y| (x as i16).min(y as i16) as u16)),
            ("max", true) => raw!(|a, b| each(a, b, |x, y| (x as i16).max(y as i16) as u16)),
            _ => return Ok(false),
        };
        self.need(o, 3)?;
        self.two_op(k, Ty::B32, o)
    }

    pub(super) fn alu(&mut self, p: &[&str], o: &[Operand]) -> Result<bool, Error> {
        match p[0] {
            "mov" => self.mov(p, o).map(|()| true),
            "setp" | "set" => self.compare(p, o).map(|()| true),
            "selp" | "slct" => self.select(p, o).map(|()| true),
            "addc" | "subc" | "madc" => self.carry(p, o).map(|()| true),
            "add" | "sub" | "mad" if p.contains(&"cc") => self.carry(p, o).map(|()| true),
            _ if matches!(p.last(), Some(&"s16x2" | &"u16x2")) && p.len() == 2 => self.pairs(p, o),
            _ => {
                if self.float(p, o)? {
                    return Ok(true);
                }
                self.integer(p, o)
            }
        }
    }

    fn integer(&mut self, p: &[&str], o: &[Operand]) -> Result<bool, Error> {
        // The modes of prmt stand behind its type.
        if p[0] == "prmt" {
            self.need(o, 4)?;
            let Some(k) = prmt(p.get(2).copied().unwrap_or("")) else { return Ok(false) };
            return self.three_op(k, Ty::B32, o, 0);
        }
        let Some(ty) = last_type(p) else { return Ok(false) };
        let dest = o.first();
        let Some(_) = dest else { return Ok(false) };
        match p[0] {
            "lop3" => {
                self.need(o, 5)?;
                if p.len() > 2 {
                    return self.unsupported("lop3 with a predicate");
                }
                let Operand::Int(lut) = o[4] else { return self.parse_error("the table of lop3 must be a literal") };
                let k = raw!(|a, b, c, i| u64::from(lop3(a as u32, b as u32, c as u32, i)));
                self.three_op(k, ty, o, lut)
            }
            "shl" | "shr" => {
                self.need(o, 3)?;
                let Some(k) = shift(p[0], ty) else { return Ok(false) };
                let (a, b) = (self.source(&o[1], ty)?, self.source(&o[2], Ty::U32)?);
                let d = self.dest(&o[0])?;
                self.alu_op(k, d, [a, b, NONE], 0);
                Ok(true)
            }
            "shf" => {
                self.need(o, 4)?;
                let k = match (p[1], p[2]) {
                    ("l", "wrap") => {
                        raw!(|a, b, c| ((((b << 32) | (a & 0xffff_ffff)) << (c & 31)) >> 32) & 0xffff_ffff)
                    }
                    ("l", "clamp") => {
                        raw!(|a, b, c| ((((b << 32) | (a & 0xffff_ffff)) << (c as u32).min(32)) >> 32) & 0xffff_ffff)
                    }
                    ("r", "wrap") => raw!(|a, b, c| (((b << 32) | (a & 0xffff_ffff)) >> (c & 31)) & 0xffff_ffff),
                    ("r", "clamp") => {
                        raw!(|a, b, c| (((b << 32) | (a & 0xffff_ffff)) >> (c as u32).min(32)) & 0xffff_ffff)
                    }
                    _ => return Ok(false),
                };
                self.three_op(k, ty, o, 0)
            }
            "bfe" => {
                self.need(o, 4)?;
                let k = match ty {
                    Ty::U32 => raw!(|a, b, c| bfe(a, b, c, 32, false)),
                    Ty::S32 => raw!(|a, b, c| bfe(a, b, c, 32, true)),
                    Ty::U64 => raw!(|a, b, c| bfe(a, b, c, 64, false)),
                    Ty::S64 => raw!(|a, b, c| bfe(a, b, c, 64, true)),
                    _ => return Ok(false),
                };
                self.three_op(k, ty, o, 0)
            }
            "bfi" => {
                // Four sources: position and length are packed into one slot first.
                self.need(o, 5)?;
                let (a, b) = (self.source(&o[1], ty)?, self.source(&o[2], ty)?);
                let (pos, len) = (self.source(&o[3], Ty::U32)?, self.source(&o[4], Ty::U32)?);
                let d = self.dest(&o[0])?;
                let t = self.temp(Ty::B32);
                self.alu_op(raw!(|x, y| (x & 255) | (y & 255) << 8), t, [pos, len, NONE], 0);
                let k = match ty {
                    Ty::B32 => raw!(|a, b, c| bfi(a, b, c & 255, c >> 8, 32) & 0xffff_ffff),
                    Ty::B64 => raw!(|a, b, c| bfi(a, b, c & 255, c >> 8, 64)),
                    _ => return Ok(false),
                };
                self.alu_op(k, d, [a, b, t], 0);
                Ok(true)
            }
            "sad" => {
                self.need(o, 4)?;
                let Some(k) = by_int!(ty, |x, y, z| (if x > y {
                    x.bits().wrapping_sub(y.bits())
                } else {
                    y.bits().wrapping_sub(x.bits())
                })
                .wrapping_add(z.bits())) else {
                    return Ok(false);
                };
                self.three_op(k, ty, o, 0)?;
                self.truncate(o, ty)
            }
            "dp4a" | "dp2a" => {
                self.need(o, 4)?;
                let types: Vec<&str> = p.iter().copied().filter(|s| matches!(*s, "u32" | "s32")).collect();
                let [at, bt] = types[..] else { return Ok(false) };
                let imm = u64::from(p[0] == "dp4a")
                    | u64::from(at == "s32") << 1
                    | u64::from(bt == "s32") << 2
                    | u64::from(p.contains(&"hi")) << 3;
                let k = raw!(|a, b, c, i| dp(a, b, c, i & 1 == 1, i & 2 != 0, i & 4 != 0, i & 8 != 0));
                self.three_op(k, ty, o, imm)
            }
            "mad" | "mad24" => {
                self.need(o, 4)?;
                let k = match (p[0], p[1]) {
                    ("mad", "lo") if p.contains(&"sat") => None,
                    ("mad", "lo") => by_int!(ty, |x, y, z| x.wrapping_mul(y).wrapping_add(z)),
                    ("mad", "hi") if p.contains(&"sat") => {
                        kernel!(i32, |x, y, z| (((i64::from(x) * i64::from(y)) >> 32) as i32).saturating_add(z))
                    }
                    ("mad", "hi") => mad_high(ty),
                    ("mad", "wide") => mad_wide(ty),
                    ("mad24", "lo") if ty == Ty::S32 => {
                        kernel!(i32, |x, y, z| ((i64::from(x << 8 >> 8) * i64::from(y << 8 >> 8)) as i32)
                            .wrapping_add(z))
                    }
                    ("mad24", "lo") => kernel!(u32, |x, y, z| ((u64::from(x & 0xff_ffff) * u64::from(y & 0xff_ffff))
                        as u32)
                        .wrapping_add(z)),
                    _ => None,
                };
                let Some(k) = k else { return Ok(false) };
                self.three_op(k, ty, o, 0)
            }
            "bmsk" => {
                self.need(o, 3)?;
                let k = if p.contains(&"wrap") {
                    raw!(|a, b| u64::from(bfi(u64::MAX, 0, a & 31, b & 31, 32) as u32))
                } else {
                    raw!(|a, b| u64::from(
                        bfi(u64::MAX, 0, (a as u32).min(255).into(), (b as u32).min(32).into(), 32) as u32
                    ))
                };
                self.two_op(k, ty, o)
            }
            "fns" => {
                self.need(o, 4)?;
                let k = raw!(|m, base, off| find_nth(m as u32, base as u32, off as i32));
                self.three_op(k, ty, o, 0)
            }
            _ => {
                if let Some(k) = two(p[0], ty, p) {
                    self.need(o, 3)?;
                    return self.two_op(k, ty, o);
                }
                if let Some(k) = one(p[0], ty, p) {
                    self.need(o, 2)?;
                    let a = self.source(&o[1], ty)?;
                    let d = self.dest(&o[0])?;
                    self.alu_op(k, d, [a, NONE, NONE], 0);
                    return Ok(true);
                }
                Ok(false)
            }
        }
    }

    fn truncate(&mut self, o: &[Operand], ty: Ty) -> Result<bool, Error> {
        let d = self.dest(&o[0])?;
        if ty.bits() < 64 {
            self.alu_op(raw!(|x, _y, _z, i| x & i), d, [d, NONE, NONE], (1 << ty.bits()) - 1);
        }
        Ok(true)
    }

    pub(super) fn two_op(&mut self, k: Kernel, ty: Ty, o: &[Operand]) -> Result<bool, Error> {
        let (a, b) = (self.source(&o[1], ty)?, self.source(&o[2], ty)?);
        let d = self.dest(&o[0])?;
        self.alu_op(k, d, [a, b, NONE], 0);
        Ok(true)
    }

    pub(super) fn three_op(&mut self, k: Kernel, ty: Ty, o: &[Operand], imm: u64) -> Result<bool, Error> {
        let (a, b, c) = (self.source(&o[1], ty)?, self.source(&o[2], ty)?, self.source(&o[3], ty)?);
        let d = self.dest(&o[0])?;
        self.alu_op(k, d, [a, b, c], imm);
        Ok(true)
    }

    /// A copy of the low `bits` bits.
    pub(super) fn copy(&mut self, d: Reg, s: Reg, bits: u32) {
        let mask = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
        self.alu_op(raw!(|x, _y, _z, i| x & i), d, [s, NONE, NONE], mask);
    }

    fn mov(&mut self, p: &[&str], o: &[Operand]) -> Result<(), Error> {
        self.need(o, 2)?;
        let Some(ty) = last_type(p) else { return self.unsupported("type") };
        if ty == Ty::B128 {
            return self.unsupported("128-bit registers");
        }
        match (&o[0], &o[1]) {
            (Operand::Vector(_), _) => {
                let s = self.source(&o[1], ty)?;
                let parts = self.dest_list(&o[0])?;
                let bits = ty.bits() / parts.len().max(1) as u32;
                self.emit(Op::Unpack { parts, s, bits });
            }
            (_, Operand::Vector(_)) => {
                let parts = self.source_list(&o[1], ty)?;
                let bits = ty.bits() / parts.len().max(1) as u32;
                let d = self.dest(&o[0])?;
                self.emit(Op::Pack { d, parts, bits });
            }
            _ => {
                let s = self.source(&o[1], ty)?;
                let d = self.dest(&o[0])?;
                if ty == Ty::Pred {
                    self.alu_op(raw!(|x| u64::from(x != 0)), d, [s, NONE, NONE], 0);
                } else {
                    self.copy(d, s, ty.bits());
                }
            }
        }
        Ok(())
    }

    fn compare(&mut self, p: &[&str], o: &[Operand]) -> Result<(), Error> {
        self.need(o, 3)?;
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
                self.need(o, 4)?;
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
            if to != NONE {
                self.copy(to, from, 1);
            }
        }
        Ok(())
    }

    fn select(&mut self, p: &[&str], o: &[Operand]) -> Result<(), Error> {
        self.need(o, 4)?;
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

    /// Extended-precision arithmetic: the carry is a register of its own.
    fn carry(&mut self, p: &[&str], o: &[Operand]) -> Result<(), Error> {
        let Some(ty) = last_type(p) else { return self.unsupported("type") };
        if self.carry == NONE {
            self.carry = self.temp(Ty::Pred);
        }
        let cc = self.carry;
        let sets = p.contains(&"cc");
        let reads = p[0].ends_with('c');
        let bits = ty.bits();
        if bits != 32 && bits != 64 {
            return self.unsupported("type");
        }
        let zero = self.literal(0);
        let (a, b) = if p[0].starts_with("mad") {
            self.need(o, 4)?;
            let (x, y, z) = (self.source(&o[1], ty)?, self.source(&o[2], ty)?, self.source(&o[3], ty)?);
            let k = match p[1] {
                "lo" => by_int!(ty, |x, y| x.wrapping_mul(y)),
                "hi" => high(ty),
                _ => None,
            };
            let Some(k) = k else { return self.unsupported("form of mad") };
            let t = self.temp(Ty::B64);
            self.alu_op(k, t, [x, y, NONE], 0);
            (t, z)
        } else {
            self.need(o, 3)?;
            (self.source(&o[1], ty)?, self.source(&o[2], ty)?)
        };
        let c = if reads { cc } else { zero };
        let d = self.dest(&o[0])?;
        let subtract = p[0].starts_with("sub");
        let imm = u64::from(bits == 64) | u64::from(subtract) << 1;
        fn sum(x: u64, y: u64, c: u64, i: u64) -> (u64, u64) {
            let bits = if i & 1 == 1 { 64 } else { 32 };
            let mask = if bits == 64 { u64::MAX } else { 0xffff_ffff };
            let (x, y, c) = (u128::from(x & mask), u128::from(y & mask), u128::from(c & 1));
            // After a subtraction the carry is a borrow.
            let r = if i & 2 == 0 { x + y + c } else { x.wrapping_sub(y).wrapping_sub(c) };
            (r as u64 & mask, (r >> bits) as u64 & 1)
        }
        let t = self.temp(Ty::B64);
        self.alu_op(raw!(|x, y, z, i| sum(x, y, z, i).0), t, [a, b, c], imm);
        if sets {
            self.alu_op(raw!(|x, y, z, i| sum(x, y, z, i).1), cc, [a, b, c], imm);
        }
        self.copy(d, t, bits);
        Ok(())
    }
}

/// `fns`: position of the n-th set bit at or beside a base.
fn find_nth(mask: u32, base: u32, offset: i32) -> u64 {
    let mut left = offset.unsigned_abs();
    if offset == 0 {
        return if base < 32 && mask >> base & 1 == 1 { u64::from(base) } else { 0xffff_ffff };
    }
    let mut at = base as i32;
    while (0..32).contains(&at) {
        if mask >> at & 1 == 1 {
            left -= 1;
            if left == 0 {
                return at as u64;
            }
        }
        at += if offset > 0 { 1 } else { -1 };
    }
    0xffff_ffff
}
