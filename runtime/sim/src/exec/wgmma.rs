//! Warpgroup matrix operations and their asynchrony.
//!
//! Each warp computes its own sixteen rows. Operations run when a wait completes them (or at once, by the seed), for
//! all four warps together, since the completion of one warp's wait lets others overwrite the operands.

use super::access::{Spot, Toucher};
use super::matrix::accumulate_int;
use super::operand::{Descriptor, Operand, element};
use super::product::{COLUMNS, multiply};
use super::run::Flow;
use super::state::{At, Block, PendingWgmma, State, Warp};
use super::{Agent, Cluster};
use crate::clock::{Sync, Touch, View};
use crate::num::{self, Round};
use crate::op::{Elem, NONE, Op, Wgmma};
use crate::order;
use crate::report::FindingKind;
use crate::shadow::{LINE, Note};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Values of B by descriptor, columns, type and order: the four warps of a warpgroup, whose operations run together
/// with nothing in between, multiply by the same ones.
type Shared = BTreeMap<(u64, usize, u8, bool), Vec<f32>>;

/// Largest depth and number of columns of an operation.
const MOST_K: usize = 32;
const MOST_N: usize = 256;

impl Wgmma {
    /// The rows of A that a warp multiplies.
    fn a(&self, desc: u64, rank: usize) -> Operand {
        let (desc, rows) = (Descriptor::decode(desc), 16 * rank..16 * rank + 16);
        Operand { desc, rows, k: self.k, e: self.a_ty, mn_major: self.trans_a }
    }

    fn b(&self, desc: u64) -> Operand {
        let desc = Descriptor::decode(desc);
        Operand { desc, rows: 0..self.n, k: self.k, e: self.b_ty, mn_major: self.trans_b }
    }
}

