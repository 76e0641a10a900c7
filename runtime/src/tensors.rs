//! Where checkpoint tensors come from: bytes in memory, or safetensors files.

use crate::error::{Code, Result, RuntimeError};
use moec_abi::DType;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::{
    cell::Cell,
    collections::BTreeMap,
    fs::File,
    ops::Deref,
    path::{Path, PathBuf},
};

/// A source of bytes that is read in parts.
pub trait ReadAt: Send + Sync {
    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The bytes cannot be read.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;
}

/// Content of a tensor: little-endian elements in row-major order.
#[derive(Clone, Copy)]
pub enum Content<'a> {
    /// In memory.
    Bytes(&'a [u8]),
    /// Read when needed.
    Reader {
        /// Source.
        reader: &'a dyn ReadAt,
        /// First byte of the tensor in the source.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
}

/// A stored tensor.
#[derive(Clone)]
pub struct TensorView<'a> {
    /// Type of the stored elements; shared exponents (E8M0) count as `u8`.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Elements.
    pub content: Content<'a>,
}

impl<'a> TensorView<'a> {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        match self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Reader { bytes, .. } => bytes,
        }
    }

    /// Bytes `start..end` of the tensor.
    ///
    /// # Errors
    /// The range does not lie in the tensor, or the file cannot be read.
    pub fn read(&self, start: u64, end: u64) -> Result<Bytes<'a>> {
        let short = || RuntimeError::new(Code::FileForm, "a tensor ends before its last element");
        if start > end || end > self.bytes() {
            return Err(short());
        }
        match self.content {
            Content::Bytes(bytes) => Ok(Bytes::Borrowed(bytes.get(start as usize..end as usize).ok_or_else(short)?)),
            Content::Reader { reader, offset, .. } => {
                let mut out = SPARE.take();
                out.resize((end - start) as usize, 0);
                reader.read_at(offset + start, &mut out)?;
                Ok(Bytes::Owned(out))
            }
        }
    }
}

/// Bytes of a tensor.
pub enum Bytes<'a> {
    /// Of one in memory.
    Borrowed(&'a [u8]),
    /// That were read, or made.
    Owned(Vec<u8>),
}

thread_local! {
    /// Memory of bytes that nobody needs any more. Packing reads thousands of tensors of a few sizes; new memory for
    /// each takes longer to get from the system than the bytes do from its cache.
    static SPARE: Cell<Vec<u8>> = Cell::default();
}

/// Most bytes that are kept for later.
const SPARE_LIMIT: usize = 64 << 20;

impl Bytes<'_> {
    /// The bytes as a vector.
    pub fn into_vec(mut self) -> Vec<u8> {
        match &mut self {
            Self::Borrowed(bytes) => bytes.to_vec(),
            Self::Owned(bytes) => std::mem::take(bytes),
        }
    }
}

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl Drop for Bytes<'_> {
    fn drop(&mut self) {
        if let Self::Owned(bytes) = self
            && (1..=SPARE_LIMIT).contains(&bytes.capacity())
        {
            // At the end of a thread there is no place any more, and memory is freed as usual.
            let _ = SPARE.try_with(|spare| spare.set(std::mem::take(bytes)));
        }
    }
}

/// Finds checkpoint tensors by name.
pub trait Tensors: Send + Sync {
    /// The tensor of this name, if there is one.
    fn find(&self, name: &str) -> Option<TensorView<'_>>;
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::BOOL | Dtype::U8 | Dtype::F8_E8M0 => DType::U8,
        Dtype::I8 => DType::I8,
        Dtype::F8_E5M2 => DType::F8e5m2,
        Dtype::F8_E4M3 => DType::F8e4m3,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::Bf16,
        Dtype::I32 => DType::I32,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::I64 => DType::I64,
        Dtype::F4
        | Dtype::F6_E2M3
        | Dtype::F6_E3M2
        | Dtype::F8_E4M3FNUZ
        | Dtype::F8_E5M2FNUZ
        | Dtype::I16
        | Dtype::U16
        | Dtype::U32
        | Dtype::C64
        | Dtype::U64 => return None,
        // The enum of the library may grow.
        _ => return None,
    })
}

fn view<'a>(info: &TensorInfo, content: impl FnOnce(u64, u64) -> Option<Content<'a>>) -> Option<TensorView<'a>> {
    let dtype = dtype_of(info.dtype)?;
    let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
    let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
    let needed = shape.iter().try_fold(dtype.bytes(), |n, &s| n.checked_mul(s))?;
    if end.checked_sub(start)? != needed {
        return None;
    }
    Some(TensorView { dtype, shape, content: content(start, end)? })
}

/// The largest header that is read; the format has the same limit.
const HEADER_LIMIT: u64 = 100_000_000;

/// The bytes of a whole safetensors file.
pub struct SafetensorsBytes<'a> {
    metadata: Metadata,
    data: &'a [u8],
}

