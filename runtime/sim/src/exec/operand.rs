//! Operands of wgmma in shared memory: descriptors, and the elements they lead to.

use super::matrix::value;
use crate::memory::Plain;
use crate::num;
use crate::op::Elem;
use crate::tensormap::Swizzle;
use std::ops::Range;
use std::sync::OnceLock;

/// A shared-memory matrix descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    pub(super) base_offset: u64,
    swizzle: Swizzle,
}

impl Descriptor {
    pub(super) fn decode(d: u64) -> Descriptor {
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

/// An operand, or some rows (mn) of it, in shared memory.
#[derive(Clone, Debug)]
pub(super) struct Operand {
    pub(super) desc: Descriptor,
    pub(super) rows: Range<usize>,
    pub(super) k: usize,
    pub(super) e: Elem,
    pub(super) mn_major: bool,
}

impl Operand {
    /// Elements of a chunk.
    fn per(&self) -> usize {
        16 / self.e.bytes() as usize
    }

    /// Tells row (from the first of the operand), step along k and address of each chunk of sixteen bytes.
    #[inline(always)]
    pub(super) fn chunks(&self, mut tell: impl FnMut(usize, usize, u64)) {
        let (n, bytes) = (self.rows.len(), u64::from(self.e.bytes()));
        let (over_rows, over_k) = if self.mn_major { (self.per(), 1) } else { (1, self.per()) };
        for mn in (0..n).step_by(over_rows) {
            for kk in (0..self.k).step_by(over_k) {
                tell(mn, kk, self.desc.chunk((self.rows.start + mn) as u64, kk as u64, bytes, self.mn_major));
            }
        }
    }

    /// Whether a chunk lies in shared memory that ends at `end`.
    pub(super) fn inside(at: u64, end: u64) -> bool {
        at >= crate::space::SHARED_BASE && at + 16 <= end
    }

    /// The values, where the element of a row and a k goes to `row * by.0 + k * by.1`; zeros for what is outside.
    pub(super) fn read(&self, smem: &Plain, end: u64, by: (usize, usize), out: &mut [f32]) {
        let (per, step) = (self.per(), if self.mn_major { by.0 } else { by.1 });
        self.chunks(|mn, kk, at| {
            let mut values = [0f32; 16];
            if Self::inside(at, end) {
                elements(self.e, smem.line(at), &mut values);
            }
            let to = &mut out[mn * by.0 + kk * by.1..];
            if step == 1 {
                to[..per].copy_from_slice(&values[..per]);
            } else {
                to.iter_mut().step_by(step).zip(&values[..per]).for_each(|(to, v)| *to = *v);
            }
        });
    }
}

/// The elements of sixteen bytes.
#[inline(always)]
fn elements(e: Elem, words: [u32; 4], out: &mut [f32; 16]) {
    match e {
        Elem::Bf16 => out.chunks_exact_mut(2).zip(words).for_each(|(to, w)| {
            to[0] = f32::from_bits(w << 16);
            to[1] = f32::from_bits(w & 0xffff_0000);
        }),
        _ => {
            let per = (4 / e.bytes()) as usize;
            let ones = super::access::ones(e.bytes());
            out.chunks_exact_mut(per).zip(words).for_each(|(to, w)| {
                for (i, to) in to.iter_mut().enumerate() {
                    *to = element(e, u64::from(w) >> (8 * e.bytes() * i as u32) & ones);
                }
            });
        }
    }
}

fn table(e: Elem) -> Option<&'static [f32; 256]> {
    static E4M3: OnceLock<[f32; 256]> = OnceLock::new();
    static E5M2: OnceLock<[f32; 256]> = OnceLock::new();
    let make = |e: Elem| std::array::from_fn(|i| value(e, i as u64) as f32);
    match e {
        Elem::E4m3 => Some(E4M3.get_or_init(|| make(e))),
        Elem::E5m2 => Some(E5M2.get_or_init(|| make(e))),
        Elem::Bf16 | Elem::F16 | Elem::Tf32 | Elem::S8 | Elem::U8 | Elem::F32 | Elem::S32 | Elem::F64 => None,
        Elem::S4 | Elem::U4 | Elem::B1 | Elem::B1Xor => None,
    }
}

/// The value of an element's bits.
pub(super) fn element(e: Elem, bits: u64) -> f32 {
    match e {
        Elem::Bf16 => num::bf16_to_f32(bits as u16),
        Elem::F16 => num::f16_to_f32(bits as u16),
        Elem::Tf32 => f32::from_bits(bits as u32 & 0xffff_e000),
        Elem::S8 => f32::from(bits as i8),
        Elem::U8 => f32::from(bits as u8),
        Elem::E4m3 | Elem::E5m2 => table(e).map_or(0.0, |t| t[bits as usize & 255]),
        Elem::S4 | Elem::U4 | Elem::B1 | Elem::B1Xor | Elem::F32 | Elem::S32 | Elem::F64 => value(e, bits) as f32,
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
