//! Weights as numbers: decoding and views, one step after another.
//!
//! This is the reference: it decodes to 64-bit floats and copies at every step. The runtime packs
//! weights on its own.

use crate::weights::Checkpoint;
use moec_ir::{
    DType, Diagnostic, Packing, View, Weight,
    interp::{Array, ArrayData, WeightIndex},
};

/// A stored tensor with its bytes.
#[derive(Clone, Debug)]
pub struct RawTensor {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Elements, little-endian.
    pub bytes: Vec<u8>,
}

/// Why a weight has no value.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The checkpoint has no such tensor.
    #[error("no tensor {0}")]
    Missing(String),
    /// A tensor does not have the shape that its packing or view needs.
    #[error("tensor {tensor}: {message}")]
    Shape {
        /// Its name.
        tensor: String,
        /// What is and what was needed.
        message: String,
    },
    /// The file could not be read.
    #[error("{}", .0.message)]
    File(Box<Diagnostic>),
}

/// The value of a weight: `prefix` replaces `{p}`, the index `{e}` and `{g}`.
///
/// Values are rounded to the type of the weight, as loading does.
///
/// # Errors
/// When `lookup` has no tensor, or one of another shape.
pub fn materialize(
    weight: &Weight,
    index: WeightIndex,
    prefix: &str,
    lookup: &dyn Fn(&str) -> Result<RawTensor, ReadError>,
) -> Result<Array, ReadError> {
    let name = |pattern: &str| index.apply(&pattern.replace("{p}", prefix));
    let tensor = name(&weight.source.tensor);
    let raw = lookup(&tensor)?;
    let shape = |message: String| ReadError::Shape { tensor: tensor.clone(), message };
    let mut array = match &weight.source.packing {
        Packing::Plain => decode(&raw).map_err(shape)?,
        Packing::Fp8Block { scale, block } => {
            let scales = decode(&lookup(&name(scale))?).map_err(shape)?;
            fp8(decode(&raw).map_err(shape)?, &scales, *block).map_err(shape)?
        }
        Packing::Mxfp4 { scales } => mxfp4(&raw, &lookup(&name(scales))?).map_err(shape)?,
    };
    for step in &weight.source.view {
        array = view(array, step, index.expert.unwrap_or(0)).map_err(shape)?;
    }
    if let ArrayData::F64(values) = &mut array.data {
        round(values, weight.dtype);
    }
    Ok(array)
}

impl Checkpoint {
    /// A whole tensor.
    ///
    /// # Errors
    /// When there is none, or its type is none of the graph's.
    pub fn raw(&self, name: &str) -> Result<RawTensor, ReadError> {
        let info = self.tensor(name).ok_or_else(|| ReadError::Missing(name.to_owned()))?;
        let dtype = info.dtype.ok_or_else(|| ReadError::Shape {
            tensor: name.to_owned(),
            message: format!("type {} is not read", info.type_name),
        })?;
        let mut bytes = vec![0; usize::try_from(info.bytes).unwrap_or(usize::MAX)];
        self.read(name, 0, &mut bytes).map_err(|e| ReadError::File(Box::new(e)))?;
        Ok(RawTensor { dtype, shape: info.shape.clone(), bytes })
    }
}

fn sizes(shape: &[u64]) -> Result<(Vec<usize>, usize), String> {
    let sides: Vec<usize> =
        shape.iter().map(|n| usize::try_from(*n)).collect::<Result<_, _>>().map_err(|_| "too large".to_owned())?;
    let total = sides.iter().try_fold(1usize, |n, side| n.checked_mul(*side)).ok_or("too large")?;
    Ok((sides, total))
}

