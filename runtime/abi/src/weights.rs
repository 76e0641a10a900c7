//! Weight slots: from checkpoint tensors to packed bytes, as data.

use crate::{DType, Recipe};
use serde::{Deserialize, Serialize};

/// Encoding of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Elements of a number type.
    Plain,
    /// FP8 with one f32 factor per tile of `block` rows and columns.
    Fp8Block {
        /// Name of the tensor of factors.
        scale: String,
        /// Rows and columns of a tile.
        block: [u64; 2],
    },
    /// OCP MXFP4: pairs of codes in bytes (low nibble first), one power of two (biased by 127) per 32.
    Mxfp4 {
        /// Name of the tensor of shared exponents.
        scales: String,
    },
    /// The bytes of FP8 numbers, undecoded.
    Fp8Codes,
    /// A factor for each row of the FP8 tensor `of`, from a tensor of factors for tiles of `rows` rows.
    Fp8Factors {
        /// Name of the tensor whose rows are counted.
        of: String,
        /// Rows of a tile.
        rows: u64,
    },
    /// The bytes of two MXFP4 codes each, undecoded: the last two axes as one.
    Mxfp4Codes,
    /// The shared exponents of MXFP4 codes, undecoded.
    Mxfp4Exponents,
    /// Composed of several tensors, expert by expert; the source's own name is for people.
    Composed(Box<Recipe>),
}

/// One step from a stored tensor to a matrix; see the field of the same name in the graph IR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum View {
    /// Entry `e` (the expert) of axis 0.
    Expert,
    /// Entry `index` of axis 0.
    Index {
        /// Position on axis 0.
        index: u64,
    },
    /// Rows `e * rows .. (e + 1) * rows` of axis 0.
    ExpertRows {
        /// Rows of one expert.
        rows: u64,
    },
    /// `len` entries of `axis` from `start`, `step` apart.
    Slice {
        /// Axis, from the outermost.
        axis: u64,
        /// First entry.
        start: u64,
        /// Entries.
        len: u64,
        /// Distance.
        step: u64,
    },
    /// Swap the last two axes.
    Transpose,
    /// Another shape for the same elements.
    Reshape {
        /// Sizes, outermost first.
        shape: Vec<u64>,
    },
}

/// Where the values of a matrix are stored.
///
/// In tensor names `{e}` is the expert's number (after `base_id`), `{p}` the prefix of the layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Name of the checkpoint tensor.
    pub tensor: String,
    /// Its encoding.
    pub packing: Packing,
    /// Steps from the decoded tensor to the value.
    pub view: Vec<View>,
    /// Type that decoded values are rounded to.
    pub dtype: DType,
}

/// One of the matrices of a slot: `rows x columns` values of each expert; vectors have one column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matrix {
    /// Where the values come from.
    pub source: Source,
    /// Rows (outputs) per expert: one number for all, or one for each.
    pub rows: Vec<u64>,
    /// Columns (inputs) per expert: one number for all, or one for each.
    pub columns: Vec<u64>,
}

/// Order of the elements of a slot.
///
/// `e` is the expert, `m` the matrix of the slot, `r` its row (output), `c` its column (input).
/// Places outside a matrix hold zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[e][m][r][c]`, columns padded to a multiple of `columns`.
    Rows {
        /// Unit of the padded row length, in elements.
        columns: u64,
    },
    /// `[e][r / panel][m][c / depth][r % panel][c % depth]`: panels of `panel` output rows; the
    /// matrices of a slot alternate panel by panel, so that gate and up of the same outputs are neighbours.
    Panels {
        /// Output rows of a panel.
        panel: u64,
        /// Neighbouring inputs of one output.
        depth: u64,
        /// Inputs are padded to a multiple of this.
        columns: u64,
    },
    /// `[e][r / block][m][r % block][c]`: `block` rows of each matrix alternate; rows padded to a multiple
    /// of `block`, columns to a multiple of `columns`. The tensor-core kernels pair gate and up rows so.
    Interleaved {
        /// Rows of one matrix before the next matrix follows.
        block: u64,
        /// Unit of the padded row length, in elements.
        columns: u64,
    },
    /// `[e][r / 8][m][c / depth][r % 8][lane][piece][c % unit]`, where `depth` is eight pieces for each lane, `lane` is
    /// `c / unit % lanes` and `piece` is `c / unit / lanes % 8`. Inputs are in memory as they are in the registers of
    /// tensor cores: what a lane multiplies of a row lies together.
    Fragments {
        /// Lanes that share the inputs of a row.
        lanes: u64,
        /// Neighbouring inputs of a lane.
        unit: u64,
        /// Unit of the padded row length, in elements.
        columns: u64,
    },
}

impl Layout {
    /// Rows that lie side by side in [`Layout::Fragments`], and the pieces that a lane has of each.
    pub const FRAGMENT: u64 = 8;
}

