//! Warpgroup matrix operations: descriptors, operands in shared memory, and their asynchrony.
//!
//! Each warp computes its own sixteen rows. Operations run when a wait completes them (or at once, by the seed), for
//! all four warps together, since the completion of one warp's wait lets others overwrite the operands.

use super::access::{Spot, Toucher};
use super::matrix::{accumulate_int, value};
use super::run::Flow;
use super::state::{At, Block, PendingWgmma, State, Warp};
use super::{Agent, Cluster};
use crate::clock::{Sync, Touch, View};
use crate::num::{self, Round};
use crate::op::{Elem, NONE, Op, Wgmma};
use crate::order;
use crate::report::FindingKind;
use crate::shadow::LINE;
use crate::tensormap::Swizzle;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

/// A shared-memory matrix descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    base_offset: u64,
    swizzle: Swizzle,
}

impl Descriptor {
    fn decode(d: u64) -> Descriptor {
        let field = |at: u32| (d >> at & 0x3fff) << 4;
        let swizzle = match d >> 62 {
            0 => Swizzle::None,
            1 => Swizzle::B128,
            2 => Swizzle::B64,
            _ => Swizzle::B32,
        };
        Descriptor { start: field(0), leading: field(16), stride: field(32), base_offset: d >> 49 & 7, swizzle }
    }

    /// Address of the 16 bytes that hold (mn, k) and what follows it along the major dimension.
    fn chunk(&self, mn: u64, k: u64, bytes: u64, mn_major: bool) -> u64 {
        let span = match self.swizzle {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        };
        let linear = match (mn_major, self.swizzle) {
            (false, Swizzle::None) => mn / 8 * self.stride + k * bytes / 16 * self.leading + mn % 8 * 16,
            (false, Swizzle::B32 | Swizzle::B64 | Swizzle::B128) => mn / 8 * self.stride + mn % 8 * span + k * bytes,
            (true, Swizzle::None) => mn / 8 * self.stride + k / 8 * self.leading + k % 8 * 16,
            (true, Swizzle::B32 | Swizzle::B64 | Swizzle::B128) => {
                let per = span / bytes;
                mn / per * self.leading + k / 8 * self.stride + k % 8 * span + mn % per * bytes
            }
        };
        self.swizzle.apply(self.start + linear)
    }
}

/// An operand read from shared memory: values by row (mn) or by k, and the chunks it came from.
struct Operand {
    /// `values[k * rows + mn]`.
    values: Vec<f32>,
    chunks: Vec<u64>,
    outside: Option<u64>,
}

/// Values of B by descriptor, columns, type and order: the four warps of a warpgroup, whose operations run together
/// with nothing in between, multiply by the same ones.
type Shared = BTreeMap<(u64, usize, u8, bool), Vec<f32>>;

/// Largest depth and number of columns of an operation.
const MOST_K: usize = 32;
const MOST_N: usize = 256;

fn table(e: Elem) -> Option<&'static [f32; 256]> {
    static E4M3: OnceLock<[f32; 256]> = OnceLock::new();
    static E5M2: OnceLock<[f32; 256]> = OnceLock::new();
    let make = |e: Elem| std::array::from_fn(|i| value(e, i as u64) as f32);
    match e {
        Elem::E4m3 => Some(E4M3.get_or_init(|| make(e))),
        Elem::E5m2 => Some(E5M2.get_or_init(|| make(e))),
        Elem::Bf16 | Elem::F16 | Elem::Tf32 | Elem::S8 | Elem::U8 | Elem::F32 | Elem::S32 | Elem::F64 => None,
    }
}

fn element(e: Elem, bits: u64) -> f32 {
    match e {
        Elem::Bf16 => num::bf16_to_f32(bits as u16),
        Elem::F16 => num::f16_to_f32(bits as u16),
        Elem::Tf32 => f32::from_bits(bits as u32 & 0xffff_e000),
        Elem::S8 => f32::from(bits as i8),
        Elem::U8 => f32::from(bits as u8),
        Elem::E4m3 | Elem::E5m2 => table(e).map_or(0.0, |t| t[bits as usize & 255]),
        Elem::F32 | Elem::S32 | Elem::F64 => value(e, bits) as f32,
    }
}