/// Elements as numbers.
fn decode(raw: &RawTensor) -> Result<Array, String> {
    let (shape, total) = sizes(&raw.shape)?;
    let width = usize::try_from(raw.dtype.bytes()).unwrap_or(1);
    if total.checked_mul(width) != Some(raw.bytes.len()) {
        return Err(format!("{} bytes for shape {:?}", raw.bytes.len(), raw.shape));
    }
    Ok(match raw.dtype {
        DType::F64 => Array::f64(shape, elements(&raw.bytes, f64::from_le_bytes)),
        DType::F32 => Array::f64(shape, elements(&raw.bytes, |b| f64::from(f32::from_le_bytes(b)))),
        DType::F16 => Array::f64(shape, elements(&raw.bytes, |b| half::f16::from_le_bytes(b).to_f64())),
        DType::Bf16 => Array::f64(shape, elements(&raw.bytes, |b| half::bf16::from_le_bytes(b).to_f64())),
        DType::F8e4m3 => Array::f64(shape, elements(&raw.bytes, |[b]| small_float(b, 4, 7, false))),
        DType::F8e5m2 => Array::f64(shape, elements(&raw.bytes, |[b]| small_float(b, 5, 15, true))),
        DType::U8 => Array::i64(shape, elements(&raw.bytes, |[b]| i64::from(b))),
        DType::I8 => Array::i64(shape, elements(&raw.bytes, |b| i64::from(i8::from_le_bytes(b)))),
        DType::I32 => Array::i64(shape, elements(&raw.bytes, |b| i64::from(i32::from_le_bytes(b)))),
        DType::I64 => Array::i64(shape, elements(&raw.bytes, i64::from_le_bytes)),
    })
}

fn elements<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
}

/// An 8-bit float. E4M3 has no infinities: all ones is NaN.
fn small_float(byte: u8, exponent_bits: u32, bias: i32, infinities: bool) -> f64 {
    let mantissa_bits = 7 - exponent_bits;
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((byte & 0x7f) >> mantissa_bits);
    let mantissa = byte & ((1 << mantissa_bits) - 1);
    let steps = f64::from(1u32 << mantissa_bits);
    let fraction = f64::from(mantissa) / steps;
    let top = (1 << exponent_bits) - 1;
    if infinities && exponent == top {
        return if mantissa == 0 { sign * f64::INFINITY } else { f64::NAN };
    }
    if !infinities && byte & 0x7f == 0x7f {
        return f64::NAN;
    }
    if exponent == 0 {
        sign * fraction * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + fraction) * 2f64.powi(exponent - bias)
    }
}

/// Whether shapes are equal but for sides of 1: a scale of a whole matrix is stored as `[]`, `[1]` or `[1, 1]`.
pub(crate) fn same_sides<T: Copy + PartialEq + From<u8>>(a: &[T], b: &[T]) -> bool {
    let one = T::from(1);
    a.iter().filter(|n| **n != one).eq(b.iter().filter(|n| **n != one))
}

/// `q * scale` by tiles of the last two axes.
fn fp8(codes: Array, scales: &Array, [rows, columns]: [u64; 2]) -> Result<Array, String> {
    let (rows, columns) = (usize::try_from(rows).unwrap_or(usize::MAX), usize::try_from(columns).unwrap_or(usize::MAX));
    let [outer @ .., height, width] = &codes.shape[..] else { return Err("fp8 tiles need two axes".to_owned()) };
    let tiles = [height.div_ceil(rows), width.div_ceil(columns)];
    let expected: Vec<usize> = outer.iter().copied().chain(tiles).collect();
    if !same_sides(&scales.shape, &expected) {
        return Err(format!("scales are {:?}, expected {expected:?}", scales.shape));
    }
    let scale = scales.floats();
    let matrix = height * width;
    let width = *width;
    let values = codes.floats().into_iter().enumerate().map(|(i, q)| {
        let (m, at) = (i / matrix.max(1), i % matrix.max(1));
        let tile = (m * tiles[0] + at / width / rows) * tiles[1] + at % width / columns;
        q * scale[tile]
    });
    let values = values.collect();
    Ok(Array::f64(codes.shape, values))
}

