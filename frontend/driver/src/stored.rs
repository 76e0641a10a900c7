//! Where the weights of a run come from.

use crate::Error;
use indexmap::IndexMap;
use moec_abi::{DType, Program};
use moec_codegen::lower;
use moec_frontend::Checkpoint;
use moec_runtime::{Code, Content, Random, ReadAt, RuntimeError, TensorView, Tensors};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Weights as a user names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Invented values, from a seed.
    Random(u64),
    /// A checkpoint: a safetensors file, an index, or a folder with either.
    Folder(PathBuf),
}

impl Weights {
    /// The tensors for a layer of a program.
    ///
    /// # Errors
    /// The checkpoint is not one, or nothing can be invented for the program.
    pub fn open(&self, program: &Program, prefix: &str) -> Result<Box<dyn Tensors>, Error> {
        match self {
            Self::Random(seed) => Ok(Box::new(Random::new(&program.slots, prefix, *seed)?)),
            Self::Folder(path) => Ok(Box::new(Opened::new(path)?)),
        }
    }
}

/// A checkpoint that the frontend has opened and checked, for the runtime.
struct Opened(IndexMap<String, Reader>);

struct Reader {
    checkpoint: Arc<Checkpoint>,
    name: String,
    dtype: DType,
    shape: Vec<u64>,
    bytes: u64,
}

impl Opened {
    fn new(path: &Path) -> Result<Self, Error> {
        let checkpoint = Arc::new(Checkpoint::open(path).map_err(|d| Error::Input(vec![d]))?);
        let mut tensors = IndexMap::new();
        for (name, info) in checkpoint.tensors() {
            let Some(dtype) =
                info.dtype.map(lower::dtype).or_else(|| (info.type_name == "F8_E8M0").then_some(DType::U8))
            else {
                continue;
            };
            let reader = Reader {
                checkpoint: Arc::clone(&checkpoint),
                name: name.to_owned(),
                dtype,
                shape: info.shape.clone(),
                bytes: info.bytes,
            };
            tensors.insert(name.to_owned(), reader);
        }
        Ok(Self(tensors))
    }
}

impl Tensors for Opened {
    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let reader = self.0.get(name)?;
        let content = Content::Reader { reader, offset: 0, bytes: reader.bytes };
        Some(TensorView { dtype: reader.dtype, shape: reader.shape.clone(), content })
    }
}

impl ReadAt for Reader {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> moec_runtime::Result<()> {
        let read = self.checkpoint.read(&self.name, offset, out);
        read.map_err(|d| RuntimeError::new(Code::File, format!("{}: {}", d.code.0, d.message)))
    }
}
