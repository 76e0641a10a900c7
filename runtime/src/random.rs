//! Invented weights: a checkpoint that nobody has to download.
//!
//! Values depend on the seed, the tensor's name and the position alone, so that any order of
//! reading gives the same layer. They are small, and exact in bfloat16.

use crate::{
    error::{Code, Result, RuntimeError},
    number,
    recipe::in_group,
    tensors::{Content, ReadAt, TensorView, Tensors},
    weights::expand,
};
use moec_abi::{DType, Packing, Slot, Source, View};
use std::collections::BTreeMap;

/// Largest size of a random weight.
const AMPLITUDE: f64 = 0.05;

/// Shape and content of an invented tensor.
struct Tensor {
    dtype: DType,
    shape: Vec<u64>,
    reader: Generator,
}

/// Tensors with random values, for all tensors that some slots ask for.
pub struct Random(BTreeMap<String, Tensor>);

impl Random {
    /// Tensors for `slots` of the layer with this `prefix`.
    ///
    /// # Errors
    /// The shape of a tensor does not follow from the views that read it.
    pub fn new(slots: &[Slot], prefix: &str, seed: u64) -> Result<Self> {
        let mut shapes = BTreeMap::new();
        for slot in slots {
            for e in 0..slot.experts {
                for matrix in &slot.matrices {
                    let size = matrix.size_of(e).ok_or_else(|| {
                        RuntimeError::new(Code::Artefact, format!("weight slot {}: no size for expert {e}", slot.name))
                    })?;
                    add(&mut shapes, &matrix.source, size, slot.number(e), prefix)?;
                }
            }
        }
        let mut tensors = BTreeMap::new();
        for (name, (source, shape, expert)) in shapes {
            let mut put = |name: String, dtype: DType, shape: Vec<u64>, fill: Fill| {
                let reader = Generator { seed: seed_of(seed, &name), dtype, fill };
                tensors.insert(name, Tensor { dtype, shape, reader });
            };
            match &source.packing {
                Packing::Plain => {
                    let last = shape.last().copied().unwrap_or(1).max(1);
                    put(name, source.dtype, shape, Fill::Values { last });
                }
                Packing::Fp8Block { scale, block } => {
                    let mut tiles = shape.clone();
                    let tiled = tiles.len().saturating_sub(2);
                    for (size, unit) in tiles.iter_mut().skip(tiled).zip(block) {
                        *size = size.div_ceil((*unit).max(1));
                    }
                    put(expand(scale, prefix, expert), DType::F32, tiles, Fill::Constant(AMPLITUDE / 448.0));
                    put(name, DType::F8e4m3, shape, Fill::FiniteCodes);
                }
                Packing::Mxfp4 { scales } => {
                    let mut blocks = shape;
                    if let Some(last) = blocks.last_mut() {
                        *last = last.div_ceil(32);
                    }
                    // 6 * 2^-7 is just under the amplitude.
                    put(expand(scales, prefix, expert), DType::U8, blocks.clone(), Fill::Constant(120.0));
                    blocks.push(16);
                    put(name, DType::U8, blocks, Fill::Bytes);
                }
                Packing::Fp8Codes => put(name, DType::F8e4m3, shape, Fill::FiniteCodes),
                Packing::Fp8Factors { rows, .. } => {
                    let mut tiles = shape;
                    if let [.., size, _] = tiles.as_mut_slice() {
                        *size = size.div_ceil((*rows).max(1));
                    }
                    put(name, DType::F32, tiles, Fill::Constant(AMPLITUDE / 448.0));
                }
                Packing::Mxfp4Codes => {
                    let mut blocks = shape;
                    if let Some(last) = blocks.last_mut() {
                        *last = last.div_ceil(16);
                    }
                    blocks.push(16);
                    put(name, DType::U8, blocks, Fill::Bytes);
                }
                // As for the codes of `Mxfp4`.
                Packing::Mxfp4Exponents => put(name, DType::U8, shape, Fill::Constant(120.0)),
                // Its parts are listed in its place.
                Packing::Composed(_) => {}
            }
        }
        Ok(Self(tensors))
    }
}

impl Tensors for Random {
    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let Tensor { dtype, shape, reader } = self.0.get(name)?;
        let bytes = shape.iter().try_fold(dtype.bytes(), |n, &s| n.checked_mul(s))?;
        Some(TensorView { dtype: *dtype, shape: shape.clone(), content: Content::Reader { reader, offset: 0, bytes } })
    }
}

type Shapes = BTreeMap<String, (Source, Vec<u64>, u64)>;