/// Values of the 16 codes of FP4.
const FP4: [f64; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Blocks of 16 bytes with one power of two each.
fn mxfp4(blocks: &RawTensor, scales: &RawTensor) -> Result<Array, String> {
    let (shape, _) = sizes(&blocks.shape)?;
    let [outer @ .., count, 16] = &shape[..] else {
        return Err(format!("mxfp4 blocks are {shape:?}, expected 16 bytes in the last axis"));
    };
    let (scale_shape, _) = sizes(&scales.shape)?;
    if scale_shape[..] != shape[..shape.len() - 1] || scales.bytes.len() * 16 != blocks.bytes.len() {
        return Err(format!("scales are {scale_shape:?} for blocks {shape:?}"));
    }
    let mut values = Vec::with_capacity(blocks.bytes.len() * 2);
    for (block, scale) in blocks.bytes.chunks(16).zip(&scales.bytes) {
        let scale = 2f64.powi(i32::from(*scale) - 127);
        for byte in block {
            values.push(FP4[usize::from(byte & 15)] * scale);
            values.push(FP4[usize::from(byte >> 4)] * scale);
        }
    }
    let shape = outer.iter().copied().chain([count * 32]).collect();
    Ok(Array::f64(shape, values))
}

/// One step of a view.
fn view(array: Array, step: &View, expert: u64) -> Result<Array, String> {
    match step {
        View::Expert => entry(array, expert),
        View::Index { index } => entry(array, *index),
        View::ExpertRows { rows } => range(array, 0, expert.checked_mul(*rows).ok_or("too large")?, *rows, 1),
        View::Slice { axis, start, len, step } => range(array, *axis, *start, *len, *step),
        View::Transpose => transpose(array),
        View::Reshape { shape } => {
            let (shape, total) = sizes(shape)?;
            if total != array.len() {
                return Err(format!("{:?} does not reshape to {shape:?}", array.shape));
            }
            Ok(Array { shape, data: array.data })
        }
    }
}

fn entry(array: Array, index: u64) -> Result<Array, String> {
    let mut out = range(array, 0, index, 1, 1)?;
    out.shape.remove(0);
    Ok(out)
}

fn range(array: Array, axis: u64, start: u64, len: u64, step: u64) -> Result<Array, String> {
    let Array { shape, data } = array;
    let wrong = || format!("{len} entries from {start} of axis {axis}, {step} apart, are not in {shape:?}");
    let [axis, start, len, step] = [axis, start, len, step].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    let side = *shape.get(axis).ok_or_else(wrong)?;
    let last = len.checked_sub(1).map_or(Some(start), |n| n.checked_mul(step)?.checked_add(start));
    if last.is_none_or(|last| last >= side) && len > 0 {
        return Err(wrong());
    }
    let inner: usize = shape[axis + 1..].iter().product();
    let outer: usize = shape[..axis].iter().product();
    let at: Vec<usize> = (0..outer)
        .flat_map(|o| (0..len).map(move |i| (o * side + start + i * step) * inner))
        .flat_map(|from| from..from + inner)
        .collect();
    let mut new = shape.clone();
    new[axis] = len;
    Ok(Array { shape: new, data: pick(&data, &at) })
}

fn transpose(array: Array) -> Result<Array, String> {
    let Array { mut shape, data } = array;
    let n = shape.len();
    let [.., rows, columns] = shape[..] else { return Err("a transpose needs two axes".to_owned()) };
    let outer: usize = shape[..n - 2].iter().product();
    let at: Vec<usize> = (0..outer)
        .flat_map(|o| (0..columns).flat_map(move |c| (0..rows).map(move |r| (o * rows + r) * columns + c)))
        .collect();
    shape.swap(n - 2, n - 1);
    Ok(Array { shape, data: pick(&data, &at) })
}

fn pick(data: &ArrayData, at: &[usize]) -> ArrayData {
    match data {
        ArrayData::F64(values) => ArrayData::F64(at.iter().map(|i| values[*i]).collect()),
        ArrayData::I64(values) => ArrayData::I64(at.iter().map(|i| values[*i]).collect()),
    }
}

/// Rounds to the type of the weight.
fn round(values: &mut [f64], dtype: DType) {
    #[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
    let to: fn(f64) -> f64 = match dtype {
        DType::F32 => |v| f64::from(v as f32),
        DType::Bf16 => |v| half::bf16::from_f64(v).to_f64(),
        DType::F16 => |v| half::f16::from_f64(v).to_f64(),
        DType::F64 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => return,
    };
    values.iter_mut().for_each(|v| *v = to(*v));
}
