//! Weights: what a graph refers to by name, and where the values come from.

use crate::{
    DType, codes,
    infer::{Cx, OpError, OpResult, numbers},
};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// Bits in which a code of `bits` bits is stored: 2, 4 or 8, so that codes never cross a byte.
pub const fn stored_bits(bits: u64) -> u64 {
    match bits {
        0..=2 => 2,
        3..=4 => 4,
        _ => 8,
    }
}

/// Name of a weight of the graph. `{e}` stands for the expert's number inside its bank part,
/// `{g}` for the group of a factored weight. Names are relative to the layer.
pub type WeightName = String;

/// A size of a weight: the same for all experts, or one for each.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Extent {
    /// Equal for all experts.
    Fixed(u64),
    /// One size per expert; 0 is allowed.
    PerExpert(Vec<u64>),
}

impl Extent {
    /// The size for expert `e`.
    pub fn of(&self, e: usize) -> Option<u64> {
        match self {
            Self::Fixed(n) => Some(*n),
            Self::PerExpert(n) => n.get(e).copied(),
        }
    }

    /// The largest size over all experts.
    pub fn max(&self) -> u64 {
        match self {
            Self::Fixed(n) => *n,
            Self::PerExpert(n) => n.iter().copied().max().unwrap_or(0),
        }
    }
}

/// A weight: shape and type of the value that the graph sees, and how to read it from a checkpoint.
///
/// `shape` is the shape of *one* expert's tensor when the name or the view depends on the expert.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weight {
    /// Type of the values (after decoding).
    pub dtype: DType,
    /// Sizes of the value, outermost first; matrices are `[out, in]`.
    pub shape: Vec<Extent>,
    /// Where the values are stored.
    pub source: Source,
}

/// How to read a weight from checkpoint tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Checkpoint tensor; `{p}` is the prefix of the layer in the checkpoint, `{e}` and `{g}` are replaced as in [`WeightName`].
    pub tensor: String,
    /// Encoding of that tensor.
    pub packing: Packing,
    /// Steps from the decoded tensor to the value, in order.
    pub view: Vec<View>,
}

impl Source {
    /// A tensor that is stored just as the graph wants it.
    pub fn plain(tensor: impl Into<String>) -> Self {
        Self { tensor: tensor.into(), packing: Packing::Plain, view: Vec::new() }
    }
}

/// Encoding of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Elements of a number type.
    Plain,
    /// FP8 with one f32 scale for each tile of `block` rows and columns; value = q * scale.
    /// Used by the DeepSeek-V3, Kimi-K2 and MiniMax-M2 releases (`weight_scale_inv`).
    Fp8Block {
        /// Name of the scale tensor, `[ceil(out/rows), ceil(in/columns)]`.
        scale: String,
        /// Rows and columns of a tile.
        block: [u64; 2],
    },
    /// OCP MXFP4: `tensor` holds `[.., blocks, 16]` bytes of two codes (low nibble first),
    /// `scales` one power of two (biased by 127) per block of 32. Decodes to `[.., blocks * 32]`.
    Mxfp4 {
        /// Name of the tensor of shared exponents, `[.., blocks]`.
        scales: String,
    },
}

/// One step from a stored tensor to a weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum View {
    /// Take entry `e` of axis 0, where `e` is the expert's number; the axis disappears.
    Expert,
    /// Take entry `index` of axis 0; the axis disappears.
    Index {
        /// Position on axis 0.
        index: u64,
    },
    /// Keep rows `e * rows .. (e + 1) * rows` of axis 0 (all experts stacked in one matrix).
    ExpertRows {
        /// Rows of one expert.
        rows: u64,
    },
    /// Keep `len` entries of `axis`, from `start`, `step` apart.
    Slice {
        /// Axis, counted from the outermost.
        axis: u64,
        /// First entry.
        start: u64,
        /// Number of entries.
        len: u64,
        /// Distance; 2 takes one half of an interleaved pair.
        step: u64,
    },
    /// Swap the last two axes.
    Transpose,
    /// Give the elements another shape.
    Reshape {
        /// New sizes, outermost first.
        shape: Vec<u64>,
    },
}

