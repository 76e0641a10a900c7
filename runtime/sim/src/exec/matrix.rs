//! ldmatrix, stmatrix, movmatrix and mma.sync.
//!
//! Products are exact in f32 for 16-bit and 8-bit floats; sums are formed in f64 and rounded to f32 once for each
//! instruction. Hardware truncates in ways that are not documented, so kernels agree up to the usual tolerance.

use super::access::{Spot, Toucher, addresses};
use super::run::Flow;
use super::seen::Seen;
use super::state::{At, Warp};
use super::{Cluster, lanes};
use crate::clock::Touch;
use crate::num::{self, Round};
use crate::op::{Elem, Inst, Mma, Op, V, Where};
use crate::report::FindingKind;

impl Cluster<'_> {
    pub(super) fn matrix(&mut self, at: At, warp: &mut Warp, gi: usize, inst: &Inst, m: u32) -> Flow {
        let (pc, frame) = (warp.groups[gi].pc, warp.groups[gi].frame);
        match &inst.op {
            Op::Ldmatrix { d, addr, place, trans, .. } => {
                let mut values = [[0u32; 4]; 32];
                let addrs = addresses(warp, frame, *addr);
                if let Some(offsets) = self.load_rows(at, warp, pc, &addrs, *place, d.len() * 8) {
                    let smem = &self.blocks[at.block].smem;
                    values.iter_mut().zip(offsets).take(d.len() * 8).for_each(|(v, o)| *v = smem.line(o));
                } else {
                    let rows = self.rows(at, warp, pc, (&addrs, *place), d.len(), false);
                    for (v, row) in values.iter_mut().zip(rows) {
                        if let Some((b, o)) = row {
                            *v = self.blocks[b].smem.line(o);
                        }
                    }
                }
                for (values, r) in values.chunks_exact(8).zip(d) {
                    let mut out = [0u64; 32];
                    if *trans {
                        let e = |r: usize, c: usize| values[r][c / 2] >> (16 * (c % 2)) & 0xffff;
                        for (l, o) in out.iter_mut().enumerate() {
                            let (g, t) = (l / 4, l % 4);
                            *o = u64::from(e(2 * t, g) | e(2 * t + 1, g) << 16);
                        }
                    } else {
                        out.iter_mut().zip(values.as_flattened()).for_each(|(o, v)| *o = u64::from(*v));
                    }
                    super::run::blend(&mut warp.frames[frame as usize].regs[*r as usize], &out, m);
                }
                Flow::Next
            }
            Op::Stmatrix { s, addr, place, trans, .. } => {
                self.effects += 1;
                let addrs = addresses(warp, frame, *addr);
                let rows = self.rows(at, warp, pc, (&addrs, *place), s.len(), true);
                for (i, r) in s.iter().enumerate() {
                    let v = warp.frames[frame as usize].regs[*r as usize];
                    for (l, v) in v.iter().enumerate() {
                        let (g, t) = (l as u64 / 4, l as u64 % 4 * 2);
                        for h in 0..2 {
                            let (row, col) = if *trans { (t + h, g) } else { (g, t + h) };
                            if let Some((b, at)) = rows[i * 8 + row as usize] {
                                self.blocks[b].smem.store(at + col * 2, 2, v >> (16 * h));
                            }
                        }
                    }
                }
                Flow::Next
            }
            Op::Movmatrix { d, a } => {
                let v = warp.frames[frame as usize].regs[*a as usize];
                let mut out = [0u64; 32];
                for (l, o) in out.iter_mut().enumerate() {
                    let (g, t) = (l / 4, l % 4 * 2);
                    // Element (r, c) of the source is in lane 4r + c/2, half c%2.
                    let e = |r: usize, c: usize| v[4 * r + c / 2] >> (16 * (c % 2)) & 0xffff;
                    *o = e(t, g) | e(t + 1, g) << 16;
                }
                super::run::blend(&mut warp.frames[frame as usize].regs[*d as usize], &out, m);
                Flow::Next
            }
            Op::Mma(op) => {
                self.counts.tensor_flops += 2 * (op.m * op.n * op.k) as u64;
                mma(warp, frame, op);
                Flow::Next
            }
            Op::Wmma(op) => {
                self.counts.tensor_flops += 2 * (op.m * op.n * op.k) as u64;
                super::wmma::wmma(warp, frame, op);
                Flow::Next
            }
            Op::Wgmma(op) => self.wgmma(at, warp, gi, op, m),
            Op::WgmmaFence => {
                warp.wgmma.fenced = true;
                Flow::Next
            }
            Op::SetMaxReg => {
                warp.resized.push(pc);
                Flow::Next
            }
            Op::WgmmaCommit => {
                warp.wgmma.committed += 1;
                self.effects += 1;
                Flow::Next
            }
            Op::WgmmaWait { pending } => self.wgmma_wait(at, warp, *pending),
            _ => Flow::Next,
        }
    }

    /// Block and offset of the rows of `count` 8x8 matrices, one by one; the first lanes give the addresses.
    fn rows(
        &mut self,
        at: At,
        warp: &Warp,
        pc: u32,
        (addrs, place): (&[u64; 32], Where),
        count: usize,
        write: bool,
    ) -> [Option<(usize, u64)>; 32] {
        let mut out = [None; 32];
        let mut seen = Seen::default();
        for l in 0..count * 8 {
            let Some(spot) = self.resolve(place, addrs[l], 16, warp, 0, at, l, pc) else { continue };
            let Spot::Shared(b, offset) = spot else {
                self.report(FindingKind::Misuse, pc, at, l, Some(addrs[l]), "matrix rows lie in shared memory", None);
                continue;
            };
            if offset % 16 != 0 {
                self.report(
                    FindingKind::Misaligned,
                    pc,
                    at,
                    l,
                    Some(addrs[l]),
                    "a matrix row is a multiple of 16",
                    None,
                );
                continue;
            }
            seen.add(l, spot);
            let t = Toucher { at, lane: l, pc, touch: Touch::Plain, agent: (0, 0) };
            let fine = self.touch(warp, t, spot, 16, write, false);
            if write {
                self.guard_mbarriers(t, b, offset, 16);
            } else if fine {
                for k in [0, 8] {
                    if !self.initialised(t, Spot::Shared(b, offset + k), 8, false) {
                        break;
                    }
                }
            }
            out[l] = Some((b, offset));
        }
        self.count(&seen, 16, write, false);
        out
    }

    /// Lanes of a mask as a number, for messages.
    pub(super) fn first_lane(m: u32) -> usize {
        lanes(m).next().unwrap_or(0)
    }
}

