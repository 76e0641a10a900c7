//! The step of an instruction.

use super::state::{At, Group, State, Warp};
use super::{Cluster, lanes, of};
use crate::clock::View;
use crate::launch::Lanes;
use crate::op::{BarKind, Inst, Kernel, NONE, Op, Reg, Timer, V, Where};
use crate::report::FindingKind;
use crate::space;
use std::sync::atomic::Ordering::Relaxed;

/// What an instruction does to its group.
pub(super) enum Flow {
    /// On to the next instruction.
    Next,
    /// The group waits at this instruction.
    Stay(State),
    /// The instruction has set the position, or changed the groups.
    Moved,
}

/// Equal answers of one strong read after which a group counts as spinning.
const SPIN: u32 = 24;

impl Cluster<'_> {
    /// Runs a group until it waits, its lanes part, it meets another group, or the turn ends. Says whether it has only
    /// been going round in a waiting loop.
    pub(super) fn run_group(&mut self, at: At, warp: &mut Warp, gi: usize, left: &mut u32) -> bool {
        let env = self.env;
        let insts = &env.code.insts[..];
        let alone = warp.groups.len() == 1;
        let (frame_id, depth, mask) = (warp.groups[gi].frame, warp.groups[gi].depth, warp.groups[gi].mask);
        let mut pc = warp.groups[gi].pc;
        let apart = env.lanes != Lanes::Together && mask.count_ones() > 1;
        if apart && !insts[pc as usize].op.meets() {
            part(warp, gi);
            return false;
        }
        let stop = if alone || env.lanes != Lanes::Together {
            u32::MAX
        } else {
            let others = warp.groups.iter().enumerate().filter(|(j, g)| *j != gi && g.depth == depth && g.pc > pc);
            others.map(|(_, g)| g.pc).min().unwrap_or(u32::MAX)
        };
        let watch = env.check && !warp.wgmma.acc.is_empty();
        let mut counts = u64::from(!warp.groups[gi].quiet);
        loop {
            if *left == 0 || pc >= stop || (apart && !insts[pc as usize].op.meets()) {
                warp.groups[gi].pc = pc;
                return false;
            }
            *left -= 1;
            self.steps += 1;
            let inst = &insts[pc as usize];
            let frame = &mut warp.frames[frame_id as usize];
            let m = active(inst, &frame.regs, mask);
            let e = &mut self.executed[pc as usize];
            e.0 += counts;
            e.1 += counts * u64::from(m.count_ones());
            if watch && m != 0 {
                self.watch_registers(at, warp, frame_id, pc);
            }
            if inst.matrix && m != 0 {
                warp.wgmma.fenced = false;
            }
            let frame = &mut warp.frames[frame_id as usize];
            match &inst.op {
                Op::Alu { k, d, a, b, c, imm } => {
                    lane_wise(&mut frame.regs, *k, *d, [*a, *b, *c], *imm, m);
                    pc += 1;
                    continue;
                }
                Op::Bra { target } => {
                    warp.groups[gi].pc = pc;
                    if m == mask {
                        pc = *target;
                    } else if m == 0 {
                        pc += 1;
                    } else {
                        warp.groups[gi].mask = mask & !m;
                        warp.groups[gi].pc = pc + 1;
                        warp.groups.push(Group::new(*target, frame_id, depth, m));
                        return false;
                    }
                    if alone {
                        continue;
                    }
                    warp.groups[gi].pc = pc;
                    return false;
                }
                Op::Nop => {
                    pc += 1;
                    continue;
                }
                _ => {}
            }
            if m == 0 {
                pc += 1;
                continue;
            }
            warp.groups[gi].pc = pc;
            if counts == 0 {
                counts = 1;
                warp.groups[gi].quiet = false;
                let e = &mut self.executed[pc as usize];
                e.0 += 1;
                e.1 += u64::from(m.count_ones());
            }
            if m != mask && inst.op.splits() {
                // The lanes whose guard is false go on by themselves.
                warp.groups[gi].mask = m;
                warp.groups.push(Group::new(pc + 1, frame_id, depth, mask & !m));
            }
            match self.step(at, warp, gi, inst, m) {
                Flow::Next => {
                    if warp.groups.len() == 1 && alone && warp.wgmma.acc.is_empty() != watch {
                        pc += 1;
                        warp.groups[0].pc = pc;
                        if warp.groups[0].state != State::Ready {
                            return true;
                        }
                        continue;
                    }
                    let g = &mut warp.groups[gi];
                    g.pc = pc + 1;
                    return g.state != State::Ready;
                }
                Flow::Stay(state) => {
                    let waits = matches!(state, State::Mbar { .. } | State::Spin);
                    // It is tried again, and counts when it succeeds: how often depends on the schedule.
                    if waits || matches!(state, State::Gather | State::Wgmma) {
                        let e = &mut self.executed[pc as usize];
                        e.0 -= 1;
                        e.1 -= u64::from(m.count_ones());
                    }
                    warp.groups[gi].state = state;
                    return waits;
                }
                Flow::Moved => return false,
            }
        }
    }

    /// Executes one instruction other than the plain ones for the lanes `m` of group `gi`.
    fn step(&mut self, at: At, warp: &mut Warp, gi: usize, inst: &Inst, m: u32) -> Flow {
        let (pc, fid) = (warp.groups[gi].pc, warp.groups[gi].frame);
        let f = fid as usize;
        match &inst.op {
            Op::Alu { .. } | Op::Bra { .. } | Op::Nop => Flow::Next,
            Op::Pack { d, parts, bits } => {
                let regs = &mut warp.frames[f].regs;
                let field = if *bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
                let mut out = [0u64; 32];
                for (i, p) in parts.iter().enumerate() {
                    let src = &regs[*p as usize];
                    for l in 0..32 {
                        out[l] |= (src[l] & field) << (i as u32 * bits);
                    }
                }
                blend(&mut regs[*d as usize], &out, m);
                Flow::Next
            }
            Op::Unpack { parts, s, bits } => {
                let regs = &mut warp.frames[f].regs;
                let field = if *bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
                let src = regs[*s as usize];
                for (i, p) in parts.iter().enumerate() {
                    let out = src.map(|x| x >> (i as u32 * bits) & field);
                    blend(&mut regs[*p as usize], &out, m);
                }
                Flow::Next
            }
            Op::Timer { d, which } => {
                let now = self.env.executed.load(Relaxed) + self.steps;
                let v = match which {
                    Timer::Clock => now * 4,
                    Timer::GlobalTimer => now * 32,
                };
                blend(&mut warp.frames[f].regs[*d as usize], &[v; 32], m);
                Flow::Next
            }
            Op::Brx { index, targets } => self.indexed_branch(at, warp, gi, *index, targets, m),
            Op::Call(c) => self.call(at, warp, gi, c),
            Op::Ret if warp.groups[gi].depth > 0 => self.ret(warp, gi),
            Op::Ret | Op::Exit => {
                self.effects += 1;
                warp.live &= !m;
                warp.groups.remove(gi);
                Flow::Moved
            }
            Op::Trap => {
                self.report(
                    FindingKind::Trap,
                    pc,
                    at,
                    m.trailing_zeros() as usize,
                    None,
                    "the kernel stops itself here",
                    None,
                );
                self.effects += 1;
                warp.live &= !m;
                warp.groups.remove(gi);
                Flow::Moved
            }
            Op::Ld(a) => self.load(at, warp, fid, a, m, pc),
            Op::St(a) => self.store(at, warp, fid, a, m, pc),
            Op::Atom(a) => self.atomic(at, warp, fid, a, m, pc),
            Op::IsSpace { d, a, place } => {
                let regs = &mut warp.frames[f].regs;
                let out = regs[*a as usize].map(|x| u64::from(in_space(x, *place)));
                blend(&mut regs[*d as usize], &out, m);
                Flow::Next
            }
            Op::Mapa { d, a, rank, generic } => {
                let regs = &mut warp.frames[f].regs;
                let n = self.env.cluster_size();
                let (src, ranks) = (regs[*a as usize], regs[*rank as usize]);
                let mut out = [0; 32];
                for l in 0..32 {
                    // A rank outside the cluster gives an address that every access rejects.
                    let r = (ranks[l] as u32).min(n);
                    let window = if *generic { space::SHARED } else { 0 };
                    out[l] = window + ((u64::from(r) + 1) << space::RANK_SHIFT) + (src[l] & space::OFFSET_MASK);
                }
                blend(&mut regs[*d as usize], &out, m);
                Flow::Next
            }
            Op::GetCtaRank { d, a } => {
                let regs = &mut warp.frames[f].regs;
                let out = regs[*a as usize].map(|x| match x >> space::RANK_SHIFT & 0xff {
                    0 => at.block as u64,
                    r => r - 1,
                });
                blend(&mut regs[*d as usize], &out, m);
                Flow::Next
            }
            Op::ActiveMask { d } => {
                blend(&mut warp.frames[f].regs[*d as usize], &[u64::from(m); 32], m);
                Flow::Next
            }
            Op::LaunchNext => {
                self.starts_next(warp, m);
                Flow::Next
            }
            Op::LaunchWait => {
                self.blocks[at.block].awaited = true;
                self.env.waited.store(true, Relaxed);
                if self.env.check {
                    let before = self.before.clone();
                    View::acquire(of(&mut warp.views, m), &mut self.memo, &before, &before);
                }
                Flow::Next
            }
            Op::Collective { op, mask } => self.collective(at, warp, gi, op, *mask, m),
            Op::Bar { .. } => self.block_barrier(at, warp, gi, inst, m),
            Op::ClusterArrive { release } => self.cluster_arrive(at, warp, gi, *release, m),
            Op::ClusterWait { acquire } => self.cluster_wait(at, warp, gi, *acquire, m),
            Op::Fence { scope } => {
                if self.env.check {
                    self.fence(at, warp, *scope, m);
                }
                Flow::Next
            }
            Op::MapFence { scope, addr } => {
                if self.env.check {
                    self.map_fence(at, warp, fid, (*scope, *addr), m);
                }
                Flow::Next
            }
            Op::ProxyFence => {
                if self.env.check {
                    for l in lanes(m) {
                        warp.views[l].proxy_fence(&mut self.memo);
                    }
                }
                Flow::Next
            }
            Op::Ldmatrix { .. }
            | Op::Stmatrix { .. }
            | Op::Movmatrix { .. }
            | Op::Mma(_)
            | Op::Wmma(_)
            | Op::Wgmma(_)
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait { .. }
            | Op::SetMaxReg => {
                if m != warp.live {
                    return Flow::Stay(State::Gather);
                }
                self.matrix(at, warp, gi, inst, m)
            }
            Op::CpAsync { .. } | Op::CpAsyncCommit | Op::CpAsyncWait { .. } => {
                self.copy_async(at, warp, fid, inst, m, pc)
            }
            Op::Bulk(b) => self.bulk(at, warp, fid, b, m, pc),
            Op::BulkCommit => {
                for l in lanes(m) {
                    warp.bulk.entry(l as u32).or_default().committed += 1;
                }
                Flow::Next
            }
            Op::BulkWait { pending, read } => self.bulk_wait(at, warp, *pending, *read, m),
            Op::Mbar { place, addr, op } => self.mbarrier(at, warp, gi, (*place, *addr), op, m),
            Op::TensormapReplace { .. } => self.replace_map(at, warp, fid, inst, m, pc),
            Op::TensormapCopy { to, from } => self.copy_map(at, warp, fid, (*to, *from), m, pc),
        }
    }

    /// Notes the answer of a strong read; the same again and again means that the group spins.
    pub(super) fn note_spin(&mut self, warp: &mut Warp, pc: u32, answer: u64) -> Flow {
        if warp.spin.0 == pc && warp.spin.1 == answer {
            warp.spin.2 += 1;
            if warp.spin.2 >= SPIN {
                warp.spin.2 = SPIN - 2;
                if let Some(g) = warp.groups.iter_mut().find(|g| g.pc == pc && g.state == State::Ready) {
                    g.state = State::Spin;
                }
            }
        } else {
            warp.spin = (pc, answer, 0);
        }
        Flow::Next
    }
}

