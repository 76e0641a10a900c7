//! Loads artefacts, binds weights and launches programs; knows no model and no compiler.
//!
//! ```no_run
//! use moec_runtime::{Artefact, Checkpoint, Cpu, Model};
//! use std::{path::Path, sync::Arc};
//!
//! # fn main() -> moec_runtime::Result<()> {
//! let artefact = Arc::new(Artefact::load(Path::new("out"))?);
//! let model = Model::new(artefact, Arc::new(Cpu::new(0)));
//! let layer = model.layer(0, &Checkpoint::open(Path::new("checkpoint"))?)?;
//! # let (hidden, mut output) = (vec![0u8; 4096], vec![0u8; 4096]);
//! layer.launch(1, &[&hidden], &mut [&mut output])?;
//! # Ok(())
//! # }
//! ```

mod artefact;
mod chain;
mod collective;
#[cfg(unix)]
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
#[cfg(unix)]
mod elf;
mod error;
mod layer;
mod number;
mod pack;
mod random;
mod recipe;
#[cfg(feature = "sim")]
mod sim;
mod target;
mod tensors;
mod weights;

pub use artefact::{Artefact, Choice};
pub use chain::{ChainLayer, HostTensor};
pub use collective::{Collectives, Threads};
#[cfg(unix)]
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::{Cuda, Graph};
pub use device::{Bound, Device, Files, Memory, Module};
pub use error::{Code, Result, RuntimeError};
pub use layer::{LaunchTime, Layer, Model, packed_layer};
pub use pack::pack;
pub use random::Random;
#[cfg(feature = "sim")]
pub use sim::Sim;
pub use target::cpu_runs;
pub use tensors::{Bytes, Checkpoint, Content, InMemory, ReadAt, SafetensorsBytes, TensorView, Tensors};
pub use weights::{expand, materialize};
