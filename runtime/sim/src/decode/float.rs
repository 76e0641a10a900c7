//! f32 and f64 arithmetic, exact and approximate.
//!
//! The approximate instructions are computed in f64 and rounded once, which is inside the error bounds that the PTX
//! manual gives for them; hardware differs in the last bits.

use super::{Decoder, last_type};
use crate::Error;
use crate::num::{self, Round, canon, flush};
use crate::op::{Kernel, NONE, V, rounding};
use crate::syntax::{Name, Operands, Ty};

/// Bits of the immediate of the f32 kernels.
const FTZ: u64 = 1;
const SAT: u64 = 2;
const NAN: u64 = 4;
const XORSIGN: u64 = 8;

fn mode_bits(mode: Round) -> u64 {
    (match mode {
        Round::NearestEven => 0u64,
        Round::NearestAway => 1,
        Round::Zero => 2,
        Round::Down => 3,
        Round::Up => 4,
    }) << 8
}

fn mode_of(imm: u64) -> Round {
    match imm >> 8 & 7 {
        0 => Round::NearestEven,
        1 => Round::NearestAway,
        2 => Round::Zero,
        3 => Round::Down,
        _ => Round::Up,
    }
}

#[inline(always)]
fn load(x: u64, imm: u64) -> f32 {
    let f = f32::from_bits(x as u32);
    if imm & FTZ != 0 { flush(f) } else { f }
}

#[inline(always)]
fn store(x: f32, imm: u64) -> u64 {
    let x = if imm & FTZ != 0 { flush(x) } else { x };
    let x = canon(x);
    let x = if imm & SAT != 0 {
        // Saturation takes NaN to +0.
        if x > 0.0 { x.min(1.0) } else { 0.0 }
    } else {
        x
    };
    u64::from(x.to_bits())
}

macro_rules! f32_kernel {
    (|$x:ident, $y:ident, $z:ident, $i:ident| $e:expr) => {{
        fn k(a: &V, b: &V, c: &V, imm: u64, o: &mut V) {
            let $i = imm;
            let _ = $i;
            for l in 0..32 {
                let ($x, $y, $z) = (load(a[l], imm), load(b[l], imm), load(c[l], imm));
                let _ = ($y, $z);
                o[l] = store($e, imm);
            }
        }
        k as Kernel
    }};
}

macro_rules! f64_kernel {
    (|$x:ident, $y:ident, $z:ident| $e:expr) => {
        f64_kernel!(|$x, $y, $z, _i| $e)
    };
    (|$x:ident, $y:ident, $z:ident, $i:ident| $e:expr) => {{
        fn k(a: &V, b: &V, c: &V, $i: u64, o: &mut V) {
            for l in 0..32 {
                let ($x, $y, $z) = (f64::from_bits(a[l]), f64::from_bits(b[l]), f64::from_bits(c[l]));
                let _ = ($y, $z);
                let r: f64 = $e;
                o[l] = if r.is_nan() { 0x7fff_ffff_ffff_ffff } else { r.to_bits() };
            }
        }
        k as Kernel
    }};
}

/// Smaller of two, with -0 below +0; NaN gives way to a number unless the NaN form is asked for.
pub(super) fn min32(x: f32, y: f32, nan: bool) -> f32 {
    if x.is_nan() || y.is_nan() {
        return if nan || (x.is_nan() && y.is_nan()) {
            f32::NAN
        } else if x.is_nan() {
            y
        } else {
            x
        };
    }
    if x == y {
        if x.is_sign_negative() { x } else { y }
    } else if x < y {
        x
    } else {
        y
    }
}

pub(super) fn max32(x: f32, y: f32, nan: bool) -> f32 {
    -min32(-x, -y, nan)
}

#[inline(always)]
fn signed(r: f32, x: f32, y: f32, imm: u64) -> f32 {
    if imm & XORSIGN == 0 {
        return r;
    }
    f32::from_bits(r.to_bits() & 0x7fff_ffff | (x.to_bits() ^ y.to_bits()) & 0x8000_0000)
}

#[inline(always)]
fn mag(x: f32, imm: u64) -> f32 {
    if imm & XORSIGN == 0 { x } else { x.abs() }
}

