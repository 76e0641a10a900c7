//! Number formats: exact rounding between f64 and every narrower format.
//!
//! Every source format embeds in f64 without loss, so one routine that rounds an f64 covers all conversions.
//! Arithmetic with a directed rounding is done in f64 with rounding to odd first, which makes the second
//! rounding exact (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

/// A binary floating-point format of at most 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) exp_bits: u32,
    pub(crate) man_bits: u32,
    pub(crate) bias: i32,
    /// Code of the largest finite value, without sign.
    pub(crate) max: u32,
    /// Code of infinity; formats without one give their NaN, or their largest value when there is no NaN either.
    pub(crate) inf: u32,
    /// Canonical NaN.
    pub(crate) nan: u32,
    pub(crate) kind: Kind,
}

/// What the codes above the finite ones mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Infinities and NaN as IEEE 754 has them.
    Ieee,
    /// No infinity; all ones is NaN (e4m3).
    NanOnly,
    /// Every code is finite (e2m1, e2m3, e3m2).
    Finite,
}

const fn ieee(exp_bits: u32, man_bits: u32) -> Format {
    let inf = ((1 << exp_bits) - 1) << man_bits;
    Format {
        exp_bits,
        man_bits,
        bias: (1 << (exp_bits - 1)) - 1,
        max: inf - 1,
        inf,
        nan: inf | ((1 << man_bits) - 1),
        kind: Kind::Ieee,
    }
}

pub(crate) const F32: Format = ieee(8, 23);
pub(crate) const F16: Format = ieee(5, 10);
pub(crate) const BF16: Format = ieee(8, 7);
pub(crate) const E5M2: Format = ieee(5, 2);
pub(crate) const E4M3: Format =
    Format { exp_bits: 4, man_bits: 3, bias: 7, max: 0x7e, inf: 0x7f, nan: 0x7f, kind: Kind::NanOnly };
pub(crate) const E2M1: Format =
    Format { exp_bits: 2, man_bits: 1, bias: 1, max: 7, inf: 7, nan: 7, kind: Kind::Finite };
pub(crate) const E2M3: Format =
    Format { exp_bits: 2, man_bits: 3, bias: 1, max: 31, inf: 31, nan: 31, kind: Kind::Finite };
pub(crate) const E3M2: Format =
    Format { exp_bits: 3, man_bits: 2, bias: 3, max: 31, inf: 31, nan: 31, kind: Kind::Finite };
/// tf32 keeps the exponent of f32 and ten bits of mantissa; it lives in the upper 19 bits of a register.
pub(crate) const TF32: Format = ieee(8, 10);

/// Rounding of a value to a format or to an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    NearestEven,
    NearestAway,
    Zero,
    Down,
    Up,
}

/// Rounds `x` to `format`. With `satfinite`, overflow gives the largest finite value.
pub(crate) fn encode(x: f64, f: Format, mode: Round, satfinite: bool) -> u32 {
    let bits = x.to_bits();
    let negative = bits >> 63 == 1;
    let sign = u32::from(negative) << (f.exp_bits + f.man_bits);
    if x.is_nan() {
        // The conversions to formats without NaN give the largest positive value.
        return f.nan;
    }
    if x.is_infinite() {
        return sign | if satfinite { f.max } else { f.inf };
    }
    let raw = bits & ((1 << 52) - 1);
    let field = (bits >> 52 & 0x7ff) as i32;
    if field == 0 && raw == 0 {
        return sign;
    }
    // A subnormal f64 is far below every target; its exact place does not matter, only that it is not zero.
    let (m, e) = if field == 0 { (1u64 << 52, -1080) } else { (raw | 1 << 52, field - 1023) };
    let least = 1 - f.bias;
    let ee = e.max(least);
    let shift = (52 - f.man_bits as i32 + (ee - e)).min(63) as u32;
    let mut q = m >> shift;
    let rest = m & ((1u64 << shift) - 1);
    let half = 1u64 << (shift - 1);
    let up = match mode {
        Round::NearestEven => rest > half || (rest == half && q & 1 == 1),
        Round::NearestAway => rest >= half,
        Round::Zero => false,
        Round::Down => negative && rest > 0,
        Round::Up => !negative && rest > 0,
    };
    q += u64::from(up);
    let implicit = 1u64 << f.man_bits;
    let code = if ee == least && q < implicit { q } else { (((ee + f.bias) as u64) << f.man_bits) + (q - implicit) };
    if code > u64::from(f.max) {
        let toward_zero = match mode {
            Round::NearestEven | Round::NearestAway => false,
            Round::Zero => true,
            Round::Down => !negative,
            Round::Up => negative,
        };
        return sign | if satfinite || toward_zero { f.max } else { f.inf };
    }
    sign | code as u32
}