/// A weight attribute of an expert bank: a weight, or a value composed of several (section 3 of the op set).
///
/// These are values, not orders of computation: a compiler may keep factors apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "a tensor name, or one of {mul, group}, {base, a, b, scale}, {codes, scale}, {codes, scale, zero, group_size[, bits]}, {slice, axis, n}, {take, ids, axis}"
)]
pub enum WeightSpec {
    /// The weight itself.
    Plain(WeightName),
    /// `A_e B_g` with `g = group[e]` (latent experts, Sub-MoE, MC-SMoE low rank).
    Mul {
        /// Names of `A` and `B`.
        mul: [WeightName; 2],
        /// Group of each expert.
        group: Vec<u64>,
    },
    /// `W + scale * B_e A_e` (MixLoRA and adapters).
    Base {
        /// Shared matrix.
        base: WeightName,
        /// Low-rank input factor `[r, in]`.
        a: WeightName,
        /// Low-rank output factor `[out, r]`.
        b: WeightName,
        /// Factor of the low-rank part.
        scale: f64,
    },
    /// `(C - Z) S` by groups along the input axis (MC-MoE, EdgeMoE, MoEQuant).
    Grouped {
        /// Integer codes `[out, in]`.
        codes: WeightName,
        /// Scales `[out, in / group_size]`.
        scale: WeightName,
        /// Zero points `[out, in / group_size]`.
        zero: WeightName,
        /// Inputs that share a scale.
        group_size: u64,
        /// Bits of a code, per expert.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        bits: Vec<u64>,
    },
    /// `C_e S_e`, codes in {-1, 0, 1} (MoTE).
    Ternary {
        /// Integer codes.
        codes: WeightName,
        /// One scale.
        scale: WeightName,
    },
    /// The e-th of `n` equal slices of a dense matrix (Union-of-Experts).
    Slice {
        /// Dense matrix.
        slice: WeightName,
        /// Axis that is cut.
        axis: u64,
        /// Number of slices.
        n: u64,
    },
    /// Rows or columns of a dense matrix by an index set (CDSP-MoE).
    Take {
        /// Dense matrix.
        take: WeightName,
        /// Index set of the expert.
        ids: WeightName,
        /// Axis that is indexed.
        axis: u64,
    },
}

impl WeightSpec {
    /// Names of all weights that the value is made of.
    pub fn names(&self) -> Vec<&WeightName> {
        match self {
            Self::Plain(w) => vec![w],
            Self::Mul { mul: [a, b], .. } => vec![a, b],
            Self::Base { base, a, b, .. } => vec![base, a, b],
            Self::Grouped { codes, scale, zero, .. } => vec![codes, scale, zero],
            Self::Ternary { codes, scale } => vec![codes, scale],
            Self::Slice { slice, .. } => vec![slice],
            Self::Take { take, ids, .. } => vec![take, ids],
        }
    }
}

impl WeightSpec {
    /// Which entry of a factor's template expert `e` of group `g` uses: the group's, where the name has its mark alone.
    pub fn entry(name: &str, e: u64, g: u64) -> u64 {
        if name.contains("{g}") && !name.contains("{e}") { g } else { e }
    }

    /// Shape of the composed value for expert `e` of its part, where `weights` hold what it names.
    pub fn shape_in(&self, weights: &IndexMap<WeightName, Weight>, e: u64) -> Option<Vec<u64>> {
        self.shape(&Cx { weights }, e).ok()
    }

