//! Headers of safetensors files, checked to the last byte.

use crate::{
    json::{Kind, Value, cut, parse_within},
    limits,
};
use indexmap::IndexMap;
use moec_ir::{Code, DType, Diagnostic};

/// A tensor as a header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Name of the type, as the file spells it.
    pub(super) type_name: String,
    /// The type, where the graph has it.
    pub(super) dtype: Option<DType>,
    /// Sizes.
    pub(super) shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    pub(super) offset: u64,
    /// Number of bytes.
    pub(super) bytes: u64,
}

/// What the header of a file says.
#[derive(Clone, Debug, Default)]
pub(super) struct Header {
    /// Tensors in the order of the header.
    pub(super) tensors: IndexMap<String, Entry>,
    /// Free text of the writer.
    pub(super) metadata: IndexMap<String, String>,
}

/// Bits of one element of each stored type.
const TYPES: &[(&str, u64, Option<DType>)] = &[
    ("F64", 64, Some(DType::F64)),
    ("F32", 32, Some(DType::F32)),
    ("F16", 16, Some(DType::F16)),
    ("BF16", 16, Some(DType::Bf16)),
    ("F8_E4M3", 8, Some(DType::F8e4m3)),
    ("F8_E5M2", 8, Some(DType::F8e5m2)),
    ("F8_E8M0", 8, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("F4", 4, None),
    ("C64", 64, None),
    ("I64", 64, Some(DType::I64)),
    ("U64", 64, None),
    ("I32", 32, Some(DType::I32)),
    ("U32", 32, None),
    ("I16", 16, None),
    ("U16", 16, None),
    ("I8", 8, Some(DType::I8)),
    ("U8", 8, Some(DType::U8)),
    ("BOOL", 8, None),
];

fn broken(message: impl Into<String>) -> Diagnostic {
    Diagnostic::error(Code("E0306"), message)
}

/// Length of the header, from the first bytes of a file.
///
/// # Errors
/// `E0306`, or `E0312` for a pointer of Git LFS, when this is not a safetensors file.
pub(super) fn length(start: &[u8], file_bytes: u64) -> Result<u64, Diagnostic> {
    foreign(start)?;
    let Some(first) = start.first_chunk::<8>() else {
        return Err(broken(format!("the file has {file_bytes} bytes, too few for a weights header"))
            .help("the file is cut off; download it again"));
    };
    let length = u64::from_le_bytes(*first);
    if length == 0 {
        return Err(broken("the weights header is empty"));
    }
    if length > limits::HEADER_BYTES {
        return Err(broken(format!(
            "the weights header claims {length} bytes, more than {} MiB",
            limits::HEADER_BYTES >> 20
        ))
        .help("this is not a safetensors file, or a broken one"));
    }
    if length > file_bytes - 8 {
        return Err(broken(format!("the weights header claims {length} bytes, but the file has {file_bytes}"))
            .help("the file is cut off; download it again"));
    }
    Ok(length)
}

/// What a file is that is no safetensors file.
fn foreign(start: &[u8]) -> Result<(), Diagnostic> {
    if start.starts_with(b"version https://git-lfs") {
        return Err(Diagnostic::error(Code("E0312"), "the file is a pointer of Git LFS, not the weights")
            .help("run `git lfs pull` in the model's folder"));
    }
    let is = |what: &str| broken(format!("the file is {what}, not safetensors"));
    let text =
        start.iter().skip_while(|b| b.is_ascii_whitespace()).take(14).map(u8::to_ascii_lowercase).collect::<Vec<u8>>();
    if start.starts_with(b"PK\x03\x04") {
        return Err(is("a zip archive").help("old PyTorch checkpoints are zip archives; convert it to safetensors"));
    }
    if start.starts_with(b"\x1f\x8b") {
        return Err(is("compressed with gzip").help("unpack it first"));
    }
    if text.starts_with(b"<!doctype html") || text.starts_with(b"<html") {
        return Err(is("an HTML page").help("the download got an error page; download it again"));
    }
    Ok(())
}

/// Parses the header of a file of this size.
///
/// # Errors
/// `E0306` naming the tensor that does not fit.
pub(super) fn parse(header: &[u8], file_bytes: u64) -> Result<Header, Diagnostic> {
    let text = std::str::from_utf8(header)
        .map_err(|e| broken(format!("the weights header is not UTF-8 at byte {}", e.valid_up_to())))?;
    if !text.starts_with('{') {
        return Err(broken("the weights header does not start with `{`")
            .help("this is not a safetensors file, or a broken one"));
    }
    let root = parse_within(text.trim_end_matches(' '), limits::TENSORS * 4).map_err(|e| {
        broken(format!("the weights header is not JSON: {}", e.message))
            .help("this is not a safetensors file, or a broken one")
    })?;
    let members = root.object().ok_or_else(|| broken("the weights header is not an object"))?;
    if members.len() as u64 > limits::TENSORS {
        return Err(broken(format!("more than {} tensors", limits::TENSORS)));
    }
    let data = 8 + header.len() as u64;
    let mut out = Header::default();
    for member in members {
        if member.key == "__metadata__" {
            for entry in member.value.object().unwrap_or(&[]) {
                if let Some(text) = entry.value.string() {
                    out.metadata.insert(entry.key.clone(), text.to_owned());
                }
            }
            continue;
        }
        if member.key.len() > limits::NAME_BYTES {
            return Err(broken(format!(
                "the tensor name {} is longer than {} bytes",
                cut(&member.key),
                limits::NAME_BYTES
            )));
        }
        let entry = entry(&member.value, data, file_bytes - data)
            .map_err(|why| broken(format!("tensor {}: {why}", cut(&member.key))))?;
        out.tensors.insert(member.key.clone(), entry);
    }
    contiguous(&out, data, file_bytes)?;
    Ok(out)
}

fn number(value: &Value) -> Option<u64> {
    match &value.kind {
        Kind::Number(text) => text.parse().ok(),
        Kind::Null | Kind::Bool(_) | Kind::NotFinite(_) | Kind::String(_) | Kind::Array(_) | Kind::Object(_) => None,
    }
}

fn numbers(value: Option<&Value>) -> Option<Vec<u64>> {
    value?.array()?.iter().map(number).collect()
}

fn entry(value: &Value, data: u64, data_bytes: u64) -> Result<Entry, String> {
    if value.object().is_none() {
        return Err(format!("is {}, expected an object", value.kind_name()));
    }
    let type_name = value.get("dtype").and_then(Value::string).ok_or("dtype is missing")?;
    let (_, bits, dtype) =
        TYPES.iter().find(|(name, ..)| *name == type_name).ok_or_else(|| format!("unknown type {}", cut(type_name)))?;
    let shape = numbers(value.get("shape")).ok_or("shape is not a list of sizes")?;
    let offsets = numbers(value.get("data_offsets")).ok_or("data_offsets is not a pair of offsets")?;
    let [start, end] = offsets[..] else { return Err("data_offsets is not a pair of offsets".to_owned()) };
    if start > end {
        return Err(format!("offsets run backwards, from {start} to {end}"));
    }
    if end > data_bytes {
        return Err(format!("ends at byte {end} of {data_bytes}"));
    }
    let total = shape.iter().try_fold(*bits, |n, side| n.checked_mul(*side)).ok_or("its size overflows 64 bits")?;
    if total % 8 != 0 || total / 8 != end - start {
        return Err(format!(
            "shape {shape:?} of {type_name} needs {} bytes, the offsets hold {}",
            total.div_ceil(8),
            end - start
        ));
    }
    Ok(Entry { type_name: type_name.to_owned(), dtype: *dtype, shape, offset: data + start, bytes: end - start })
}

/// The tensors fill the data, without gaps or overlaps.
fn contiguous(header: &Header, data: u64, file_bytes: u64) -> Result<(), Diagnostic> {
    let mut order: Vec<(&String, &Entry)> = header.tensors.iter().collect();
    order.sort_by_key(|(_, e)| (e.offset, e.bytes));
    let mut at = data;
    for (name, entry) in order {
        if entry.offset < at {
            return Err(broken(format!("tensor {}: overlaps the tensor before it", cut(name))));
        }
        if entry.offset > at {
            return Err(broken(format!("tensor {}: a gap of {} bytes lies before it", cut(name), entry.offset - at)));
        }
        at = entry.offset + entry.bytes;
    }
    if at != file_bytes {
        return Err(broken(format!("{} bytes after the last tensor", file_bytes - at))
            .help("the header does not belong to this file"));
    }
    Ok(())
}
