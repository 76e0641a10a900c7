//! Matrix instructions: ldmatrix, stmatrix, mma and wgmma.

use super::Decoder;
use crate::Error;
use crate::op::{Elem, Mma, NONE, Op, Wgmma};
use crate::syntax::{Name, Operand, Operands, Ty};

pub(super) fn elem(s: &str) -> Option<Elem> {
    Some(match s {
        "bf16" => Elem::Bf16,
        "f16" => Elem::F16,
        "tf32" => Elem::Tf32,
        "e4m3" => Elem::E4m3,
        "e5m2" => Elem::E5m2,
        "s8" => Elem::S8,
        "u8" => Elem::U8,
        "f32" => Elem::F32,
        "s32" => Elem::S32,
        "f64" => Elem::F64,
        _ => return None,
    })
}

/// `m16n8k16` to its three numbers.
pub(super) fn shape(s: &str) -> Option<(usize, usize, usize)> {
    let (m, rest) = s.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    Some((m.parse().ok()?, n.parse().ok()?, k.parse().ok()?))
}

impl Decoder<'_> {
    pub(super) fn tensor(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        match p[0] {
            "ldmatrix" | "stmatrix" => {
                if !matches!(p.last(), Some(&"b16" | &"b8"))
                    || !(p.contains(&"m8n8") || p.contains(&"m16n16") || p.contains(&"m16n8"))
                {
                    return self.unsupported("shape");
                }
                if !p.contains(&"m8n8") {
                    return self.unsupported("shapes of sm_100");
                }
                let count = match p.iter().find(|s| matches!(**s, "x1" | "x2" | "x4")) {
                    Some(&"x1") => 1,
                    Some(&"x2") => 2,
                    Some(&"x4") => 4,
                    _ => return self.unsupported("number of matrices"),
                };
                let trans = p.contains(&"trans");
                let place = Self::place(p);
                if p[0] == "ldmatrix" {
                    let addr = self.address(&o[1])?;
                    let d = self.dest_list(&o[0])?;
                    if d.len() != count {
                        return self.parse_error("number of destinations");
                    }
                    self.emit(Op::Ldmatrix { d, addr, place, trans });
                } else {
                    let addr = self.address(&o[0])?;
                    let s = self.source_list(&o[1], Ty::B32)?;
                    if s.len() != count {
                        return self.parse_error("number of sources");
                    }
                    self.emit(Op::Stmatrix { s, addr, place, trans });
                }
            }
            "movmatrix" => {
                let a = self.source(&o[1], Ty::B32)?;
                let d = self.dest(&o[0])?;
                self.emit(Op::Movmatrix { d, a });
            }
            "mma" => self.mma(p, o)?,
            "wmma" => return self.wmma(p, o),
            "wgmma" => match p.get(1).copied() {
                Some("fence") => self.emit(Op::WgmmaFence),
                Some("commit_group") => self.emit(Op::WgmmaCommit),
                Some("wait_group") => {
                    let pending = self.constant(&o[0])? as u32;
                    self.emit(Op::WgmmaWait { pending });
                }
                Some("mma_async") => self.wgmma(p, o)?,
                _ => return Ok(false),
            },
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn mma(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let unknown = |s: &&str| s.starts_with("sp") || s.starts_with("block_scale") || s.starts_with("kind");
        if p.iter().any(unknown) {
            return self.unsupported("this form is not in the simulator");
        }
        let Some((m, n, k)) = p.iter().find_map(|s| shape(s)) else { return self.unsupported("shape") };
        if !p.contains(&"row") || !p.contains(&"col") || p.iter().filter(|s| **s == "row").count() != 1 {
            return self.unsupported("layout; only row.col is known");
        }
        let small = |s: &str| match s {
            "s4" => Some(Elem::S4),
            "u4" => Some(Elem::U4),
            "b1" if p.ends_with(&["and", "popc"]) => Some(Elem::B1),
            "b1" if p.ends_with(&["xor", "popc"]) => Some(Elem::B1Xor),
            _ => elem(s),
        };
        let types: Vec<Elem> = p.iter().filter_map(|s| small(s)).collect();
        let [d_ty, a_ty, b_ty, c_ty] = types[..] else { return self.unsupported("types") };
        let known = match (a_ty, d_ty) {
            (Elem::Bf16, Elem::F32) | (Elem::F16, Elem::F32 | Elem::F16) => matches!(k, 8 | 16) && m == 16,
            (Elem::Tf32, Elem::F32) => matches!(k, 4 | 8) && m == 16,
            (Elem::S8 | Elem::U8, Elem::S32) => matches!((m, k), (16, 16 | 32) | (8, 16)),
            (Elem::S4 | Elem::U4, Elem::S32) => matches!((m, k), (16, 32 | 64) | (8, 32)),
            (Elem::B1 | Elem::B1Xor, Elem::S32) => matches!((m, k), (16, 128 | 256) | (8, 128)),
            (Elem::E4m3 | Elem::E5m2, Elem::F32 | Elem::F16) => matches!(k, 16 | 32) && m == 16,
            (Elem::F64, Elem::F64) => matches!((m, k), (8, 4) | (16, 4 | 8 | 16)),
            _ => false,
        };
        if !known || n != 8 || c_ty != d_ty || a_ty.bits() != b_ty.bits() {
            return self.unsupported("shape or types");
        }
        let a = self.source_list(&o[1], Ty::B32)?;
        let b = self.source_list(&o[2], Ty::B32)?;
        let c = self.source_list(&o[3], Ty::F32)?;
        let d = self.dest_list(&o[0])?;
        let regs = |count: usize, e: Elem| count * e.bits() / 32 / if e == Elem::F64 { 2 } else { 1 } / 32;
        if a.len() != regs(m * k, a_ty)
            || b.len() != regs(k * n, b_ty)
            || c.len() != regs(m * n, c_ty)
            || d.len() != c.len()
        {
            return self.parse_error(format!("`{}`: number of registers", self.name));
        }
        let satfinite = p.contains(&"satfinite");
        self.emit(Op::Mma(Box::new(Mma { m, n, k, a_ty, b_ty, c_ty, satfinite, d, a, b, c })));
        Ok(())
    }

    fn wgmma(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let Some((m, n, k)) = p.iter().find_map(|s| shape(s)) else { return self.unsupported("shape") };
        let types: Vec<Elem> = p.iter().filter_map(|s| elem(s)).collect();
        let [d_ty, a_ty, b_ty] = types[..] else { return self.unsupported("types") };
        let known = match (a_ty, b_ty, d_ty) {
            (Elem::Bf16, Elem::Bf16, Elem::F32) | (Elem::F16, Elem::F16, Elem::F32 | Elem::F16) => {
                k == 16 && n % 8 == 0
            }
            (Elem::Tf32, Elem::Tf32, Elem::F32) => k == 8 && n % 8 == 0,
            (Elem::E4m3 | Elem::E5m2, Elem::E4m3 | Elem::E5m2, Elem::F32 | Elem::F16) => k == 32 && n % 8 == 0,
            (Elem::S8 | Elem::U8, Elem::S8 | Elem::U8, Elem::S32) => k == 32 && (n % 16 == 0 || n == 8 || n == 24),
            _ => false,
        };
        if !known || m != 64 || n == 0 || n > 256 {
            return self.unsupported("shape or types");
        }
        let d = {
            // The accumulator is read and written.
            let d = self.dest_list(&o[0])?;
            self.uses.extend(d.iter().copied());
            d
        };
        let expected = if d_ty == Elem::F16 { n / 4 } else { n / 2 };
        if d.len() != expected {
            return self.parse_error(format!(
                "`{}`: {} accumulator registers instead of {expected}",
                self.name,
                d.len()
            ));
        }
        let (a, a_desc) = match &o[1] {
            Operand::Vector(_) => (self.source_list(&o[1], Ty::B32)?, NONE),
            _ => (Vec::new(), self.source(&o[1], Ty::B64)?),
        };
        if a_desc == NONE && a.len() != 4 {
            return self.parse_error("A in registers takes four");
        }
        let b_desc = self.source(&o[2], Ty::B64)?;
        let (scale_d, negated) = self.pred(&o[3])?;
        if negated {
            return self.unsupported("negated scale-d");
        }
        let rest: Vec<i64> = o.after(4).iter().map(|x| self.constant(x).map(|v| v as i64)).collect::<Result<_, _>>()?;
        let sixteen = matches!(a_ty, Elem::Bf16 | Elem::F16);
        let integer = matches!(a_ty, Elem::S8 | Elem::U8);
        let wanted = if integer {
            0
        } else if !sixteen {
            2
        } else if a.is_empty() {
            4
        } else {
            3
        };
        if rest.len() != wanted {
            return self.parse_error(format!(
                "`{}`: {} literals after scale-d instead of {wanted}",
                self.name,
                rest.len()
            ));
        }
        let at = |i: usize| rest.get(i).copied().unwrap_or(0);
        let (trans_a, trans_b) = match (sixteen, a.is_empty()) {
            (true, true) => (at(2) == 1, at(3) == 1),
            (true, false) => (false, at(2) == 1),
            (false, _) => (false, false),
        };
        let satfinite = p.contains(&"satfinite");
        self.emit(Op::Wgmma(Box::new(Wgmma {
            n,
            k,
            a_ty,
            b_ty,
            d_ty,
            satfinite,
            d,
            a,
            a_desc,
            b_desc,
            scale_d,
            negate_a: at(0) == -1,
            negate_b: at(1) == -1,
            trans_a,
            trans_b,
        })));
        Ok(())
    }
}
