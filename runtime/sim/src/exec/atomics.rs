//! Atomic operations and reductions on memory.

use super::access::{Spot, Toucher, addresses, get, set, shifted, touch_of};
use super::run::Flow;
use super::seen::Seen;
use super::state::{At, Flight, FlightKind, Warp};
use super::{Agent, Cluster, lanes};
use crate::clock::Touch;
use crate::num;
use crate::op::{Atomic, Rmw, Where};
use crate::report::FindingKind;
use crate::syntax::Ty;

impl Cluster<'_> {
    pub(super) fn atomic(&mut self, at: At, warp: &mut Warp, frame: u32, a: &Atomic, m: u32, pc: u32) -> Flow {
        if a.mbar.is_some() {
            return self.remote(at, warp, frame, a, m, pc);
        }
        let size = a.ty.bytes();
        let total = u64::from(size) * a.b.len() as u64;
        let addrs = addresses(warp, frame, a.addr);
        let mut seen = Seen::default();
        let mut answer = 0u64;
        let mut changed = false;
        for l in lanes(m) {
            let Some(spot) = self.resolve(a.place, addrs[l], total, warp, frame, at, l, pc) else { continue };
            if !addrs[l].is_multiple_of(total) {
                self.report(
                    FindingKind::Misaligned,
                    pc,
                    at,
                    l,
                    Some(addrs[l]),
                    format!("not a multiple of {total}"),
                    None,
                );
                continue;
            }
            seen.add(l, spot);
            let t = Toucher { at, lane: l, pc, touch: touch_of(a.order), agent: (0, 0) };
            if self.env.check && matches!(spot, Spot::Global(..) | Spot::Shared(..)) {
                if self.touch(warp, t, spot, total as u32, true, false) && a.op != Rmw::Exch {
                    for i in 0..a.b.len() as u64 {
                        self.initialised(t, shifted(spot, i * u64::from(size)), size, true);
                    }
                }
                self.acquire_at(warp, t, spot, a.order, !a.d.is_empty());
                self.release_at(warp, t, spot, a.order, true);
            }
            for i in 0..a.b.len() {
                let s = shifted(spot, i as u64 * u64::from(size));
                let b = get(warp, frame, a.b[i], l);
                let c = a.c.get(i).map_or(0, |r| get(warp, frame, *r, l));
                let old = match s {
                    // One word of global memory may be shared with blocks on other cores.
                    Spot::Global(g, o) if size == 4 => u64::from(
                        self.env.memory.allocs[g].update(o, |w| combine(a.op, a.ty, u64::from(w), b, c) as u32),
                    ),
                    _ => {
                        let old = self.peek(warp, frame, l, s, size);
                        self.poke(warp, frame, l, s, size, combine(a.op, a.ty, old, b, c));
                        old
                    }
                };
                changed |= combine(a.op, a.ty, old, b, c) != old;
                answer = answer.wrapping_mul(31).wrapping_add(old);
                if let Some(d) = a.d.get(i) {
                    set(warp, frame, *d, l, old);
                }
            }
        }
        self.count(&seen, total as u32, true, true);
        if changed {
            self.effects += 1;
            warp.spin.2 = 0;
            return Flow::Next;
        }
        if a.d.is_empty() { Flow::Next } else { self.note_spin(warp, pc, answer) }
    }

    /// `st.async` and `red.async`: counted by an mbarrier of the destination's block.
    fn remote(&mut self, at: At, warp: &mut Warp, frame: u32, a: &Atomic, m: u32, pc: u32) -> Flow {
        let total = u64::from(a.ty.bytes()) * a.b.len() as u64;
        let addrs = addresses(warp, frame, a.addr);
        let Some(mbar) = a.mbar else { return Flow::Next };
        let bars = addresses(warp, frame, mbar);
        self.effects += 1;
        for l in lanes(m) {
            let Some(Spot::Shared(b, o)) = self.resolve(Where::SharedCluster, addrs[l], total, warp, frame, at, l, pc)
            else {
                continue;
            };
            let Some(Spot::Shared(mb, mo)) = self.resolve(Where::SharedCluster, bars[l], 8, warp, frame, at, l, pc)
            else {
                continue;
            };
            if !addrs[l].is_multiple_of(total) {
                self.report(
                    FindingKind::Misaligned,
                    pc,
                    at,
                    l,
                    Some(addrs[l]),
                    format!("not a multiple of {total}"),
                    None,
                );
                continue;
            }
            let Some(agent) = self.mbar_agent(at, l, pc, mb, mo as u32) else { continue };
            let plain = a.op == Rmw::Exch;
            let t = Toucher { at, lane: l, pc, touch: if plain { Touch::Copy } else { Touch::Reduce }, agent };
            self.touch(warp, t, Spot::Shared(b, o), total as u32, true, false);
            let values = a.b.iter().map(|r| get(warp, frame, *r, l)).collect();
            let what = FlightKind::Remote { to: (b, o as u32), values, ty: a.ty, op: a.op, mbar: (mb, mo as u32) };
            self.flights.push(Flight { block: at.block, warp: at.warp, lane: l, pc, what });
        }
        Flow::Next
    }

    /// The component of the copies that an mbarrier counts, at its current phase.
    pub(super) fn mbar_agent(&mut self, at: At, lane: usize, pc: u32, block: usize, offset: u32) -> Option<(u32, u32)> {
        match self.blocks[block].mbars.get(&offset) {
            Some(m) => Some((m.agent, m.time)),
            None => {
                self.effects += 1;
                self.report(
                    FindingKind::Mbarrier,
                    pc,
                    at,
                    lane,
                    Some(u64::from(offset)),
                    "the mbarrier is not initialised",
                    None,
                );
                None
            }
        }
    }

    /// Component of an agent of a thread.
    pub(super) fn thread_agent(&mut self, a: Agent) -> u32 {
        self.agent(a).0
    }
}

