//! `wmma.mma`: products of fragments, whose elements lie in the lanes as [`crate::decode`] deals them out.

use super::matrix::{accumulate_int, value};
use super::state::Warp;
use crate::num::{self, Round};
use crate::op::{Elem, V, Wmma};

/// The elements of a fragment of `total`, in their order.
fn gather(regs: &[V], list: &[u32], e: Elem, total: usize) -> Vec<u64> {
    let (run, per) = (total / 32, (4 / e.bytes() as usize).max(1));
    let bits = 8 * e.bytes();
    let element = |i: usize| {
        let (lane, j) = (i / run, i % run);
        regs[list[j / per] as usize][lane] >> (bits * (j % per) as u32) & super::access::ones(e.bytes())
    };
    (0..total).map(element).collect()
}

/// Multiplies and adds; sums are formed in f64, as those of `mma.sync` are.
pub(super) fn wmma(warp: &mut Warp, frame: u32, op: &Wmma) {
    let regs = &mut warp.frames[frame as usize].regs;
    let values = |list: &[u32], e: Elem, total: usize| -> Vec<f64> {
        gather(regs, list, e, total).into_iter().map(|bits| value(e, bits)).collect()
    };
    let (m, n, k) = (op.m, op.n, op.k);
    let (a, b) = (values(&op.a, op.a_ty, m * k), values(&op.b, op.b_ty, n * k));
    let c = gather(regs, &op.c, op.c_ty, m * n);
    let results = c.iter().enumerate().map(|(i, c)| {
        let pairs = a[i / n * k..][..k].iter().zip(&b[i % n * k..][..k]);
        let addend = value(op.c_ty, *c);
        match op.d_ty {
            Elem::F64 => pairs.fold(addend, |s, (x, y)| x.mul_add(*y, s)).to_bits(),
            Elem::S32 => accumulate_int(*c, pairs.map(|(x, y)| x * y).sum::<f64>() as i64, op.satfinite),
            Elem::F16 => {
                let sum = addend + pairs.map(|(x, y)| x * y).sum::<f64>();
                u64::from(num::encode(sum, num::F16, Round::NearestEven, false))
            }
            _ => {
                let sum = addend + pairs.map(|(x, y)| x * y).sum::<f64>();
                u64::from(num::canon(sum as f32).to_bits())
            }
        }
    });
    let results: Vec<u64> = results.collect();
    let (run, per) = (m * n / 32, (4 / op.d_ty.bytes() as usize).max(1));
    for (r, d) in op.d.iter().enumerate() {
        let part = |lane: usize, x: usize| results[lane * run + r * per + x] << (8 * op.d_ty.bytes() * x as u32);
        regs[*d as usize] = std::array::from_fn(|lane| (0..per).fold(0, |v, x| v | part(lane, x)));
    }
}
