//! What an artefact says to a runtime: the only thing that compiler and runtime share.
//!
//! A [`Program`] is one compiled layer form for one target: buffers with sizes in the number of
//! tokens, weight slots with a recipe from checkpoint tensors to packed bytes, and launches in
//! order. Nothing in it needs knowledge of a model, and no field has to be guessed.

use serde::{Deserialize, Serialize};

mod chain;
pub mod embed;
mod encode;
mod expr;
pub mod format;
pub mod header;
mod recipe;
mod weights;

pub use chain::{Chain, Group, Move, MoveKind, Rows, Step};
pub use encode::{EncodeError, cpu_level, dtype_number, encode, fingerprint, weight_offsets};
pub use expr::Expr;
pub use recipe::Recipe;
pub use weights::{Layout, Matrix, Packing, Slot, Source, View};

/// Version of the manifest; a runtime refuses a newer one.
pub const SCHEMA: u32 = 1;

/// Element type of a buffer or tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// OCP E4M3.
    F8e4m3,
    /// OCP E5M2.
    F8e5m2,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// 32-bit signed.
    I32,
    /// 64-bit signed.
    I64,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F8e4m3 | Self::F8e5m2 | Self::U8 | Self::I8 => 1,
        }
    }
}

/// What a buffer is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BufferKind {
    /// The caller passes it; kernels only read it.
    Input {
        /// Name in the interface.
        name: String,
    },
    /// The caller passes it; kernels write all of it.
    Output {
        /// Name in the interface.
        name: String,
    },
    /// Packed weights of the slot with this index; kernels only read it.
    Weight {
        /// Index into [`Program::slots`].
        slot: usize,
    },
    /// Lies in the workspace, at [`Buffer::offset`].
    Workspace,
}

/// A region of memory that kernels read or write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Name for people: the value that it holds.
    pub name: String,
    /// What it is for.
    pub kind: BufferKind,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<Expr>,
    /// Position in the workspace; zero for all other kinds.
    pub offset: Expr,
    /// Value that the workspace must hold before the first launch; `None`: anything.
    pub zeroed: bool,
}

/// One argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arg {
    /// Address of a buffer.
    Buffer(usize),
    /// Address inside a buffer, in bytes from its start.
    Offset {
        /// Index into [`Program::buffers`].
        buffer: usize,
        /// Bytes from its start.
        bytes: Expr,
    },
    /// A 64-bit number.
    Value(Expr),
    /// A tensor map over a buffer (CUDA targets with TMA only).
    TensorMap(TensorMap),
}

/// A tensor map: how a bulk tensor copy sees a buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorMap {
    /// Index into [`Program::buffers`].
    pub buffer: usize,
    /// Element type.
    pub dtype: DType,
    /// Sizes in elements, innermost first.
    pub dims: Vec<Expr>,
    /// Strides in bytes of dimensions 1 and up.
    pub strides: Vec<Expr>,
    /// Box in elements, innermost first.
    pub box_dims: Vec<u32>,
    /// Bytes of the swizzle span: 0, 32, 64 or 128.
    pub swizzle: u32,
}

/// How a launch spreads over a CPU: `items` independent pieces of work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuGrid {
    /// Number of items.
    pub items: Expr,
    /// Items that one thread takes at a time, at least 1.
    pub grain: u64,
    /// Bytes of scratch per thread, 64-byte aligned.
    pub scratch: u64,
}

/// How a launch spreads over a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuGrid {
    /// Thread blocks in x, y, z.
    pub blocks: [Expr; 3],
    /// Threads of a block in x, y, z.
    pub threads: [u32; 3],
    /// Blocks of a cluster; 1, 1, 1 without clusters.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The launch may start before its predecessor ends (programmatic dependent launch).
    pub dependent: bool,
    /// First and last number of tokens for which the launch is made; others have a kernel of their own.
    #[serde(default = "any_tokens", skip_serializing_if = "is_any")]
    pub tokens: [u64; 2],
}

/// All numbers of tokens: see [`GpuGrid::tokens`].
pub const ANY_TOKENS: [u64; 2] = [0, u64::MAX];

const fn any_tokens() -> [u64; 2] {
    ANY_TOKENS
}

fn is_any(tokens: &[u64; 2]) -> bool {
    *tokens == ANY_TOKENS
}

