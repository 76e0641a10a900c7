//! `cvt` between all types, and `cvta` between address windows.

use super::Decoder;
use crate::Error;
use crate::num::{self, Format, Round};
use crate::op::{Kernel, NONE, V, rounding};
use crate::space;
use crate::syntax::{Name, Operands, Ty};

/// The formats a conversion knows beside the integers.
const FORMATS: [(&str, Format); 9] = [
    ("f32", num::F32),
    ("f16", num::F16),
    ("bf16", num::BF16),
    ("tf32", num::TF32),
    ("e4m3", num::E4M3),
    ("e5m2", num::E5M2),
    ("e2m1", num::E2M1),
    ("e2m3", num::E2M3),
    ("e3m2", num::E3M2),
];

/// What a general conversion does, packed into the immediate of its kernel.
#[derive(Clone, Copy)]
struct Plan {
    /// Type codes: index of an integer type, or 16 plus the index of a format, or 31 for f64.
    from: u32,
    to: u32,
    mode: Round,
    ftz: bool,
    sat: bool,
    satfinite: bool,
    relu: bool,
    /// Round a float to an integral float.
    integral: bool,
    reg_bits: u32,
}

const INTS: [Ty; 8] = [Ty::U8, Ty::S8, Ty::U16, Ty::S16, Ty::U32, Ty::S32, Ty::U64, Ty::S64];
const F64: u32 = 31;

impl Plan {
    fn pack(self) -> u64 {
        let mode = match self.mode {
            Round::NearestEven => 0u64,
            Round::NearestAway => 1,
            Round::Zero => 2,
            Round::Down => 3,
            Round::Up => 4,
        };
        u64::from(self.from)
            | u64::from(self.to) << 5
            | mode << 10
            | u64::from(self.ftz) << 13
            | u64::from(self.sat) << 14
            | u64::from(self.satfinite) << 15
            | u64::from(self.relu) << 16
            | u64::from(self.integral) << 17
            | u64::from(self.reg_bits) << 18
    }

    fn unpack(i: u64) -> Plan {
        let mode = match i >> 10 & 7 {
            0 => Round::NearestEven,
            1 => Round::NearestAway,
            2 => Round::Zero,
            3 => Round::Down,
            _ => Round::Up,
        };
        Plan {
            from: i as u32 & 31,
            to: (i >> 5) as u32 & 31,
            mode,
            ftz: i >> 13 & 1 == 1,
            sat: i >> 14 & 1 == 1,
            satfinite: i >> 15 & 1 == 1,
            relu: i >> 16 & 1 == 1,
            integral: i >> 17 & 1 == 1,
            reg_bits: (i >> 18) as u32 & 127,
        }
    }

    fn run(&self, x: u64) -> u64 {
        let mask = |v: u64, bits: u32| if bits >= 64 { v } else { v & ((1 << bits) - 1) };
        if self.from < 8 && self.to < 8 {
            let v = int_value(x, INTS[self.from as usize]);
            let to = INTS[self.to as usize];
            let v = if self.sat { clamp(v, to) } else { v };
            return mask(extend(v as u64, to), self.reg_bits);
        }
        if self.to < 8 {
            return mask(extend(self.float_to_int(x), INTS[self.to as usize]), self.reg_bits);
        }
        if self.from < 8 {
            let v = int_value(x, INTS[self.from as usize]);
            return self.int_to_float(v);
        }
        let mut v = self.load(x);
        if self.integral {
            v = num::round_int(v, self.mode);
        }
        if self.relu && v <= 0.0 {
            v = 0.0;
        }
        if self.sat {
            v = if v > 0.0 { v.min(1.0) } else { 0.0 };
        }
        if self.to == F64 {
            return if v.is_nan() { 0x7fff_ffff_ffff_ffff } else { v.to_bits() };
        }
        let f = FORMATS[self.to as usize - 16].1;
        let mut code = num::encode(v, f, self.mode, self.satfinite);
        if v.is_nan() && self.relu {
            code = f.nan;
        }
        if self.to == 19 {
            // tf32 keeps its place in the upper bits.
            code <<= 13;
            if v.is_nan() {
                code = 0x7fff_ffff;
            }
        }
        if self.to == 16 && self.ftz {
            return u64::from(num::flush(f32::from_bits(code)).to_bits());
        }
        u64::from(code)
    }

