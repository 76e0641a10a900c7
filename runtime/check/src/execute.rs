//! One run of a compiled layer on the tensors of a case.

use crate::compare;
use moec_abi::{Buffer, BufferKind, DType};
use moec_runtime::{Code, Layer, Result, RuntimeError, Tensors};
use std::collections::BTreeMap;

/// A result of the layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Values, integers too.
    pub values: Vec<f64>,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
}

/// The case cannot be run, for this reason.
pub(crate) fn refused(message: impl Into<String>) -> RuntimeError {
    RuntimeError::new(Code::FileForm, message)
}

/// Runs the layer; inputs are the tensors `prefix` + name. Results by name.
///
/// # Errors
/// An input is missing or of another type, or the device fails.
pub fn execute(layer: &Layer, tokens: u64, tensors: &dyn Tensors, prefix: &str) -> Result<BTreeMap<String, Found>> {
    let mut inputs = Vec::new();
    for buffer in layer.inputs()? {
        inputs.push(input(tensors, prefix, buffer)?);
    }
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    let mut outputs: Vec<Vec<u8>> = Vec::new();
    for buffer in layer.outputs()? {
        // A result that a kernel forgets to write shall not look like zeros.
        outputs.push(vec![0xff; size(buffer, tokens)?]);
    }
    layer.launch(tokens, &inputs, &mut outputs.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>())?;
    let mut results = BTreeMap::new();
    for (buffer, bytes) in layer.outputs()?.into_iter().zip(&outputs) {
        if let BufferKind::Output { name } = &buffer.kind {
            let shape = buffer.shape.iter().map(|d| d.eval(tokens).unwrap_or(0)).collect();
            results.insert(name.clone(), Found { values: compare::floats(buffer.dtype, bytes), shape });
        }
    }
    Ok(results)
}

/// Bytes of an input of the program, from the tensor of that name.
fn input(tensors: &dyn Tensors, prefix: &str, buffer: &Buffer) -> Result<Vec<u8>> {
    let name = match &buffer.kind {
        BufferKind::Input { name } => name,
        BufferKind::Output { .. } | BufferKind::Weight { .. } | BufferKind::Workspace => &buffer.name,
    };
    let (bytes, dtype, _) = compare::raw(tensors, &format!("{prefix}{name}"))?;
    if dtype == buffer.dtype {
        return Ok(bytes);
    }
    Err(refused(format!("`{name}` of the case is {dtype:?}, the program reads {:?}", buffer.dtype)))
}

fn size(buffer: &Buffer, tokens: u64) -> Result<usize> {
    let elements = buffer.shape.iter().try_fold(buffer.dtype.bytes(), |n, d| n.checked_mul(d.eval(tokens)?));
    elements
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| refused(format!("the output `{}` does not fit into memory", buffer.name)))
}

/// Whether elements of this type are integers.
#[must_use]
pub const fn is_integer(dtype: DType) -> bool {
    match dtype {
        DType::U8 | DType::I8 | DType::I32 | DType::I64 => true,
        DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => false,
    }
}
