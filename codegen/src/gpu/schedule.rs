//! Tile shapes, and what follows from them for packing and launching.

use super::{coded::Coded, epilogue::GAP, tuned::Choice};
use crate::{
    Target,
    codes::Codes,
    grouped::{Grouped, RowSource},
};
use moec_abi::{DType, Expr, GpuGrid, Layout};
use std::fmt;

/// Rows of one matrix before the rows of the next one follow, in packed weights. Gate and up of one
/// output then meet in the same lane of every tensor-core fragment.
pub(super) const BLOCK: u64 = 8;

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `mma.sync` on bf16 with f32 sums.
    MmaSync,
    /// Fused multiply-adds on f32.
    Simt,
    /// `mma.sync` on bf16 with f32 sums, for few rows: operands pass through registers alone.
    Decode,
    /// `wgmma` on bf16 with f32 sums: one warpgroup copies, the others multiply.
    Wgmma,
}

/// One way through a kernel: a tile for row counts up to [`Tile::rows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows of the tile.
    pub rows: u32,
    /// Depth of one stage, in elements.
    pub depth: u32,
    /// Stages of the ring in shared memory.
    pub stages: u32,
    /// Warps (warpgroups for [`Kind::Wgmma`]) along the rows; the others lie along the columns.
    pub down: u32,
}

/// The tiles for a range of row counts of a whole launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Most rows of a launch for which this mode is taken; the last mode has no limit.
    pub limit: Option<u64>,
    /// Packed weight rows of a tile (all matrices).
    pub columns: u32,
    /// Blocks of a cluster that share the weights and the rows of a tile, for [`Kind::Wgmma`]; 1 for the others.
    pub share: u32,
    /// Tiles by rising height. A block takes the lowest one that holds its rows.
    pub tiles: Vec<Tile>,
}

/// How a grouped product is spread over threads and time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// How products are computed.
    pub kind: Kind,
    /// Warps that multiply.
    pub warps: u32,
    /// Blocks per multiprocessor that registers allow for.
    pub blocks: u32,
    /// Modes by rising limit: narrow columns while rows are too few to occupy the device with wide ones.
    pub modes: Vec<Mode>,
    /// Whether the launch may start before its predecessor ends.
    pub dependent: bool,
    /// Blocks that walk through all tiles; `None`: each tile has its block.
    pub walk: Option<u64>,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, groups) = match self.kind {
            Kind::MmaSync => ("mma.sync", self.warps),
            Kind::Simt => ("simt", self.warps),
            Kind::Decode => ("decode", self.warps),
            Kind::Wgmma => ("wgmma", self.warps / 4),
        };
        write!(f, "{kind} warps {}", self.warps)?;
        for mode in &self.modes {
            if let Some(limit) = mode.limit {
                write!(f, "; to {limit} rows")?;
            } else {
                f.write_str("; any")?;
            }
            for t in &mode.tiles {
                let Tile { rows, depth, stages, down } = t;
                write!(f, ", {rows}x{}x{depth} stages {stages} split {down}x{}", mode.columns, groups / down)?;
            }
            if mode.share > 1 {
                write!(f, ", {} blocks", mode.share)?;
            }
        }
        Ok(())
    }
}

impl Mode {
    /// Rows of the highest tile of all blocks that share it: row tiles are counted in this unit.
    pub fn rows(&self) -> u32 {
        self.share * self.block_rows()
    }

    /// Rows of the highest tile of a block.
    fn block_rows(&self) -> u32 {
        self.tiles.iter().map(|t| t.rows).max().unwrap_or(1)
    }

    /// Column tiles of one expert.
    pub fn column_tiles(&self, spec: &Grouped) -> u64 {
        packed_rows(spec).div_ceil(u64::from(self.columns))
    }

    /// Bytes of one stage: rows of the operand, then packed rows of the weights.
    pub(super) fn stage_bytes(&self, spec: &Grouped, tile: &Tile) -> u32 {
        tile.rows * tile.depth * size(spec.a) + self.columns * staged_bytes(spec, tile)
    }

    /// Result columns of a tile.
    pub(super) fn out_columns(&self, spec: &Grouped) -> u32 {
        self.columns / matrices(spec)
    }

    /// Bytes between rows of the result in shared memory. The gap keeps the rows that a warp writes in different banks.
    pub(super) fn staging_pitch(&self, spec: &Grouped) -> u32 {
        (self.out_columns(spec) + GAP) * size(spec.out)
    }

    /// Bytes between stages of a ring that all tiles of the mode share, for [`Kind::Wgmma`].
    pub(super) fn stage_stride(&self, spec: &Grouped) -> u32 {
        let bytes =
            |t: &Tile| super::wgmma::weight_bytes(spec, self.columns, t.depth) + t.rows * t.depth * size(spec.a);
        self.tiles.iter().map(bytes).max().unwrap_or(0)
    }