    fn load(&self, x: u64) -> f64 {
        if self.from == F64 {
            return f64::from_bits(x);
        }
        if self.from == 16 {
            let f = f32::from_bits(x as u32);
            return f64::from(if self.ftz { num::flush(f) } else { f });
        }
        num::decode(x as u32, FORMATS[self.from as usize - 16].1)
    }

    fn float_to_int(&self, x: u64) -> u64 {
        let to = INTS[self.to as usize];
        let v = self.load(x);
        if v.is_nan() {
            // The manual: zero, unless the source is f64 or the destination has 64 bits.
            let wide = self.from == F64 || to.bits() == 64;
            return if wide { 1 << (to.bits() - 1) } else { 0 };
        }
        let v = num::round_int(v, self.mode);
        match to {
            Ty::U64 => v as u64,
            Ty::S64 => v as i64 as u64,
            _ => clamp(v as i128, to) as u64,
        }
    }

    fn int_to_float(&self, v: i128) -> u64 {
        // Every integer of 64 bits is scaled into two exact halves, summed with rounding to odd.
        let (high, low) = ((v >> 32) as f64 * 4_294_967_296.0, (v & 0xffff_ffff) as f64);
        if self.to == F64 {
            return (high + low).to_bits();
        }
        let v = num::add_odd(high, low);
        let v = if self.sat { if v > 0.0 { v.min(1.0) } else { 0.0 } } else { v };
        u64::from(num::encode(v, FORMATS[self.to as usize - 16].1, self.mode, false))
    }
}

fn int_value(x: u64, ty: Ty) -> i128 {
    match ty {
        Ty::U8 => i128::from(x as u8),
        Ty::S8 => i128::from(x as i8),
        Ty::U16 => i128::from(x as u16),
        Ty::S16 => i128::from(x as i16),
        Ty::U32 => i128::from(x as u32),
        Ty::S32 => i128::from(x as i32),
        Ty::S64 => i128::from(x as i64),
        _ => i128::from(x),
    }
}

fn extend(x: u64, ty: Ty) -> u64 {
    int_value(x, ty) as u64
}

