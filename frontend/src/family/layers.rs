//! Which layers are mixtures.

use crate::{
    json::Kind,
    keys::{Keys, Num},
    limits,
};
use moec_ir::{Code, Diagnostic};

/// Most layers, as a length.
#[expect(clippy::cast_possible_truncation, reason = "4096 fits")]
pub(crate) const MOST: usize = limits::LAYERS as usize;

/// Kinds of entries of a list of layers.
const SPARSE: &[&str] = &["sparse", "moe", "hash_moe"];

/// `mlp_layer_types`: one word for each layer.
pub(crate) fn listed(keys: &mut Keys<'_>, layers: &Num) -> Option<Vec<String>> {
    let (items, found) = keys.list(&["mlp_layer_types"])?;
    if layers.known && items.len() as u64 != layers.value {
        let mut error = Diagnostic::error(
            Code("E0214"),
            format!("mlp_layer_types has {} entries for {} layers", items.len(), layers.value),
        )
        .primary(found.value.span, format!("{} entries", items.len()));
        if let Some(span) = layers.span {
            error = error.secondary(span, format!("{} layers", layers.value));
        }
        keys.errors.push(error.help("one entry for each layer is needed"));
    }
    let mut words = Vec::new();
    for item in items {
        match &item.kind {
            Kind::String(word) if word == "dense" || SPARSE.contains(&word.as_str()) => words.push(word.clone()),
            Kind::String(_)
            | Kind::Null
            | Kind::Bool(_)
            | Kind::Number(_)
            | Kind::NotFinite(_)
            | Kind::Array(_)
            | Kind::Object(_) => {
                keys.errors.push(
                    Diagnostic::error(Code("E0214"), format!("mlp_layer_types holds {item}"))
                        .primary(item.span, "unknown kind of layer")
                        .help("known: dense, sparse, moe, hash_moe"),
                );
            }
        }
    }
    Some(words)
}

/// `mlp_layer_types` where present.
fn by_list(keys: &mut Keys<'_>, layers: &Num) -> Option<Vec<bool>> {
    Some(listed(keys, layers)?.iter().map(|word| word != "dense").collect())
}

/// All layers, unless `mlp_layer_types` says otherwise.
pub(crate) fn all(keys: &mut Keys<'_>, layers: &Num) -> Vec<bool> {
    by_list(keys, layers).unwrap_or_else(|| vec![true; count(layers)])
}

/// The first `names` layers are dense, then every `moe_layer_freq`-th is a mixture.
pub(crate) fn first_dense(keys: &mut Keys<'_>, layers: &Num, names: &[&str], default: u64) -> Vec<bool> {
    let dense = keys.size_or(names, default, 0, limits::SIZE);
    let list = frequency_list(keys, layers);
    let every = if list.is_some() { 1 } else { keys.size_or(&["moe_layer_freq"], 1, 1, limits::LAYERS).value };
    if let Some(list) = by_list(keys, layers).or(list) {
        return list;
    }
    (0..count(layers) as u64).map(|i| i >= dense.value && i.is_multiple_of(every)).collect()
}

/// `moe_layer_freq` as a list of 0 and 1.
fn frequency_list(keys: &mut Keys<'_>, layers: &Num) -> Option<Vec<bool>> {
    keys.quiet(&["moe_layer_freq"])?.value.array()?;
    let list = keys.per_layer(&["moe_layer_freq"], None, layers.value, 0, 1);
    Some((0..count(layers) as u64).map(|i| list.of(i).value == 1).collect())
}

/// `decoder_sparse_step` and `mlp_only_layers`.
pub(crate) fn sparse_step(keys: &mut Keys<'_>, layers: &Num) -> Vec<bool> {
    let step = keys.size_or(&["decoder_sparse_step"], 1, 1, limits::SIZE).value;
    let dense = indices(keys, "mlp_only_layers", layers).unwrap_or_default();
    if let Some(list) = by_list(keys, layers) {
        return list;
    }
    (0..count(layers) as u64).map(|i| !dense.contains(&i) && (i + 1).is_multiple_of(step)).collect()
}

/// A list of layer numbers.
pub(crate) fn indices(keys: &mut Keys<'_>, name: &str, layers: &Num) -> Option<Vec<u64>> {
    let (items, found) = keys.list(&[name])?;
    let mut out = Vec::new();
    for item in items {
        let negative = matches!(&item.kind, Kind::Number(n) if n.starts_with('-'));
        let number = if negative { None } else { Some(keys.whole(found.key, item, 0, limits::SIZE)) };
        match number {
            Some(n) if !n.known => {}
            Some(n) if !layers.known || n.value < layers.value => out.push(n.value),
            _ => keys.errors.push(
                Diagnostic::error(Code("E0214"), format!("{name} names layer {item}, which is not there"))
                    .primary(item.span, format!("layers are 0 to {}", layers.value.saturating_sub(1))),
            ),
        }
    }
    Some(out)
}

/// Layers, where that many can be listed.
pub(crate) fn count(layers: &Num) -> usize {
    usize::try_from(layers.value.min(limits::LAYERS)).unwrap_or(0)
}