/// The value of a code of `format`.
pub(crate) fn decode(code: u32, f: Format) -> f64 {
    let man = code & ((1 << f.man_bits) - 1);
    let field = code >> f.man_bits & ((1 << f.exp_bits) - 1);
    let sign = if code >> (f.exp_bits + f.man_bits) & 1 == 1 { -1.0 } else { 1.0 };
    match f.kind {
        Kind::Ieee if field == (1 << f.exp_bits) - 1 => return if man == 0 { sign * f64::INFINITY } else { f64::NAN },
        Kind::NanOnly if code & 0x7f == 0x7f => return f64::NAN,
        Kind::Ieee | Kind::NanOnly | Kind::Finite => {}
    }
    let scale = |e: i32| f64::from_bits(((e + 1023) as u64) << 52);
    if field == 0 {
        sign * f64::from(man) * scale(1 - f.bias - f.man_bits as i32)
    } else {
        sign * f64::from(man | 1 << f.man_bits) * scale(field as i32 - f.bias - f.man_bits as i32)
    }
}

/// f32 of 16 bits of bfloat16.
#[inline]
pub(crate) fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// f32 of 16 bits of half precision.
#[inline]
pub(crate) fn f16_to_f32(x: u16) -> f32 {
    let x = u32::from(x);
    let sign = (x & 0x8000) << 16;
    let rest = x & 0x7fff;
    if rest >= 0x7c00 {
        return f32::from_bits(sign | 0x7f80_0000 | (rest & 0x3ff) << 13);
    }
    // The multiplication renormalises subnormals and is exact.
    f32::from_bits(sign | rest << 13) * f32::from_bits((254 - 15) << 23)
}

/// Canonical NaN of an f32 result, as PTX arithmetic returns it.
#[inline]
pub(crate) fn canon(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(0x7fff_ffff) } else { x }
}

/// Flushes subnormals to zero of the same sign.
#[inline]
pub(crate) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

/// Turns `s + err` (err is the rounding error of s) into s rounded to odd.
fn to_odd(s: f64, err: f64) -> f64 {
    if err == 0.0 || !s.is_finite() || s.to_bits() & 1 == 1 {
        return s;
    }
    // The exact value lies between s and its neighbour on the side of err; the odd one of the two is the neighbour.
    if (err > 0.0) == (s > 0.0) { f64::from_bits(s.to_bits() + 1) } else { f64::from_bits(s.to_bits() - 1) }
}

/// `a + b` rounded to odd in f64.
pub(crate) fn add_odd(a: f64, b: f64) -> f64 {
    let s = a + b;
    let bb = s - a;
    let err = (a - (s - bb)) + (b - bb);
    if s == 0.0 { s } else { to_odd(s, err) }
}

/// `a * b + c` of f32 values with any rounding.
pub(crate) fn fma_round(a: f32, b: f32, c: f32, mode: Round) -> f32 {
    // A product of two f32 is exact in f64.
    let p = f64::from(a) * f64::from(b);
    let s = add_odd(p, f64::from(c));
    zero_sign(s, p, f64::from(c), mode)
}

/// `a + b` of f32 values with any rounding.
pub(crate) fn add_round(a: f32, b: f32, mode: Round) -> f32 {
    let s = add_odd(f64::from(a), f64::from(b));
    zero_sign(s, f64::from(a), f64::from(b), mode)
}

