//! Limits on what is read, in one place.

/// Largest config, graph or index file, in bytes.
pub const CONFIG_BYTES: u64 = 16 << 20;
/// Deepest nesting of brackets in JSON.
pub const CONFIG_DEPTH: usize = 64;
/// Most keys in a JSON file.
pub const CONFIG_KEYS: u64 = 100_000;
/// Most experts in a layer.
pub const EXPERTS: u64 = 4096;
/// Most experts of rank one in a layer (product keys), which cost no code each.
pub const NEURONS: u64 = 1 << 32;
/// Most layers in a model.
pub const LAYERS: u64 = 4096;
/// Largest width of a layer, vocabulary or head count.
pub const SIZE: u64 = 1 << 31;
/// Largest weights of one layer, in bytes.
pub const LAYER_BYTES: u64 = 64 << 40;
/// Most tensors in a checkpoint.
pub const TENSORS: u64 = 1_000_000;
/// Largest header of a weights file, in bytes.
pub const HEADER_BYTES: u64 = 32 << 20;
/// Longest tensor or file name, in bytes.
pub const NAME_BYTES: usize = 1024;
/// Most errors reported for one file.
pub const ERRORS: usize = 20;
