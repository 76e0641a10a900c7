//! Why a change may rightly show in no result.

use super::{Mutant, same_graph};
use moec_ir::Graph;

/// A rule by which a change has no effect whatever the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The value is the default, or means the same: both graphs are equal.
    SameGraph,
    /// A permission, which changes no value.
    Permission,
    /// Another change of the same attribute of the same operation does show.
    Inactive,
    /// `round` of values that the narrow type holds exactly: counts, signs and comparisons.
    Exact,
    /// `base_id` of experts without weights, which have no names to count in.
    NoWeights,
    /// `bits` says how codes are stored: more of them change no value, and fewer are refused with the codes.
    Storage,
    /// `strict` counts where a score meets its bound exactly, which random data never do. `tests/properties.rs` has
    /// such data.
    Tie,
    /// `min_k` counts where no score passes. `tests/properties.rs` has such data.
    Floor,
}

/// The rule that holds for a change, if one does.
pub(super) fn reason(before: &Graph, after: &Graph, mutant: &Mutant) -> Option<Reason> {
    if mutant.attribute == "batch_dependent" && mutant.node.is_empty() {
        return Some(Reason::Permission);
    }
    match mutant.attribute.as_str() {
        "base_id" if mutant.place.ends_with("identity bank base_id") || mutant.place.ends_with("zero bank base_id") => {
            return Some(Reason::NoWeights);
        }
        "round" if mutant.place.split(' ').any(|name| ["count", "sign", "gt", "ge"].contains(&name)) => {
            return Some(Reason::Exact);
        }
        "bits" => return Some(Reason::Storage),
        "strict" => return Some(Reason::Tie),
        "min_k" => return Some(Reason::Floor),
        _ => {}
    }
    same_graph(before, after).then_some(Reason::SameGraph)
}
