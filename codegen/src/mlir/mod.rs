//! MLIR: a context, a builder for the ops that kernels need, and the lowering pipeline.

mod build;
mod context;

pub use build::{Builder, FuncKind, V};
pub use context::{Compiled, Keep, Session};
