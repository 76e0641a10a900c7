//! Kernel ops to machine code: schedule, MLIR, LLVM, object or PTX.

pub mod batch;
pub mod codes;
pub mod cpu;
mod error;
pub mod gpu;
pub mod grouped;
pub mod limits;
pub mod lower;
pub mod math;
pub mod mlir;
pub mod plan;
pub mod rows;
mod target;

pub use error::CodegenError;
pub use target::Target;

/// Symbol of the dynamic shared memory of a GPU module; every kernel carves what it needs from it.
pub const SHARED: &str = "moec_shared";