impl Cluster<'_> {
    #[expect(clippy::too_many_arguments, reason = "an operand is all of these")]
    fn operand(
        &self,
        block: usize,
        desc: u64,
        rows: std::ops::Range<usize>,
        k: usize,
        e: Elem,
        mn_major: bool,
        read: bool,
    ) -> Operand {
        let d = Descriptor::decode(desc);
        let bytes = u64::from(e.bytes());
        let per = 16 / bytes as usize;
        let n = rows.len();
        let mut out =
            Operand { values: if read { vec![0.0; n * k] } else { Vec::new() }, chunks: Vec::new(), outside: None };
        let mut visit = |mn: usize, kk: usize| {
            let at = d.chunk((rows.start + mn) as u64, kk as u64, bytes, mn_major);
            if at < crate::space::SHARED_BASE || at + 16 > self.env.shared_end {
                out.outside = out.outside.or(Some(at));
                return;
            }
            if !read {
                out.chunks.push(at);
                return;
            }
            let m = &self.blocks[block].smem;
            let words = [m.load(at, 8), m.load(at + 8, 8)];
            let mut put = |i: usize, v: f32| {
                let (mn, kk) = if mn_major { (mn + i, kk) } else { (mn, kk + i) };
                out.values[kk * n + mn] = v;
            };
            if e == Elem::Bf16 {
                (0..8).for_each(|i| put(i, f32::from_bits(((words[i / 4] >> (i % 4 * 16)) as u32) << 16)));
            } else {
                let ones = super::access::ones(bytes as u32);
                for i in 0..per {
                    let bit = i * bytes as usize * 8;
                    put(i, element(e, words[bit / 64] >> (bit % 64) & ones));
                }
            }
        };
        if mn_major {
            (0..k).for_each(|kk| (0..n).step_by(per).for_each(|mn| visit(mn, kk)));
        } else {
            (0..n).for_each(|mn| (0..k).step_by(per).for_each(|kk| visit(mn, kk)));
        }
        out
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
            op: Arc::new(op.clone()),
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
        let op = w.op.clone();
        let mut parts = Vec::new();
        if op.a_desc != NONE {
            parts.push(self.operand(at.block, w.a_desc, 16 * rank..16 * rank + 16, op.k, op.a_ty, op.trans_a, false));
        }
        // B is the same for the four warps; one of them registers it.
        if rank == 0 {
            parts.push(self.operand(at.block, w.b_desc, 0..op.n, op.k, op.b_ty, op.trans_b, false));
        }
        let outside = parts.iter().find_map(|p| p.outside);
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
        for o in parts.iter().flat_map(|p| &p.chunks) {
            let line = (*o / LINE) as usize;
            if shadow.has_read_line(line, reader, mask) {
                continue;
            }
            let conflict = shadow.touch_line(line, false, &|| false, &access);
            if conflict.is_some() || !(smem.written(*o, 8, false) && smem.written(*o + 8, 8, false)) {
                faults.push((*o, conflict));
            }
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
        let peers: Vec<usize> =
            (first..first + 4).filter(|w| *w != at.warp && *w < self.blocks[at.block].warps.len()).collect();
        // The operations are those of four warps; the wait ends when all of them have issued theirs.
        if peers.iter().any(|w| {
            self.blocks[at.block].warps[*w].wgmma.committed < complete && self.blocks[at.block].warps[*w].live != 0
        }) {
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
            for view in &mut warp.views {
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
        let op = &*w.op;
        let rank = at.warp % 4;
        let (n, k) = (op.n, op.k);
        let b = shared
            .entry((w.b_desc, n, op.b_ty as u8, op.trans_b))
            .or_insert_with(|| self.operand(at.block, w.b_desc, 0..n, k, op.b_ty, op.trans_b, true).values);
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
            let v = self.operand(at.block, w.a_desc, 16 * rank..16 * rank + 16, k, op.a_ty, op.trans_a, true).values;
            (0..16).for_each(|row| (0..k).for_each(|kk| a[row * k + kk] = v[kk * 16 + row]));
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
            // Element `e` of a lane: two columns side by side, then the rows eight below, then the next eight columns.
            let start = |e: usize| 8 * (e / 2 % 2) * n + e / 4 * 8 + e % 2;
            let places = |e: usize| (0..32).map(move |lane| start(e) + lane / 4 * n + lane % 4 * 2);
            match op.d_ty {
                Elem::S32 => out.iter_mut().zip(places(i)).for_each(|(o, at)| {
                    *o = accumulate_int(*o, dots[at] as i64, op.satfinite);
                }),
                Elem::F16 => out.iter_mut().zip(places(2 * i).zip(places(2 * i + 1))).for_each(|(o, at)| {
                    let one = |h: u32, at: usize| {
                        let c = f64::from(num::f16_to_f32((*o >> (16 * h)) as u16));
                        u64::from(num::encode(c + f64::from(dots[at]), num::F16, Round::NearestEven, false)) << (16 * h)
                    };
                    *o = one(0, at.0) | one(1, at.1);
                }),
                _ => out.iter_mut().zip(places(i)).for_each(|(o, at)| {
                    *o = u64::from(num::canon(f32::from_bits(*o as u32) + dots[at]).to_bits());
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

/// `dots[i][j] = sum over k of a[i][k] * b[k][j]` for sixteen rows. Sums of integers of eight bits stay exact in f32
/// only up to 2^24, which products over 32 steps do not reach.
fn multiply(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { multiply_512(a, b, dots, n, k) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { multiply_256(a, b, dots, n, k) };
        }
    }
    multiply_by_rows(a, b, dots, n, k);
}

/// With wider vectors. Products and sums stay apart, so that every width rounds alike.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_512(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    multiply_by_rows(a, b, dots, n, k);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_256(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    multiply_by_rows(a, b, dots, n, k);
}

#[inline(always)]
fn multiply_by_rows(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    if n.is_multiple_of(16) {
        multiply_columns::<16>(a, b, dots, n, k);
    } else {
        multiply_columns::<8>(a, b, dots, n, k);
    }
}

/// Four rows and `W` columns at a time, whose sums stay in registers.
#[inline(always)]
fn multiply_columns<const W: usize>(a: &[f32], b: &[f32], dots: &mut [f32], n: usize, k: usize) {
    for (a, dots) in a.chunks_exact(4 * k).zip(dots.chunks_exact_mut(4 * n)) {
        for c in (0..n).step_by(W) {
            let mut sums = [[0f32; W]; 4];
            for kk in 0..k {
                let column = &b[kk * n + c..][..W];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = a[row * k + kk];
                    sums.iter_mut().zip(column).for_each(|(s, y)| *s += x * y);
                }
            }
            sums.iter().enumerate().for_each(|(row, sums)| dots[row * n + c..][..W].copy_from_slice(sums));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_find_rows_and_chunks() {
        let d = Descriptor::decode(0x1000 >> 4 | 1 << 16 | 64 << 32 | 1 << 62);
        assert_eq!((d.start, d.leading, d.stride, d.swizzle), (0x1000, 16, 1024, Swizzle::B128));
        // Row 9, k 8 of bf16: second group of rows, first row of it plus one, chunk 1 swizzled by row 1.
        assert_eq!(d.chunk(9, 8, 2, false), (0x1000 + 1024 + 128));
        // MN-major: k picks the row of 128 bytes.
        let t = Descriptor::decode(0x1000 >> 4 | 128 << 16 | 64 << 32 | 1 << 62);
        assert_eq!(t.chunk(64, 3, 2, true), 0x1000 + 2048 + 3 * 128 + (3 << 4));
        let none = Descriptor::decode(0x1000 >> 4 | 8 << 16 | 16 << 32);
        assert_eq!(none.chunk(9, 8, 2, false), 0x1000 + 256 + 128 + 16);
    }
}
