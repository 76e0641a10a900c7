//! Grouped products: rows times one matrix per expert, with an epilogue.
//!
//! This is the form that expert banks, shared experts and dense products take before a target's
//! emitter sees them. Everything that differs between model families is data here: which rows,
//! how many matrices, biases, scales, and the epilogue as an expression tree.

use crate::{
    codes::Codes,
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

/// Numbers (f32, rows of as many elements as the product has outputs) that a sum starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// The sum.
    pub sum: usize,
    /// Whether row `p` of the result takes row `map[p]` of a map of its own; otherwise it takes row `p`.
    pub mapped: bool,
}

/// An expression over the accumulators of one place of the result.
#[derive(Clone, Debug, PartialEq)]
pub enum Epilogue {
    /// Sum `0` (gate, or the only one) or `1` (up), with its bias.
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
/// A sum may start from given numbers, or consist of them alone: products of factors, and products whose matrices are
/// stored in different ways, are computed by several kernels in turn.
///
/// # Arguments of the kernel, in this order (those that do not apply are left out)
/// `a`, `w` (packed slot), the scales and the zeros of codes (slots in the order of `w`), `bias` (f32
/// `[experts][sums][n]`), `offsets` (i32 `[experts + 1]`, the first sorted row of each expert; the address is that of
/// the part's first expert), `map` (i32, for [`RowSource::Gathered`]), `scale` (f32 by sorted row), for each of `given`
/// the numbers and, if they are mapped, the map (i32 by sorted row), `out`, and the number of tokens (value).
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
    /// The sum that the first matrix adds to.
    pub first: usize,
    /// What sums start from; zero otherwise.
    pub given: Vec<Given>,
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
    /// Type of the weights as they are multiplied: f32 or bf16.
    pub w: DType,
    /// How weights are stored, if they are packed as codes and not as values.
    pub codes: Option<Codes>,
    /// Type of the result in memory: f32 or bf16.
    pub out: DType,
    /// Whether there is a bias.
    pub bias: bool,
    /// Per-row scale.
    pub scale: RowScale,
    /// What happens to the sums.
    pub epilogue: Epilogue,
}

impl Grouped {
    /// Sums of a place: those of the matrices, and those that are given.
    pub fn sums(&self) -> usize {
        self.given.iter().map(|g| g.sum + 1).fold(self.first + self.matrices, usize::max)
    }

    /// Type of the elements of the packed weights.
    pub fn packed(&self) -> DType {
        if self.codes.is_some() { DType::U8 } else { self.w }
    }

    /// Bits of a weight.
    pub(crate) fn weight_bits(&self) -> u64 {
        self.codes.map_or(self.w.bytes() * 8, |codes| codes.bits)
    }

    /// All sums of a place, from those of the matrices and the given numbers; `zero` is a sum of nothing.
    pub(crate) fn start<'c>(&self, b: &Builder<'c>, own: &[V<'c>], given: &[V<'c>], zero: V<'c>) -> Vec<V<'c>> {
        let mut sums: Vec<Option<V<'c>>> = vec![None; self.sums()];
        let parts = self.given.iter().map(|g| g.sum).zip(given).chain((self.first..).zip(own));
        for (i, part) in parts {
            sums[i] = Some(sums[i].map_or(*part, |sum| b.addf(sum, *part)));
        }
        sums.into_iter().map(|sum| sum.unwrap_or(zero)).collect()
    }

    /// Whether a kernel knows its rows, or the numbers that sums start from, only when the launch before has ended.
    pub(crate) fn follows(&self) -> bool {
        self.rows == RowSource::Gathered || !self.given.is_empty()
    }
}
