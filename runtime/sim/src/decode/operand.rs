//! Operands to slots of the frame.

use super::{Decoder, Symbol};
use crate::Error;
use crate::op::{Addr, Class, FUNC_BASE, Op, Reg, Slot, Special, Timer};
use crate::syntax::{Operand, Space, Ty};

impl Decoder<'_> {
    pub(super) fn literal(&mut self, v: u64) -> Reg {
        if let Some(r) = self.consts.get(&v) {
            return *r;
        }
        self.slots.push(Slot::Const(v));
        let r = (self.slots.len() - 1) as Reg;
        self.consts.insert(v, r);
        r
    }

    pub(super) fn slot(&mut self, s: Slot) -> Reg {
        if let Some((_, r)) = self.others.iter().find(|(o, _)| *o == s) {
            return *r;
        }
        self.slots.push(s);
        let r = (self.slots.len() - 1) as Reg;
        self.others.push((s, r));
        r
    }

    fn variable(&mut self, v: usize, offset: i64) -> Reg {
        let var = &self.code.vars[v];
        match var.var.space {
            Space::Const => {
                let at = var.const_offset.wrapping_add(offset as u64);
                self.literal(at)
            }
            Space::Shared | Space::Global | Space::Local | Space::Param => {
                if var.var.space == Space::Shared && !self.shared_vars.contains(&v) {
                    self.shared_vars.push(v);
                }
                self.slot(Slot::Variable(v, offset))
            }
        }
    }

    /// The slot of a source operand; literals are read as `ty`.
    pub(super) fn source(&mut self, o: &Operand, ty: Ty) -> Result<Reg, Error> {
        match o {
            Operand::Int(v) => Ok(self.literal(*v)),
            Operand::Float(v) => {
                let bits = match ty {
                    Ty::F64 => v.to_bits(),
                    _ => u64::from((*v as f32).to_bits()),
                };
                Ok(self.literal(bits))
            }
            Operand::Word(w) => self.named(w, 0),
            Operand::Offset(w, offset) => self.named(w, *offset),
            _ => self.expected("a register or a literal", o),
        }
    }

    fn named(&mut self, w: &str, offset: i64) -> Result<Reg, Error> {
        match self.find(w) {
            Some(Symbol::Reg(r, _)) => {
                self.uses.push(r);
                Ok(r)
            }
            Some(Symbol::Variable(v)) => Ok(self.variable(v, offset)),
            Some(Symbol::KernelParam(at)) => Ok(self.literal(u64::from(at).wrapping_add(offset as u64))),
            Some(Symbol::Local(at)) => Ok(self.slot(Slot::Local(at as i64 + offset))),
            Some(Symbol::FrameParam(_)) => self.unsupported(format!("address of the parameter `{w}`")),
            Some(Symbol::Targets(_)) => self.parse_error(format!("`{w}` is a list of labels")),
            None => self.special(w),
        }
    }

    fn special(&mut self, w: &str) -> Result<Reg, Error> {
        if let Some(f) = self.names.get(w) {
            self.indirect = true;
            return Ok(self.literal(FUNC_BASE + *f as u64));
        }
        let timer = match w {
            "%clock" | "%clock_hi" | "%clock64" => Some(Timer::Clock),
            "%globaltimer" | "%globaltimer_lo" | "%globaltimer_hi" => Some(Timer::GlobalTimer),
            _ => None,
        };
        if let Some(which) = timer {
            let d = self.temp(Ty::B64);
            let was = self.emitted;
            self.emit(Op::Timer { d, which });
            if let Some(last) = self.code.insts.last_mut() {
                last.class = Class::Hidden;
            }
            self.emitted = was;
            return Ok(d);
        }
        let (base, axis) =
            w.rsplit_once('.').map_or((w, None), |(b, a)| (b, ["x", "y", "z"].iter().position(|x| *x == a)));
        let s = match (base, axis) {
            ("%tid", Some(i)) => Special::Tid(i),
            ("%ntid", Some(i)) => Special::Ntid(i),
            ("%ctaid", Some(i)) => Special::Ctaid(i),
            ("%nctaid", Some(i)) => Special::Nctaid(i),
            ("%clusterid", Some(i)) => Special::Clusterid(i),
            ("%nclusterid", Some(i)) => Special::Nclusterid(i),
            ("%cluster_ctaid", Some(i)) => Special::ClusterCtaid(i),
            ("%cluster_nctaid", Some(i)) => Special::ClusterNctaid(i),
            _ => match w {
                "%cluster_ctarank" => Special::ClusterCtarank,
                "%cluster_nctarank" => Special::ClusterNctarank,
                "%is_explicit_cluster" => Special::IsExplicitCluster,
                "%laneid" => Special::Laneid,
                "%warpid" => Special::Warpid,
                "%nwarpid" => Special::Nwarpid,
                "%smid" => Special::Smid,
                "%nsmid" => Special::Nsmid,
                "%gridid" => Special::Gridid,
                "%lanemask_eq" => Special::LanemaskEq,
                "%lanemask_le" => Special::LanemaskLe,
                "%lanemask_lt" => Special::LanemaskLt,
                "%lanemask_ge" => Special::LanemaskGe,
                "%lanemask_gt" => Special::LanemaskGt,
                "%dynamic_smem_size" => Special::DynamicSharedSize,
                "%envreg1" => Special::GridWorkspace { upper: true },
                "%envreg2" => Special::GridWorkspace { upper: false },
                "%total_smem_size" | "%aggr_smem_size" => Special::TotalSharedSize,
                "WARP_SZ" => return Ok(self.literal(32)),
                _ => return self.parse_error(format!("unknown name `{w}`")),
            },
        };
        Ok(self.slot(Slot::Special(s)))
    }

    /// The register that takes what nobody wants: `_`, or a destination that was left out.
    pub(super) fn sink(&mut self) -> Reg {
        match self.sink {
            Some(r) => r,
            None => *self.sink.insert({
                self.slots.push(Slot::Register(Ty::B64));
                (self.slots.len() - 1) as Reg
            }),
        }
    }

    /// A destination register.
    pub(super) fn dest(&mut self, o: &Operand) -> Result<Reg, Error> {
        Ok(self.dest_ty(o)?.0)
    }

    pub(super) fn dest_ty(&mut self, o: &Operand) -> Result<(Reg, Ty), Error> {
        let Operand::Word(w) = o else { return self.expected("a destination register", o) };
        if w == "_" {
            return Ok((self.sink(), Ty::B64));
        }
        match self.find(w) {
            Some(Symbol::Reg(r, ty)) => {
                self.defs.push(r);
                Ok((r, ty))
            }
            Some(_) | None => self.parse_error(format!("`{w}` is not a register")),
        }
    }

    /// `d|p` or `d`.
    pub(super) fn dest_pair(&mut self, o: &Operand) -> Result<(Reg, Reg), Error> {
        match o {
            Operand::Pair(a, b) => Ok((self.dest(a)?, self.dest(b)?)),
            _ => Ok((self.dest(o)?, self.sink())),
        }
    }

    /// Registers of a vector operand, or of a single one.
    pub(super) fn dest_list(&mut self, o: &Operand) -> Result<Vec<Reg>, Error> {
        match o {
            Operand::Vector(v) => v.iter().map(|x| self.dest(x)).collect(),
            _ => Ok(vec![self.dest(o)?]),
        }
    }

    pub(super) fn source_list(&mut self, o: &Operand, ty: Ty) -> Result<Vec<Reg>, Error> {
        match o {
            Operand::Vector(v) => v.iter().map(|x| self.source(x, ty)).collect(),
            _ => Ok(vec![self.source(o, ty)?]),
        }
    }

    /// A predicate source, perhaps negated.
    pub(super) fn pred(&mut self, o: &Operand) -> Result<(Reg, bool), Error> {
        match o {
            Operand::Not(inner) => Ok((self.source(inner, Ty::Pred)?, true)),
            _ => Ok((self.source(o, Ty::Pred)?, false)),
        }
    }

    /// An address in brackets (or a bare register, which some instructions allow).
    pub(super) fn address(&mut self, o: &Operand) -> Result<Addr, Error> {
        match o {
            Operand::Mem(base, offset, _) => {
                let base = self.source(base, Ty::B64)?;
                Ok(Addr { base, offset: *offset })
            }
            Operand::Word(_) | Operand::Int(_) | Operand::Offset(..) => {
                Ok(Addr { base: self.source(o, Ty::B64)?, offset: 0 })
            }
            _ => self.expected("an address", o),
        }
    }

    /// The literal of an operand.
    pub(super) fn constant(&self, o: &Operand) -> Result<u64, Error> {
        match o {
            Operand::Int(v) => Ok(*v),
            _ => self.expected("a literal", o),
        }
    }

    /// The refusal of an operand that is something else, or not there.
    pub(super) fn expected<T>(&self, what: &str, o: &Operand) -> Result<T, Error> {
        self.parse_error(match o {
            Operand::Missing(n) => format!("`{}`: operand {n} is missing, {what}", self.name),
            _ => format!("`{}`: expected {what}", self.name),
        })
    }
}
