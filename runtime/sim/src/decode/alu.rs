//! Integer, logic and data-movement instructions.

use super::integer::{bfe, bfi, dp, find_nth, high, lop3, mad_high, mad_wide, one, prmt, shift, two};
use super::kernel::{Lane, by_int, kernel, raw};
use super::{Decoder, last_type};
use crate::Error;
use crate::op::{Kernel, NONE, Op, Reg, V};
use crate::syntax::{Name, Operand, Operands, Ty};

impl Decoder<'_> {
    /// Pairs of 16-bit integers in one register (sm_90).
    fn pairs(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
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
        self.two_op(k, Ty::B32, o)
    }

    pub(super) fn alu(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
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

    fn integer(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        // The modes of prmt stand behind its type.
        if p[0] == "prmt" {
            let Some(k) = prmt(p.get(2).copied().unwrap_or("")) else { return Ok(false) };
            return self.three_op(k, Ty::B32, o, 0);
        }
        let Some(ty) = last_type(p) else { return Ok(false) };
        match p[0] {
            "lop3" => {
                if p.len() > 2 {
                    return self.unsupported("lop3 with a predicate");
                }
                let lut = self.constant(&o[4])?;
                let k = raw!(|a, b, c, i| u64::from(lop3(a as u32, b as u32, c as u32, i)));
                self.three_op(k, ty, o, lut)
            }
            "shl" | "shr" => {
                let Some(k) = shift(p[0], ty) else { return Ok(false) };
                let (a, b) = (self.source(&o[1], ty)?, self.source(&o[2], Ty::U32)?);
                let d = self.dest(&o[0])?;
                self.alu_op(k, d, [a, b, NONE], 0);
                Ok(true)
            }
            "shf" => {
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
                let k = raw!(|m, base, off| find_nth(m as u32, base as u32, off as i32));
                self.three_op(k, ty, o, 0)
            }
            _ => {
                if let Some(k) = two(p[0], ty, p) {
                    return self.two_op(k, ty, o);
                }
                if let Some(k) = one(p[0], ty, p) {
                    let a = self.source(&o[1], ty)?;
                    let d = self.dest(&o[0])?;
                    self.alu_op(k, d, [a, NONE, NONE], 0);
                    return Ok(true);
                }
                Ok(false)
            }
        }
    }

    fn truncate(&mut self, o: Operands<'_>, ty: Ty) -> Result<bool, Error> {
        let d = self.dest(&o[0])?;
        if ty.bits() < 64 {
            self.alu_op(raw!(|x, _y, _z, i| x & i), d, [d, NONE, NONE], (1 << ty.bits()) - 1);
        }
        Ok(true)
    }

    pub(super) fn two_op(&mut self, k: Kernel, ty: Ty, o: Operands<'_>) -> Result<bool, Error> {
        let (a, b) = (self.source(&o[1], ty)?, self.source(&o[2], ty)?);
        let d = self.dest(&o[0])?;
        self.alu_op(k, d, [a, b, NONE], 0);
        Ok(true)
    }

    pub(super) fn three_op(&mut self, k: Kernel, ty: Ty, o: Operands<'_>, imm: u64) -> Result<bool, Error> {
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

    fn mov(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
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

    /// Extended-precision arithmetic: the carry is a register of its own.
    fn carry(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
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
        let (a, b) = if p[0].starts_with("mad") {
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
            (self.source(&o[1], ty)?, self.source(&o[2], ty)?)
        };
        let d = self.dest(&o[0])?;
        let subtract = p[0].starts_with("sub");
        // A subtraction adds the complement and one: its carry is set where nothing is borrowed. The manual speaks of
        // a borrow, but what nvcc emits for 128-bit division adds this carry after a subtraction.
        let c = if reads { cc } else { self.literal(u64::from(subtract)) };
        let imm = u64::from(bits == 64) | u64::from(subtract) << 1;
        fn sum(x: u64, y: u64, c: u64, i: u64) -> (u64, u64) {
            let bits = if i & 1 == 1 { 64 } else { 32 };
            let mask = if bits == 64 { u64::MAX } else { 0xffff_ffff };
            let y = if i & 2 == 0 { y } else { !y };
            let r = u128::from(x & mask) + u128::from(y & mask) + u128::from(c & 1);
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