pub(super) fn unary(name: &str) -> Option<Kernel> {
    Some(match name {
        "ex2" => f32_kernel!(|x, _y, _z, _i| f64::from(x).exp2() as f32),
        "lg2" => f32_kernel!(|x, _y, _z, _i| f64::from(x).log2() as f32),
        "sin" => f32_kernel!(|x, _y, _z, _i| f64::from(x).sin() as f32),
        "cos" => f32_kernel!(|x, _y, _z, _i| f64::from(x).cos() as f32),
        "tanh" => f32_kernel!(|x, _y, _z, _i| f64::from(x).tanh() as f32),
        "rsqrt" => f32_kernel!(|x, _y, _z, _i| (1.0 / f64::from(x).sqrt()) as f32),
        "rcp" => f32_kernel!(|x, _y, _z, i| divide(1.0, x, i)),
        "sqrt" => f32_kernel!(|x, _y, _z, i| root(x, i)),
        _ => return None,
    })
}

fn divide(x: f32, y: f32, imm: u64) -> f32 {
    let mode = mode_of(imm);
    if mode == Round::NearestEven || x == 0.0 || y == 0.0 || !x.is_finite() || !y.is_finite() {
        return x / y;
    }
    // The quotient rounded to odd: a remainder that is not zero makes the last bit stick.
    let (a, b) = (f64::from(x), f64::from(y));
    let q = a / b;
    let r = (-q).mul_add(b, a);
    directed(q, if (r > 0.0) == (b > 0.0) { 1.0 } else { -1.0 }, r == 0.0, mode)
}

fn root(x: f32, imm: u64) -> f32 {
    let mode = mode_of(imm);
    if mode == Round::NearestEven || x <= 0.0 || !x.is_finite() {
        return x.sqrt();
    }
    let a = f64::from(x);
    let q = a.sqrt();
    let r = (-q).mul_add(q, a);
    directed(q, if r > 0.0 { 1.0 } else { -1.0 }, r == 0.0, mode)
}

/// Rounds `q` plus a tiny error of the given sign.
fn directed(q: f64, sign: f64, exact: bool, mode: Round) -> f32 {
    let odd = if exact || q.to_bits() & 1 == 1 {
        q
    } else if (sign > 0.0) == (q > 0.0) {
        f64::from_bits(q.to_bits() + 1)
    } else {
        f64::from_bits(q.to_bits() - 1)
    };
    f32::from_bits(num::encode(odd, num::F32, mode, false))
}

