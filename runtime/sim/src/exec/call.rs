//! Branches through tables, calls and returns.

use super::run::{Flow, blend};
use super::state::{At, Group, Warp};
use super::{Cluster, lanes};
use crate::op::{Call, CallValue, FUNC_BASE, Op};
use crate::report::FindingKind;

/// Deepest nesting of calls.
const MAX_DEPTH: u32 = 4096;

impl Cluster<'_> {
    pub(super) fn indexed_branch(
        &mut self,
        at: At,
        warp: &mut Warp,
        gi: usize,
        index: u32,
        targets: &[u32],
        m: u32,
    ) -> Flow {
        let g = warp.groups[gi].clone();
        let values = warp.frames[g.frame as usize].regs[index as usize];
        let mut rest = m;
        warp.groups.remove(gi);
        while rest != 0 {
            let v = values[rest.trailing_zeros() as usize] as u32;
            let same = lanes(rest).filter(|l| values[*l] as u32 == v).fold(0, |x, l| x | 1 << l);
            rest &= !same;
            match targets.get(v as usize) {
                Some(t) => warp.groups.push(Group { pc: *t, mask: same, ..g.clone() }),
                None => {
                    self.report(
                        FindingKind::OutOfBounds,
                        g.pc,
                        at,
                        same.trailing_zeros() as usize,
                        None,
                        format!("branch index {v} of {} targets", targets.len()),
                        None,
                    );
                    warp.live &= !same;
                }
            }
        }
        Flow::Moved
    }

    pub(super) fn call(&mut self, at: At, warp: &mut Warp, gi: usize, c: &Call) -> Flow {
        let env = self.env;
        let mut g = warp.groups[gi].clone();
        let func = match c.target {
            Ok(f) => f,
            Err(r) => {
                let values = warp.frames[g.frame as usize].regs[r as usize];
                let first = g.mask.trailing_zeros() as usize;
                // Lanes that call another function go by themselves.
                let same = lanes(g.mask).filter(|l| values[*l] == values[first]).fold(0, |x, l| x | 1 << l);
                if same != g.mask {
                    warp.groups.push(Group { mask: g.mask & !same, ..g.clone() });
                    warp.groups[gi].mask = same;
                    g.mask = same;
                }
                let i = values[first].wrapping_sub(FUNC_BASE) as usize;
                if i >= env.code.funcs.len() {
                    self.report(
                        FindingKind::Misuse,
                        g.pc,
                        at,
                        first,
                        Some(values[first]),
                        "call of an address that is no function",
                        None,
                    );
                    warp.live &= !g.mask;
                    warp.groups.remove(gi);
                    return Flow::Moved;
                }
                i
            }
        };
        let f = &env.code.funcs[func];
        if !f.has_body {
            return self.external(at, warp, gi, &f.name, c);
        }
        let local = warp.frames[g.frame as usize].local_base
            + env.code.funcs[warp.frames[g.frame as usize].func].local_bytes.next_multiple_of(16);
        if g.depth >= MAX_DEPTH || local > 1 << 19 {
            self.report(
                FindingKind::OutOfBounds,
                g.pc,
                at,
                g.mask.trailing_zeros() as usize,
                None,
                "the stack overflows",
                None,
            );
            warp.live &= !g.mask;
            warp.groups.remove(gi);
            return Flow::Moved;
        }
        let id = self.new_frame(at, warp, func, g.frame, g.pc, local, g.mask);
        for (arg, (offset, bytes)) in c.args.iter().zip(&f.params) {
            for l in lanes(g.mask) {
                let to = l * f.area_bytes as usize + *offset as usize;
                let n = *bytes as usize;
                match arg {
                    CallValue::Area(from) => {
                        let src = &warp.frames[g.frame as usize];
                        let per = src.area.len() / 32;
                        // A declaration that is shorter than the parameter gives what it has.
                        let n = n.min(per.saturating_sub(*from as usize));
                        let at = l * per + *from as usize;
                        let data = src.area[at..at + n].to_vec();
                        warp.frames[id as usize].area[to..to + n].copy_from_slice(&data);
                    }
                    CallValue::Reg(r) => {
                        let v = warp.frames[g.frame as usize].regs[*r as usize][l].to_le_bytes();
                        let n = n.min(8);
                        warp.frames[id as usize].area[to..to + n].copy_from_slice(&v[..n]);
                    }
                }
            }
        }
        warp.groups[gi] = Group { pc: f.start, frame: id, depth: g.depth + 1, ..g };
        Flow::Moved
    }

    /// The functions of the system that a kernel may name.
    fn external(&mut self, at: At, warp: &mut Warp, gi: usize, name: &str, c: &Call) -> Flow {
        let g = warp.groups[gi].clone();
        if name == "vprintf" {
            for r in &c.rets {
                match r {
                    CallValue::Reg(r) => blend(&mut warp.frames[g.frame as usize].regs[*r as usize], &[0; 32], g.mask),
                    CallValue::Area(o) => {
                        let frame = &mut warp.frames[g.frame as usize];
                        let per = frame.area.len() / 32;
                        for l in lanes(g.mask) {
                            frame.area[l * per + *o as usize..][..4].fill(0);
                        }
                    }
                }
            }
            return Flow::Next;
        }
        let what = if name == "__assertfail" {
            "an assertion of the kernel fails".to_owned()
        } else {
            format!("call of `{name}`, which has no body")
        };
        self.report(FindingKind::Trap, g.pc, at, g.mask.trailing_zeros() as usize, None, what, None);
        self.effects += 1;
        warp.live &= !g.mask;
        warp.groups.remove(gi);
        Flow::Moved
    }

    pub(super) fn ret(&mut self, warp: &mut Warp, gi: usize) -> Flow {
        let env = self.env;
        let g = warp.groups[gi].clone();
        let (func, parent, call_pc) = {
            let f = &warp.frames[g.frame as usize];
            (f.func, f.parent, f.call_pc)
        };
        let callee = &env.code.funcs[func];
        if let Op::Call(c) = &env.code.insts[call_pc as usize].op {
            for (ret, (offset, bytes)) in c.rets.iter().zip(&callee.rets) {
                for l in lanes(g.mask) {
                    let from = l * callee.area_bytes as usize + *offset as usize;
                    let n = *bytes as usize;
                    let data = warp.frames[g.frame as usize].area[from..from + n].to_vec();
                    let to = &mut warp.frames[parent as usize];
                    match ret {
                        CallValue::Area(at) => {
                            let per = to.area.len() / 32;
                            let n = n.min(per.saturating_sub(*at as usize));
                            let at = l * per + *at as usize;
                            to.area[at..at + n].copy_from_slice(&data[..n]);
                        }
                        CallValue::Reg(r) => {
                            let mut b = [0; 8];
                            b[..n.min(8)].copy_from_slice(&data[..n.min(8)]);
                            to.regs[*r as usize][l] = u64::from_le_bytes(b);
                        }
                    }
                }
            }
        }
        let frame = &mut warp.frames[g.frame as usize];
        frame.lanes &= !g.mask;
        if frame.lanes == 0 {
            warp.free_frames.push(g.frame);
        }
        warp.groups[gi] = Group { pc: call_pc + 1, frame: parent, depth: g.depth - 1, ..g };
        Flow::Moved
    }
}