fn zero_sign(s: f64, p: f64, c: f64, mode: Round) -> f32 {
    if s == 0.0 && p == -c && p != 0.0 {
        // An exact cancellation is +0, except when rounding down.
        return if mode == Round::Down { -0.0 } else { 0.0 };
    }
    if s == 0.0 && p == 0.0 && c == 0.0 && mode == Round::Down && (p.is_sign_negative() || c.is_sign_negative()) {
        return -0.0;
    }
    f32::from_bits(encode(s, F32, mode, false))
}

/// The error of a rounded sum.
fn sum_error(a: f64, b: f64, s: f64) -> f64 {
    let bb = s - a;
    (a - (s - bb)) + (b - bb)
}

/// A result that was rounded to nearest, rounded the way of `mode` instead; `err` has the sign of what is missing.
fn toward(r: f64, err: f64, finite: bool, mode: Round) -> f64 {
    if r.is_infinite() && finite {
        let stays = match mode {
            Round::Up => r > 0.0,
            Round::Down => r < 0.0,
            Round::NearestEven | Round::NearestAway => true,
            Round::Zero => false,
        };
        return if stays { r } else { f64::MAX.copysign(r) };
    }
    let down = match mode {
        Round::Down => true,
        Round::Zero => r > 0.0 || (r == 0.0 && r.is_sign_positive()),
        Round::Up => false,
        Round::NearestEven | Round::NearestAway => return r,
    };
    match (down, err) {
        (true, err) if err < 0.0 => r.next_down(),
        (false, err) if err > 0.0 => r.next_up(),
        _ => r,
    }
}

/// `a + b`, rounded the way of `mode`.
pub(crate) fn sum_toward(a: f64, b: f64, mode: Round) -> f64 {
    let s = a + b;
    if s == 0.0 {
        // A sum of zero is exact, and negative when rounding down, unless both are positive zeros.
        let negative = mode == Round::Down && !(a == 0.0 && a.is_sign_positive() && b.is_sign_positive());
        return if negative { -0.0 } else { s };
    }
    toward(s, sum_error(a, b, s), a.is_finite() && b.is_finite(), mode)
}

/// `a * b`, rounded the way of `mode`.
pub(crate) fn product_toward(a: f64, b: f64, mode: Round) -> f64 {
    let p = a * b;
    let lost = p == 0.0 && a != 0.0 && b != 0.0;
    let err = if lost { 1f64.copysign(p) } else { a.mul_add(b, -p) };
    toward(p, err, a.is_finite() && b.is_finite(), mode)
}

/// `a * b + c`, rounded the way of `mode`; the error is that of Boldo and Muller (2005).
pub(crate) fn fma_toward(a: f64, b: f64, c: f64, mode: Round) -> f64 {
    let r = a.mul_add(b, c);
    let p = a * b;
    if r == 0.0 && p == -c {
        return sum_toward(p, c, mode);
    }
    let low = a.mul_add(b, -p);
    let high = c + low;
    let rest = sum_error(c, low, high);
    let top = p + high;
    let err = ((top - r) + sum_error(p, high, top)) + rest;
    toward(r, err, [a, b, c].iter().all(|x| x.is_finite()), mode)
}

/// `a / b`, rounded the way of `mode`.
pub(crate) fn quotient_toward(a: f64, b: f64, mode: Round) -> f64 {
    let q = a / b;
    let rest = (-q).mul_add(b, a);
    toward(q, rest * b.signum(), a.is_finite() && b.is_finite() && b != 0.0, mode)
}

/// The square root, rounded the way of `mode`.
pub(crate) fn root_toward(a: f64, mode: Round) -> f64 {
    let r = a.sqrt();
    toward(r, (-r).mul_add(r, a), false, mode)
}

/// `a * b` of f32 values with any rounding.
pub(crate) fn mul_round(a: f32, b: f32, mode: Round) -> f32 {
    f32::from_bits(encode(f64::from(a) * f64::from(b), F32, mode, false))
}