/// f32 (or exact integer) value of element bits.
pub(super) fn value(e: Elem, bits: u64) -> f64 {
    match e {
        Elem::Bf16 => f64::from(num::bf16_to_f32(bits as u16)),
        Elem::F16 => f64::from(num::f16_to_f32(bits as u16)),
        // The lower 13 bits of a tf32 operand are ignored.
        Elem::Tf32 => f64::from(f32::from_bits(bits as u32 & 0xffff_e000)),
        Elem::F32 => f64::from(f32::from_bits(bits as u32)),
        Elem::E4m3 => num::decode(bits as u32 & 0xff, num::E4M3),
        Elem::E5m2 => num::decode(bits as u32 & 0xff, num::E5M2),
        Elem::S8 => f64::from(bits as i8),
        Elem::U8 => f64::from(bits as u8),
        Elem::S4 => f64::from((bits as i8) << 4 >> 4),
        Elem::U4 => f64::from(bits as u8 & 15),
        Elem::B1 => f64::from(bits as u8 & 1),
        Elem::B1Xor => 1.0 - 2.0 * f64::from(bits as u8 & 1),
        Elem::S32 => f64::from(bits as i32),
        Elem::F64 => f64::from_bits(bits),
    }
}

/// Row and column of the first element of register `reg` of a lane, for an operand of `groups` times eight rows (A: rows
/// m, B: rows n); the other elements of the register follow along k. `per` elements share a register of 32 bits.
fn place(lane: usize, reg: usize, per: usize, groups: usize) -> (usize, usize) {
    // Registers go through the groups of eight rows first, then along k.
    (lane / 4 + 8 * (reg % groups), lane % 4 * per + 4 * per * (reg / groups))
}