    /// Blocks for `rows` rows of a launch: enough for every distribution over experts.
    fn blocks(&self, spec: &Grouped, rows: &Expr) -> Expr {
        let full = rows.clone().ceil_div(u64::from(self.rows()));
        let row_tiles = match spec.rows {
            RowSource::Dense => full,
            // An expert's last tile may be nearly empty, the others are full.
            RowSource::Gathered | RowSource::Sorted => {
                let ends = Expr::Min(Box::new(rows.clone()), Box::new(Expr::Const(spec.experts)));
                Expr::Min(Box::new(rows.clone()), Box::new(ends.plus(full)))
            }
        };
        row_tiles.times(self.column_tiles(spec))
    }
}

/// Picks the schedule of a product from kernels that every GPU target runs, for more tokens than the kernel for few
/// tokens takes.
pub fn schedule(spec: &Grouped, target: Target, choice: &Choice) -> Schedule {
    let mut schedule = portable(spec, target, choice.few_tokens);
    schedule.limit(choice.tallest);
    schedule
}

fn portable(spec: &Grouped, target: Target, served: u64) -> Schedule {
    if spec.a != DType::Bf16 || spec.w != DType::Bf16 || spec.codes.is_some_and(|codes| !shares_fragments(spec, &codes))
    {
        let (depth, stages) = spec.codes.map_or((32, 3), |codes| codes_stage(&codes));
        // Of a narrow matrix, such as a low-rank factor, a wide tile would compute nothing.
        let columns = if spec.matrices == 1 && packed_rows(spec) <= 32 { 32 } else { 64 };
        let modes = vec![Mode {
            limit: None,
            columns,
            share: 1,
            tiles: vec![tile(16, depth, stages, 1), tile(64, depth, stages, 2)],
        }];
        return Schedule { kind: Kind::Simt, warps: 4, blocks: 2, modes, dependent: false, walk: None };
    }
    if let Some(codes) = spec.codes {
        // Columns are narrow: each lane keeps the scales of its columns, and few columns make more blocks.
        let (depth, stages) = codes_stage(&codes);
        let tiles = vec![tile(16, depth, stages + 1, 1), tile(64, depth, stages, 2)];
        let modes = vec![Mode { limit: None, columns: 64, share: 1, tiles }];
        return Schedule { kind: Kind::MmaSync, warps: 4, blocks: 2, modes, dependent: false, walk: None };
    }
    // Two blocks share a multiprocessor: 164 KiB of shared memory on sm_80, 100 on sm_89, 228 on sm_90.
    let (few, many) = if target == Target::Sm89 {
        (
            vec![tile(16, 64, 4, 1), tile(64, 64, 3, 2)],
            vec![tile(16, 32, 5, 1), tile(64, 32, 4, 2), tile(128, 32, 3, 2)],
        )
    } else {
        (
            vec![tile(16, 64, 7, 1), tile(64, 64, 4, 2)],
            vec![tile(16, 64, 4, 1), tile(64, 32, 5, 2), tile(128, 32, 4, 2)],
        )
    };
    let wide = Mode { limit: None, columns: 128, share: 1, tiles: many };
    let narrow = Mode { limit: few_rows(spec, &wide, 2), columns: 64, share: 1, tiles: few };
    let modes = if has_few_columns(spec) {
        vec![Mode { limit: None, columns: 64, share: 1, tiles: narrow.tiles[1..].to_vec() }]
    } else if narrow.limit <= Some(served * spec.rows_per_token) {
        vec![wide]
    } else {
        vec![narrow, wide]
    };
    Schedule { kind: Kind::MmaSync, warps: 4, blocks: 2, modes, dependent: false, walk: None }
}

