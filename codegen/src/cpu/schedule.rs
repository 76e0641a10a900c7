//! Tile sizes and the packing and launch that follow from them.

use crate::{
    grouped::{Grouped, RowSource},
    target::Target,
};
use moec_abi::{CpuGrid, DType, Expr, Layout};

/// Bytes of packed rows that stay in the second-level cache beside the weights of a unit.
const CHUNK_BYTES: u64 = 768 << 10;
/// The same for the matrix unit, which needs more rows to hide the reading of weights: with 320 rows of 2048
/// inputs it does 1.1 times the work of 192 (weights from memory, one thread).
const MATRIX_CHUNK_BYTES: u64 = 1280 << 10;

/// What multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Vector multiply-add in f32.
    Vector,
    /// Vector products of pairs of bf16, added up in f32 (AVX-512 BF16).
    Pairs,
    /// The matrix unit (AMX): tiles of 16 x 16 sums over 32 bf16 products.
    Matrix,
}

impl Engine {
    /// Type of the rows that it reads.
    pub(super) const fn operand(self) -> DType {
        match self {
            Self::Vector => DType::F32,
            Self::Pairs | Self::Matrix => DType::Bf16,
        }
    }
}

/// How a grouped product is laid out and spread on a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// What multiplies.
    pub engine: Engine,
    /// Rows of a register tile.
    pub mr: usize,
    /// Vectors of columns that a tile is wide, per matrix.
    pub nv: usize,
    /// Places of a vector.
    pub lanes: usize,
    /// Neighbouring inputs of one output in the packed weights.
    pub depth: u64,
    /// Units of columns of one item. A unit is what one register tile spans.
    pub units_per_item: u64,
    /// Items that become one when an expert has at least [`Self::merge_rows`] rows.
    pub merge: u64,
    /// See [`Self::merge`].
    pub merge_rows: u64,
    /// Rows that are packed together.
    pub chunk_rows: u64,
    /// Inputs that are packed together.
    pub k_block: u64,
    /// Rows of one item of a dense product.
    pub dense_rows: u64,
    /// Rows are read where they lie instead of being packed.
    pub direct: bool,
    /// Weights that come from memory are asked for page by page (vector kernel). Intel processors read 1.4 times as fast
    /// then; AMD's follow a stream over pages by themselves, and asking costs them a tenth.
    pub pages: bool,
    /// Bytes that weights are fetched ahead from the second level (vector kernel).
    pub prefetch: u64,
}

/// The type of the left operand with which products with weights of type `w` are fastest.
pub fn operand_type(target: Target, w: DType) -> DType {
    if target.bf16_only() && w == DType::Bf16 { DType::Bf16 } else { DType::F32 }
}

/// Picks a schedule.
pub fn schedule(spec: &Grouped, target: Target) -> Schedule {
    let narrow = spec.a == DType::Bf16 && spec.w == DType::Bf16;
    match target {
        Target::X86V4Amx if narrow => matrix(spec),
        Target::X86V4Bf16 if narrow => vector(spec, target, Engine::Pairs),
        Target::X86V3
        | Target::X86V4
        | Target::X86V4Bf16
        | Target::X86V4Amx
        | Target::Aarch64
        | Target::Sm80
        | Target::Sm89
        | Target::Sm90a => vector(spec, target, Engine::Vector),
    }
}

