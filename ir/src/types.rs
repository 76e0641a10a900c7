//! Types of values: tensor, route, plan, ragged.

use crate::{DType, Dim};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A dense array. An empty shape is a scalar.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorType {
    /// Element type of the values when they are stored.
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: Vec<Dim>,
}

/// Which experts each row uses, and with which weight.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RouteType {
    /// Rows that were routed.
    pub rows: Dim,
    /// Slots of a row: the largest number of experts that a row may use. Unused slots hold -1.
    pub slots: u64,
    /// Number of experts; ids lie in `0..experts`.
    pub experts: u64,
    /// Whether the slots carry weights (after `weigh`, or scores of `product_key`).
    pub weighted: bool,
}

/// Rows sorted by expert: one for every filled slot of a route.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RaggedType {
    /// The route that spread the rows.
    pub route: RouteType,
    /// Consecutive tokens that one route row stands for.
    pub repeat: u64,
    /// Element type.
    pub dtype: DType,
    /// Shape of one row. Empty for a plan, which carries no data.
    pub row: Vec<u64>,
}

/// Type of a value of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Type {
    /// A dense array.
    Tensor(TensorType),
    /// Expert choices.
    Route(RouteType),
    /// Positions of rows sorted by expert, without data: counts, offsets, gather map.
    Plan(RouteType),
    /// Rows sorted by expert, with data.
    Ragged(RaggedType),
}

impl Type {
    /// The tensor type, if it is one.
    pub const fn tensor(&self) -> Option<&TensorType> {
        match self {
            Self::Tensor(ty) => Some(ty),
            Self::Route(_) | Self::Plan(_) | Self::Ragged(_) => None,
        }
    }

    /// The route type, if it is one.
    pub const fn route(&self) -> Option<&RouteType> {
        match self {
            Self::Route(ty) => Some(ty),
            Self::Tensor(_) | Self::Plan(_) | Self::Ragged(_) => None,
        }
    }

    /// The type of rows sorted by expert, if it is one.
    pub const fn ragged(&self) -> Option<&RaggedType> {
        match self {
            Self::Ragged(ty) => Some(ty),
            Self::Tensor(_) | Self::Route(_) | Self::Plan(_) => None,
        }
    }

    /// What it is, in a word: `tensor`, `route`, `plan`, `ragged`.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Tensor(_) => "tensor",
            Self::Route(_) => "route",
            Self::Plan(_) => "plan",
            Self::Ragged(_) => "ragged",
        }
    }

    /// The same type with elements of `dtype`; routes and plans have none.
    #[must_use]
    pub fn with_dtype(self, dtype: DType) -> Self {
        match self {
            Self::Tensor(ty) => Self::Tensor(TensorType { dtype, ..ty }),
            Self::Ragged(ty) => Self::Ragged(RaggedType { dtype, ..ty }),
            Self::Route(ty) => Self::Route(ty),
            Self::Plan(ty) => Self::Plan(ty),
        }
    }
}

/// `bf16[T, 64]`.
impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype.name(), shape.join(", "))
    }
}

/// `T, 8 of 128` or `T, 8 of 128, weighted`.
impl fmt::Display for RouteType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} of {}", self.rows, self.slots, self.experts)?;
        if self.weighted { f.write_str(", weighted") } else { Ok(()) }
    }
}

/// `T, 8 of 128, weighted, repeat 4; bf16[64]`.
impl fmt::Display for RaggedType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.route)?;
        if self.repeat != 1 {
            write!(f, ", repeat {}", self.repeat)?;
        }
        let row: Vec<String> = self.row.iter().map(u64::to_string).collect();
        write!(f, "; {}[{}]", self.dtype.name(), row.join(", "))
    }
}

/// `bf16[T, 64]`, `route[T, 8 of 128, weighted]`, `plan[T, 8 of 128]`, `rows[T, 8 of 128; bf16[64]]`.
impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor(ty) => write!(f, "{ty}"),
            Self::Route(ty) => write!(f, "route[{ty}]"),
            Self::Plan(ty) => write!(f, "plan[{ty}]"),
            Self::Ragged(ty) => write!(f, "rows[{ty}]"),
        }
    }
}