impl<'e> Cluster<'e> {
    /// The operation of an instruction.
    fn wgmma_op(&self, pc: u32) -> Option<&'e Wgmma> {
        match &self.env.code.insts[pc as usize].op {
            Op::Wgmma(op) => Some(op),
            _ => None,
        }
    }

    pub(super) fn wgmma(&mut self, at: At, warp: &mut Warp, gi: usize, op: &Wgmma, m: u32) -> Flow {
        let (pc, frame) = (warp.groups[gi].pc, warp.groups[gi].frame);
        let first = Self::first_lane(m);
        if self.env.check && !warp.wgmma.fenced {
            let text = "no wgmma.fence since its registers were last used otherwise, or at all";
            self.report(FindingKind::Misuse, pc, at, first, None, text, None);
            warp.wgmma.fenced = true;
        }
        let regs = &warp.frames[frame as usize].regs;
        let same =
            |r: u32| r == NONE || (0..32).all(|l| m >> l & 1 == 0 || regs[r as usize][l] == regs[r as usize][first]);
        let uniform = same(op.a_desc) && same(op.b_desc) && same(op.scale_d);
        let scalar = |r: u32| if r == NONE { 0 } else { regs[r as usize][first] };
        let pending = PendingWgmma {
            group: warp.wgmma.committed,
            frame,
            pc,
            a_desc: scalar(op.a_desc),
            b_desc: scalar(op.b_desc),
            scale_d: scalar(op.scale_d) & 1 == 1,
        };
        if !uniform || warp.lanes != u32::MAX {
            self.report(
                FindingKind::Misuse,
                pc,
                at,
                first,
                None,
                "wgmma needs the same descriptors in all lanes of a full warp",
                None,
            );
        }
        let (a, b) = (Descriptor::decode(pending.a_desc), Descriptor::decode(pending.b_desc));
        if b.base_offset != 0 || (op.a_desc != NONE && a.base_offset != 0) {
            self.report(
                FindingKind::Misuse,
                pc,
                at,
                first,
                None,
                "a descriptor with a base offset; tiles that start on the swizzle's period need none",
                None,
            );
        }
        self.counts.tensor_flops += 2 * 16 * (op.n * op.k) as u64;
        self.counts.shared_bytes_read +=
            (if op.a_desc == NONE { 0 } else { 16 * op.k } + op.n * op.k / 4) as u64 * u64::from(op.a_ty.bytes());
        if self.env.check {
            self.check_operands(at, warp, pc, first, &pending);
        }
        warp.wgmma.acc.insert(frame, &op.d, pending.group);
        warp.wgmma.a_regs.insert(frame, &op.a, pending.group);
        warp.wgmma.queue.push_back(pending);
        if self.env.seed % 4 == 1 {
            self.run_wgmma(at, warp, u32::MAX, &mut Shared::default());
        }
        Flow::Next
    }

    /// Registers the reads of shared memory with the race detector.
    fn check_operands(&mut self, at: At, warp: &mut Warp, pc: u32, lane: usize, w: &PendingWgmma) {
        let rank = at.warp % 4;
        let agent = (self.agent(Agent::Mma(at.block, at.warp / 4)).0, w.group + 1);
        let Some(op) = self.wgmma_op(pc) else { return };
        let end = self.env.shared_end;
        // B is the same for the four warps; one of them registers it.
        let parts = [(op.a_desc != NONE).then(|| op.a(w.a_desc, rank)), (rank == 0).then(|| op.b(w.b_desc))];
        let mut outside = None;
        for part in parts.iter().flatten() {
            part.chunks(|_, _, o| outside = outside.or_else(|| (!Operand::inside(o, end)).then_some(o)));
        }
        if outside.is_some() {
            let text = "an operand of wgmma reaches outside shared memory";
            self.report(FindingKind::OutOfBounds, pc, at, lane, outside, text, None);
        }
        // The operation comes after everything that each of its threads has done.
        let base = self.component(at, 0);
        let view = &warp.views[lane];
        let alike = |v: &View| Rc::ptr_eq(&v.v, &view.v) && Rc::ptr_eq(&v.p, &view.p);
        let joined;
        let (view, peers) = if super::lanes(warp.live).all(|l| alike(&warp.views[l])) {
            (view, Some(&warp.views[..]))
        } else {
            let mut sync = Sync::default();
            super::lanes(warp.live).for_each(|l| sync.add(base + l as u32, &warp.views[l]));
            let (v, p) = sync.share();
            joined = View { v, p, ..view.clone() };
            (&joined, None)
        };
        let access = order::Access {
            view,
            peers,
            cluster: self.id,
            me: base + lane as u32,
            warp: base,
            block_size: self.env.block_size(),
            touch: Touch::Mma,
            agent: agent.0,
            agent_time: agent.1,
            pc,
            memo: &order::Memo::default(),
            independent: self.env.independent,
            waited: &self.waited,
        };
        let (reader, mask) = access.reader();
        let Block { smem, shadow, .. } = &mut self.blocks[at.block];
        let mut faults = Vec::new();
        for part in parts.iter().flatten() {
            part.chunks(|_, _, o| {
                let line = (o / LINE) as usize;
                if !Operand::inside(o, end) || shadow.has_read_line(line, reader, mask) {
                    return;
                }
                let quick = shadow.quick_line(line, Note::Read(reader, mask), &mut &access, pc);
                let conflict = if quick { None } else { shadow.touch_line(line, false, &|| false, &access) };
                if conflict.is_some() || !smem.written_all(o, 16, false) {
                    faults.push((o, conflict));
                }
            });
        }
        let t = Toucher { at, lane, pc, touch: Touch::Mma, agent };
        for (o, conflict) in faults {
            let spot = Spot::Shared(at.block, o);
            match conflict {
                Some(c) => self.conflict(t, c, self.address_of(spot), false),
                None => self.unwritten(t, spot),
            }
        }
    }

    pub(super) fn wgmma_wait(&mut self, at: At, warp: &mut Warp, pending: u32) -> Flow {
        let complete = warp.wgmma.committed.saturating_sub(pending);
        if complete <= warp.wgmma.completed {
            return Flow::Next;
        }
        let first = at.warp / 4 * 4;
        let peers = (first..self.blocks[at.block].warps.len().min(first + 4)).filter(|w| *w != at.warp);
        // The operations are those of four warps; the wait ends when all of them have issued theirs.
        let behind = |w: &Warp| w.wgmma.committed < complete && w.live != 0;
        if peers.clone().any(|w| behind(&self.blocks[at.block].warps[w])) {
            return Flow::Stay(State::Wgmma);
        }
        let mut shared = Shared::default();
        self.run_wgmma(at, warp, complete, &mut shared);
        for w in peers {
            let mut peer = std::mem::take(&mut self.blocks[at.block].warps[w]);
            self.run_wgmma(At { warp: w, ..at }, &mut peer, complete, &mut shared);
            self.blocks[at.block].warps[w] = peer;
        }
        self.effects += 1;
        let q = &mut warp.wgmma;
        q.completed = complete;
        q.acc.complete(complete);
        q.a_regs.complete(complete);
        if self.env.check {
            let agent = self.agent(Agent::Mma(at.block, at.warp / 4)).0;
            self.has_waited(agent, complete);
            // Lanes of a warp mostly share their clocks; learning is done once for each.
            let mut memo: Vec<(Rc<_>, Rc<_>, View)> = Vec::new();
            for view in warp.views.iter_mut() {
                match memo.iter().find(|(v, p, _)| Rc::ptr_eq(v, &view.v) && Rc::ptr_eq(p, &view.p)) {
                    Some((_, _, done)) => {
                        view.v = done.v.clone();
                        view.p = done.p.clone();
                    }
                    None => {
                        let key = (view.v.clone(), view.p.clone());
                        view.learn(agent, complete);
                        memo.push((key.0, key.1, view.clone()));
                    }
                }
            }
        }
        Flow::Next
    }

    /// Runs the operations of a warp whose group is below `complete`.
    fn run_wgmma(&mut self, at: At, warp: &mut Warp, complete: u32, shared: &mut Shared) {
        while warp.wgmma.queue.front().is_some_and(|w| w.group < complete) {
            if let Some(w) = warp.wgmma.queue.pop_front() {
                self.execute_wgmma(at, warp, &w, shared);
            }
        }
    }

    fn execute_wgmma(&mut self, at: At, warp: &mut Warp, w: &PendingWgmma, shared: &mut Shared) {
        let Some(op) = self.wgmma_op(w.pc) else { return };
        let (n, k, end) = (op.n, op.k, self.env.shared_end);
        let smem = &self.blocks[at.block].smem;
        let b = shared.entry((w.b_desc, n, op.b_ty as u8, op.trans_b)).or_insert_with(|| {
            let mut b = vec![0f32; n * k];
            op.b(w.b_desc).read(smem, end, (1, n), &mut b);
            b
        });
        // A by rows: a[row * k + kk].
        let mut a = [0f32; 16 * MOST_K];
        let a = &mut a[..16 * k];
        if op.a_desc == NONE {
            let per = 4 / op.a_ty.bytes() as usize;
            let bits = 8 * op.a_ty.bytes() as usize;
            for (i, r) in op.a.iter().enumerate() {
                for lane in 0..32 {
                    let v = warp.frames[w.frame as usize].regs[*r as usize][lane];
                    for e in 0..per {
                        let (row, col) = (lane / 4 + 8 * (i % 2), lane % 4 * per + e + 4 * per * (i / 2));
                        a[row * k + col] = element(op.a_ty, v >> (bits * e) & super::access::ones(op.a_ty.bytes()));
                    }
                }
            }
        } else {
            op.a(w.a_desc, at.warp % 4).read(smem, end, (k, 1), a);
        }
        if op.negate_a != op.negate_b {
            a.iter_mut().for_each(|x| *x = -*x);
        }
        let mut dots = [0f32; 16 * MOST_N];
        let dots = &mut dots[..16 * n];
        multiply(a, b, dots, n, k);
        let regs = &mut warp.frames[w.frame as usize].regs;
        for (i, r) in op.d.iter().enumerate() {
            let out = &mut regs[*r as usize];
            if !w.scale_d {
                *out = [0; 32];
            }
            // Pair `e` of a lane has two columns side by side: the rows eight below come next, then the next eight columns.
            let pairs = |e: usize| dots[8 * COLUMNS * e..][..8 * COLUMNS].chunks_exact(2);
            match op.d_ty {
                Elem::S32 => out.iter_mut().zip(pairs(i / 2)).for_each(|(o, dots)| {
                    *o = accumulate_int(*o, dots[i % 2] as i64, op.satfinite);
                }),
                Elem::F16 => out.iter_mut().zip(pairs(i)).for_each(|(o, dots)| {
                    let one = |h: u32| {
                        let c = f64::from(num::f16_to_f32((*o >> (16 * h)) as u16)) + f64::from(dots[h as usize]);
                        u64::from(num::encode(c, num::F16, Round::NearestEven, false)) << (16 * h)
                    };
                    *o = one(0) | one(1);
                }),
                _ => out.iter_mut().zip(pairs(i / 2)).for_each(|(o, dots)| {
                    *o = u64::from(num::canon(f32::from_bits(*o as u32) + dots[i % 2]).to_bits());
                }),
            }
        }
    }

    /// Registers of matrix operations in flight that an instruction touches.
    pub(super) fn watch_registers(&mut self, at: At, warp: &mut Warp, frame: u32, pc: u32) {
        let env = self.env;
        let q = &warp.wgmma;
        let in_acc = |r: &u32| q.acc.contains(frame, *r);
        let (acc, a) = match &env.code.insts[pc as usize].op {
            // Products in a row may share their accumulators.
            Op::Wgmma(w) => (w.a.iter().chain(&[w.a_desc, w.b_desc, w.scale_d]).any(in_acc), false),
            _ => {
                let (uses, defs) = (&env.code.uses[pc as usize], &env.code.defs[pc as usize]);
                (uses.iter().chain(defs).any(in_acc), defs.iter().any(|r| q.a_regs.contains(frame, *r)))
            }
        };
        if acc || a {
            let what = if acc { "an accumulator" } else { "an operand" };
            let lane = Self::first_lane(warp.live);
            self.report(
                FindingKind::MissingWait,
                pc,
                at,
                lane,
                None,
                format!("{what} register of a wgmma in flight is used before wgmma.wait_group"),
                None,
            );
        }
    }
}