/// Lanes of `mask` whose guard is true.
#[inline]
fn active(inst: &Inst, regs: &[V], mask: u32) -> u32 {
    if inst.guard == NONE {
        return mask;
    }
    let g = &regs[inst.guard as usize];
    let mut bits = 0u32;
    for (l, v) in g.iter().enumerate() {
        bits |= ((*v & 1) as u32) << l;
    }
    mask & if inst.negate { !bits } else { bits }
}

/// Runs a lane-wise operation, straight into its register where all lanes take part and it reads others.
#[inline(always)]
fn lane_wise(regs: &mut [V], k: Kernel, d: Reg, sources: [Reg; 3], imm: u64, mask: u32) {
    let (d, [a, b, c]) = (d as usize, sources.map(|s| s as usize));
    if mask == u32::MAX && a != d && b != d && c != d {
        let (below, rest) = regs.split_at_mut(d);
        if let Some((out, above)) = rest.split_first_mut() {
            let source = |i: usize| if i < d { &below[i] } else { &above[i - d - 1] };
            return k(source(a), source(b), source(c), imm, out);
        }
    }
    let mut out: V = [0; 32];
    k(&regs[a], &regs[b], &regs[c], imm, &mut out);
    blend(&mut regs[d], &out, mask);
}

/// Writes the lanes of `mask`.
#[inline]
pub(super) fn blend(into: &mut V, from: &V, mask: u32) {
    if mask == u32::MAX {
        *into = *from;
        return;
    }
    for l in 0..32 {
        if mask >> l & 1 == 1 {
            into[l] = from[l];
        }
    }
}

/// Makes each lane of a group a group of its own.
fn part(warp: &mut Warp, gi: usize) {
    let group = warp.groups[gi].clone();
    let mut all = lanes(group.mask).map(|l| Group { mask: 1 << l, ..group.clone() });
    if let Some(first) = all.next() {
        warp.groups[gi] = first;
    }
    warp.groups.extend(all);
}

fn in_space(x: u64, place: Where) -> bool {
    let w = space::window(x);
    match place {
        Where::Shared => w == space::SHARED && x >> space::RANK_SHIFT & 0xff == 0,
        Where::SharedCluster => w == space::SHARED,
        Where::Local => w == space::LOCAL,
        Where::Const => w == space::CONST,
        Where::KernelParam | Where::FrameParam => w == space::PARAM,
        Where::Global | Where::Generic => x >= space::GLOBAL,
    }
}

/// Whether a barrier instruction only announces its threads.
pub(super) fn arrives_only(kind: BarKind) -> bool {
    kind == BarKind::Arrive
}