fn clamp(v: i128, ty: Ty) -> i128 {
    let bits = ty.bits();
    if ty.signed() { v.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { v.clamp(0, (1 << bits) - 1) }
}

fn general(a: &V, _: &V, _: &V, imm: u64, o: &mut V) {
    let plan = Plan::unpack(imm);
    for l in 0..32 {
        o[l] = plan.run(a[l]);
    }
}

/// Two sources to a packed pair; the first source is the upper half.
fn pack_pair(a: &V, b: &V, _: &V, imm: u64, o: &mut V) {
    let plan = Plan::unpack(imm);
    let f = FORMATS[plan.to as usize - 16].1;
    let bits = 1 + f.exp_bits + f.man_bits;
    // Six-bit formats stand in bytes.
    let bits = if bits == 6 { 8 } else { bits };
    for l in 0..32 {
        o[l] = plan.run(a[l]) << bits | plan.run(b[l]);
    }
}

/// A packed pair in one register, element by element.
fn unpack_pair(a: &V, _: &V, _: &V, imm: u64, o: &mut V) {
    let plan = Plan::unpack(imm);
    let width = |t: u32| {
        let f = FORMATS[t as usize - 16].1;
        let b = 1 + f.exp_bits + f.man_bits;
        if b == 6 { 8 } else { b }
    };
    let (from, to) = (width(plan.from), width(plan.to));
    for l in 0..32 {
        let low = a[l] & ((1 << from) - 1);
        let high = a[l] >> from & ((1 << from) - 1);
        o[l] = plan.run(high) << to | plan.run(low);
    }
}

fn bf16_pair(a: &V, b: &V, _: &V, _: u64, o: &mut V) {
    #[inline(always)]
    fn one(x: u32) -> u32 {
        let r = (x + 0x7fff + (x >> 16 & 1)) >> 16;
        if x & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { r }
    }
    for l in 0..32 {
        o[l] = u64::from(one(a[l] as u32)) << 16 | u64::from(one(b[l] as u32));
    }
}

fn from_s32(a: &V, _: &V, _: &V, _: u64, o: &mut V) {
    for l in 0..32 {
        o[l] = u64::from((a[l] as i32 as f32).to_bits());
    }
}

fn sign_extend(a: &V, _: &V, _: &V, _: u64, o: &mut V) {
    for l in 0..32 {
        o[l] = a[l] as i32 as i64 as u64;
    }
}

impl Decoder<'_> {
    pub(super) fn convert(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        match p[0] {
            "cvt" => self.cvt(p, o).map(|()| true),
            "cvta" => self.cvta(p, o).map(|()| true),
            _ => Ok(false),
        }
    }

    fn type_code(&self, s: &str) -> Option<(u32, bool)> {
        if let Some(i) = Ty::parse(s).and_then(|t| INTS.iter().position(|x| *x == t)) {
            return Some((i as u32, false));
        }
        if s == "f64" {
            return Some((F64, false));
        }
        let (name, pair) = match s.strip_suffix("x2") {
            Some(n) => (n, true),
            None => (s, false),
        };
        FORMATS.iter().position(|f| f.0 == name).map(|i| (16 + i as u32, pair))
    }

    fn cvt(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let [.., to, from] = *p else { return self.unsupported("types") };
        if to.ends_with("x4") {
            return self.unsupported("stochastic rounding");
        }
        let (Some((from, from_pair)), Some((to, to_pair))) = (self.type_code(from), self.type_code(to)) else {
            return self.unsupported("types");
        };
        let has = |s: &str| p.contains(&s);
        let mode_name = p.iter().find(|s| rounding(s).is_some()).copied();
        let float_to_int = to < 8 && from >= 16;
        let mode = mode_name.and_then(rounding).unwrap_or(if float_to_int { Round::Zero } else { Round::NearestEven });
        let integral = !float_to_int && to >= 16 && from >= 16 && mode_name.is_some_and(|m| m.ends_with('i'));
        let mut plan = Plan {
            from,
            to,
            mode,
            ftz: has("ftz"),
            sat: has("sat"),
            satfinite: has("satfinite"),
            relu: has("relu"),
            integral,
            reg_bits: 64,
        };
        // Formats below 16 bits saturate always.
        if to >= 20 && to != F64 {
            plan.satfinite = true;
        }
        let pair = o.len() >= 3;
        let ty = if from == F64 { Ty::F64 } else { Ty::F32 };
        let first = self.source(&o[1], ty)?;
        let second = if pair { self.source(&o[2], ty)? } else { NONE };
        let (d, dty) = self.dest_ty(&o[0])?;
        plan.reg_bits = dty.bits();
        if to_pair && pair {
            let simple =
                to == 18 && from == 16 && mode == Round::NearestEven && !plan.relu && !plan.satfinite && !plan.ftz;
            let k: Kernel = if simple { bf16_pair } else { pack_pair };
            self.alu_op(k, d, [first, second, NONE], plan.pack());
            return Ok(());
        }
        if to_pair != from_pair || pair {
            return self.unsupported("number of sources");
        }
        let k: Kernel = if to_pair {
            unpack_pair
        } else if from == 5 && to == 16 && mode == Round::NearestEven && !plan.sat {
            from_s32
        } else if from == 5 && (to == 6 || to == 7) && !plan.sat {
            sign_extend
        } else {
            general
        };
        self.alu_op(k, d, [first, NONE, NONE], plan.pack());
        Ok(())
    }

    fn cvta(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let to_specific = p.get(1) == Some(&"to");
        let Some(which) = p.get(if to_specific { 2 } else { 1 }) else { return self.unsupported("space") };
        let window = match *which {
            "global" => 0,
            "shared" | "shared::cta" | "shared::cluster" => space::SHARED,
            "local" => space::LOCAL,
            "const" => space::CONST,
            "param" => space::PARAM,
            _ => return self.unsupported("space"),
        };
        let a = self.source(&o[1], Ty::B64)?;
        let d = self.dest(&o[0])?;
        fn enter(a: &V, _: &V, _: &V, w: u64, o: &mut V) {
            for l in 0..32 {
                o[l] = a[l].wrapping_add(w);
            }
        }
        fn leave(a: &V, _: &V, _: &V, w: u64, o: &mut V) {
            for l in 0..32 {
                o[l] = a[l].wrapping_sub(w);
            }
        }
        self.alu_op(if to_specific { leave } else { enter }, d, [a, NONE, NONE], window);
        Ok(())
    }
}