/// The schedules with the instructions of this target alone, if it has any for the product, each with the most tokens
/// that it is for. Their kernels take a tensor map in place of the weights: see [`Schedule::parameters`].
pub fn specialised(spec: &Grouped, target: Target, choice: &Choice) -> Vec<(Schedule, u64)> {
    if !has_wgmma(spec, target) {
        return Vec::new();
    }
    // Most of shared memory is the ring.
    let kernel = |columns, share, rows: &[u32]| {
        let kept = || rows.iter().filter(|r| **r * share <= choice.tallest || **r == rows[0]);
        let tiles = |stages| kept().map(|rows| tile(*rows, 64, stages, 1)).collect();
        let mode = Mode { limit: None, columns, share, tiles: tiles(1) };
        let stages = (RING_BYTES / mode.stage_stride(spec)).min(super::wgmma::STAGES);
        let modes = vec![Mode { tiles: tiles(stages), ..mode }];
        let walk = Some(HOPPER_MULTIPROCESSORS);
        Schedule { kind: Kind::Wgmma, warps: 8, blocks: 1, modes, dependent: true, walk }
    };
    if has_few_columns(spec) {
        return vec![(kernel(128, 1, &[64]), u64::MAX)];
    }
    // The widest columns of which less than a ninth lies past the last row, and with which all experts occupy half of the
    // device.
    let wide = |columns: &[u32]| {
        let fits = |columns: &&u32| {
            let tiles = packed_rows(spec).div_ceil(u64::from(**columns));
            2 * spec.experts * tiles >= HOPPER_MULTIPROCESSORS
                && 8 * tiles * u64::from(**columns) < 9 * packed_rows(spec)
        };
        columns.iter().find(fits).copied().unwrap_or(128)
    };
    // Few rows of an expert are read again by each of its column tiles, so that these are wide; many rows read the
    // weights again, and two blocks share those. Codes are decoded by each block, which takes as long as products with 64
    // rows: so few tiles are low, and nothing is shared.
    let (rare, many) = if spec.codes.is_some() {
        (kernel(wide(&[384, 256]), 1, &[64]), kernel(wide(&[256]), 1, &[64, 128]))
    } else {
        let columns = packed_rows(spec).next_multiple_of(128).min(256) as u32;
        (kernel(wide(&[384, 256]), 1, &[16, 64]), kernel(columns, 2, &[64, 128]))
    };
    // A table may hold any number; more rows than the highest tile has are not rare.
    let most = spec.experts * choice.rare_rows.min(256) / spec.rows_per_token.max(1);
    vec![(rare, most), (many, u64::MAX)]
}

/// Whether a product's kernel multiplies with `wgmma`.
pub(super) fn has_wgmma(spec: &Grouped, target: Target) -> bool {
    let coded = spec.codes.is_none() || Coded::new(spec).is_some();
    target == Target::Sm90a && spec.a == DType::Bf16 && spec.w == DType::Bf16 && coded
}

/// Whether only low and narrow tiles make enough blocks of any number of rows: so it is with the logits of routers.
fn has_few_columns(spec: &Grouped) -> bool {
    spec.rows == RowSource::Dense && packed_rows(spec) <= 512
}

fn tile(rows: u32, depth: u32, stages: u32, down: u32) -> Tile {
    Tile { rows, depth, stages, down }
}

/// Most rows for which blocks of mode `wide` cannot fill the device, with `each` blocks on a multiprocessor.
fn few_rows(spec: &Grouped, wide: &Mode, each: u64) -> Option<u64> {
    let blocks = MULTIPROCESSORS * each;
    let columns = wide.column_tiles(spec);
    let row_tiles = blocks.div_ceil(columns);
    // Few rows fall to different experts; once all experts have some, only whole tiles add blocks.
    let beyond = row_tiles.saturating_sub(spec.experts) * u64::from(wide.rows());
    Some(row_tiles.min(spec.experts) + beyond)
}

/// Bytes of the ring in shared memory, for [`Kind::Wgmma`]: barriers, offsets and results have the others.
const RING_BYTES: u32 = 192 << 10;

/// Multiprocessors of H100 and H200.
const HOPPER_MULTIPROCESSORS: u64 = 132;

/// Multiprocessors of the larger devices: 108 (A100), 142 (L40S), 132 (H100, H200).
pub(super) const MULTIPROCESSORS: u64 = 128;

impl Schedule {
    /// Leaves out tiles of more than so many rows, but for the lowest.
    fn limit(&mut self, tallest: u32) {
        for mode in &mut self.modes {
            let lowest = mode.tiles.iter().map(|t| t.rows).min();
            mode.tiles.retain(|t| t.rows <= tallest || Some(t.rows) == lowest);
        }
    }

    /// Order of the packed weights.
    pub fn layout(&self, spec: &Grouped) -> Layout {
        match (self.kind, Coded::new(spec)) {
            (Kind::Decode | Kind::Wgmma, Some(coded)) => coded.layout(row_unit(spec)),
            (Kind::Decode | Kind::Wgmma, None) | (Kind::MmaSync | Kind::Simt, _) => {
                Layout::Interleaved { block: BLOCK, columns: row_unit(spec) }
            }
        }
    }

    /// Order of the scales of codes.
    pub fn scale_layout(&self) -> Layout {
        // The lanes that read eight rows of weights find their scales side by side.
        Layout::Panels { panel: BLOCK, depth: 1, columns: 1 }
    }