    /// Shape of the composed value for expert `e` of its part.
    pub(crate) fn shape(&self, cx: &Cx<'_>, e: u64) -> OpResult<Vec<u64>> {
        match self {
            Self::Plain(name) => cx.shape_at(name, e),
            Self::Mul { mul: [a, b], group } => {
                let g = group_of(group, e)?;
                let shape = |name| cx.shape_at(name, Self::entry(name, e, g));
                product_shape((a, &shape(a)?), (b, &shape(b)?))
            }
            Self::Base { base, a, b, .. } => {
                let shape = cx.shape_at(base, e)?;
                let delta = product_shape((b, &cx.shape_at(b, e)?), (a, &cx.shape_at(a, e)?))?;
                if shape != delta {
                    let text = format!("`{base}` is {}, `{b}` `{a}` gives {}", numbers(&shape), numbers(&delta));
                    return Err(OpError::new(codes::FACTORS, text));
                }
                Ok(shape)
            }
            Self::Grouped { codes: packed, scale, zero, group_size, bits } => {
                let shape = cx.shape_at(packed, e)?;
                check_grouped(packed, &shape, *group_size)?;
                if !bits.is_empty() && usize::try_from(e).ok().is_none_or(|e| e >= bits.len()) {
                    return Err(OpError::new(
                        codes::EXTENT,
                        format!("`bits` of `{packed}` has no entry for expert {e}"),
                    ));
                }
                if let Some(wide) = bits.iter().find(|b| !(1..=8).contains(*b)) {
                    let text = format!("`bits` of `{packed}` has {wide}, a code has from 1 to 8 bits");
                    return Err(OpError::new(codes::VALUE, text));
                }
                for name in [scale, zero] {
                    let given = cx.shape_at(name, e)?;
                    let needed = [shape[0], shape[1] / group_size];
                    if given != needed {
                        let text = format!("`{name}` is {}, {} is needed", numbers(&given), numbers(&needed));
                        return Err(OpError::new(codes::FACTORS, text));
                    }
                }
                Ok(shape)
            }
            Self::Ternary { codes: packed, scale } => {
                let shape = cx.shape_at(packed, e)?;
                let given = cx.shape_at(scale, e)?;
                let fits = given.len() <= shape.len()
                    && given.iter().rev().zip(shape.iter().rev()).all(|(s, n)| *s == 1 || s == n);
                if !fits {
                    let text = format!("`{scale}` {} does not scale `{packed}` {}", numbers(&given), numbers(&shape));
                    return Err(OpError::new(codes::FACTORS, text));
                }
                Ok(shape)
            }
            Self::Slice { slice, axis, n } => {
                let mut shape = cx.shape_at(slice, e)?;
                let size = axis_size(slice, &mut shape, *axis)?;
                if *n == 0 || !size.is_multiple_of(*n) || e >= *n {
                    let text = format!("slice {e} of {n} of `{slice}`, whose axis {axis} has {size} entries");
                    return Err(OpError::new(codes::FACTORS, text));
                }
                *size /= n;
                Ok(shape)
            }
            Self::Take { take, ids, axis } => {
                let mut shape = cx.shape_at(take, e)?;
                let index = cx.shape_at(ids, e)?;
                let size = axis_size(take, &mut shape, *axis)?;
                let [kept] = index.as_slice() else {
                    return Err(OpError::new(
                        codes::FACTORS,
                        format!("`{ids}` is {}, a list is needed", numbers(&index)),
                    ));
                };
                *size = *kept;
                Ok(shape)
            }
        }
    }
}

fn group_of(group: &[u64], e: u64) -> OpResult<u64> {
    usize::try_from(e)
        .ok()
        .and_then(|e| group.get(e).copied())
        .ok_or_else(|| OpError::new(codes::EXTENT, format!("`group` has no entry for expert {e}")))
}

fn product_shape((a, sa): (&str, &[u64]), (b, sb): (&str, &[u64])) -> OpResult<Vec<u64>> {
    match (sa, sb) {
        ([out, inner], [same, input]) if inner == same => Ok(vec![*out, *input]),
        _ => Err(OpError::new(
            codes::FACTORS,
            format!("`{a}` {} times `{b}` {} is no product", numbers(sa), numbers(sb)),
        )),
    }
}

fn check_grouped(name: &str, shape: &[u64], group_size: u64) -> OpResult<()> {
    match shape {
        [_, input] if group_size > 0 && input.is_multiple_of(group_size) => Ok(()),
        _ => Err(OpError::new(
            codes::GROUP_SIZE,
            format!("groups of {group_size} do not divide the input of `{name}` {}", numbers(shape)),
        )),
    }
}

fn axis_size<'a>(name: &str, shape: &'a mut [u64], axis: u64) -> OpResult<&'a mut u64> {
    let rank = shape.len();
    usize::try_from(axis)
        .ok()
        .and_then(|a| shape.get_mut(a))
        .ok_or_else(|| OpError::new(codes::FACTORS, format!("axis {axis} of `{name}`, which has {rank} axes")))
}
