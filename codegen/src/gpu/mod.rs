//! Grouped products on NVIDIA GPUs.
//!
//! [`schedule`] picks tile shapes, [`Schedule::layout`] and [`Schedule::grid`] say how weights are packed and how
//! many blocks are launched, and [`emit`] makes the kernel. One kernel serves every number of tokens and every
//! routing: it holds one way for each row count of its tiles, and a block takes the lowest tile that holds its rows.
//!
//! A block finds its expert and rows (`tile`), streams both operands through a ring of stages in shared memory
//! (`pipeline`, `swizzle`), multiplies (`fragments` on tensor cores, `simt` in f32) and stores (`epilogue`).
//! The sums of a row use no other row, and always run over `k` in the same order within one kind of tile.

mod device;
mod epilogue;
mod fragments;
mod pipeline;
mod schedule;
mod simt;
mod swizzle;
mod tile;

pub use schedule::{Kind, Schedule, Tile, schedule};

use crate::{
    Target,
    grouped::{Grouped, RowScale, RowSource},
    mlir::{Builder, FuncKind, V},
};
use device::{GLOBAL, SHARED};
use fragments::Mma;
use moec_abi::DType;
use simt::Simt;
use tile::{Rows, int};

/// Arguments of the kernel.
struct Args<'c> {
    a: V<'c>,
    w: V<'c>,
    bias: Option<V<'c>>,
    offsets: Option<V<'c>>,
    map: Option<V<'c>>,
    scale: Option<V<'c>>,
    out: V<'c>,
    tokens: V<'c>,
}

/// A kernel under construction.
struct Kernel<'b, 'c> {
    b: &'b Builder<'c>,
    spec: &'b Grouped,
    schedule: &'b Schedule,
    args: Args<'c>,
    /// Start of the dynamic shared memory.
    shared: V<'c>,
    /// Thread in the block, warp in the block, lane in the warp (i32).
    thread: V<'c>,
    warp: V<'c>,
    lane: V<'c>,
}

/// Emits the kernel `spec.symbol`: one 64-bit parameter for each argument that [`Grouped`] lists.
pub fn emit(b: &Builder<'_>, spec: &Grouped, schedule: &Schedule, target: Target) {
    debug_assert!(target.is_gpu());
    let grouped = spec.rows != RowSource::Dense;
    let present =
        [true, true, spec.bias, grouped, spec.rows == RowSource::Gathered, spec.scale != RowScale::None, true];
    let pointers = present.iter().filter(|p| **p).count();
    let parameters: Vec<_> = std::iter::repeat_n((GLOBAL, "{}"), pointers).chain([("i64", "{}")]).collect();
    let ring = format!("{}_shared", spec.symbol);
    b.shared(&ring, 0, 1024);
    let kind = FuncKind::Kernel { threads: schedule.threads(), blocks: schedule.blocks, cluster: 1 };
    b.func(&spec.symbol, kind, &parameters, |values| {
        let mut values = values.iter().copied();
        let mut next = |present: bool| if present { values.next() } else { None };
        let args = Args {
            a: next(true).expect("the operand"),
            w: next(true).expect("the weights"),
            bias: next(spec.bias),
            offsets: next(grouped),
            map: next(spec.rows == RowSource::Gathered),
            scale: next(spec.scale != RowScale::None),
            out: next(true).expect("the result"),
            tokens: next(true).expect("the number of tokens"),
        };
        let thread = epilogue::thread(b);
        let kernel = Kernel {
            b,
            spec,
            schedule,
            args,
            shared: b.address_of(&ring, SHARED),
            thread,
            warp: b.shrui(thread, b.i32(5)),
            lane: b.andi(thread, b.i32(31)),
        };
        let (row_tile, column_tile) = kernel.block();
        kernel.with_rows(row_tile, |rows| kernel.ways(&schedule.tiles, rows, column_tile));
    });
}

impl<'c> Kernel<'_, 'c> {
    /// Takes the lowest of `tiles` that holds the rows.
    fn ways(&self, tiles: &[Tile], rows: Rows<'c>, column_tile: V<'c>) {
        let b = self.b;
        match tiles {
            [] => {}
            [tile] => self.way(tile, rows, column_tile),
            [tile, higher @ ..] => {
                let low = b.cmpi("sle", rows.count, b.i32(int(i64::from(tile.rows))));
                b.if_else(
                    low,
                    &[],
                    || {
                        self.way(tile, rows, column_tile);
                        Vec::new()
                    },
                    || {
                        self.ways(higher, rows, column_tile);
                        Vec::new()
                    },
                );
            }
        }
    }

    fn way(&self, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>) {
        let matrices = self.spec.matrices;
        match self.schedule.kind {
            Kind::MmaSync => {
                let products = Mma::new(self, tile);
                let sums = self.accumulate(tile, rows, column_tile, vec![self.b.f32(0.0); products.sums()], &products);
                let (origin, places) = (products.lane_origin(self), products.places(matrices));
                self.store(rows, column_tile, origin, &places, &sums);
            }
            Kind::Simt => {
                let products = Simt::new(self, tile);
                let sums = self.accumulate(tile, rows, column_tile, vec![self.b.f32(0.0); products.sums()], &products);
                let (origin, places) = (products.lane_origin(self), products.places(matrices));
                self.store(rows, column_tile, origin, &places, &sums);
            }
        }
    }

    /// MLIR name of an element type.
    fn element(&self, dtype: DType) -> &'static str {
        match dtype {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            other => unreachable!("grouped products of {other:?}"),
        }
    }
}
