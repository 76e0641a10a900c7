//! Words of an encoded program, shared by the encoder and the launcher.
//!
//! An encoded program is one array of 64-bit words. Positions are word indices from its start.
//!
//! | record | words |
//! |---|---|
//! | header | see the `H_*` positions; [`HEADER`] words |
//! | expression | number of words that follow, then postfix code: `0 v` number, `1` tokens, `2` add, `3` multiply, `4 d` divide by d rounding up, `5` smaller, `6` larger |
//! | buffer | kind (0 input, 1 output, 2 weight, 3 workspace), ordinal among its kind or slot, alignment in bytes, expression of its bytes, expression of its workspace offset, zeroed (0, 1) |
//! | launch | expression of items, grain, scratch bytes, number of arguments, position of arguments |
//! | argument | kind (0 buffer, 1 buffer and byte offset, 2 value), buffer, expression |
//! | slot | packed bytes, offset in the weights, experts, first expert, type, matrices, position of matrices, layout (0 rows, 1 panels, 2 interleaved; 3 fragments is for GPUs alone), its three numbers, position of the experts' offsets |
//! | fit | expression of a size, its least and largest value, what it is a multiple of |
//! | matrix | type, plain (0, 1), views, position of views, rows, their position, columns, their position |
//! | view | kind (0 expert, 1 index, 2 expert rows, 3 slice, 4 transpose, 5 reshape), four numbers; a reshape has rank and position of sizes |
//! | text | two positions of NUL-terminated bytes for each input, then output: when null, when misaligned |

/// First word of an encoded program.
pub const MAGIC: u64 = u64::from_le_bytes(*b"MOECPRG1");
/// First word of packed weights.
pub const WEIGHTS_MAGIC: u64 = u64::from_le_bytes(*b"MOECWGT1");
/// Version of the words; a launcher takes exactly this one.
pub const VERSION: u64 = 3;

/// Words of the header.
pub const HEADER: usize = 21;
/// Version.
pub const H_VERSION: usize = 1;
/// Words of the whole program.
pub const H_WORDS: usize = 2;
/// Sum over the slots: weights packed for another program are refused.
pub const H_FINGERPRINT: usize = 3;
/// Needed processor: 0 any, 3 x86-64-v3, 4 x86-64-v4, 5 x86-64-v4 with products of pairs of bf16, 6 with the
/// matrix unit.
pub const H_CPU: usize = 4;
/// Most tokens.
pub const H_MAX_TOKENS: usize = 5;
/// Expression of the workspace bytes.
pub const H_WORKSPACE: usize = 6;
/// Bytes of all packed weights with their header page.
pub const H_WEIGHTS: usize = 7;
/// Number and position of the buffers.
pub const H_BUFFERS: usize = 8;
/// Number and position of the slots.
pub const H_SLOTS: usize = 10;
/// Number and position of the launches.
pub const H_LAUNCHES: usize = 12;
/// Most arguments of a launch.
pub const H_MAX_ARGS: usize = 14;
/// Most scratch bytes of a launch.
pub const H_SCRATCH: usize = 15;
/// Number of inputs.
pub const H_INPUTS: usize = 16;
/// Number of outputs.
pub const H_OUTPUTS: usize = 17;
/// Position of the texts.
pub const H_TEXTS: usize = 18;
/// Number and position of the sizes that must fit.
pub const H_FITS: usize = 19;

/// Words of a buffer.
pub const BUFFER: usize = 6;
/// Words of a launch.
pub const LAUNCH: usize = 5;
/// Words of an argument.
pub const ARG: usize = 3;
/// Words of a slot.
pub const SLOT: usize = 12;
/// Words of a size that must fit.
pub const FIT: usize = 4;
/// Words of a matrix.
pub const MATRIX: usize = 8;
/// Words of a view.
pub const VIEW: usize = 5;

/// Deepest stack of an expression.
pub const STACK: usize = 32;

/// Unit of the places of slots in packed weights, in bytes; the first page is a header.
///
/// The header holds [`WEIGHTS_MAGIC`], the fingerprint, the total bytes and the number of slots as
/// words, then one byte for each slot that is 1 once it is packed.
pub const WEIGHTS_PAGE: u64 = 4096;
/// Byte of the header page that belongs to slot 0.
pub const WEIGHTS_FLAGS: usize = 64;
/// Most slots of a program: as many as have a flag in the header page.
pub const MAX_SLOTS: usize = WEIGHTS_PAGE as usize - WEIGHTS_FLAGS;

/// Numbers of element types, in the order of `moec_abi::DType`.
pub mod dtype {
    /// IEEE double.
    pub const F64: u64 = 0;
    /// IEEE single.
    pub const F32: u64 = 1;
    /// bfloat16.
    pub const BF16: u64 = 2;
    /// IEEE half.
    pub const F16: u64 = 3;
    /// OCP E4M3.
    pub const F8E4M3: u64 = 4;
    /// OCP E5M2.
    pub const F8E5M2: u64 = 5;
    /// Unsigned byte.
    pub const U8: u64 = 6;
    /// Signed byte.
    pub const I8: u64 = 7;
    /// 32-bit signed.
    pub const I32: u64 = 8;
    /// 64-bit signed.
    pub const I64: u64 = 9;

    /// Bytes of one element; 0 for an unknown number.
    pub const fn bytes(dtype: u64) -> u64 {
        match dtype {
            F64 | I64 => 8,
            F32 | I32 => 4,
            BF16 | F16 => 2,
            F8E4M3 | F8E5M2 | U8 | I8 => 1,
            _ => 0,
        }
    }
}
