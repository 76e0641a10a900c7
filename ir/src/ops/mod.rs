//! The operations, one file each: attributes, meaning, type rule.
//!
//! Attributes have the names and defaults of the graph JSON (`moec-graph-1`), so that one
//! set of types serves the JSON, the text form and the passes. Values that the JSON names
//! inside attributes (a class, a mask, rows to keep) are operands here, in the order that
//! each op documents.

mod adjust;
mod attention;
mod binary;
mod collective;
mod combine;
mod count;
mod described;
mod dispatch;
mod einsum;
mod experts;
mod ffn;
mod gather;
mod input;
mod kernel;
mod limit;
mod linear;
mod norm;
mod overrides;
mod param;
mod plan;
mod product_key;
mod reduce;
mod select;
mod shape;
mod softmax;
mod transport;
mod unary;
mod weigh;

pub use adjust::Adjust;
pub use attention::Attention;
pub use binary::{Binary, BinaryFn};
pub use collective::{Collective, Group};
pub use combine::Combine;
pub use count::Count;
pub use described::{Described, DescribedKind};
pub use dispatch::Dispatch;
pub use einsum::Einsum;
pub use experts::{BankPart, Experts, Film, LinearBank, Neuron, PartKind};
pub use ffn::{Ffn, LimitOn};
pub use gather::Gather;
pub use input::Input;
pub use kernel::{Kernel, KernelKind};
pub use limit::{Limit, Priority};
pub use linear::Linear;
pub use norm::{Norm, NormKind};
pub use overrides::Override;
pub use param::Param;
pub use plan::Plan;
pub use product_key::ProductKey;
pub use reduce::{Reduce, ReduceFn};
pub use select::{Select, SelectRule};
pub use shape::{Range, Shape};
pub use softmax::Softmax;
pub use transport::Transport;
pub use unary::{Unary, UnaryFn};
pub use weigh::{Weigh, WeighFn, WeighNorm};

/// For `skip_serializing_if`: the attribute has its default value.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Serde default of flags that are on unless said otherwise.
pub(crate) const fn yes() -> bool {
    true
}

/// Whether a flag has its default `true`.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
pub(crate) const fn is_yes(flag: &bool) -> bool {
    *flag
}

/// Serde default 1.
pub(crate) const fn one() -> u64 {
    1
}

/// Whether a count has its default 1.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
pub(crate) const fn is_one(n: &u64) -> bool {
    *n == 1
}

/// Serde default 1.0.
pub(crate) const fn unit() -> f64 {
    1.0
}

/// Whether a factor has its default 1.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
pub(crate) fn is_unit(x: &f64) -> bool {
    x.to_bits() == 1f64.to_bits()
}
