//! The graph IR of moec: what a mixture-of-experts layer computes.
//!
//! A [`Graph`] holds [`Op`]s that compute one value each. Values are tensors, routes (which
//! experts each row uses), and rows sorted by expert ([`Type`]). Sizes are constants or
//! expressions in the number of tokens `T` ([`Dim`]). The ops are a closed set of composable
//! operations (`ops`), from which every router and expert form is built; fusion adds kernel ops,
//! whose meaning is the graph that they hold ([`ops::Kernel`]).
//!
//! Every op has a type rule ([`Graph::infer`]) and a value ([`interp`], in f64, which decides what
//! is right). [`verify`] checks whole graphs, [`print`] and [`parse`] are the text form, [`json`]
//! reads and writes `moec-graph-1`. A node is rounded where the model rounds ([`Node::round`]).
//!
//! This crate reads no file and knows no target.

pub mod codes;
mod cost;
pub mod diag;
mod dim;
mod dot;
mod dtype;
mod graph;
mod infer;
pub mod interp;
pub mod json;
mod nearest;
mod op;
pub mod ops;
mod outline;
mod rows;
mod text;
mod types;
mod verify;
mod weight;

pub use cost::{Cost, cost};
pub use diag::{Code, Diagnostic, Label, Severity, Span};
pub use dim::Dim;
pub use dot::dot;
pub use dtype::DType;
pub use graph::{Graph, Node, NodeId, Output, Part};
pub use nearest::nearest;
pub use op::Op;
pub use outline::OutlineError;
pub use text::{parse, print};
pub use types::{RaggedType, RouteType, TensorType, Type};
pub use verify::{batch_dependent_nodes, verify};
pub use weight::{Extent, Packing, Source, View, Weight, WeightName, WeightSpec, stored_bits};