impl Decoder<'_> {
    pub(super) fn float(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        let Some(ty) = last_type(p) else { return Ok(false) };
        match ty {
            Ty::F32 => self.f32(p, o),
            Ty::F64 => self.f64(p, o),
            Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 => self.half(p, o, ty),
            _ => Ok(false),
        }
    }

    fn f32(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        let has = |s: &str| p.contains(&s);
        // Packed pairs in a 64-bit register are another instruction set.
        if p.iter().rev().skip(1).any(|s| matches!(*s, "f16" | "bf16")) {
            return self.unsupported("mixed precision");
        }
        let mode = p.iter().find_map(|s| rounding(s)).unwrap_or(Round::NearestEven);
        let imm = u64::from(has("ftz")) * FTZ
            + u64::from(has("sat")) * SAT
            + u64::from(has("NaN")) * NAN
            + u64::from(has("xorsign")) * XORSIGN
            + mode_bits(mode);
        let near = mode == Round::NearestEven;
        let two = |k: Kernel| Some((k, 2));
        let three = |k: Kernel| Some((k, 3));
        let one = |k: Kernel| Some((k, 1));
        let found = match p[0] {
            "add" if near => two(f32_kernel!(|x, y, _z, _i| x + y)),
            "sub" if near => two(f32_kernel!(|x, y, _z, _i| x - y)),
            "mul" if near => two(f32_kernel!(|x, y, _z, _i| x * y)),
            "add" => two(f32_kernel!(|x, y, _z, i| num::add_round(x, y, mode_of(i)))),
            "sub" => two(f32_kernel!(|x, y, _z, i| num::add_round(x, -y, mode_of(i)))),
            "mul" => two(f32_kernel!(|x, y, _z, i| num::mul_round(x, y, mode_of(i)))),
            "fma" | "mad" if near => three(f32_kernel!(|x, y, z, _i| num::fma_f32(x, y, z))),
            "fma" | "mad" => three(f32_kernel!(|x, y, z, i| num::fma_round(x, y, z, mode_of(i)))),
            "div" => two(f32_kernel!(|x, y, _z, i| divide(x, y, i))),
            "min" if o.len() == 3 => {
                two(f32_kernel!(|x, y, _z, i| signed(min32(mag(x, i), mag(y, i), i & NAN != 0), x, y, i)))
            }
            "max" if o.len() == 3 => {
                two(f32_kernel!(|x, y, _z, i| signed(max32(mag(x, i), mag(y, i), i & NAN != 0), x, y, i)))
            }
            "min" => three(f32_kernel!(|x, y, z, i| min32(min32(x, y, i & NAN != 0), z, i & NAN != 0))),
            "max" => three(f32_kernel!(|x, y, z, i| max32(max32(x, y, i & NAN != 0), z, i & NAN != 0))),
            "neg" => one(f32_kernel!(|x, _y, _z, _i| -x)),
            "abs" => one(f32_kernel!(|x, _y, _z, _i| x.abs())),
            "copysign" => two(f32_kernel!(|x, y, _z, _i| y.copysign(x))),
            "testp" => return self.testp(p, o),
            name => unary(name).map(|k| (k, 1)),
        };
        let Some((k, n)) = found else { return Ok(false) };
        self.operate(k, n, Ty::F32, o, imm)
    }

    pub(super) fn operate(&mut self, k: Kernel, n: usize, ty: Ty, o: Operands<'_>, imm: u64) -> Result<bool, Error> {
        let mut s = [NONE; 3];
        for i in 0..n {
            s[i] = self.source(&o[i + 1], ty)?;
        }
        let d = self.dest(&o[0])?;
        self.alu_op(k, d, s, imm);
        Ok(true)
    }

    fn testp(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        let kind =
            ["finite", "infinite", "number", "notanumber", "normal", "subnormal"].iter().position(|k| p.contains(k));
        let Some(kind) = kind else { return Ok(false) };
        fn k(a: &V, _: &V, _: &V, imm: u64, o: &mut V) {
            for l in 0..32 {
                let x = f32::from_bits(a[l] as u32);
                o[l] = u64::from(match imm {
                    0 => x.is_finite(),
                    1 => x.is_infinite(),
                    2 => !x.is_nan(),
                    3 => x.is_nan(),
                    4 => x.is_normal(),
                    _ => x.is_subnormal(),
                });
            }
        }
        self.operate(k, 1, Ty::F32, o, kind as u64)
    }

    fn f64(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        if let Some(mode) = p.iter().find_map(|s| rounding(s)).filter(|m| *m != Round::NearestEven) {
            let (k, sources) = match p[0] {
                "add" => (f64_kernel!(|x, y, _z, i| num::sum_toward(x, y, mode_of(i))), 2),
                "sub" => (f64_kernel!(|x, y, _z, i| num::sum_toward(x, -y, mode_of(i))), 2),
                "mul" => (f64_kernel!(|x, y, _z, i| num::product_toward(x, y, mode_of(i))), 2),
                "fma" | "mad" => (f64_kernel!(|x, y, z, i| num::fma_toward(x, y, z, mode_of(i))), 3),
                "div" => (f64_kernel!(|x, y, _z, i| num::quotient_toward(x, y, mode_of(i))), 2),
                "rcp" => (f64_kernel!(|x, _y, _z, i| num::quotient_toward(1.0, x, mode_of(i))), 1),
                "sqrt" => (f64_kernel!(|x, _y, _z, i| num::root_toward(x, mode_of(i))), 1),
                _ => return Ok(false),
            };
            return self.operate(k, sources, Ty::F64, o, mode_bits(mode));
        }
        let found = match p[0] {
            "add" => (f64_kernel!(|x, y, _z| x + y), 2),
            "sub" => (f64_kernel!(|x, y, _z| x - y), 2),
            "mul" => (f64_kernel!(|x, y, _z| x * y), 2),
            "fma" | "mad" => (f64_kernel!(|x, y, z| x.mul_add(y, z)), 3),
            "div" => (f64_kernel!(|x, y, _z| x / y), 2),
            "min" => (f64_kernel!(|x, y, _z| x.min(y)), 2),
            "max" => (f64_kernel!(|x, y, _z| x.max(y)), 2),
            "neg" => (f64_kernel!(|x, _y, _z| -x), 1),
            "abs" => (f64_kernel!(|x, _y, _z| x.abs()), 1),
            "rcp" => (f64_kernel!(|x, _y, _z| 1.0 / x), 1),
            "sqrt" => (f64_kernel!(|x, _y, _z| x.sqrt()), 1),
            "rsqrt" => (f64_kernel!(|x, _y, _z| 1.0 / x.sqrt()), 1),
            "copysign" => (f64_kernel!(|x, y, _z| y.copysign(x)), 2),
            _ => return Ok(false),
        };
        self.operate(found.0, found.1, Ty::F64, o, 0)
    }
}
