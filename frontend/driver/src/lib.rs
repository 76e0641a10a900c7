//! The facade of moec: what the command line does, as a library.
//!
//! [`Compiler`] turns a model into an [`Artefact`] in memory, which can be written to a folder or
//! run at once; [`verify`] holds compiled kernels against reference cases.

mod artefact;
pub mod bench;
mod compiler;
mod error;
pub mod estimate;
pub mod files;
mod host;
pub mod interrupt;
mod library;
pub mod limits;
pub mod peers;
pub mod pointed;
pub mod ptxas;
pub mod ranks;
pub mod read;
mod reference;
pub mod routing;
pub mod run;
mod stored;
pub mod tune;
pub mod verify;

pub use compiler::{Artefact, Compiler, FormReport, TargetReport, host_target};
pub use error::Error;
pub use moec_abi as abi;
pub use moec_codegen::{Target, gpu::tuned::Table, lower::TunedProduct, mlir::Keep};
pub use moec_frontend as frontend;
pub use moec_ir as ir;
pub use moec_passes as passes;
pub use moec_place as place;
pub use moec_plan as plan;
pub use moec_runtime as runtime;
pub use moec_sim as sim;