/// The new value of a read-modify-write.
pub(super) fn combine(op: Rmw, ty: Ty, old: u64, b: u64, c: u64) -> u64 {
    let wide = ty.bytes() == 8;
    let trim = |x: u64| if wide { x } else { x & 0xffff_ffff };
    match op {
        Rmw::Exch => trim(b),
        Rmw::Cas => {
            let mask = super::access::ones(ty.bytes());
            if old & mask == b & mask { c & mask } else { old & mask }
        }
        Rmw::And => trim(old & b),
        Rmw::Or => trim(old | b),
        Rmw::Xor => trim(old ^ b),
        Rmw::Inc => {
            let (o, b) = (old as u32, b as u32);
            u64::from(if o >= b { 0 } else { o + 1 })
        }
        Rmw::Dec => {
            let (o, b) = (old as u32, b as u32);
            u64::from(if o == 0 || o > b { b } else { o - 1 })
        }
        Rmw::Add => match ty {
            Ty::F32 => u64::from(num::canon(f32::from_bits(old as u32) + f32::from_bits(b as u32)).to_bits()),
            Ty::F64 => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
            Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 => halves(op, ty, old, b),
            _ => trim(old.wrapping_add(b)),
        },
        Rmw::Min | Rmw::Max => {
            let less = match ty {
                Ty::S32 => (b as i32) < old as i32,
                Ty::S64 => (b as i64) < old as i64,
                Ty::F32 => f32::from_bits(b as u32) < f32::from_bits(old as u32),
                Ty::F64 => f64::from_bits(b) < f64::from_bits(old),
                Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 => return halves(op, ty, old, b),
                _ => trim(b) < trim(old),
            };
            let equal = trim(b) == trim(old);
            trim(if equal || (op == Rmw::Min) != less { old } else { b })
        }
    }
}

fn halves(op: Rmw, ty: Ty, a: u64, b: u64) -> u64 {
    let bf16 = matches!(ty, Ty::Bf16 | Ty::Bf16x2);
    let one = |s: u32| u64::from(crate::decode::combine_half(op, bf16, (a >> s) as u16, (b >> s) as u16)) << s;
    if ty.bytes() == 2 { one(0) } else { one(0) | one(16) }
}