/// Rows and columns of the largest operations.
const M: usize = 16;
const N: usize = 8;

/// Reads an operand of `groups` times eight rows into rows of `K` values. Four lanes hold a row of a register.
#[inline(always)]
fn fetch<const K: usize>(list: &[u32], e: Elem, groups: usize, regs: &[V], out: &mut [[f64; K]]) {
    match e {
        Elem::Bf16 => spread::<K, 2, 8>(list, groups, regs, out, |bits| {
            [bits << 16, bits & 0xffff_0000].map(|b| f64::from(f32::from_bits(b as u32)))
        }),
        Elem::F16 => spread::<K, 2, 8>(list, groups, regs, out, |bits| {
            [bits, bits >> 16].map(|b| f64::from(num::f16_to_f32(b as u16)))
        }),
        Elem::E4m3 | Elem::E5m2 | Elem::S8 | Elem::U8 => {
            spread::<K, 4, 16>(list, groups, regs, out, |bits| [0, 8, 16, 24].map(|s| value(e, bits >> s)));
        }
        Elem::S4 | Elem::U4 => {
            spread::<K, 8, 32>(list, groups, regs, out, |bits| std::array::from_fn(|i| value(e, bits >> (4 * i))));
        }
        Elem::B1 | Elem::B1Xor => {
            spread::<K, 32, 128>(list, groups, regs, out, |bits| std::array::from_fn(|i| value(e, bits >> i)));
        }
        Elem::Tf32 | Elem::F32 | Elem::S32 | Elem::F64 => {
            spread::<K, 1, 4>(list, groups, regs, out, |bits| [value(e, bits)]);
        }
    }
}

/// Puts the `PER` elements of each register and lane where they belong: `WIDTH` of four lanes lie side by side.
#[inline(always)]
fn spread<const K: usize, const PER: usize, const WIDTH: usize>(
    list: &[u32],
    groups: usize,
    regs: &[V],
    out: &mut [[f64; K]],
    elements: impl Fn(u64) -> [f64; PER],
) {
    for (i, r) in list.iter().enumerate() {
        let (first, column) = place(0, i, PER, groups);
        let rows = out[first..first + 8].iter_mut().zip(regs[*r as usize].chunks_exact(4));
        for (row, lanes) in rows {
            let Some(to) = row.get_mut(column..).and_then(|r| r.first_chunk_mut::<WIDTH>()) else { continue };
            to.chunks_exact_mut(PER).zip(lanes).for_each(|(to, bits)| to.copy_from_slice(&elements(*bits)));
        }
    }
}

/// `dots[i][j] = sum over k of a[i][k] * b[j][k]`, in the order of k. Products are exact, so that a sum rounds alike with
/// its product in one step (`FUSED`) and apart.
#[inline(always)]
fn products<const K: usize, const FUSED: bool>(a: &[[f64; K]; M], b: &[[f64; K]; N], dots: &mut [[f64; N]; M]) {
    // B by columns, so that a row of results is one vector.
    let mut columns = [[0f64; N]; K];
    for (j, row) in b.iter().enumerate() {
        for (column, v) in columns.iter_mut().zip(row) {
            column[j] = *v;
        }
    }
    for (row, out) in a.iter().zip(dots) {
        let mut sums = [0f64; N];
        for (v, column) in row.iter().zip(&columns) {
            for (s, c) in sums.iter_mut().zip(column) {
                *s = if FUSED { v.mul_add(*c, *s) } else { *s + v * c };
            }
        }
        *out = sums;
    }
}

fn mma(warp: &mut Warp, frame: u32, op: &Mma) {
    let regs = &mut warp.frames[frame as usize].regs;
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { mma_512(regs, op) };
    }
    mma_of_depth::<false>(regs, op);
}

/// With wider vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,fma")]
fn mma_512(regs: &mut [V], op: &Mma) {
    mma_of_depth::<true>(regs, op);
}

