//! Weights of a checkpoint: which file holds a tensor, what it holds, and what a form needs.
//!
//! Files come from strangers. Nothing is allocated by what a file claims, nothing outside the
//! given folder is opened, and reads are positional, so that a file that changes is noticed
//! instead of changing what was checked.

mod bind;
mod checkpoint;
mod file;
mod header;
mod index;
mod read;

pub use bind::{Binding, bind};
pub(crate) use bind::{experts, stored_shape};
pub(crate) use checkpoint::small_file;
pub use checkpoint::{Checkpoint, TensorInfo};
pub use read::{RawTensor, ReadError, materialize};
