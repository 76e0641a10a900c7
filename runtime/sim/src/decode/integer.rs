//! Kernels of the integer instructions.

use super::kernel::{Lane, NegLane, by_int, kernel, raw};
use crate::op::{Kernel, V};
use crate::syntax::{Name, Ty};

pub(super) fn two(name: &str, ty: Ty, p: Name<'_>) -> Option<Kernel> {
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

pub(super) fn high(ty: Ty) -> Option<Kernel> {
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

pub(super) fn mad_wide(ty: Ty) -> Option<Kernel> {
    Some(match ty {
        Ty::U16 => raw!(|x, y, z| u64::from((x as u16 as u32 * y as u16 as u32).wrapping_add(z as u32))),
        Ty::S16 => raw!(|x, y, z| u64::from((x as i16 as i32 * y as i16 as i32).wrapping_add(z as i32) as u32)),
        Ty::U32 => raw!(|x, y, z| (u64::from(x as u32) * u64::from(y as u32)).wrapping_add(z)),
        Ty::S32 => raw!(|x, y, z| ((i64::from(x as i32) * i64::from(y as i32)) as u64).wrapping_add(z)),
        _ => return None,
    })
}

pub(super) fn mad_high(ty: Ty) -> Option<Kernel> {
    match ty {
        Ty::U32 => kernel!(u32, |x, y, z| (((u64::from(x) * u64::from(y)) >> 32) as u32).wrapping_add(z)),
        Ty::S32 => kernel!(i32, |x, y, z| (((i64::from(x) * i64::from(y)) >> 32) as i32).wrapping_add(z)),
        Ty::U64 => kernel!(u64, |x, y, z| (((u128::from(x) * u128::from(y)) >> 64) as u64).wrapping_add(z)),
        Ty::S64 => kernel!(i64, |x, y, z| (((i128::from(x) * i128::from(y)) >> 64) as i64).wrapping_add(z)),
        _ => None,
    }
}

pub(super) fn one(name: &str, ty: Ty, p: Name<'_>) -> Option<Kernel> {
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

fn bfind(x: u64, bits: u32, shift: bool) -> u64 {
    if x == 0 {
        return 0xffff_ffff;
    }
    let top = 63 - x.leading_zeros();
    u64::from(if shift { bits - 1 - top } else { top })
}

pub(super) fn shift(name: &str, ty: Ty) -> Option<Kernel> {
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

pub(super) fn prmt(mode: &str) -> Option<Kernel> {
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

pub(super) fn bfe(x: u64, pos: u64, len: u64, bits: u64, signed: bool) -> u64 {
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

pub(super) fn bfi(a: u64, b: u64, pos: u64, len: u64, bits: u64) -> u64 {
    let (pos, len) = (pos & 255, len & 255);
    if pos >= bits || len == 0 {
        return b;
    }
    let have = len.min(bits - pos);
    let mask = if have >= 64 { u64::MAX } else { ((1 << have) - 1) << pos };
    (b & !mask) | (a << pos & mask)
}

pub(super) fn lop3(a: u32, b: u32, c: u32, lut: u64) -> u32 {
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

pub(super) fn dp(a: u64, b: u64, c: u64, four: bool, a_signed: bool, b_signed: bool, high: bool) -> u64 {
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

/// `fns`: position of the n-th set bit at or beside a base.
pub(super) fn find_nth(mask: u32, base: u32, offset: i32) -> u64 {
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
