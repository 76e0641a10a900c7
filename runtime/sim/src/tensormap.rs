//! Tensor maps: the 128-byte descriptors of tensor copies, and the boxes they move.
//!
//! The driver's encoding is not documented, so the simulator has its own; a kernel only passes it on.

use crate::Error;
use crate::syntax::Ty;

const MAGIC: u64 = 0x3150_414d_4345_4f4d;

/// Element type of a tensor map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the driver's enumeration")]
pub enum MapType {
    U8,
    U16,
    U32,
    S32,
    U64,
    S64,
    F16,
    F32,
    F64,
    Bf16,
    Tf32,
}

impl MapType {
    /// As the driver and `tensormap.replace` number them. Forms that flush subnormal numbers stand beside the others.
    const NUMBERED: [MapType; 13] = [
        MapType::U8,
        MapType::U16,
        MapType::U32,
        MapType::S32,
        MapType::U64,
        MapType::S64,
        MapType::F16,
        MapType::F32,
        MapType::F32,
        MapType::F64,
        MapType::Bf16,
        MapType::Tf32,
        MapType::Tf32,
    ];

    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            MapType::U8 => 1,
            MapType::U16 | MapType::F16 | MapType::Bf16 => 2,
            MapType::U32 | MapType::S32 | MapType::F32 | MapType::Tf32 => 4,
            MapType::U64 | MapType::S64 | MapType::F64 => 8,
        }
    }

    /// The type with this name: `u8`, `bf16`, `e4m3` (as bytes), ..
    #[must_use]
    pub fn parse(name: &str) -> Option<MapType> {
        Some(match name {
            "u8" | "s8" | "e4m3" | "e5m2" | "b8" => MapType::U8,
            "u16" | "s16" | "b16" => MapType::U16,
            "u32" | "b32" => MapType::U32,
            "s32" | "i32" => MapType::S32,
            "u64" | "b64" => MapType::U64,
            "s64" | "i64" => MapType::S64,
            "f16" => MapType::F16,
            "f32" => MapType::F32,
            "f64" => MapType::F64,
            "bf16" => MapType::Bf16,
            "tf32" => MapType::Tf32,
            _ => return None,
        })
    }

    pub(crate) fn ty(self) -> Ty {
        match self {
            MapType::U8 => Ty::U8,
            MapType::U16 => Ty::U16,
            MapType::U32 => Ty::U32,
            MapType::S32 => Ty::S32,
            MapType::U64 => Ty::U64,
            MapType::S64 => Ty::S64,
            MapType::F16 => Ty::F16,
            MapType::F32 | MapType::Tf32 => Ty::F32,
            MapType::F64 => Ty::F64,
            MapType::Bf16 => Ty::Bf16,
        }
    }
}

/// How 16-byte chunks are permuted in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the driver's enumeration")]
pub enum Swizzle {
    None,
    B32,
    B64,
    B128,
}

impl Swizzle {
    const ALL: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

    /// The permuted form of a shared address.
    #[must_use]
    pub fn apply(self, addr: u64) -> u64 {
        match self {
            Swizzle::None => addr,
            Swizzle::B32 => addr ^ (addr >> 7 & 1) << 4,
            Swizzle::B64 => addr ^ (addr >> 7 & 3) << 4,
            Swizzle::B128 => addr ^ (addr >> 7 & 7) << 4,
        }
    }

    /// Widest inner box in bytes.
    fn span(self) -> u64 {
        match self {
            Swizzle::None => u64::MAX,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }

    /// The mode with this name: `none`, `32B`, `64B`, `128B`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Swizzle> {
        Some(match name {
            "none" => Swizzle::None,
            "32B" => Swizzle::B32,
            "64B" => Swizzle::B64,
            "128B" => Swizzle::B128,
            _ => return None,
        })
    }
}