/// Where a launch runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// On CPU threads.
    Cpu(CpuGrid),
    /// On a GPU.
    Gpu(GpuGrid),
}

/// One kernel launch. Launches run in order; each sees all writes of the ones before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Name of the kernel op, for people and profiles.
    pub name: String,
    /// Symbol of the kernel in the code object.
    ///
    /// CPU kernels have the C type [`CpuKernel`]; GPU kernels take one 64-bit parameter for each argument.
    pub symbol: String,
    /// Arguments, in order.
    pub args: Vec<Arg>,
    /// Extent.
    pub grid: Grid,
}

/// C type of a CPU kernel: `args[i]` is the address or value of argument `i`; the kernel does the
/// items `begin..end` and may use `scratch`.
pub type CpuKernel = unsafe extern "C" fn(args: *const u64, begin: u64, end: u64, scratch: *mut core::ffi::c_void);

/// A compiled layer form for one target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Name of the form; a C identifier, prefix of all symbols.
    pub name: String,
    /// `x86-64-v3`, `x86-64-v4`, `aarch64`, `sm_80`, `sm_90a`, ...
    pub target: String,
    /// Everything that kernels touch.
    pub buffers: Vec<Buffer>,
    /// Packed weights.
    pub slots: Vec<Slot>,
    /// Kernel launches, in order.
    pub launches: Vec<Launch>,
    /// Bytes of workspace.
    pub workspace: Expr,
    /// Largest number of tokens for which all sizes and indices fit.
    pub max_tokens: u64,
    /// Sizes that the form has a meaning for; a call with other numbers of tokens is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fits: Vec<Fit>,
    /// Layers of the model that this form serves.
    pub layers: Vec<u64>,
    /// What `{p}` in tensor names stands for, per entry of `layers` (checkpoint prefix of the layer).
    pub prefixes: Vec<String>,
    /// Code: file in the artefact folder (object, PTX), relative.
    pub code: String,
    /// Ahead-of-time binary for the target, if one was made (cubin), relative.
    pub binary: Option<String>,
    /// What inputs of integers may hold; a runtime that sees the values refuses others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<Domain>,
}

/// What a size has to be that depends on the number of tokens: rows that a slice takes are there, rows of another length
/// come out whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// Node whose size it is, and what it has to be, for people.
    pub what: String,
    /// The size.
    pub size: Expr,
    /// Least value.
    pub least: u64,
    /// Largest value.
    pub most: u64,
    /// It is a multiple of this; not 0.
    pub multiple: u64,
}

impl Fit {
    /// Whether the size comes out for this number of tokens.
    pub fn holds(&self, tokens: u64) -> bool {
        let fits = |n: u64| (self.least..=self.most).contains(&n) && n.is_multiple_of(self.multiple);
        self.size.eval(tokens).is_some_and(fits)
    }
}

impl Program {
    /// Whether there are outputs, and all are empty for this number of tokens: a call has nothing to do then.
    pub fn writes_nothing(&self, tokens: u64) -> bool {
        let empty = |b: &Buffer| b.shape.iter().any(|n| n.eval(tokens) == Some(0));
        let mut outputs = self.buffers.iter().filter(|b| matches!(b.kind, BufferKind::Output { .. })).peekable();
        outputs.peek().is_some() && outputs.all(empty)
    }
}

/// Values that an input of integers may hold: classes that have experts, ids of a table, experts of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Index into [`Program::buffers`].
    pub buffer: usize,
    /// Node that reads the values, and what they are to it.
    pub what: String,
    /// Ranges of allowed values, first and last, by rising values.
    pub ranges: Vec<[i64; 2]>,
}

/// Everything about an artefact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this form: [`SCHEMA`].
    pub schema: u32,
    /// Name and version of the producer.
    pub producer: String,
    /// Name of the model; a C identifier.
    pub model: String,
    /// SHA-256 of the input files, hexadecimal, by name.
    pub inputs: Vec<(String, String)>,
    /// Compiled forms, one per layer form and target.
    pub programs: Vec<Program>,
    /// What one rank runs of layers that are spread over several ranks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chains: Vec<Chain>,
    /// Remarks that change how the result should be read: fallbacks, untuned shapes, rewrites.
    pub notes: Vec<String>,
}
