//! Loads, stores and atomics.

use super::{Decoder, Symbol, last_type};
use crate::Error;
use crate::clock::Scope;
use crate::op::{Access, Addr, Atomic, Op, Order, Rmw, Where};
use crate::syntax::{Name, Operand, Operands, Ty};

impl Decoder<'_> {
    pub(super) fn memory(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        match p[0] {
            "ld" | "ldu" => self.load(p, o).map(|()| true),
            "st" if p.get(1) == Some(&"async") => self.store_async(p, o).map(|()| true),
            "st" => self.store(p, o).map(|()| true),
            "atom" => self.atomic(p, o).map(|()| true),
            "red" => self.atomic(p, o).map(|()| true),
            _ => Ok(false),
        }
    }

    /// The space an access names, and how its address reads.
    pub(super) fn place(p: Name<'_>) -> Where {
        for s in p.iter() {
            match *s {
                "global" => return Where::Global,
                "shared" | "shared::cta" => return Where::Shared,
                "shared::cluster" => return Where::SharedCluster,
                "local" => return Where::Local,
                "const" => return Where::Const,
                "param" | "param::entry" => return Where::KernelParam,
                "param::func" => return Where::FrameParam,
                _ => {}
            }
        }
        Where::Generic
    }

    pub(super) fn order(p: Name<'_>, atomic: bool) -> Order {
        let has = |s: &str| p.contains(&s);
        let (acquire, release) = (has("acquire") || has("acq_rel"), has("release") || has("acq_rel"));
        let strong = atomic || acquire || release || has("relaxed") || has("volatile") || has("mmio");
        let scope = if has("volatile") { Scope::Gpu } else { Self::scope(p) };
        Order { strong, acquire, release, scope }
    }

    fn param_address(&mut self, o: &Operand) -> Result<Option<Addr>, Error> {
        if let Operand::Mem(base, offset, _) = o
            && let Operand::Word(w) = &**base
            && let Some(Symbol::FrameParam(at)) = self.find(w)
        {
            let base = self.literal(u64::from(at));
            return Ok(Some(Addr { base, offset: *offset }));
        }
        Ok(None)
    }

    fn access(&mut self, p: Name<'_>, mem: &Operand) -> Result<(Where, Addr, Ty), Error> {
        let Some(ty) = last_type(p) else { return self.unsupported("type") };
        if ty == Ty::B128 {
            return self.unsupported("128-bit registers");
        }
        let mut place = Self::place(p);
        let addr = match self.param_address(mem)? {
            Some(a) if place == Where::KernelParam || place == Where::FrameParam => {
                place = Where::FrameParam;
                a
            }
            _ => self.address(mem)?,
        };
        Ok((place, addr, ty))
    }

    fn load(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let (place, addr, ty) = self.access(p, &o[1])?;
        let regs = self.dest_list(&o[0])?;
        let named = |x: &&Operand| **x != Operand::Word("_".into());
        let last = match &o[0] {
            Operand::Vector(v) => v.iter().rev().find(named),
            x => Some(x).filter(named),
        };
        let reg_bits = match last {
            Some(x) => self.dest_ty(x)?.1.bits(),
            None => 64,
        };
        self.emit(Op::Ld(Box::new(Access { place, ty, regs, reg_bits, addr, order: Self::order(p, false) })));
        Ok(())
    }

    fn store(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        if p.contains(&"bulk") {
            return self.unsupported("bulk store of a constant");
        }
        let (place, addr, ty) = self.access(p, &o[0])?;
        let regs = self.source_list(&o[1], ty)?;
        self.emit(Op::St(Box::new(Access {
            place,
            ty,
            regs,
            reg_bits: ty.bits(),
            addr,
            order: Self::order(p, false),
        })));
        Ok(())
    }

    fn store_async(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let (_, addr, ty) = self.access(p, &o[0])?;
        let b = self.source_list(&o[1], ty)?;
        let mbar = Some(self.address(&o[2])?);
        let order = Order { strong: true, acquire: false, release: false, scope: Scope::Cluster };
        self.emit(Op::Atom(Box::new(Atomic {
            place: Where::SharedCluster,
            op: Rmw::Exch,
            ty,
            d: Vec::new(),
            addr,
            b,
            c: Vec::new(),
            order,
            mbar,
        })));
        Ok(())
    }

    fn atomic(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let returns = p[0] == "atom";
        let asynchronous = p.get(1) == Some(&"async");
        let (mem, values) = if returns { (&o[1], o.after(2)) } else { (&o[0], o.after(1)) };
        let (place, addr, ty) = self.access(p, mem)?;
        let op = p.iter().skip(1).find_map(|s| {
            Some(match *s {
                "add" => Rmw::Add,
                "min" => Rmw::Min,
                "max" => Rmw::Max,
                "and" => Rmw::And,
                "or" => Rmw::Or,
                "xor" => Rmw::Xor,
                "inc" => Rmw::Inc,
                "dec" => Rmw::Dec,
                "exch" => Rmw::Exch,
                "cas" => Rmw::Cas,
                _ => return None,
            })
        });
        let Some(op) = op else { return self.unsupported("operation") };
        let fits = match op {
            Rmw::Add => !matches!(ty, Ty::B32 | Ty::B64 | Ty::B16),
            Rmw::Min | Rmw::Max => !matches!(ty, Ty::B32 | Ty::B64 | Ty::B16 | Ty::F32 | Ty::F64),
            Rmw::And | Rmw::Or | Rmw::Xor => matches!(ty, Ty::B32 | Ty::B64),
            Rmw::Inc | Rmw::Dec => ty == Ty::U32,
            Rmw::Exch => matches!(ty, Ty::B32 | Ty::B64),
            Rmw::Cas => matches!(ty, Ty::B16 | Ty::B32 | Ty::B64),
        };
        // The older spellings of bit operations on u32 and s32 are read too.
        let old = matches!(op, Rmw::And | Rmw::Or | Rmw::Xor | Rmw::Exch | Rmw::Cas)
            && matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64);
        if !fits && !old {
            return self.unsupported("operation on this type");
        }
        if matches!(ty, Ty::Pred | Ty::B8 | Ty::U8 | Ty::S8 | Ty::U16 | Ty::S16 | Ty::Tf32 | Ty::B128) {
            return self.unsupported("type");
        }
        let b = self.source_list(&values[0], ty)?;
        let c = if op == Rmw::Cas { self.source_list(&values[1], ty)? } else { Vec::new() };
        let mbar = if asynchronous { Some(self.address(&values[1])?) } else { None };
        let d = if returns { self.dest_list(&o[0])? } else { Vec::new() };
        self.emit(Op::Atom(Box::new(Atomic { place, op, ty, d, addr, b, c, order: Self::order(p, true), mbar })));
        Ok(())
    }
}
