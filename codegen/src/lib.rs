//! Kernel ops to machine code: schedule, MLIR, LLVM, object or PTX.

mod error;
pub mod gpu;
pub mod grouped;
pub mod math;
pub mod mlir;
mod target;

pub use error::CodegenError;
pub use target::Target;
