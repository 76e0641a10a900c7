//! Warp-wide operations under a member mask: shuffles, votes, matches, reductions, elections.

use super::access::set;
use super::run::{Flow, blend};
use super::state::{At, State, Warp};
use super::{Cluster, lanes};
use crate::op::{Collective, Reg, Rmw, ShflMode, Vote};
use crate::report::FindingKind;
use crate::syntax::Ty;

impl Cluster<'_> {
    pub(super) fn collective(
        &mut self,
        at: At,
        warp: &mut Warp,
        gi: usize,
        op: &Collective,
        mask: Reg,
        m: u32,
    ) -> Flow {
        let frame = warp.groups[gi].frame;
        let need = warp.frames[frame as usize].regs[mask as usize];
        let live = warp.live;
        if lanes(m).any(|l| need[l] as u32 & live & !m != 0) {
            return Flow::Stay(State::Gather);
        }
        if let Some(l) = lanes(m).find(|l| need[*l] as u32 >> l & 1 == 0) {
            let pc = warp.groups[gi].pc;
            self.report(FindingKind::Misuse, pc, at, l, None, "the member mask lacks the executing lane", None);
        }
        let mut rest = m;
        while rest != 0 {
            // Lanes with one mask are one operation.
            let first = rest.trailing_zeros() as usize;
            let members = need[first] as u32 & m;
            let same = lanes(rest).filter(|l| need[*l] == need[first]).fold(0, |x, l| x | 1 << l);
            rest &= !same;
            self.one(at, warp, frame, op, members | 1 << first, same);
        }
        Flow::Next
    }

    /// One operation: `members` take part, `m` are those whose results are written.
    fn one(&mut self, at: At, warp: &mut Warp, frame: u32, op: &Collective, members: u32, m: u32) {
        let regs = &mut warp.frames[frame as usize].regs;
        match op {
            Collective::Barrier => self.warp_sync(at, warp, m),
            Collective::Shfl { mode, d, p, a, b, c } => {
                let (va, vb, vc) = (regs[*a as usize], regs[*b as usize], regs[*c as usize]);
                let (mut out, mut ok) = ([0u64; 32], [0u64; 32]);
                for l in lanes(m) {
                    let (src, valid) = source(*mode, l as i32, vb[l] as u32, vc[l] as u32);
                    ok[l] = u64::from(valid);
                    // The value of a lane that does not take part is undefined; its own stale value shows that.
                    out[l] = if members >> src & 1 == 1 { va[src] & 0xffff_ffff } else { !va[src] & 0xffff_ffff };
                }
                blend(&mut regs[*d as usize], &out, m);
                blend(&mut regs[*p as usize], &ok, m);
            }
            Collective::Vote { kind, d, a, negate } => {
                let v = regs[*a as usize];
                let set = lanes(members).filter(|l| (v[*l] & 1 == 1) != *negate).fold(0u32, |x, l| x | 1 << l);
                let r = match kind {
                    Vote::All => u64::from(set == members),
                    Vote::Any => u64::from(set != 0),
                    Vote::Uni => u64::from(set == members || set == 0),
                    Vote::Ballot => u64::from(set),
                };
                blend(&mut regs[*d as usize], &[r; 32], m);
            }
            Collective::MatchAny { d, a, bits } => {
                let v = regs[*a as usize].map(|x| if *bits == 32 { x & 0xffff_ffff } else { x });
                for l in lanes(m) {
                    let same = lanes(members).filter(|k| v[*k] == v[l]).fold(0u64, |x, k| x | 1 << k);
                    set(warp, frame, *d, l, same);
                }
            }
            Collective::MatchAll { d, p, a, bits } => {
                let v = regs[*a as usize].map(|x| if *bits == 32 { x & 0xffff_ffff } else { x });
                let first = v[members.trailing_zeros() as usize];
                let all = lanes(members).all(|l| v[l] == first);
                blend(&mut regs[*d as usize], &[if all { u64::from(members) } else { 0 }; 32], m);
                blend(&mut regs[*p as usize], &[u64::from(all); 32], m);
            }
            Collective::Redux { op, ty, d, a, abs, nan } => {
                let v = regs[*a as usize];
                let r = redux(*op, *ty, lanes(members).map(|l| v[l]), *abs, *nan);
                blend(&mut regs[*d as usize], &[r; 32], m);
            }
            Collective::Elect { d, p } => {
                let leader = members.trailing_zeros();
                blend(&mut regs[*d as usize], &[u64::from(leader); 32], m);
                let mut out = [0; 32];
                out[leader as usize] = 1;
                blend(&mut regs[*p as usize], &out, m);
            }
        }
    }
}

/// Source lane of a shuffle, and whether it is in range.
fn source(mode: ShflMode, lane: i32, b: u32, c: u32) -> (usize, bool) {
    let bval = (b & 31) as i32;
    let cval = (c & 31) as i32;
    let mask = (c >> 8 & 31) as i32;
    let max = (lane & mask) | (cval & !mask);
    let min = lane & mask;
    let (j, ok) = match mode {
        ShflMode::Up => (lane - bval, lane - bval >= max),
        ShflMode::Down => (lane + bval, lane + bval <= max),
        ShflMode::Bfly => (lane ^ bval, lane ^ bval <= max),
        ShflMode::Idx => {
            let j = min | (bval & !mask);
            (j, j <= max)
        }
    };
    (if ok { (j & 31) as usize } else { lane as usize }, ok)
}

fn redux(op: Rmw, ty: Ty, values: impl Iterator<Item = u64>, abs: bool, nan: bool) -> u64 {
    if ty == Ty::F32 {
        let mut out: Option<f32> = None;
        for v in values {
            let x = f32::from_bits(v as u32);
            let x = if abs { x.abs() } else { x };
            out = Some(match out {
                None => x,
                Some(o) if x.is_nan() || o.is_nan() => {
                    if nan {
                        f32::NAN
                    } else if o.is_nan() {
                        x
                    } else {
                        o
                    }
                }
                Some(o) if op == Rmw::Min => o.min(x),
                Some(o) => o.max(x),
            });
        }
        return u64::from(crate::num::canon(out.unwrap_or(0.0)).to_bits());
    }
    let fold = |a: u32, b: u32| match op {
        Rmw::Add => a.wrapping_add(b),
        Rmw::Min if ty == Ty::S32 => (a as i32).min(b as i32) as u32,
        Rmw::Max if ty == Ty::S32 => (a as i32).max(b as i32) as u32,
        Rmw::Min => a.min(b),
        Rmw::Max => a.max(b),
        Rmw::And => a & b,
        Rmw::Or => a | b,
        Rmw::Xor => a ^ b,
        Rmw::Inc | Rmw::Dec | Rmw::Exch | Rmw::Cas => b,
    };
    u64::from(values.map(|v| v as u32).reduce(fold).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffles_stay_in_their_segment() {
        assert_eq!(source(ShflMode::Up, 9, 3, 0x1800), (9, false));
        assert_eq!(source(ShflMode::Up, 11, 3, 0x1800), (8, true));
        assert_eq!(source(ShflMode::Down, 14, 5, 0x100f), (14, false));
        assert_eq!(source(ShflMode::Idx, 13, 2, 0x1807), (10, true));
        assert_eq!(source(ShflMode::Bfly, 5, 17, 0x1f), (20, true));
    }
}
