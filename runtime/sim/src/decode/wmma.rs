//! `wmma`: matrices that a warp loads, multiplies and stores together.
//!
//! Which lane holds which element is for the machine to choose. Here the elements, along k (of C and D: along n), line after
//! line, are dealt out to the lanes in runs of equal length; registers beyond a lane's run hold it again. So a load
//! becomes ordinary loads, which are checked and counted as such.

use super::kernel::raw;
use super::tensor::{elem, shape};
use super::{Decoder, last_type};
use crate::Error;
use crate::op::{Access, Addr, Elem, Kernel, NONE, Op, Reg, Slot, Special, V, Wmma};
use crate::syntax::{Name, Operand, Operands, Ty};

/// One operand of a product, as memory and registers hold it.
struct Fragment {
    e: Elem,
    /// Lines and elements of a line.
    lines: usize,
    len: usize,
    /// Whether the elements of a line are neighbours in memory.
    neighbours: bool,
}

impl Fragment {
    /// Elements of a lane, and of a register.
    fn runs(&self) -> (usize, usize) {
        (self.lines * self.len / 32, (4 / self.e.bytes() as usize).max(1))
    }

    /// Registers of a lane.
    fn registers(&self, which: &str) -> usize {
        let (run, per) = self.runs();
        // Those of A and B in f16 are eight in every shape.
        if self.e == Elem::F16 && matches!(which, "a" | "b") { 8 } else { run / per }
    }
}