fn vector(spec: &Grouped, target: Target, engine: Engine) -> Schedule {
    let lanes = target.lanes();
    let depth = match spec.codes {
        // Lookups take 16-bit words, two for each output.
        Some(codes) if engine == Engine::Pairs && codes.bits < 8 => 32 / codes.bits,
        Some(_) if engine == Engine::Pairs => 2,
        Some(codes) => codes.per_byte(),
        None if spec.w == DType::Bf16 => 2,
        None => 1,
    };
    // Heights that fit the registers beside the weights of one step and one broadcast, widest first.
    let shapes: &[(usize, usize)] = match (target.vector_registers(), depth) {
        // Arm needs a register for the mask of the upper halves, which x86 reads from memory.
        (32, 2) if target == Target::Aarch64 => &[(7, 3), (5, 4), (10, 2), (16, 1)],
        // Decoding needs registers, and that of bytes takes long: more rows share it.
        (32, _) if spec.codes.is_some_and(|codes| codes.bits == 8) => &[(11, 2), (16, 1)],
        (32, _) if spec.codes.is_some() && engine == Engine::Vector => &[(7, 3), (5, 4), (11, 2), (16, 1)],
        (32, _) => &[(8, 3), (6, 4), (12, 2), (16, 1)],
        (_, 1) => &[(6, 2), (4, 3), (10, 1)],
        _ => &[(5, 2), (8, 1)],
    };
    // Columns that are computed for nothing cost as much as others.
    let padded = |nv: usize| spec.n.next_multiple_of((nv * lanes) as u64);
    let (mr, nv) = shapes.iter().copied().min_by_key(|&(_, nv)| padded(nv)).unwrap_or(shapes[0]);
    let operand = engine.operand();
    let mut s = Schedule {
        engine,
        mr,
        nv,
        lanes,
        depth,
        units_per_item: 1,
        merge: 1,
        merge_rows: 2 * mr as u64,
        chunk_rows: 0,
        k_block: spec.k.next_multiple_of(depth).min(4096),
        dense_rows: 0,
        direct: spec.a == operand
            && spec.rows != RowSource::Gathered
            && spec.k.is_multiple_of(depth)
            && (engine == Engine::Vector || depth == 2),
        pages: target != Target::X86V4Bf16,
        prefetch: 4096,
    };
    s.chunk_rows = (CHUNK_BYTES / s.packed_stride()).max(1).next_multiple_of(mr as u64).max(2 * mr as u64);
    // About 128 columns per item, 512 when there are many rows.
    let width = s.unit_width(spec) * spec.matrices as u64;
    s.units_per_item = (128 / width).clamp(1, s.units(spec));
    s.merge = (512 / (width * s.units_per_item)).max(1);
    s.dense_rows = s.chunk_rows;
    s
}

fn matrix(spec: &Grouped) -> Schedule {
    let mut s = Schedule {
        engine: Engine::Matrix,
        mr: 32,
        nv: 2 / spec.matrices,
        lanes: 16,
        depth: 2,
        units_per_item: 1,
        merge: 1,
        merge_rows: 33,
        chunk_rows: 0,
        k_block: spec.k.next_multiple_of(32).min(4096),
        dense_rows: 0,
        direct: false,
        pages: true,
        prefetch: 0,
    };
    s.chunk_rows = (MATRIX_CHUNK_BYTES / (s.k_block * 2)).max(1).next_multiple_of(32).min(512);
    let width = s.unit_width(spec) * spec.matrices as u64;
    s.units_per_item = (128 / width).clamp(1, s.units(spec));
    s.merge = (1024 / (width * s.units_per_item)).max(1);
    s.dense_rows = s.chunk_rows;
    s
}

impl Schedule {
    /// Order of the packed weights.
    pub fn layout(&self, spec: &Grouped) -> Layout {
        match spec.codes {
            Some(codes) => {
                // Neighbours that a step of a vector kernel reads lie together; they may take four bytes.
                let columns = self.k_step() / codes.per_byte();
                let depth = if self.engine == Engine::Matrix { 1 } else { columns };
                Layout::Panels { panel: self.panel(), depth, columns }
            }
            None => Layout::Panels { panel: self.panel(), depth: self.depth, columns: self.k_step() },
        }
    }

    /// Order of the scales of codes.
    pub fn scale_layout(&self) -> Layout {
        Layout::Panels { panel: self.panel(), depth: 1, columns: 1 }
    }

    /// Bytes of the scales (or zeros) of a panel, at so many bytes each.
    pub(super) fn factors_bytes(&self, spec: &Grouped, bytes: u64) -> u64 {
        spec.codes.map_or(0, |codes| codes.groups(spec.k) * self.panel() * bytes)
    }

    /// How the launch spreads.
    pub fn grid(&self, spec: &Grouped) -> CpuGrid {
        let parts = match spec.rows {
            RowSource::Dense => Expr::Tokens.ceil_div(self.dense_rows),
            RowSource::Gathered | RowSource::Sorted => Expr::Const(spec.experts),
        };
        CpuGrid { items: parts.times(self.blocks(spec)), grain: 1, scratch: self.scratch(spec) }
    }