/// A tiled tensor map, as `cuTensorMapEncodeTiled` takes it. No interleave; elements out of range read as zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMapDesc {
    /// Element type.
    pub dtype: MapType,
    /// Device address of the first element; a multiple of 16.
    pub base: u64,
    /// Elements of each dimension, innermost first; one to five.
    pub dims: Vec<u64>,
    /// Bytes from one element to the next in dimensions 1 and up; multiples of 16.
    pub strides: Vec<u64>,
    /// Elements of the box, innermost first; at most 256 each.
    pub box_dims: Vec<u32>,
    /// Steps between elements of the box; empty means ones.
    pub element_strides: Vec<u32>,
    /// Swizzle of the box in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMapDesc {
    /// The 128 bytes a kernel gets.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMap`] where the driver would refuse: rank, alignment, box or strides out of range.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let bad = |m: String| Err(Error::TensorMap(m));
        let rank = self.dims.len();
        if !(1..=5).contains(&rank) || self.strides.len() + 1 != rank || self.box_dims.len() != rank {
            return bad(format!(
                "{rank} dimensions, {} strides, {} box dimensions",
                self.strides.len(),
                self.box_dims.len()
            ));
        }
        if !self.base.is_multiple_of(16) {
            return bad(format!("base {:#x} is not a multiple of 16", self.base));
        }
        if let Some(s) = self.strides.iter().find(|s| **s % 16 != 0 || **s >= 1 << 40) {
            return bad(format!("stride {s} is not a multiple of 16 below 2^40"));
        }
        if let Some(d) = self.dims.iter().find(|d| **d == 0 || **d > 1 << 32) {
            return bad(format!("dimension {d}"));
        }
        if let Some(b) = self.box_dims.iter().find(|b| **b == 0 || **b > 256) {
            return bad(format!("box dimension {b} is not in 1..=256"));
        }
        let inner = u64::from(self.box_dims[0]) * u64::from(self.dtype.bytes());
        if inner % 16 != 0 || inner > self.swizzle.span() {
            return bad(format!("inner box of {inner} bytes is not a multiple of 16 within the swizzle"));
        }
        if !self.element_strides.is_empty()
            && (self.element_strides.len() != rank || self.element_strides.iter().any(|s| *s == 0 || *s > 8))
        {
            return bad("element strides".into());
        }
        Ok(self.raw())
    }

    /// The encoding without checks.
    pub(crate) fn raw(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        out.extend(MAGIC.to_le_bytes());
        out.extend(self.base.to_le_bytes());
        let code = MapType::NUMBERED.iter().position(|t| *t == self.dtype).unwrap_or(0) as u8;
        let swizzle = Swizzle::ALL.iter().position(|t| *t == self.swizzle).unwrap_or(0) as u8;
        out.extend([self.dims.len() as u8, code, swizzle, 0]);
        for i in 0..5 {
            out.extend(self.dims.get(i).copied().unwrap_or(1).to_le_bytes());
        }
        for i in 0..4 {
            out.extend(self.strides.get(i).copied().unwrap_or(0).to_le_bytes());
        }
        for i in 0..5 {
            out.extend((self.box_dims.get(i).copied().unwrap_or(1) as u16).to_le_bytes());
        }
        for i in 0..5 {
            out.push(self.element_strides.get(i).copied().unwrap_or(1) as u8);
        }
        out.resize(128, 0);
        out
    }

    /// The map that a kernel makes itself, field by field, out of zeros.
    pub(crate) fn blank() -> TensorMapDesc {
        TensorMapDesc {
            dtype: MapType::U8,
            base: 0,
            dims: vec![1],
            strides: Vec::new(),
            box_dims: vec![1],
            element_strides: vec![1],
            swizzle: Swizzle::None,
        }
    }

    /// Reads the encoding back; nothing for bytes that are no tensor map.
    pub(crate) fn decode(bytes: &[u8]) -> Option<TensorMapDesc> {
        let u64_at = |i: usize| bytes.get(i..i + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        if bytes.len() < 128 || u64_at(0)? != MAGIC {
            return None;
        }
        let rank = usize::from(bytes[16]);
        if !(1..=5).contains(&rank) {
            return None;
        }
        let dims = (0..rank).map(|i| u64_at(20 + 8 * i)).collect::<Option<_>>()?;
        let strides = (0..rank - 1).map(|i| u64_at(60 + 8 * i)).collect::<Option<_>>()?;
        let box_dims =
            (0..rank).map(|i| u32::from(u16::from_le_bytes([bytes[92 + 2 * i], bytes[93 + 2 * i]]))).collect();
        let element_strides = (0..rank).map(|i| u32::from(bytes[102 + i])).collect();
        Some(TensorMapDesc {
            dtype: *MapType::NUMBERED.get(usize::from(bytes[17]))?,
            base: u64_at(8)?,
            dims,
            strides,
            box_dims,
            element_strides,
            swizzle: *Swizzle::ALL.get(usize::from(bytes[18]))?,
        })
    }

    /// The encoding with one field replaced, as `tensormap.replace` does; fields are numbered as the decoder lists them.
    /// Zeros count as a map too, and dimensions past the rank may be set, since the rank may be set later.
    pub(crate) fn replace(bytes: &[u8], field: u8, index: u32, value: u64) -> Option<Vec<u8>> {
        let mut raw = match bytes.iter().all(|b| *b == 0) {
            true => TensorMapDesc::blank().raw(),
            false => TensorMapDesc::decode(bytes).map(|_| bytes.to_vec())?,
        };
        let i = index as usize;
        let mut put = |at: usize, new: &[u8]| raw.get_mut(at..at + new.len()).map(|old| old.copy_from_slice(new));
        match field {
            0 => put(8, &value.to_le_bytes())?,
            // The field holds the rank minus one.
            1 if value < 5 => put(16, &[value as u8 + 1])?,
            2 if i < 5 => put(92 + 2 * i, &(value as u16).to_le_bytes())?,
            3 if i < 5 => put(20 + 8 * i, &u64::from(value as u32).to_le_bytes())?,
            // In bytes, as toolkits from 12.4 on pass it.
            4 if i < 4 => put(60 + 8 * i, &value.to_le_bytes())?,
            5 if i < 5 => put(102 + i, &[value as u8])?,
            6 if (value as usize) < MapType::NUMBERED.len() => put(17, &[value as u8])?,
            8 if (value as usize) < Swizzle::ALL.len() => put(18, &[value as u8])?,
            // No interleave, and zeros outside.
            7 | 9 if value == 0 => {}
            _ => return None,
        }
        Some(raw)
    }

    /// Bytes of a box in shared memory.
    pub(crate) fn box_bytes(&self) -> u64 {
        self.box_dims.iter().map(|b| u64::from(*b)).product::<u64>() * u64::from(self.dtype.bytes())
    }

    /// Calls `f` for each row of the box at `coords`, with the address of the element that is first in the tensor's row,
    /// where the row is in range.
    fn rows(&self, coords: &[i64], mut f: impl FnMut(u64, Option<u64>)) {
        let step = |i: usize| i64::from(self.element_strides.get(i).copied().unwrap_or(1));
        let rows: u64 = self.box_dims[1..].iter().map(|b| u64::from(*b)).product();
        let mut at = [0u32; 5];
        for row in 0..rows {
            let mut start = Some(self.base);
            for i in 1..self.dims.len() {
                let c = coords[i] + i64::from(at[i]) * step(i);
                start = match (start, u64::try_from(c)) {
                    (Some(a), Ok(c)) if c < self.dims[i] => Some(a.wrapping_add(c.wrapping_mul(self.strides[i - 1]))),
                    _ => None,
                };
            }
            f(row, start);
            for (a, b) in at[1..].iter_mut().zip(&self.box_dims[1..]) {
                *a += 1;
                if *a < *b {
                    break;
                }
                *a = 0;
            }
        }
    }

    /// The elements of a row of the box that are in range, from the first to behind the last.
    fn inside(&self, coords: &[i64]) -> (u64, u64) {
        let (width, step) =
            (i64::from(self.box_dims[0]), i64::from(self.element_strides.first().copied().unwrap_or(1)));
        // The first x with `coords[0] + x * step` not below the bound.
        let from = |bound: i64| (bound.saturating_sub(coords[0]) + step - 1).div_euclid(step).clamp(0, width) as u64;
        (from(0), from(i64::try_from(self.dims[0]).unwrap_or(i64::MAX)))
    }

    /// Calls `f` for each run of the box at `coords`: offset in the unswizzled box, bytes, and global address where the
    /// run is in range. A run lies in one piece of sixteen bytes of the box, which a swizzle moves as a whole.
    pub(crate) fn each(&self, coords: &[i64], mut f: impl FnMut(u64, u64, Option<u64>)) {
        let bytes = u64::from(self.dtype.bytes());
        let (width, (from, to)) = (u64::from(self.box_dims[0]), self.inside(coords));
        let step = self.element_strides.first().map_or(1, |s| u64::from(*s));
        self.rows(coords, |row, start| {
            let (from, to) = if start.is_some() { (from, to) } else { (width, width) };
            let mut x = 0;
            while x < width {
                let offset = (row * width + x) * bytes;
                let piece = x + ((16 - offset % 16) / bytes).max(1);
                let (end, valid) = match x {
                    _ if x < from => (piece.min(from), None),
                    _ if x < to => (if step == 1 { piece.min(to) } else { x + 1 }, start),
                    _ => (piece, None),
                };
                let end = end.min(width);
                let first = (coords[0].wrapping_add((x * step) as i64) as u64).wrapping_mul(bytes);
                f(offset, (end - x) * bytes, valid.map(|start| start.wrapping_add(first)));
                x = end;
            }
        });
    }

    /// Address and bytes of each stretch of memory that the box at `coords` takes in.
    pub(crate) fn stretches(&self, coords: &[i64]) -> Vec<(u64, u64)> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        let mut add = |at: u64, n: u64| match all.last_mut() {
            Some((start, len)) if *start + *len == at => *len += n,
            _ => all.push((at, n)),
        };
        if self.element_strides.first().is_none_or(|s| *s == 1) {
            let (bytes, (from, to)) = (u64::from(self.dtype.bytes()), self.inside(coords));
            let first = (coords[0].wrapping_add(from as i64) as u64).wrapping_mul(bytes);
            self.rows(coords, |_, start| {
                if let Some(start) = start.filter(|_| from < to) {
                    add(start.wrapping_add(first), (to - from) * bytes);
                }
            });
        } else {
            self.each(coords, |_, n, at| at.into_iter().for_each(|at| add(at, n)));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> TensorMapDesc {
        TensorMapDesc {
            dtype: MapType::Bf16,
            base: 0x1000,
            dims: vec![100, 7],
            strides: vec![208],
            box_dims: vec![64, 4],
            element_strides: Vec::new(),
            swizzle: Swizzle::B128,
        }
    }

    #[test]
    fn the_encoding_reads_back() {
        let back = TensorMapDesc::decode(&map().encode().unwrap_or_default());
        assert_eq!(
            back.map(|b| (b.base, b.dims, b.strides, b.box_dims, b.swizzle)),
            Some((0x1000, vec![100, 7], vec![208], vec![64, 4], Swizzle::B128))
        );
    }

    #[test]
    fn elements_past_the_edge_have_no_address() {
        let mut inside = 0;
        map().each(&[64, 5], |_, n, a| inside += if a.is_some() { n } else { 0 });
        assert_eq!(inside, 36 * 2 * 2);
        let mut all = 0;
        map().each(&[-1, 0], |at, n, a| {
            assert_eq!(a.is_none(), at % 128 == 0);
            assert!(at / 16 == (at + n - 1) / 16);
            all += n;
        });
        assert_eq!(all, map().box_bytes());
    }

    #[test]
    fn swizzles_move_chunks_by_the_row() {
        assert_eq!(Swizzle::B128.apply(0x80 * 3), 0x80 * 3 + 0x30);
        assert_eq!(Swizzle::B64.apply(0x80 * 5), 0x80 * 5 + 0x10);
        assert_eq!(Swizzle::B32.apply(0x80 * 3), 0x80 * 3 + 0x10);
    }
}