impl Decoder<'_> {
    pub(super) fn wmma(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        match p.get(1).copied() {
            Some("load") => self.wmma_move(p, &o[0], &o[1], o.after(2).first()).map(|()| true),
            Some("store") => self.wmma_move(p, &o[1], &o[0], o.after(2).first()).map(|()| true),
            Some("mma") => self.wmma_product(p, o).map(|()| true),
            _ => Ok(false),
        }
    }

    fn fragment(&self, p: Name<'_>) -> Result<Fragment, Error> {
        let Some((m, n, k)) = p.iter().find_map(|s| shape(s)) else { return self.unsupported("shape") };
        let Some(e) = p.last().and_then(|s| elem(s)) else { return self.unsupported("type") };
        self.wmma_shape((m, n, k))?;
        let row = p.contains(&"row");
        let (lines, len, neighbours) = match p.get(2).copied() {
            Some("a") => (m, k, row),
            Some("b") => (n, k, !row),
            _ => (m, n, row),
        };
        Ok(Fragment { e, lines, len, neighbours })
    }

    fn wmma_shape(&self, shape: (usize, usize, usize)) -> Result<(), Error> {
        match shape {
            (16, 16, 8 | 16) | (32, 8, 16) | (8, 32, 16) | (8, 8, 4) => Ok(()),
            _ => self.unsupported("shape"),
        }
    }

    fn wmma_move(
        &mut self,
        p: Name<'_>,
        registers: &Operand,
        memory: &Operand,
        stride: Option<&Operand>,
    ) -> Result<(), Error> {
        let f = self.fragment(p)?;
        let loads = p[1] == "load";
        let space = Self::place(p);
        let addr = self.address(memory)?;
        let stride = match stride {
            Some(s) => self.source(s, Ty::B32)?,
            None => self.literal(if f.neighbours { f.len } else { f.lines } as u64),
        };
        let list = if loads {
            self.dest_list(registers)?
        } else {
            self.source_list(registers, last_type(p).unwrap_or(Ty::B32))?
        };
        if list.len() != f.registers(p[2]) {
            return self.parse_error(format!(
                "`{}`: {} registers instead of {}",
                self.name,
                list.len(),
                f.registers(p[2])
            ));
        }
        let (run, per) = f.runs();
        let bytes = f.e.bytes() as usize;
        let ty = |bytes: usize| match bytes {
            1 => Ty::B8,
            2 => Ty::B16,
            4 => Ty::B32,
            _ => Ty::B64,
        };
        let lane = self.slot(Slot::Special(Special::Laneid));
        let order = Self::order(p, false);
        // Whole registers, up to sixteen bytes at once, or single elements.
        let (step, width) = if f.neighbours { ((16 / bytes).min(run), bytes * per) } else { (1, bytes) };
        for (registers, first) in list.chunks(step.div_ceil(per)).zip((0..).step_by(step.max(per))) {
            for j in (first..first + step.max(per)).step_by(step) {
                let at = self.temp(Ty::B64);
                let element = j % run;
                let imm = (element | run << 8 | f.len << 16 | bytes << 24 | usize::from(f.neighbours) << 28) as u64;
                self.alu_op(
                    raw!(|lane, stride, base, imm| place(lane, stride, base, imm)),
                    at,
                    [lane, stride, addr.base],
                    imm,
                );
                let addr = Addr { base: at, offset: addr.offset };
                let access = |regs| Box::new(Access { place: space, ty: ty(width), regs, reg_bits: 64, addr, order });
                if f.neighbours || per == 1 {
                    let regs = registers.to_vec();
                    self.emit(if loads { Op::Ld(access(regs)) } else { Op::St(access(regs)) });
                } else {
                    self.wmma_element(loads, registers[0], (j % per, per), bytes as u32 * 8, access);
                }
            }
        }
        Ok(())
    }

    /// Moves one of the elements of a register.
    fn wmma_element(
        &mut self,
        loads: bool,
        register: Reg,
        (i, per): (usize, usize),
        bits: u32,
        access: impl FnOnce(Vec<Reg>) -> Box<Access>,
    ) {
        let t = self.temp(Ty::B32);
        let zero = self.literal(0);
        let mut parts = vec![zero; per];
        parts[i] = t;
        if loads {
            self.emit(Op::Ld(access(vec![t])));
            if i > 0 {
                let whole = self.temp(Ty::B32);
                self.emit(Op::Pack { d: whole, parts, bits });
                self.alu_op(raw!(|a, b| a | b), register, [register, whole, NONE], 0);
            } else {
                self.copy(register, t, 32);
            }
        } else {
            let shift = self.literal(u64::from(bits) * i as u64);
            self.alu_op(raw!(|a, b| a >> b), t, [register, shift, NONE], 0);
            self.emit(Op::St(access(vec![t])));
        }
    }

    fn wmma_product(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let Some((m, n, k)) = p.iter().find_map(|s| shape(s)) else { return self.unsupported("shape") };
        self.wmma_shape((m, n, k))?;
        if p.iter().any(|s| matches!(*s, "xor" | "and")) {
            return self.unsupported("products of bits");
        }
        let types: Vec<Elem> = p.iter().filter_map(|s| elem(s)).collect();
        let (d_ty, a_ty, b_ty, c_ty) = match types[..] {
            [d, c] => (d, Elem::F16, Elem::F16, c),
            [d, a, b, c] => (d, a, b, c),
            _ => return self.unsupported("types"),
        };
        let half = |e: Elem| matches!(e, Elem::F32 | Elem::F16);
        let known = a_ty == b_ty
            && match a_ty {
                Elem::F16 => half(d_ty) && half(c_ty) && k == 16,
                Elem::Bf16 => (d_ty, c_ty) == (Elem::F32, Elem::F32) && k == 16,
                Elem::Tf32 => (d_ty, c_ty) == (Elem::F32, Elem::F32) && k == 8,
                Elem::S8 | Elem::U8 => (d_ty, c_ty) == (Elem::S32, Elem::S32) && k == 16,
                Elem::F64 => (d_ty, c_ty) == (Elem::F64, Elem::F64) && k == 4,
                Elem::E4m3 | Elem::E5m2 | Elem::F32 | Elem::S32 => false,
                Elem::S4 | Elem::U4 | Elem::B1 | Elem::B1Xor => false,
            };
        if !known {
            return self.unsupported("shape or types");
        }
        let (a, b) = (self.source_list(&o[1], Ty::B32)?, self.source_list(&o[2], Ty::B32)?);
        let c = self.source_list(&o[3], Ty::B32)?;
        let d = self.dest_list(&o[0])?;
        let count = |which: &str, e: Elem, lines: usize, len: usize| {
            Fragment { e, lines, len, neighbours: true }.registers(which)
        };
        let wanted = [count("a", a_ty, m, k), count("b", b_ty, n, k), count("c", c_ty, m, n), count("d", d_ty, m, n)];
        if [a.len(), b.len(), c.len(), d.len()] != wanted {
            return self.parse_error(format!("`{}`: number of registers", self.name));
        }
        let satfinite = p.contains(&"satfinite");
        self.emit(Op::Wmma(Box::new(Wmma { m, n, k, a_ty, b_ty, c_ty, d_ty, satfinite, d, a, b, c })));
        Ok(())
    }
}

/// Address of an element of a lane: `imm` holds the element, those of a lane and of a line, bytes, and whether the elements
/// of a line are neighbours.
fn place(lane: u64, stride: u64, base: u64, imm: u64) -> u64 {
    let (element, run, len) = (imm & 0xff, imm >> 8 & 0xff, imm >> 16 & 0xff);
    let (bytes, neighbours) = (imm >> 24 & 0xf, imm >> 28 == 1);
    let i = lane * run + element;
    let (line, at) = (i / len, i % len);
    let elements = if neighbours { line * stride + at } else { at * stride + line };
    base.wrapping_add(elements.wrapping_mul(bytes))
}
