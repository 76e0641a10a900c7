//! Numbers against numbers.

use half::{bf16, f16};
use moec_abi::DType;
use moec_runtime::{Code, Result, RuntimeError, Tensors};

/// Bytes of a tensor as f64.
pub fn floats(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        DType::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        DType::F32 => bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
        DType::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect(),
        DType::I32 => bytes.as_chunks().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect(),
        #[expect(clippy::cast_precision_loss, reason = "ids are far below 2^53")]
        DType::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
        DType::U8 | DType::F8e4m3 | DType::F8e5m2 => bytes.iter().map(|b| f64::from(*b)).collect(),
        DType::I8 => bytes.iter().map(|b| f64::from(b.cast_signed())).collect(),
    }
}

/// A tensor of the case as f64, with its shape.
///
/// # Errors
/// There is no such tensor, or it cannot be read.
pub fn tensor(tensors: &dyn Tensors, name: &str) -> Result<(Vec<f64>, Vec<u64>)> {
    let (bytes, dtype, shape) = raw(tensors, name)?;
    Ok((floats(dtype, &bytes), shape))
}

/// A tensor of the case as stored: bytes, type, shape.
///
/// # Errors
/// There is no such tensor, or it cannot be read.
pub fn raw(tensors: &dyn Tensors, name: &str) -> Result<(Vec<u8>, DType, Vec<u64>)> {
    let view = tensors
        .find(name)
        .ok_or_else(|| RuntimeError::new(Code::FileForm, format!("the case has no tensor `{name}`")))?;
    let bytes = view.read(0, view.bytes())?.into_vec();
    Ok((bytes, view.dtype, view.shape.clone()))
}

/// Largest and root-mean-square difference, relative to the largest and the root mean square of `expected`.
///
/// A NaN in place of a number is an infinite difference.
pub fn difference(got: &[f64], expected: &[f64]) -> (f64, f64) {
    if got.len() != expected.len() {
        return (f64::INFINITY, f64::INFINITY);
    }
    let (mut largest, mut top, mut squares, mut reference) = (0f64, 0f64, 0f64, 0f64);
    for (g, e) in got.iter().zip(expected) {
        let d = if g.is_nan() == e.is_nan() && (g.is_nan() || g == e) { 0.0 } else { (g - e).abs() };
        let d = if d.is_nan() { f64::INFINITY } else { d };
        largest = largest.max(d);
        top = top.max(if e.is_nan() { 0.0 } else { e.abs() });
        squares += d * d;
        reference += if e.is_nan() { 0.0 } else { e * e };
    }
    let relative = |value: f64, unit: f64| if value == 0.0 { 0.0 } else { value / unit };
    (relative(largest, top), relative(squares.sqrt(), reference.sqrt()))
}
