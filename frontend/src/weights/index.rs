//! The map from tensors to shards: `model.safetensors.index.json`.

use crate::{
    json::{decode, parse_within},
    limits,
};
use indexmap::IndexMap;
use moec_ir::{Code, Diagnostic};

/// Reads an index: tensor name to shard name.
///
/// # Errors
/// The codes of JSON text, and `E0306` when there is no map of names.
pub(super) fn parse(bytes: &[u8]) -> Result<IndexMap<String, String>, Diagnostic> {
    let text = decode(bytes)?;
    let root = parse_within(text, limits::TENSORS)?;
    let map = root.get("weight_map").and_then(|map| map.object());
    let map = map.ok_or_else(|| {
        Diagnostic::error(Code("E0306"), "the index has no weight_map")
            .help("expected { \"weight_map\": { TENSOR: SHARD } }")
    })?;
    map.iter()
        .map(|member| {
            let shard = member.value.string().ok_or_else(|| {
                Diagnostic::error(
                    Code("E0306"),
                    format!("the index gives {} as a shard, expected a file name", member.value),
                )
                .primary(member.value.span, "not a name")
            })?;
            Ok((member.key.clone(), shard.to_owned()))
        })
        .collect()
}
