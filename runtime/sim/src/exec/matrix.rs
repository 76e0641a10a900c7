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
use crate::op::{Elem, Inst, Mma, Op, V};
use crate::report::FindingKind;

impl Cluster<'_> {
    pub(super) fn matrix(&mut self, at: At, warp: &mut Warp, gi: usize, inst: &Inst, m: u32) -> Flow {
        let (pc, frame) = (warp.groups[gi].pc, warp.groups[gi].frame);
        match &inst.op {
            Op::Ldmatrix { d, addr, place, trans, .. } => {
                let Some(rows) = self.rows(at, warp, frame, pc, (*addr, *place), d.len(), false) else {
                    return Flow::Next;
                };
                for (i, r) in d.iter().enumerate() {
                    let mut out = [0u64; 32];
                    let mut values = [[0u32; 4]; 8];
                    for (v, row) in values.iter_mut().zip(&rows[i * 8..]) {
                        if let Some((b, at)) = row {
                            *v = self.blocks[*b].smem.line(*at);
                        }
                    }
                    for (l, o) in out.iter_mut().enumerate() {
                        let (g, t) = (l / 4, l % 4);
                        let e = |r: usize, c: usize| values[r][c / 2] >> (16 * (c % 2)) & 0xffff;
                        *o = u64::from(if *trans { e(2 * t, g) | e(2 * t + 1, g) << 16 } else { values[g][t] });
                    }
                    super::run::blend(&mut warp.frames[frame as usize].regs[*r as usize], &out, m);
                }
                Flow::Next
            }
            Op::Stmatrix { s, addr, place, trans, .. } => {
                self.effects += 1;
                let Some(rows) = self.rows(at, warp, frame, pc, (*addr, *place), s.len(), true) else {
                    return Flow::Next;
                };
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

    /// Block and offset of the rows of `count` 8x8 matrices; the first lanes give the addresses.
    #[expect(clippy::too_many_arguments, reason = "a warp's access")]
    fn rows(
        &mut self,
        at: At,
        warp: &mut Warp,
        frame: u32,
        pc: u32,
        place: (crate::op::Addr, crate::op::Where),
        count: usize,
        write: bool,
    ) -> Option<[Option<(usize, u64)>; 32]> {
        let addrs = addresses(warp, frame, place.0);
        let mut out = [None; 32];
        if !write && let Some(offsets) = self.load_rows(at, warp, pc, &addrs, place.1, count * 8) {
            out.iter_mut().zip(offsets).take(count * 8).for_each(|(o, offset)| *o = Some((at.block, offset)));
            return Some(out);
        }
        let mut seen = Seen::default();
        for l in 0..count * 8 {
            let Some(spot) = self.resolve(place.1, addrs[l], 16, warp, frame, at, l, pc) else { continue };
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
        Some(out)
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

/// The elements of a register, lane after lane; says how many there are of a lane.
#[inline(always)]
fn elements(e: Elem, from: &V, into: &mut [f64; 128]) -> usize {
    let per = (4 / e.bytes() as usize).max(1);
    let lanes = from.iter().zip(into.chunks_exact_mut(per));
    match e {
        Elem::Bf16 => lanes.for_each(|(v, to)| {
            to[0] = f64::from(f32::from_bits((*v as u32) << 16));
            to[1] = f64::from(f32::from_bits(*v as u32 & 0xffff_0000));
        }),
        Elem::F16 => lanes.for_each(|(v, to)| {
            to[0] = f64::from(num::f16_to_f32(*v as u16));
            to[1] = f64::from(num::f16_to_f32((*v >> 16) as u16));
        }),
        _ => lanes.for_each(|(v, to)| {
            to.iter_mut().enumerate().for_each(|(x, to)| *to = value(e, v >> (8 * e.bytes() * x as u32)));
        }),
    }
    per
}

/// Reads an operand of `groups` times eight rows into rows of `K` values. Four lanes hold a row of a register.
#[inline(always)]
fn fetch<const K: usize>(list: &[u32], e: Elem, groups: usize, regs: &[V], out: &mut [[f64; K]]) {
    let mut values = [0f64; 128];
    for (i, r) in list.iter().enumerate() {
        let width = 4 * elements(e, &regs[*r as usize], &mut values);
        let (first, column) = place(0, i, width / 4, groups);
        for (row, values) in out[first..first + 8].iter_mut().zip(values.chunks_exact(width)) {
            row[column..column + width].copy_from_slice(values);
        }
    }
}

/// `dots[i][j] = sum over k of a[i][k] * b[j][k]`, in the order of k.
#[inline(always)]
fn products<const K: usize>(a: &[[f64; K]; M], b: &[[f64; K]; N], dots: &mut [[f64; N]; M]) {
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
                *s += v * c;
            }
        }
        *out = sums;
    }
}

fn mma(warp: &mut Warp, frame: u32, op: &Mma) {
    let regs = &mut warp.frames[frame as usize].regs;
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { mma_512(regs, op) };
    }
    mma_of_depth(regs, op);
}

/// With wider vectors. Products and sums stay apart, so that every width rounds alike.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn mma_512(regs: &mut [V], op: &Mma) {
    mma_of_depth(regs, op);
}

#[inline(always)]
fn mma_of_depth(regs: &mut [V], op: &Mma) {
    match op.k {
        0..=4 => mma_of::<4>(regs, op),
        5..=8 => mma_of::<8>(regs, op),
        9..=16 => mma_of::<16>(regs, op),
        _ => mma_of::<32>(regs, op),
    }
}

#[inline(always)]
fn mma_of<const K: usize>(regs: &mut [V], op: &Mma) {
    let (mut a, mut b, mut dots) = ([[0f64; K]; M], [[0f64; K]; N], [[0f64; N]; M]);
    fetch(&op.a, op.a_ty, op.m / 8, regs, &mut a);
    fetch(&op.b, op.b_ty, 1, regs, &mut b);
    if op.c_ty != Elem::F64 {
        products(&a, &b, &mut dots);
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
                Elem::S32 => accumulate_int(c, dots[row][col] as i64, op.satfinite),
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