impl<'a> SafetensorsBytes<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// The bytes are not a safetensors file.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        let (header, metadata) = safetensors::SafeTensors::read_metadata(bytes)
            .map_err(|e| RuntimeError::new(Code::FileForm, format!("not a safetensors file: {e}")))?;
        Ok(Self { metadata, data: bytes.get(8 + header..).unwrap_or(&[]) })
    }

    /// Free text of the header, by key.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Names of all tensors, in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }
}

impl Tensors for SafetensorsBytes<'_> {
    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        view(self.metadata.info(name)?, |start, end| self.data.get(start as usize..end as usize).map(Content::Bytes))
    }
}

/// A file that is read by position.
struct Shard {
    path: PathBuf,
    file: File,
}

impl ReadAt for Shard {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        #[cfg(unix)]
        let read = std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset);
        #[cfg(not(unix))]
        let read = {
            use std::io::{Read, Seek, SeekFrom};
            // A second handle has its own position, so that threads do not disturb one another.
            File::open(&self.path).and_then(|mut file| {
                file.seek(SeekFrom::Start(offset))?;
                file.read_exact(out)
            })
        };
        read.map_err(|e| RuntimeError::file("read", &self.path, &e))
    }
}

/// A folder (or file) of safetensors; only headers are read until a tensor is asked for.
pub struct Checkpoint {
    shards: Vec<(Shard, u64)>,
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

impl Checkpoint {
    /// Opens one `.safetensors` file, or all of a folder.
    ///
    /// # Errors
    /// No file, an unreadable one, or one that is not in the safetensors form.
    pub fn open(path: &Path) -> Result<Self> {
        let mut files = Vec::new();
        if path.is_dir() {
            let entries = std::fs::read_dir(path).map_err(|e| RuntimeError::file("read", path, &e))?;
            for entry in entries {
                let file = entry.map_err(|e| RuntimeError::file("read", path, &e))?.path();
                if file.extension().is_some_and(|e| e == "safetensors") {
                    files.push(file);
                }
            }
            files.sort();
            if files.is_empty() {
                return Err(RuntimeError::new(Code::File, format!("no .safetensors file in {}", path.display()))
                    .with_help("name the folder that holds the checkpoint, or use random:SEED"));
            }
        } else {
            files.push(path.to_owned());
        }
        let mut checkpoint = Self { shards: Vec::new(), tensors: BTreeMap::new() };
        for file in files {
            checkpoint.add(file)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let io = |e: std::io::Error| RuntimeError::file("read", &path, &e);
        let form = |what: String| RuntimeError::new(Code::FileForm, format!("{}: {what}", path.display()));
        let file = File::open(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let shard = Shard { path: path.clone(), file };
        if length < 8 {
            return Err(form("shorter than a safetensors header".into()));
        }
        let mut size = [0; 8];
        shard.read_at(0, &mut size)?;
        let size = u64::from_le_bytes(size);
        if size > HEADER_LIMIT || size > length - 8 {
            return Err(form(format!("header of {size} bytes in a file of {length}")));
        }
        let mut header = vec![0; size as usize];
        shard.read_at(8, &mut header)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| form(format!("header: {e}")))?;
        let (data, index) = (8 + size, self.shards.len());
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            if info.data_offsets.1 as u64 > length - data {
                return Err(form(format!("tensor {name} ends after the file"))
                    .with_help("the download may be incomplete; fetch the file again"));
            }
            self.tensors.insert(name, (index, info.clone()));
        }
        self.shards.push((shard, data));
        Ok(())
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

impl Tensors for Checkpoint {
    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let (shard, info) = self.tensors.get(name)?;
        let (reader, data) = self.shards.get(*shard)?;
        view(info, |start, end| Some(Content::Reader { reader, offset: data + start, bytes: end - start }))
    }
}

/// Tensors that a program made, by name.
#[derive(Default)]
pub struct InMemory(BTreeMap<String, (DType, Vec<u64>, Vec<u8>)>);

impl InMemory {
    /// No tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor; `bytes` are little-endian elements in row-major order.
    ///
    /// # Errors
    /// The number of bytes does not go with type and shape.
    pub fn insert(&mut self, name: impl Into<String>, dtype: DType, shape: Vec<u64>, bytes: Vec<u8>) -> Result<()> {
        let name = name.into();
        if shape.iter().try_fold(dtype.bytes(), |n, &s| n.checked_mul(s)) != Some(bytes.len() as u64) {
            let message = format!("tensor {name}: {} bytes for {dtype:?} {shape:?}", bytes.len());
            return Err(RuntimeError::new(Code::TensorMismatch, message));
        }
        self.0.insert(name, (dtype, shape, bytes));
        Ok(())
    }
}

impl Tensors for InMemory {
    fn find(&self, name: &str) -> Option<TensorView<'_>> {
        let (dtype, shape, bytes) = self.0.get(name)?;
        Some(TensorView { dtype: *dtype, shape: shape.clone(), content: Content::Bytes(bytes) })
    }
}
