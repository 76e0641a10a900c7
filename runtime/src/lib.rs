//! Loads artefacts, binds weights and launches programs; knows no model and no compiler.

mod error;
mod number;
mod pack;
mod random;
mod tensors;
mod weights;

pub use error::{Code, Result, RuntimeError};
pub use pack::pack;
pub use random::Random;
pub use tensors::{Checkpoint, Content, InMemory, ReadAt, SafetensorsBytes, TensorView, Tensors};
pub use weights::{expand, materialize};
