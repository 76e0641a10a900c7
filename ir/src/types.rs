//! Types of values: tensor, route, plan, ragged.

use crate::{DType, Dim};
use serde::{Deserialize, Serialize};

/// A dense array. An empty shape is a scalar.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