/// Notes the smallest shape with which `source` can be read.
fn add(shapes: &mut Shapes, source: &Source, size: (u64, u64), expert: u64, prefix: &str) -> Result<()> {
    if let Packing::Composed(recipe) = &source.packing {
        for (i, matrix) in recipe.parts().into_iter().enumerate() {
            let (number, group) = recipe.number(i, expert);
            let size = matrix.size_of(number).unwrap_or((1, 1));
            add(shapes, &in_group(&matrix.source, group), size, expert, prefix)?;
        }
        return Ok(());
    }
    let name = expand(&source.tensor, prefix, expert);
    let known = shapes.get(&name).map(|(_, shape, _)| shape.clone());
    // A vector has one axis, unless a view needs two.
    let forms = if size.1 == 1 && source.packing == Packing::Plain {
        vec![vec![size.0], vec![size.0, 1]]
    } else {
        vec![vec![size.0, size.1]]
    };
    let shape = forms
        .into_iter()
        .find_map(|form| before(form, &source.view, expert))
        .filter(|shape| known.as_ref().is_none_or(|k| k.len() == shape.len()))
        .ok_or_else(|| {
            let message = format!("the shape of tensor {name} does not follow from its views");
            RuntimeError::new(Code::TensorMismatch, message).with_help("pass a checkpoint instead of random weights")
        })?;
    match shapes.get_mut(&name) {
        Some((_, known, _)) => known.iter_mut().zip(shape).for_each(|(k, s)| *k = (*k).max(s)),
        None => {
            shapes.insert(name, (source.clone(), shape, expert));
        }
    }
    Ok(())
}

/// The smallest shape from which the views give `shape`.
fn before(mut shape: Vec<u64>, views: &[View], expert: u64) -> Option<Vec<u64>> {
    for view in views.iter().rev() {
        match view {
            View::Expert => shape.insert(0, expert + 1),
            View::Index { index } => shape.insert(0, index + 1),
            View::ExpertRows { rows } => *shape.first_mut()? = (expert + 1).checked_mul(*rows)?,
            View::Slice { axis, start, len, step } => {
                let size = shape.get_mut(usize::try_from(*axis).ok()?)?;
                *size = match len.checked_sub(1) {
                    // The whole group of the last entry, so that interleaved parts agree.
                    Some(last) => (start / step.max(&1) * step.max(&1))
                        .checked_add((last + 1).checked_mul((*step).max(1))?)?
                        .max(start + last * step + 1),
                    None => *start,
                };
            }
            View::Transpose => {
                let rank = shape.len();
                shape.swap(rank.checked_sub(2)?, rank - 1);
            }
            View::Reshape { .. } => shape = vec![shape.iter().product()],
        }
    }
    Some(shape)
}

fn seed_of(seed: u64, name: &str) -> [u8; 32] {
    // Two FNV-1a sums of the name; the generator does the mixing.
    let sum = |start: u64| name.bytes().fold(start, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
    let mut key = [0; 32];
    let words = [seed, sum(0xcbf2_9ce4_8422_2325), sum(0x6c62_272e_07bb_0142), name.len() as u64];
    key.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(k, w)| *k = w.to_le_bytes());
    key
}

/// What the elements of an invented tensor are.
#[derive(Clone, Copy)]
enum Fill {
    /// Uniform values; integers count along the last axis, which has this length.
    Values { last: u64 },
    /// 8-bit floats without NaN, each finite code alike.
    FiniteCodes,
    /// Any bytes.
    Bytes,
    /// One value.
    Constant(f64),
}

struct Generator {
    seed: [u8; 32],
    dtype: DType,
    fill: Fill,
}