    /// Bytes of scratch: packed rows, decoded weights, then sums.
    fn scratch(&self, spec: &Grouped) -> u64 {
        let slots = match self.k_blocks(spec) {
            1 => 1,
            _ => self.merge * self.units_per_item * self.tiles(),
        };
        self.pack_bytes(spec) + self.decoded_bytes(spec) + slots * self.slot_bytes(spec)
    }

    /// Most tiles of a chunk: full ones, or those that are lower because there are few.
    pub(super) fn tiles(&self) -> u64 {
        let few = (super::FEW_TILES + 1) * self.mr as u64 - 1;
        self.chunk_rows.div_ceil(self.mr as u64).max(few.div_ceil(self.mr as u64 - 1))
    }

    /// Bytes of decoded weights: two panels, for the matrix unit.
    pub(super) fn decoded_bytes(&self, spec: &Grouped) -> u64 {
        match self.engine {
            Engine::Matrix if spec.codes.is_some() => 2 * self.k_block * 16 * 2,
            Engine::Matrix | Engine::Vector | Engine::Pairs => 0,
        }
    }

    /// Output rows of a panel of packed weights.
    pub(super) fn panel(&self) -> u64 {
        match self.engine {
            Engine::Vector | Engine::Pairs => (self.nv * self.lanes) as u64,
            Engine::Matrix => 16,
        }
    }

    /// Outputs of a unit.
    pub(super) fn unit_width(&self, _spec: &Grouped) -> u64 {
        (self.nv * self.lanes) as u64
    }

    /// Units of columns of one matrix.
    pub(super) fn units(&self, spec: &Grouped) -> u64 {
        spec.n.div_ceil(self.unit_width(spec))
    }

    /// Panels of one matrix.
    pub(super) fn panels(&self, spec: &Grouped) -> u64 {
        spec.n.div_ceil(self.panel())
    }

    /// Panels of all matrices that a unit spans.
    pub(super) fn panels_per_unit(&self, spec: &Grouped) -> u64 {
        match self.engine {
            Engine::Vector | Engine::Pairs => spec.matrices as u64,
            Engine::Matrix => 2,
        }
    }

    /// Blocks of units, which are the items of one expert.
    pub(super) fn blocks(&self, spec: &Grouped) -> u64 {
        self.units(spec).div_ceil(self.units_per_item)
    }

    /// The inputs of pair `at` of a step: the halves of the step side by side, as lookups in words leave them.
    pub(super) const fn pair(&self, at: u64) -> [u64; 2] {
        [at, at + self.depth / 2]
    }

    /// Inputs that one step of the innermost loop takes.
    pub(super) const fn k_step(&self) -> u64 {
        match self.engine {
            Engine::Vector | Engine::Pairs => self.depth,
            Engine::Matrix => 32,
        }
    }

    /// Bytes of weights of one matrix that one step takes.
    pub(super) fn step_bytes(&self, spec: &Grouped) -> u64 {
        self.panel() * self.k_step() * spec.weight_bits() / 8
    }

    /// Inputs with padding.
    pub(super) const fn padded_k(&self, spec: &Grouped) -> u64 {
        spec.k.next_multiple_of(self.k_step())
    }

    /// Blocks of inputs.
    pub(super) const fn k_blocks(&self, spec: &Grouped) -> u64 {
        self.padded_k(spec).div_ceil(self.k_block)
    }

    /// Bytes of a panel.
    pub(super) fn panel_bytes(&self, spec: &Grouped) -> u64 {
        self.padded_k(spec) * self.panel() * spec.weight_bits() / 8
    }

    /// Bytes between packed rows. A line more than needed keeps rows off the same cache sets.
    pub(super) const fn packed_stride(&self) -> u64 {
        (self.k_block * self.engine.operand().bytes()).next_multiple_of(64) + 64
    }

    /// Bytes of packed rows.
    pub(super) const fn pack_bytes(&self, _spec: &Grouped) -> u64 {
        let bytes = match self.engine {
            Engine::Vector | Engine::Pairs if self.direct => 0,
            Engine::Vector | Engine::Pairs => self.chunk_rows * self.packed_stride(),
            Engine::Matrix => self.chunk_rows * self.k_block * 2,
        };
        bytes.next_multiple_of(64)
    }

    /// Bytes of the sums of a tile.
    pub(super) const fn slot_bytes(&self, spec: &Grouped) -> u64 {
        ((spec.matrices * self.mr * self.nv * self.lanes * 4) as u64).next_multiple_of(64)
    }
}
