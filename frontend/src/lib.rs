//! Bytes in, checked graph out.
//!
//! Reading goes in three steps. *Read*: JSON text becomes values that know their place
//! ([`json`]), and a family reads the keys that it needs. *Check*: each rule is one function with
//! one code. *Build*: the family composes the block of every mixture layer from graph ops; layers
//! with equal blocks share a [`Form`]. Nothing here prints or ends the process: findings are
//! [`moec_ir::Diagnostic`]s.

#![expect(clippy::result_large_err, reason = "a finding ends its stage; it is made once")]

mod block;
mod check;
pub mod codes;
mod config;
mod family;
mod harmless;
pub mod json;
mod keys;
mod layout;
pub mod limits;
mod model;
mod outline;
mod quantization;
mod relayout;
mod source;
pub mod weights;

pub use config::{families, identifier, read_config};
pub use model::{Facts, Form, FormFacts, LatentAttention, Layer, LayerKind, Model};
pub use relayout::Shapes;
pub use source::{read_graph, read_model, read_model_bytes};
pub use weights::{Checkpoint, TensorInfo};
