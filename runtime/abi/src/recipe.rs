//! Values that are composed of several stored tensors.

use crate::Matrix;
use serde::{Deserialize, Serialize};

/// How the values of an expert's matrix follow from others.
///
/// Where a part lists one size for each expert, it is found by the expert's number, not by its place in the slot.
/// `{g}` in tensor names is the expert's group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recipe {
    /// Zero everywhere.
    Zero {
        /// Rows and columns.
        shape: [u64; 2],
    },
    /// `left right`, where `right` belongs to the expert's group.
    Product {
        /// Left factor.
        left: Matrix,
        /// Right factor; sizes are listed by group.
        right: Matrix,
        /// Group of each expert.
        groups: Vec<u64>,
    },
    /// `base + scale b a`.
    Adapted {
        /// The shared matrix.
        base: Matrix,
        /// Factor on the input's side.
        a: Matrix,
        /// Factor on the output's side.
        b: Matrix,
        /// Bits of the f64 factor.
        scale: u64,
    },
    /// `(codes - zero) * scale`, with a scale and a zero for each `group_size` columns.
    Grouped {
        /// Codes.
        codes: Matrix,
        /// Scales.
        scale: Matrix,
        /// Codes that stand for zero.
        zero: Matrix,
        /// Columns that share a scale.
        group_size: u64,
    },
    /// Bytes of `8 / bits` codes each, the first in the lowest bits; `codes + offset` of neighbouring columns.
    Packed {
        /// Codes: integers from `-offset` on.
        codes: Matrix,
        /// Bits of a code: 2, 4 or 8.
        bits: u64,
        /// Added to each code.
        offset: u64,
    },
    /// The same row, so many times.
    Repeated {
        /// A matrix of one row.
        row: Matrix,
        /// Number of rows.
        rows: u64,
    },
    /// `codes * scale`; the scale is repeated along axes of size 1.
    Scaled {
        /// Codes.
        codes: Matrix,
        /// Scales.
        scale: Matrix,
    },
    /// Rows (`axis` 0) or columns (`axis` 1) of a matrix by an index set.
    Take {
        /// The matrix.
        dense: Matrix,
        /// Indices.
        ids: Matrix,
        /// Axis that is indexed.
        axis: u64,
    },
}

impl Recipe {
    /// The matrices that are read.
    pub fn parts(&self) -> Vec<&Matrix> {
        match self {
            Self::Zero { .. } => Vec::new(),
            Self::Product { left, right, .. } => vec![left, right],
            Self::Adapted { base, a, b, .. } => vec![base, a, b],
            Self::Grouped { codes, scale, zero, .. } => vec![codes, scale, zero],
            Self::Packed { codes, .. } => vec![codes],
            Self::Repeated { row, .. } => vec![row],
            Self::Scaled { codes, scale } => vec![codes, scale],
            Self::Take { dense, ids, .. } => vec![dense, ids],
        }
    }

    /// The number under which part `i` is found for expert `e`, and the group that `{g}` stands for.
    pub fn number(&self, i: usize, e: u64) -> (u64, Option<u64>) {
        match self {
            Self::Product { left, right, groups } => {
                let group = usize::try_from(e).ok().and_then(|e| groups.get(e)).copied().unwrap_or(0);
                let name = &if i == 0 { left } else { right }.source.tensor;
                let shared = name.contains("{g}") && !name.contains("{e}");
                (if shared { group } else { e }, Some(group))
            }
            Self::Zero { .. }
            | Self::Adapted { .. }
            | Self::Grouped { .. }
            | Self::Packed { .. }
            | Self::Repeated { .. }
            | Self::Scaled { .. }
            | Self::Take { .. } => (e, None),
        }
    }
}