impl Generator {
    /// Elements from `first` on; element `i` follows from bytes `2 i` and `2 i + 1` of the stream alone.
    fn fill(&self, first: u64, out: &mut [u8]) {
        const BATCH: usize = 4096;
        let size = self.dtype.bytes() as usize;
        let mut word = first / 2;
        let table: [f64; 512] =
            std::array::from_fn(|k| number::round(DType::Bf16, (k as f64 - 256.0) * AMPLITUDE / 256.0));
        let halves = table.map(|value| half::bf16::from_f64(value).to_le_bytes());
        // The stream is read by words of two elements; an odd start leaves the first one out.
        let mut stream = [0; 2 * BATCH];
        let mut skip = (first % 2) as usize;
        let mut index = first;
        let mut rest = out;
        while !rest.is_empty() {
            let count = (rest.len() / size).min(BATCH - skip);
            let needed = (2 * (skip + count)).next_multiple_of(4);
            chacha8(&self.seed, word, &mut stream[..needed]);
            word += needed as u64 / 4;
            let bits = stream.as_chunks::<2>().0.iter().skip(skip).map(|b| u16::from_le_bytes(*b));
            let (batch, tail) = rest.split_at_mut(count * size);
            match (self.fill, self.dtype) {
                (Fill::Values { .. }, DType::Bf16) => {
                    for (element, bits) in batch.as_chunks_mut::<2>().0.iter_mut().zip(bits) {
                        *element = halves[usize::from(bits & 511)];
                    }
                }
                (fill, dtype) => {
                    for ((element, bits), i) in batch.chunks_mut(size).zip(bits).zip(index..) {
                        one(fill, dtype, &table, bits, i, element);
                    }
                }
            }
            (rest, index, skip) = (tail, index + count as u64, 0);
        }
    }
}

/// The ChaCha8 stream of a key from a 32-bit word on, by random access: any part costs the same.
///
/// Bernstein's variant: a 64-bit block counter and stream number 0.
fn chacha8(key: &[u8; 32], word: u64, out: &mut [u8]) {
    let mut start = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (state, bytes) in start[4..12].iter_mut().zip(key.as_chunks::<4>().0) {
        *state = u32::from_le_bytes(*bytes);
    }
    let (mut block, mut skip) = (word / 16, (word % 16) as usize * 4);
    let mut rest = out;
    while !rest.is_empty() {
        start[12] = block as u32;
        start[13] = (block >> 32) as u32;
        let mut x: [u32; 16] = start;
        for _ in 0..4 {
            for (a, b, c, d) in [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)] {
                quarter(&mut x, a, b, c, d);
            }
            for (a, b, c, d) in [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)] {
                quarter(&mut x, a, b, c, d);
            }
        }
        let mut bytes = [0; 64];
        for ((to, x), s) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(x).zip(start) {
            *to = x.wrapping_add(s).to_le_bytes();
        }
        let count = rest.len().min(64 - skip);
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&bytes[skip..skip + count]);
        (rest, block, skip) = (later, block.wrapping_add(1), 0);
    }
}

#[inline]
fn quarter(x: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    x[a] = x[a].wrapping_add(x[b]);
    x[d] = (x[d] ^ x[a]).rotate_left(16);
    x[c] = x[c].wrapping_add(x[d]);
    x[b] = (x[b] ^ x[c]).rotate_left(12);
    x[a] = x[a].wrapping_add(x[b]);
    x[d] = (x[d] ^ x[a]).rotate_left(8);
    x[c] = x[c].wrapping_add(x[d]);
    x[b] = (x[b] ^ x[c]).rotate_left(7);
}

fn one(fill: Fill, dtype: DType, table: &[f64; 512], bits: u16, index: u64, element: &mut [u8]) {
    match fill {
        Fill::Values { last } => match dtype {
            DType::Bf16 | DType::F64 | DType::F32 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => {
                number::encode(dtype, table[usize::from(bits & 511)], element, 0);
            }
            DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
                number::encode(dtype, (index % last % 128) as f64, element, 0);
            }
        },
        Fill::FiniteCodes => {
            let code = (bits % 127) as u8;
            element[0] = if bits & 0x8000 != 0 { code | 0x80 } else { code };
        }
        Fill::Bytes => element[0] = (bits & 0xff) as u8,
        Fill::Constant(value) => number::encode(dtype, value, element, 0),
    }
}

impl ReadAt for Generator {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let size = self.dtype.bytes();
        if !offset.is_multiple_of(size) || !(out.len() as u64).is_multiple_of(size) {
            return Err(RuntimeError::new(Code::Argument, "random tensors are read by whole elements"));
        }
        self.fill(offset / size, out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{Rng, SeedableRng},
    };

    #[test]
    fn the_stream_is_that_of_chacha8() {
        let key = std::array::from_fn(|i| i as u8 * 7);
        for word in [0, 1, 15, 16, 1000, 1 << 33] {
            for bytes in [4, 60, 64, 68, 1024] {
                let mut rng = ChaCha8Rng::from_seed(key);
                rng.set_word_pos(u128::from(word));
                let (mut wanted, mut got) = (vec![0; bytes], vec![0; bytes]);
                rng.fill_bytes(&mut wanted);
                chacha8(&key, word, &mut got);
                assert_eq!(got, wanted, "{word} {bytes}");
            }
        }
    }
}