/// `a * b + c` rounded once to nearest even.
#[inline]
pub(crate) fn fma_f32(a: f32, b: f32, c: f32) -> f32 {
    let p = f64::from(a) * f64::from(b);
    let s = p + f64::from(c);
    let r = s as f32;
    // Two roundings differ from one only when the first lands on a tie of the second or in the subnormal range.
    let tie = s.to_bits() & 0x1fff_ffff == 0x1000_0000;
    if tie || (r.abs() < 1.2e-38 && r != 0.0) { a.mul_add(b, c) } else { r }
}

/// Rounds to an integer value of f64.
pub(crate) fn round_int(x: f64, mode: Round) -> f64 {
    match mode {
        Round::NearestEven => x.round_ties_even(),
        Round::NearestAway => x.round(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        Round::Up => x.ceil(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_a_round_trip() {
        for code in 0..=0xffffu32 {
            let v = decode(code, F16);
            assert!(v.is_nan() || encode(v, F16, Round::NearestEven, false) == code);
            let f = f16_to_f32(code as u16);
            assert!((f.is_nan() && v.is_nan()) || f64::from(f) == v);
        }
    }

    #[test]
    fn every_small_float_survives_a_round_trip() {
        for f in [E4M3, E5M2, E2M1, E2M3, E3M2] {
            for code in 0..1u32 << (1 + f.exp_bits + f.man_bits) {
                let v = decode(code, f);
                assert!(!v.is_finite() || encode(v, f, Round::NearestEven, true) == code, "{code:#x} of {f:?}");
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_overflow_saturates() {
        assert_eq!(encode(464.0, E4M3, Round::NearestEven, true), 0x7e);
        assert_eq!(encode(17.0, E4M3, Round::NearestEven, true), encode(16.0, E4M3, Round::NearestEven, true));
        assert_eq!(encode(19.0, E4M3, Round::NearestEven, true), encode(20.0, E4M3, Round::NearestEven, true));
        assert_eq!(encode(65520.0, F16, Round::NearestEven, false), 0x7c00);
        assert_eq!(encode(65520.0, F16, Round::Zero, false), 0x7bff);
        assert_eq!(encode(f64::from(f32::NAN), BF16, Round::NearestEven, false), 0x7fff);
    }

    #[test]
    fn directed_rounding_sees_what_f64_drops() {
        assert_eq!(add_round(1.0, 1e-30, Round::Up), 1.0 + f32::EPSILON);
        assert_eq!(add_round(1.0, 1e-30, Round::Down), 1.0);
        assert_eq!(add_round(1.0, -1e-30, Round::Zero), 1.0 - f32::EPSILON / 2.0);
        assert_eq!(fma_round(1.0, 1.0, -1e-38, Round::Down), 1.0 - f32::EPSILON / 2.0);
    }

    #[test]
    fn doubles_are_rounded_as_asked() {
        let (tiny, one) = (f64::from_bits(1), 1f64);
        assert_eq!(sum_toward(one, tiny, Round::Up), one.next_up());
        assert_eq!(sum_toward(one, -tiny, Round::Zero), one.next_down());
        assert_eq!(sum_toward(-one, tiny, Round::Down), -one);
        assert!(sum_toward(one, -one, Round::Down).is_sign_negative());
        assert_eq!(sum_toward(f64::MAX, f64::MAX, Round::Zero), f64::MAX);
        assert_eq!(product_toward(0.1, 10.0, Round::Up), one.next_up());
        assert_eq!(product_toward(tiny, -tiny, Round::Down), -tiny);
        assert_eq!(quotient_toward(one, -3.0, Round::Down), -(one / 3.0).next_up());
        assert_eq!(quotient_toward(one, 0.0, Round::Zero), f64::INFINITY);
        assert_eq!(fma_toward(0.1, 10.0, -one, Round::Zero), 0.1f64.mul_add(10.0, -one));
        assert_eq!(fma_toward(one, one, tiny, Round::Up), one.next_up());
        let root = root_toward(2.0, Round::Up);
        assert!(root == 2f64.sqrt() || root == 2f64.sqrt().next_up());
        assert!(root_toward(2.0, Round::Down) < root);
    }
}