/// Packed weights: what a kernel reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Name for people.
    pub name: String,
    /// Experts in the slot; 1 for weights that are not per expert.
    pub experts: u64,
    /// Number of the first expert in tensor names and views.
    pub first_expert: u64,
    /// Number of each expert in tensor names and views, where they are not consecutive from the first on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numbers: Vec<u64>,
    /// Matrices that are packed together; equal rows and columns.
    pub matrices: Vec<Matrix>,
    /// Order of the elements.
    pub layout: Layout,
    /// Element type of the packed values.
    pub dtype: DType,
    /// Bytes of the packed slot.
    pub bytes: u64,
    /// Byte offset of each expert; one entry more than experts.
    pub offsets: Vec<u64>,
}

impl Layout {
    /// Columns of a row with padding, in elements; `u64::MAX` when they do not fit.
    pub const fn padded_columns(&self, columns: u64) -> u64 {
        match *self {
            Self::Rows { columns: unit } | Self::Interleaved { columns: unit, .. } => round_up(columns, unit),
            Self::Panels { depth, columns: unit, .. } => round_up(round_up(columns, unit), depth),
            Self::Fragments { lanes, unit, columns: whole } => {
                round_up(round_up(columns, whole), lanes.saturating_mul(unit).saturating_mul(Self::FRAGMENT))
            }
        }
    }

    /// Rows of a matrix with padding; `u64::MAX` when they do not fit.
    pub const fn padded_rows(&self, rows: u64) -> u64 {
        match *self {
            Self::Rows { .. } => rows,
            Self::Panels { panel, .. } => round_up(rows, panel),
            Self::Interleaved { block, .. } => round_up(rows, block),
            Self::Fragments { .. } => round_up(rows, Self::FRAGMENT),
        }
    }
}

const fn round_up(value: u64, unit: u64) -> u64 {
    let unit = if unit == 0 { 1 } else { unit };
    value.div_ceil(unit).saturating_mul(unit)
}

impl Matrix {
    /// Rows and columns for expert `e` (counted from 0 inside the slot).
    pub fn size_of(&self, e: u64) -> Option<(u64, u64)> {
        let pick = |sizes: &[u64]| match sizes {
            [one] => Some(*one),
            all => all.get(usize::try_from(e).ok()?).copied(),
        };
        Some((pick(&self.rows)?, pick(&self.columns)?))
    }
}

impl Slot {
    /// Number of expert `e` (counted from 0) in tensor names and views.
    pub fn number(&self, e: u64) -> u64 {
        let listed = usize::try_from(e).ok().and_then(|at| self.numbers.get(at));
        listed.copied().unwrap_or(self.first_expert.saturating_add(e))
    }

    /// Whether launchers without a host library pack the matrix: stored as numbers, and not stacked with experts
    /// that the slot leaves out.
    pub fn is_native(&self, matrix: &Matrix) -> bool {
        let stacked = matrix.source.view.iter().any(|v| matches!(v, View::Expert | View::ExpertRows { .. }));
        matrix.source.packing == Packing::Plain && (!stacked || self.numbers.is_empty())
    }

    /// Rows and columns of each matrix for expert `e` (counted from 0); `None` when the matrices differ.
    pub fn size_of(&self, e: u64) -> Option<(u64, u64)> {
        let mut sizes = self.matrices.iter().map(|m| m.size_of(e));
        let first = sizes.next()??;
        sizes.all(|size| size == Some(first)).then_some(first)
    }

    /// Packed bytes of expert `e` (counted from 0), with the padding of the layout but none behind it.
    pub fn expert_bytes(&self, e: u64) -> Option<u64> {
        let (rows, columns) = self.size_of(e)?;
        self.layout
            .padded_rows(rows)
            .checked_mul(self.layout.padded_columns(columns))?
            .checked_mul(self.matrices.len() as u64)?
            .checked_mul(self.dtype.bytes())
    }

    /// Sets [`offsets`](Self::offsets) and [`bytes`](Self::bytes): experts one after the other, each at a multiple of `align` bytes.
    ///
    /// `None` when sizes of matrices differ or do not fit.
    pub fn place(&mut self, align: u64) -> Option<()> {
        let mut offsets = vec![0];
        let mut end = 0u64;
        for e in 0..self.experts {
            end = end.checked_add(self.expert_bytes(e)?)?.checked_next_multiple_of(align.max(1))?;
            offsets.push(end);
        }
        self.offsets = offsets;
        self.bytes = end;
        Some(())
    }

    /// Cuts the bytes of a packed slot into those of its experts; bytes before the first expert are zeroed.
    ///
    /// `None` when the offsets do not rise or do not lie in `packed`.
    pub fn parts<'a>(&self, packed: &'a mut [u8]) -> Option<Vec<&'a mut [u8]>> {
        if self.offsets.len() as u64 != self.experts.checked_add(1)? {
            return None;
        }
        let mut parts = Vec::new();
        let mut rest = packed;
        let mut at = 0;
        for (i, &offset) in self.offsets.iter().enumerate() {
            let (part, tail) = rest.split_at_mut_checked(usize::try_from(offset.checked_sub(at)?).ok()?)?;
            if i == 0 {
                part.fill(0);
            } else {
                parts.push(part);
            }
            (rest, at) = (tail, offset);
        }
        rest.fill(0);
        Some(parts)
    }
}
