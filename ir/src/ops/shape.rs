//! Rearrangements without arithmetic.

use serde::{Deserialize, Serialize};

/// `%y = shape %a, %b {fn = "concat", axis = 1}`: moves values, computes nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum Shape {
    /// Values one after another along `axis`. Routes are joined slot by slot (`axis` 1).
    Concat {
        /// Axis; negative counts from the last.
        axis: i64,
    },
    /// Entries `range[0] .. range[1]` of `axis`.
    Slice {
        /// Axis; negative counts from the last.
        axis: i64,
        /// First entry and one past the last.
        range: [i64; 2],
    },
    /// The same elements in row-major order with another shape; one size may be -1.
    Reshape {
        /// New sizes.
        to: Vec<i64>,
    },
    /// Axes in another order.
    Transpose {
        /// Old axis of each new axis.
        perm: Vec<u64>,
    },
    /// Each entry of `axis` `n` times in a row.
    Repeat {
        /// Copies.
        n: u64,
        /// Axis; negative counts from the last.
        axis: i64,
    },
    /// Zeros at the end of axis 0 up to a multiple.
    Pad {
        /// The size becomes a multiple of this.
        multiple: u64,
    },
    /// Values side by side along a new `axis`.
    Stack {
        /// Position of the new axis.
        axis: i64,
    },
}