    /// The launch: enough blocks for every distribution of rows over experts.
    pub fn grid(&self, spec: &Grouped) -> GpuGrid {
        let rows = match spec.rows {
            RowSource::Dense => Expr::Tokens,
            RowSource::Gathered | RowSource::Sorted => Expr::Tokens.times(spec.rows_per_token),
        };
        let blocks = self.modes.iter().map(|mode| {
            let reached = match mode.limit {
                Some(limit) => Expr::Min(Box::new(rows.clone()), Box::new(Expr::Const(limit))),
                None => rows.clone(),
            };
            mode.blocks(spec, &reached)
        });
        let blocks = blocks.reduce(|x, y| Expr::Max(Box::new(x), Box::new(y))).unwrap_or(Expr::Const(1));
        let share = self.modes.iter().map(|mode| mode.share).max().unwrap_or(1);
        let blocks = match self.walk {
            Some(most) => {
                let clusters = (most / u64::from(share)).max(1);
                Expr::Min(Box::new(blocks), Box::new(Expr::Const(clusters))).times(u64::from(share))
            }
            None => blocks,
        };
        GpuGrid {
            blocks: [blocks, Expr::Const(1), Expr::Const(1)],
            threads: [self.threads(), 1, 1],
            cluster: [share, 1, 1],
            shared: self.shared(spec),
            dependent: self.dependent,
            tokens: moec_abi::ANY_TOKENS,
        }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        match self.kind {
            Kind::MmaSync | Kind::Simt | Kind::Decode => self.warps * 32,
            Kind::Wgmma => self.warps * 32 + COPIERS,
        }
    }

    /// Bytes of dynamic shared memory.
    pub fn shared(&self, spec: &Grouped) -> u32 {
        if self.kind == Kind::Decode {
            return super::decode::SHARED_BYTES;
        }
        let modes = self.modes.iter().flat_map(|m| m.tiles.iter().map(move |t| (m, t)));
        let passing = |(mode, tile): (&Mode, &Tile)| {
            (tile.stages * mode.stage_bytes(spec, tile)).max(tile.rows * mode.staging_pitch(spec))
        };
        self.header(spec)
            + match self.kind {
                Kind::Wgmma => self.staging(spec) + 2 * super::wgmma::part_bytes(spec, self.most_rows()),
                Kind::MmaSync | Kind::Simt | Kind::Decode => modes.map(passing).max().unwrap_or(0),
            }
    }

    /// Distance from the ring to where results pass through shared memory, for [`Kind::Wgmma`].
    pub(super) fn staging(&self, spec: &Grouped) -> u32 {
        let rings = self.modes.iter().flat_map(|m| m.tiles.iter().map(|t| t.stages * m.stage_stride(spec)));
        rings.max().unwrap_or(0)
    }

    /// Rows of the highest tile of a block, of all modes.
    pub(super) fn most_rows(&self) -> u32 {
        self.modes.iter().map(Mode::block_rows).max().unwrap_or(1)
    }

    /// Bytes of shared memory before the ring: barriers.
    pub(super) fn header(&self, spec: &Grouped) -> u32 {
        match self.kind {
            Kind::MmaSync | Kind::Simt | Kind::Decode => 0,
            Kind::Wgmma => super::wgmma::header(spec),
        }
    }
}

/// Threads of the warpgroup that copies, for [`Kind::Wgmma`].
pub(super) const COPIERS: u32 = 128;

/// Elements between packed rows: weights, or bytes of codes.
pub(super) fn packed_columns(spec: &Grouped) -> u64 {
    let elements = spec.codes.map_or(spec.k, |codes| spec.k.div_ceil(codes.per_byte()));
    elements.next_multiple_of(row_unit(spec))
}

/// Elements of which rows have a multiple: whole lines of 128 bytes, or what a stage holds of codes, so that no tile
/// ends inside a copy.
fn row_unit(spec: &Grouped) -> u64 {
    spec.codes.map_or(128 / spec.packed().bytes(), |codes| u64::from(codes_stage(&codes).0) * codes.bits / 8)
}

/// Whether the codes that a lane decodes for one product of 16 inputs share a scale.
fn shares_fragments(spec: &Grouped, codes: &Codes) -> bool {
    codes.group.is_multiple_of(16) || codes.groups(spec.k) == 1
}

/// Inputs of a stage of codes, and stages: a row has at least the 32 bytes that memory moves at once.
fn codes_stage(codes: &Codes) -> (u32, u32) {
    if codes.bits == 2 { (128, 2) } else { (64, 3) }
}

/// Bytes of a packed row in one stage.
pub(super) fn staged_bytes(spec: &Grouped, tile: &Tile) -> u32 {
    tile.depth * u32::try_from(spec.weight_bits()).expect("weights are small") / 8
}

/// Packed rows of one expert.
pub(super) fn packed_rows(spec: &Grouped) -> u64 {
    spec.n.next_multiple_of(BLOCK) * u64::from(matrices(spec))
}

/// Matrices of the slot.
pub(super) fn matrices(spec: &Grouped) -> u32 {
    u32::try_from(spec.matrices).expect("one or two matrices")
}

/// Bytes of an element.
pub(super) fn size(dtype: DType) -> u32 {
    u32::try_from(dtype.bytes()).expect("elements are small")
}
