//! Tile shapes, and what follows from them for packing and launching.

use crate::{
    Target,
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
    /// Warps along the rows; the others lie along the columns.
    pub warps: u32,
}

/// How a grouped product is spread over threads and time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// How products are computed.
    pub kind: Kind,
    /// Packed weight rows of a tile (all matrices).
    pub columns: u32,
    /// Warps of a block.
    pub warps: u32,
    /// Blocks per multiprocessor that registers allow for.
    pub blocks: u32,
    /// Tiles by rising height. A block takes the lowest one that holds its rows.
    pub tiles: Vec<Tile>,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::MmaSync => "mma.sync",
            Kind::Simt => "simt",
        };
        write!(f, "{kind} columns {} warps {}", self.columns, self.warps)?;
        for t in &self.tiles {
            write!(
                f,
                ", rows {} depth {} stages {} warps {}x{}",
                t.rows,
                t.depth,
                t.stages,
                t.warps,
                self.warps / t.warps
            )?;
        }
        Ok(())
    }
}

/// Picks the schedule of a product.
pub fn schedule(spec: &Grouped, target: Target) -> Schedule {
    let tile = |rows, depth, stages, warps| Tile { rows, depth, stages, warps };
    if spec.a != DType::Bf16 || spec.w != DType::Bf16 {
        let tiles = vec![tile(16, 32, 3, 1), tile(64, 32, 3, 2)];
        return Schedule { kind: Kind::Simt, columns: 64, warps: 4, blocks: 2, tiles };
    }
    // Two blocks share a multiprocessor: 164 KiB of shared memory on sm_80, 100 on sm_89, 228 on sm_90.
    let tiles = match target {
        Target::Sm89 => vec![tile(16, 32, 5, 1), tile(64, 32, 4, 2), tile(128, 32, 3, 2)],
        Target::Sm90a => vec![tile(16, 64, 6, 1), tile(64, 64, 4, 2), tile(128, 64, 3, 2)],
        Target::X86V3 | Target::X86V4 | Target::X86V4Amx | Target::Aarch64 | Target::Sm80 => {
            vec![tile(16, 64, 4, 1), tile(64, 32, 5, 2), tile(128, 32, 4, 2)]
        }
    };
    Schedule { kind: Kind::MmaSync, columns: 128, warps: 4, blocks: 2, tiles }
}

impl Schedule {
    /// Rows of the highest tile: row tiles are counted in this unit.
    pub fn rows(&self) -> u32 {
        self.tiles.iter().map(|t| t.rows).max().unwrap_or(1)
    }

    /// Order of the packed weights.
    pub fn layout(&self, spec: &Grouped) -> Layout {
        // Whole lines of 128 bytes, so that no tile ends inside a copy.
        Layout::Interleaved { block: BLOCK, columns: 128 / spec.w.bytes() }
    }

    /// Elements between packed rows.
    pub fn packed_columns(&self, spec: &Grouped) -> u64 {
        spec.k.next_multiple_of(128 / spec.w.bytes())
    }

    /// Packed rows of one expert.
    pub fn packed_rows(&self, spec: &Grouped) -> u64 {
        spec.n.next_multiple_of(BLOCK) * spec.matrices as u64
    }

    /// Column tiles of one expert.
    pub fn column_tiles(&self, spec: &Grouped) -> u64 {
        self.packed_rows(spec).div_ceil(u64::from(self.columns))
    }

    /// The launch: enough blocks for every distribution of rows over experts.
    pub fn grid(&self, spec: &Grouped) -> GpuGrid {
        let rows = u64::from(self.rows());
        let row_tiles = match spec.rows {
            RowSource::Dense => Expr::Tokens.ceil_div(rows),
            RowSource::Gathered | RowSource::Sorted => {
                let sorted = Expr::Tokens.times(spec.rows_per_token);
                let active = Expr::Min(Box::new(sorted.clone()), Box::new(Expr::Const(spec.experts)));
                // An expert's last tile may be nearly empty, the others are full.
                active.plus(sorted.ceil_div(rows))
            }
        };
        GpuGrid {
            blocks: [row_tiles.times(self.column_tiles(spec)), Expr::Const(1), Expr::Const(1)],
            threads: [self.threads(), 1, 1],
            cluster: [1, 1, 1],
            shared: self.shared(spec),
            dependent: false,
        }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.warps * 32
    }

    /// Bytes of dynamic shared memory.
    pub fn shared(&self, spec: &Grouped) -> u32 {
        let bytes = |t: &Tile| (t.stages * self.stage_bytes(spec, t)).max(self.staging_bytes(spec, t));
        self.tiles.iter().map(bytes).max().unwrap_or(0)
    }

    /// Bytes of one stage: rows of the operand, then packed rows of the weights.
    pub(super) fn stage_bytes(&self, spec: &Grouped, tile: &Tile) -> u32 {
        tile.rows * tile.depth * size(spec.a) + self.columns * tile.depth * size(spec.w)
    }

    /// Result columns of a tile.
    pub(super) fn out_columns(&self, spec: &Grouped) -> u32 {
        self.columns / u32::try_from(spec.matrices).expect("one or two matrices")
    }

    /// Bytes between rows of the result in shared memory. The gap keeps the rows that a warp writes in different banks.
    pub(super) fn staging_pitch(&self, spec: &Grouped) -> u32 {
        (self.out_columns(spec) + 8) * size(spec.out)
    }

    fn staging_bytes(&self, spec: &Grouped, tile: &Tile) -> u32 {
        tile.rows * self.staging_pitch(spec)
    }
}

/// Bytes of an element.
pub(super) fn size(dtype: DType) -> u32 {
    u32::try_from(dtype.bytes()).expect("elements are small")
}
