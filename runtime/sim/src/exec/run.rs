//! The turns of warps, the choice of a group, and the step of an instruction.

use super::state::{At, Group, State, Warp};
use super::{Cluster, Turn, lanes};
use crate::Error;
use crate::launch::Lanes;
use crate::op::{BarKind, Call, CallValue, Collective, FUNC_BASE, Inst, NONE, Op, Timer, V, Where};
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

/// Rounds without any effect after which a cluster counts as stuck.
const IDLE_ROUNDS: u32 = 6;
/// Equal answers of one strong read after which a group counts as spinning.
const SPIN: u32 = 24;
/// Deepest nesting of calls.
const MAX_DEPTH: u32 = 4096;

impl Cluster<'_> {
    /// Runs up to `rounds` rounds of all warps.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] past the instruction limit of the launch.
    pub(crate) fn run(&mut self, rounds: u32) -> Result<Turn, Error> {
        let mut any = false;
        for _ in 0..rounds {
            if self.finished() {
                return Ok(Turn::Done);
            }
            let before = self.effects;
            let worked = self.round();
            let total = self.env.executed.fetch_add(self.steps, Relaxed) + self.steps;
            self.steps = 0;
            if total > self.env.max_instructions {
                let entry = self.env.code.funcs[self.env.entry].name.clone();
                return Err(Error::Limit { entry, max: self.env.max_instructions });
            }
            let worked = worked || self.effects != before;
            if worked {
                any = true;
                self.idle = 0;
                continue;
            }
            // Nothing can go on: the copies that are due latest land now.
            self.idle += 1;
            if self.land_one() || (self.idle == 3 && self.force_divergent()) {
                any = true;
                self.idle = 0;
                continue;
            }
            self.wake();
            if self.idle > IDLE_ROUNDS {
                return Ok(if any { Turn::Worked } else { Turn::Idle });
            }
        }
        Ok(if self.finished() { Turn::Done } else { Turn::Worked })
    }

    fn finished(&mut self) -> bool {
        if self.blocks.iter().any(|b| b.warps.iter().any(|w| w.live != 0)) {
            return false;
        }
        while self.land_one() {}
        true
    }

    /// Gives every warp a turn; says whether any of them could go on.
    fn round(&mut self) -> bool {
        let n = self.order.len();
        for i in (1..n).rev() {
            let j = self.random() as usize % (i + 1);
            self.order.swap(i, j);
        }
        let mut worked = false;
        for i in 0..n {
            let (b, w) = self.order[i];
            if self.blocks[b].warps[w].live == 0 {
                continue;
            }
            let quantum = 200 + (self.random() % 800) as u32;
            let mut warp = std::mem::take(&mut self.blocks[b].warps[w]);
            let at = At { block: b, warp: w };
            worked |= self.slice(at, &mut warp, quantum);
            let ended = warp.live == 0;
            self.blocks[b].warps[w] = warp;
            if ended {
                self.warp_ended(at);
            }
            if !self.env.seed.is_multiple_of(4) && !self.flights.is_empty() && self.random().is_multiple_of(4) {
                self.land_any();
            }
        }
        worked
    }

    fn slice(&mut self, at: At, warp: &mut Warp, quantum: u32) -> bool {
        let mut left = quantum;
        let mut spun = false;
        let before = self.effects;
        let start = self.steps;
        for g in &mut warp.groups {
            if g.state == State::Spin {
                g.state = State::Ready;
            }
        }
        while left > 0 {
            let Some(g) = self.pick(at, warp) else { break };
            spun |= self.run_group(at, warp, g, &mut left);
        }
        self.effects != before || (self.steps != start && !spun && left < quantum && self.runnable(warp))
    }

    /// Whether the warp stopped for its quantum and not because it waits.
    fn runnable(&self, warp: &Warp) -> bool {
        warp.live == 0
            || warp.groups.iter().any(|g| g.state == State::Ready)
            || warp.groups.iter().all(|g| g.state != State::Spin)
    }

    /// Lets waits fail once and spinning loops go round, since nothing else can happen.
    fn wake(&mut self) {
        for b in &mut self.blocks {
            for g in b.warps.iter_mut().flat_map(|w| &mut w.groups) {
                match g.state {
                    State::Mbar { .. } => g.give_up = true,
                    State::Spin => g.state = State::Ready,
                    State::Ready | State::Gather | State::Barrier { .. } | State::Cluster { .. } | State::Wgmma => {}
                }
            }
        }
    }

    /// The group to run next, with those that wait looked at again.
    fn pick(&mut self, at: At, warp: &mut Warp) -> Option<usize> {
        let order = self.env.lanes;
        if warp.groups.len() > 1 {
            merge(warp, order);
        }
        let mut best: Option<usize> = None;
        for i in 0..warp.groups.len() {
            if warp.groups[i].state != State::Ready && !self.ready(at, warp, i) {
                continue;
            }
            // A warp barrier may have released other groups and a completed wait may have moved this one.
            let g = &warp.groups[i];
            if g.state != State::Ready {
                continue;
            }
            let better = match best {
                None => true,
                Some(b) => {
                    let best = &warp.groups[b];
                    match order {
                        Lanes::Together => {
                            (best.depth, std::cmp::Reverse(best.pc)) < (g.depth, std::cmp::Reverse(g.pc))
                        }
                        Lanes::Ascending => g.mask.trailing_zeros() < best.mask.trailing_zeros(),
                        Lanes::Descending => g.mask.leading_zeros() < best.mask.leading_zeros(),
                    }
                }
            };
            if better {
                best = Some(i);
            }
        }
        best
    }

    /// Whether a waiting group can go on; does what the end of the wait means.
    fn ready(&mut self, at: At, warp: &mut Warp, i: usize) -> bool {
        let g = &warp.groups[i];
        let yes = match g.state {
            State::Ready => true,
            State::Spin => false,
            State::Gather => return self.gathered(at, warp, i),
            State::Barrier { id, generation } => return self.leave_barrier(at, warp, i, id, generation),
            State::Cluster { generation, acquire } => return self.leave_cluster(warp, i, generation, acquire),
            State::Mbar { block, offset, phase } => {
                g.give_up || self.blocks[block].mbars.get(&offset).is_none_or(|m| m.phase != phase)
            }
            State::Wgmma => true,
        };
        if yes {
            warp.groups[i].state = State::Ready;
        }
        yes
    }

    /// Whether the lanes a group waits for have come.
    fn gathered(&mut self, at: At, warp: &mut Warp, i: usize) -> bool {
        let env = self.env;
        let g = &warp.groups[i];
        let inst = &env.code.insts[g.pc as usize];
        if let Op::Collective { op, mask } = &inst.op {
            if matches!(**op, Collective::Barrier) {
                return self.warp_barrier_across(at, warp, i);
            }
            let need = warp.frames[g.frame as usize].regs[*mask as usize];
            let all = lanes(g.mask).all(|l| need[l] as u32 & warp.live & !g.mask == 0);
            if all {
                warp.groups[i].state = State::Ready;
            }
            return all;
        }
        let all = g.mask == warp.live;
        if all {
            warp.groups[i].state = State::Ready;
        }
        all
    }

    /// Runs a group until it waits, its lanes part, it meets another group, or the turn ends. Says whether it has only
    /// been going round in a waiting loop.
    fn run_group(&mut self, at: At, warp: &mut Warp, gi: usize, left: &mut u32) -> bool {
        let env = self.env;
        let insts = &env.code.insts[..];
        let alone = warp.groups.len() == 1;
        let (frame_id, depth, mask) = (warp.groups[gi].frame, warp.groups[gi].depth, warp.groups[gi].mask);
        let mut pc = warp.groups[gi].pc;
        let apart = env.lanes != Lanes::Together && mask.count_ones() > 1;
        if apart && !meets(&insts[pc as usize].op) {
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
        loop {
            if *left == 0 || pc >= stop || (apart && !meets(&insts[pc as usize].op)) {
                warp.groups[gi].pc = pc;
                return false;
            }
            *left -= 1;
            self.steps += 1;
            let inst = &insts[pc as usize];
            let frame = &mut warp.frames[frame_id as usize];
            let m = active(inst, &frame.regs, mask);
            let e = &mut self.executed[pc as usize];
            e.0 += 1;
            e.1 += u64::from(m.count_ones());
            if watch && m != 0 {
                self.watch_registers(at, warp, frame_id, pc);
            }
            let frame = &mut warp.frames[frame_id as usize];
            match &inst.op {
                Op::Alu { k, d, a, b, c, imm } => {
                    let mut out: V = [0; 32];
                    let r = &frame.regs;
                    k(&r[*a as usize], &r[*b as usize], &r[*c as usize], *imm, &mut out);
                    blend(&mut frame.regs[*d as usize], &out, m);
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
                        warp.groups.push(Group {
                            pc: *target,
                            frame: frame_id,
                            depth,
                            mask: m,
                            state: State::Ready,
                            give_up: false,
                        });
                        return false;
                    }
                    if alone {
                        continue;
                    }
                    warp.groups[gi].pc = pc;
                    return false;
                }
                Op::Nop | Op::SetMaxReg => {
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
            if m != mask && splits(&inst.op) {
                // The lanes whose guard is false go on by themselves.
                warp.groups[gi].mask = m;
                warp.groups.push(Group {
                    pc: pc + 1,
                    frame: frame_id,
                    depth,
                    mask: mask & !m,
                    state: State::Ready,
                    give_up: false,
                });
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
            Op::Alu { .. } | Op::Bra { .. } | Op::Nop | Op::SetMaxReg => Flow::Next,
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
                if *d != NONE {
                    blend(&mut regs[*d as usize], &out, m);
                }
                Flow::Next
            }
            Op::Unpack { parts, s, bits } => {
                let regs = &mut warp.frames[f].regs;
                let field = if *bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
                let src = regs[*s as usize];
                for (i, p) in parts.iter().enumerate().filter(|(_, p)| **p != NONE) {
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
            | Op::Wgmma(_)
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait { .. } => {
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

    fn indexed_branch(&mut self, at: At, warp: &mut Warp, gi: usize, index: u32, targets: &[u32], m: u32) -> Flow {
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

    fn call(&mut self, at: At, warp: &mut Warp, gi: usize, c: &Call) -> Flow {
        let env = self.env;
        let g = warp.groups[gi].clone();
        let func = match c.target {
            Ok(f) => f,
            Err(r) => {
                let values = warp.frames[g.frame as usize].regs[r as usize];
                let first = g.mask.trailing_zeros() as usize;
                // Lanes that call another function go by themselves.
                let same = lanes(g.mask).filter(|l| values[*l] == values[first]).fold(0, |x, l| x | 1 << l);
                if same != g.mask {
                    warp.groups[gi].mask = same;
                    warp.groups.push(Group { mask: g.mask & !same, ..g });
                    return Flow::Moved;
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

    fn ret(&mut self, warp: &mut Warp, gi: usize) -> Flow {
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

    /// The state of every group that waits, for the report of a deadlock.
    pub(crate) fn report_deadlock(&mut self) {
        let mut stuck = Vec::new();
        for (b, block) in self.blocks.iter().enumerate() {
            for (w, warp) in block.warps.iter().enumerate() {
                for g in &warp.groups {
                    stuck.push((At { block: b, warp: w }, g.clone()));
                }
            }
        }
        for (at, g) in stuck {
            let what = match g.state {
                State::Barrier { id, .. } => format!("waits at barrier {id} of the block for threads that never come"),
                State::Cluster { .. } => "waits at the barrier of the cluster for threads that never come".into(),
                State::Mbar { .. } => "waits for a phase of an mbarrier that never completes".into(),
                State::Gather => "waits for lanes of its warp that never come".into(),
                State::Wgmma => "waits for warps of its warpgroup that never come".into(),
                State::Ready | State::Spin => "loops for a value that nobody writes".into(),
            };
            let pc = self.waiting_pc(at, &g);
            self.report(FindingKind::Deadlock, pc, at, g.mask.trailing_zeros() as usize, None, what, None);
        }
    }

    /// The wait a group is in: a loop may be anywhere between its branches when it is stopped.
    fn waiting_pc(&self, at: At, g: &Group) -> u32 {
        let spin = self.blocks[at.block].warps[at.warp].spin.0;
        if matches!(g.state, State::Ready | State::Spin) && spin != 0 { spin } else { g.pc }
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

/// Joins groups that stand at the same place; lanes that go apart are joined only where they must meet.
fn merge(warp: &mut Warp, order: Lanes) {
    let free = |g: &Group| g.state == State::Gather || (g.state == State::Ready && order == Lanes::Together);
    let mut i = 0;
    while i < warp.groups.len() {
        let mut j = i + 1;
        while j < warp.groups.len() {
            let (a, b) = (&warp.groups[i], &warp.groups[j]);
            if a.pc == b.pc && a.frame == b.frame && a.depth == b.depth && free(a) && free(b) {
                let b = warp.groups.swap_remove(j);
                warp.groups[i].mask |= b.mask;
                warp.groups[i].state = State::Ready;
            } else {
                j += 1;
            }
        }
        i += 1;
    }
}

/// Whether lanes that go apart stay together for this operation: it is one of the warp, or of all its threads.
fn meets(op: &Op) -> bool {
    match op {
        Op::Collective { .. }
        | Op::Bar { .. }
        | Op::ClusterArrive { .. }
        | Op::ClusterWait { .. }
        | Op::Ldmatrix { .. }
        | Op::Stmatrix { .. }
        | Op::Movmatrix { .. }
        | Op::Mma(_)
        | Op::Wgmma(_)
        | Op::WgmmaFence
        | Op::WgmmaCommit
        | Op::WgmmaWait { .. }
        | Op::TensormapCopy { .. } => true,
        Op::Alu { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Timer { .. }
        | Op::Bra { .. }
        | Op::Brx { .. }
        | Op::Call(_)
        | Op::Ret
        | Op::Exit
        | Op::Trap
        | Op::Nop
        | Op::Ld(_)
        | Op::St(_)
        | Op::Atom(_)
        | Op::IsSpace { .. }
        | Op::Mapa { .. }
        | Op::GetCtaRank { .. }
        | Op::ActiveMask { .. }
        | Op::Fence { .. }
        | Op::ProxyFence
        | Op::SetMaxReg
        | Op::CpAsync { .. }
        | Op::CpAsyncCommit
        | Op::CpAsyncWait { .. }
        | Op::Bulk(_)
        | Op::BulkCommit
        | Op::BulkWait { .. }
        | Op::Mbar { .. }
        | Op::TensormapReplace { .. } => false,
    }
}

/// Whether lanes with a false guard must go on alone: the instruction moves or stops the others.
fn splits(op: &Op) -> bool {
    match op {
        Op::Brx { .. }
        | Op::Call(_)
        | Op::Ret
        | Op::Exit
        | Op::Trap
        | Op::Bar { .. }
        | Op::ClusterWait { .. }
        | Op::Collective { .. }
        | Op::BulkWait { .. } => true,
        Op::Mbar { op, .. } => matches!(**op, crate::op::Mbar::TestWait { .. }),
        Op::Alu { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Timer { .. }
        | Op::Bra { .. }
        | Op::Nop
        | Op::Ld(_)
        | Op::St(_)
        | Op::Atom(_)
        | Op::IsSpace { .. }
        | Op::Mapa { .. }
        | Op::GetCtaRank { .. }
        | Op::ActiveMask { .. }
        | Op::ClusterArrive { .. }
        | Op::Fence { .. }
        | Op::ProxyFence
        | Op::Ldmatrix { .. }
        | Op::Stmatrix { .. }
        | Op::Movmatrix { .. }
        | Op::Mma(_)
        | Op::Wgmma(_)
        | Op::WgmmaFence
        | Op::WgmmaCommit
        | Op::WgmmaWait { .. }
        | Op::SetMaxReg
        | Op::CpAsync { .. }
        | Op::CpAsyncCommit
        | Op::CpAsyncWait { .. }
        | Op::Bulk(_)
        | Op::BulkCommit
        | Op::TensormapReplace { .. }
        | Op::TensormapCopy { .. } => false,
    }
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
