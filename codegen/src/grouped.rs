//! Grouped products: rows times one matrix per expert, with an epilogue.
//!
//! This is the form that expert banks, shared experts and dense products take before a target's
//! emitter sees them. Everything that differs between model families is data here: which rows,
//! how many matrices, biases, scales, and the epilogue as an expression tree.

use crate::{
    math,
    mlir::{Builder, V},
};
use moec_abi::DType;
use moec_ir::ops::{BinaryFn, UnaryFn};

/// Where the rows of the left operand come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSource {
    /// Every row of the batch goes through one matrix: no offsets, no map.
    Dense,
    /// Row `p` of the sorted order is row `map[p]` of the operand (dispatch).
    Gathered,
    /// Row `p` of the sorted order is row `p` of the operand.
    Sorted,
}

/// What a per-row scale multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowScale {
    /// No scale.
    None,
    /// The operand's row, which is the sum before the bias (Llama 4).
    Input,
    /// The result after the epilogue (route weights, when they are not applied later).
    Output,
}

/// An expression over the accumulators of one place of the result.
#[derive(Clone, Debug, PartialEq)]
pub enum Epilogue {
    /// Sum of matrix `0` (gate, or the only one) or `1` (up), with its bias.
    Sum(usize),
    /// A number.
    Constant(f32),
    /// A function of one value.
    Unary(UnaryFn, Box<Epilogue>),
    /// A function of two values.
    Binary(BinaryFn, Box<Epilogue>, Box<Epilogue>),
}

impl Epilogue {
    /// Emits the expression for accumulators `sums`: floats, or vectors of floats.
    pub fn emit<'c>(&self, b: &Builder<'c>, sums: &[V<'c>]) -> V<'c> {
        match self {
            Self::Sum(i) => sums[*i],
            Self::Constant(value) => math::constant(b, sums[0], *value),
            Self::Unary(function, x) => math::unary(b, *function, x.emit(b, sums)),
            Self::Binary(function, x, y) => math::binary(b, *function, x.emit(b, sums), y.emit(b, sums)),
        }
    }
}

/// A grouped product: `out[p][n] = epilogue(sum_k a[row(p)][k] * w_m[expert(p)][n][k] + bias_m[expert(p)][n])`.
///
/// # Arguments of the kernel, in this order (those that do not apply are left out)
/// `a`, `w` (packed slot), `bias` (f32 `[experts][matrices][n]`), `offsets` (i32 `[experts + 1]`, the first
/// sorted row of each expert; the address is that of the part's first expert), `map` (i32, for
/// [`RowSource::Gathered`]), `scale` (f32 by sorted row), `out`, and the number of tokens (value).
/// For [`RowSource::Dense`] the number of rows is the number of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Grouped {
    /// Symbol of the kernel.
    pub symbol: String,
    /// Experts (matrices of the slot); 1 for dense products.
    pub experts: u64,
    /// Where rows come from.
    pub rows: RowSource,
    /// Most rows that the sorted order can hold per token (slots of the route).
    pub rows_per_token: u64,
    /// Matrices that share the operand: 1, or 2 for gate and up.
    pub matrices: usize,
    /// Length of the sums: columns of the matrices.
    pub k: u64,
    /// Rows of one matrix: width of the result.
    pub n: u64,
    /// Elements between rows of the operand.
    pub a_stride: u64,
    /// Elements between rows of the result.
    pub out_stride: u64,
    /// Type of the operand in memory: f32 or bf16.
    pub a: DType,
    /// Type of the packed weights: f32 or bf16.
    pub w: DType,
    /// Type of the result in memory: f32 or bf16.
    pub out: DType,
    /// Whether there is a bias.
    pub bias: bool,
    /// Per-row scale.
    pub scale: RowScale,
    /// What happens to the sums.
    pub epilogue: Epilogue,
}