#[inline(always)]
fn mma_of_depth<const FUSED: bool>(regs: &mut [V], op: &Mma) {
    match op.k {
        0..=4 => mma_of::<4, FUSED>(regs, op),
        5..=8 => mma_of::<8, FUSED>(regs, op),
        9..=16 => mma_of::<16, FUSED>(regs, op),
        17..=32 => mma_of::<32, FUSED>(regs, op),
        33..=64 => mma_of::<64, FUSED>(regs, op),
        _ => mma_of::<256, FUSED>(regs, op),
    }
}

#[inline(always)]
fn mma_of<const K: usize, const FUSED: bool>(regs: &mut [V], op: &Mma) {
    let (mut a, mut b, mut dots) = ([[0f64; K]; M], [[0f64; K]; N], [[0f64; N]; M]);
    fetch(&op.a, op.a_ty, op.m / 8, regs, &mut a);
    fetch(&op.b, op.b_ty, 1, regs, &mut b);
    if op.c_ty != Elem::F64 {
        products::<K, FUSED>(&a, &b, &mut dots);
    }
    // All of them before the first is written: a result may take the place of another's addend.
    let mut results = [[0; 32]; 4];
    for (i, out) in results.iter_mut().enumerate().take(op.d.len()) {
        let addends = &regs[op.c[i] as usize];
        if op.c_ty == Elem::F32 {
            // Of each row, a lane has two columns side by side, one to a register.
            let dots = dots[8 * (i / 2)..][..8].as_flattened().chunks_exact(2);
            for ((o, c), dots) in out.iter_mut().zip(addends).zip(dots) {
                let s = f64::from(f32::from_bits(*c as u32)) + dots[i % 2];
                *o = u64::from(num::canon(s as f32).to_bits());
            }
            continue;
        }
        for (lane, o) in out.iter_mut().enumerate() {
            let c = addends[lane];
            let (g, t) = (lane / 4, lane % 4 * 2);
            let (row, col) = (g + 8 * (i / 2), t + i % 2);
            *o = match op.c_ty {
                Elem::F16 => {
                    // Two columns share a register.
                    let one = |h: usize| {
                        let c = f64::from(num::f16_to_f32((c >> (16 * h)) as u16));
                        let sum = c + dots[g + 8 * i][t + h];
                        u64::from(num::encode(sum, num::F16, Round::NearestEven, false)) << (16 * h)
                    };
                    one(0) | one(1)
                }
                Elem::F64 => (0..K).fold(f64::from_bits(c), |s, x| a[row][x].mul_add(b[col][x], s)).to_bits(),
                Elem::S32 => {
                    let dot = dots[row][col] as i64;
                    // Of k bits, those that are the same less those that are not: how many are not.
                    let dot = if op.a_ty == Elem::B1Xor { (op.k as i64 - dot) / 2 } else { dot };
                    accumulate_int(c, dot, op.satfinite)
                }
                _ => 0,
            };
        }
    }
    for (d, out) in op.d.iter().zip(&results) {
        regs[*d as usize] = *out;
    }
}

pub(super) fn accumulate_int(c: u64, dot: i64, saturate: bool) -> u64 {
    let s = i64::from(c as i32) + dot;
    u64::from(if saturate { s.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32 as u32 } else { s as u32 })
}

#[cfg(test)]
mod tests {
    use super::place;

    #[test]
    fn fragments_follow_the_manual() {
        // A of m16n8k16, 16 bits: register 1 is row g + 8, register 2 is column + 8.
        assert_eq!(place(5, 0, 2, 2), (1, 2));
        assert_eq!(place(5, 1, 2, 2), (9, 2));
        assert_eq!(place(5, 2, 2, 2), (1, 10));
        // B: registers go along k.
        assert_eq!(place(5, 1, 2, 1), (1, 10));
        // 8-bit elements: four to a register; tf32: one.
        assert_eq!(place(6, 1, 4, 2), (9, 8));
        assert_eq!(place(6, 2, 1, 2), (1, 6));
    }
}
