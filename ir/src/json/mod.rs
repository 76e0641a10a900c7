//! Graph JSON, format `moec-graph-1`: one layer, or a chain of layers, by composable operations.
//!
//! Values that the JSON names inside attributes (a class, a mask, rows to keep, key blocks) are
//! operands of the graph. A `loop` is unrolled. Shapes come from a [`Signature`] or from the JSON's
//! own `tensors` and `inputs`, which [`write_graph`] always writes.

mod about;
mod beyond;
mod read;
mod signature;
mod strict;
mod write;

pub use about::{About, Work};
pub use read::{read_graph, read_value};
pub use signature::{Signature, TensorShape};
pub use write::write_graph;

/// The `format` of the JSON.
pub const FORMAT: &str = "moec-graph-1";

/// How an operation stands in JSON, where it differs from its attributes.
pub(crate) struct Named {
    /// Attribute that names a value.
    pub(crate) key: &'static str,
    /// Flag of the op that says whether the operand is there.
    pub(crate) flag: Option<&'static str>,
}

/// Attributes of an operation that name values, in operand order.
pub(crate) fn named_operands(op: &str, tucker: bool) -> &'static [Named] {
    const fn plain(key: &'static str) -> Named {
        Named { key, flag: None }
    }
    const fn flagged(key: &'static str) -> Named {
        Named { key, flag: Some(key) }
    }
    match op {
        "adjust" => const { &[plain("class"), flagged("mask")] },
        "override" => const { &[plain("when")] },
        "select" => const { &[flagged("bound")] },
        "weigh" => const { &[flagged("drop_rows"), flagged("keep_rows")] },
        "attention" => const { &[plain("blocks")] },
        "product_key" if tucker => const { &[plain("k1"), plain("k2")] },
        _ => &[],
    }
}
