//! CPU emitter of grouped products.
//!
//! One kernel serves every row count. Work is cut into items, each a block of output columns of
//! one expert (or of some rows of a dense product). An item goes through its rows in chunks that
//! stay in the second-level cache: a chunk is packed once, then every unit of columns runs over it
//! in register tiles, and the epilogue turns the sums into results.
//!
//! The order of the sums over `k` is the same for every tile height, so a row's result does not
//! depend on which other rows are present, nor on threads and grain.
//!
//! - [`schedule`] picks tile sizes; [`Schedule::layout`] and [`Schedule::grid`] say what packing and
//!   launch they imply.
//! - `tile` holds the vector kernels, `amx` the matrix-unit kernel, `stream` the order in which they ask memory for
//!   weights, `coded` and `decode` what they do with weights that are
//!   codes, `pack` the copying of rows, `finish` the epilogue.

mod amx;
mod coded;
mod decode;
mod finish;
mod pack;
mod schedule;
mod stream;
mod tile;

use crate::{
    grouped::{Grouped, RowScale, RowSource},
    mlir::{Builder, FuncKind, V},
    target::Target,
};
pub use schedule::{Engine, Schedule, operand_type, schedule};
use stream::Stream;
pub(crate) use tile::pair_products;

/// Most full tiles of a chunk that are not enough to share the fetching of weights.
const FEW_TILES: u64 = 2;

/// Type of addresses.
const PTR: &str = "!llvm.ptr";

/// What the parts of one kernel share.
struct Kernel<'b, 'c> {
    b: &'b Builder<'c>,
    spec: &'b Grouped,
    schedule: &'b Schedule,
    lanes: usize,
    a: V<'c>,
    w: V<'c>,
    /// Scales and zeros of codes.
    scales: Option<V<'c>>,
    zeros: Option<V<'c>>,
    bias: Option<V<'c>>,
    offsets: Option<V<'c>>,
    map: Option<V<'c>>,
    scale: Option<V<'c>>,
    /// Given numbers and their maps.
    given: Vec<(V<'c>, Option<V<'c>>)>,
    out: V<'c>,
    tokens: V<'c>,
    scratch: V<'c>,
}

/// The rows and columns of one item.
#[derive(Clone, Copy)]
struct Item<'c> {
    expert: V<'c>,
    /// Rows in sorted order.
    first: V<'c>,
    last: V<'c>,
    /// Units of columns.
    begin: V<'c>,
    end: V<'c>,
}

/// Some rows of an item that are packed together.
#[derive(Clone, Copy)]
struct Chunk<'c> {
    /// First row in sorted order.
    first: V<'c>,
    rows: V<'c>,
}

/// A register tile: rows of a chunk times a unit of columns.
#[derive(Clone, Copy)]
struct Tile<'c> {
    /// Rows of the tile, at most the schedule's `mr`.
    rows: V<'c>,
    /// Operand at the first row and the first column of the block of `k`.
    a: V<'c>,
    /// Packed weights of the unit at the block of `k`.
    w: V<'c>,
    /// Weights of the second of two tiles side by side (matrix unit).
    w1: V<'c>,
    /// Scales and zeros of the unit, from the first input on.
    scales: Option<V<'c>>,
    zeros: Option<V<'c>>,
    /// First input of the block of `k`.
    k0: V<'c>,
    /// The weights that the next unit will read in this part of `k`.
    ahead: V<'c>,
    /// The same if the unit is one of this item, else its own.
    next: V<'c>,
    /// Number of the tile among those of the chunk.
    index: V<'c>,
    /// The weights of the item, of which this tile reads those of its unit (vector kernel).
    stream: Stream<'c>,
    /// Bytes of the next unit's weights that a full tile fetches in each step (vector kernel).
    share: V<'c>,
    /// Steps over `k`.
    steps: V<'c>,
    /// Where the sums are kept.
    sums: V<'c>,
    /// Whether the sums start from zero.
    fresh: V<'c>,
}

/// Appends the kernel of `spec`: a function of the C type [`moec_abi::CpuKernel`] named `spec.symbol`.
pub fn emit(b: &Builder<'_>, spec: &Grouped, schedule: &Schedule, target: Target) {
    let pointer = ("!llvm.ptr", "{llvm.noalias}");
    let number = ("i64", "{}");
    b.func(&spec.symbol, FuncKind::Plain, &[pointer, number, number, pointer], |f| {
        let kernel = Kernel::new(b, spec, schedule, target, f[0], f[3]);
        match schedule.engine {
            Engine::Vector | Engine::Pairs => kernel.items(f[1], f[2]),
            Engine::Matrix => kernel.with_tiles(|| kernel.items(f[1], f[2])),
        }
    });
}

impl<'b, 'c> Kernel<'b, 'c> {
    fn new(
        b: &'b Builder<'c>,
        spec: &'b Grouped,
        schedule: &'b Schedule,
        target: Target,
        args: V<'c>,
        scratch: V<'c>,
    ) -> Self {
        let mut next = 0;
        let mut argument = |ty: &str| {
            let value = b.load(b.gepc(args, "i64", next), ty, 8);
            next += 1;
            value
        };
        let a = argument(PTR);
        let w = argument(PTR);
        let scales = spec.codes.map(|_| argument(PTR));
        let zeros = spec.codes.filter(|codes| codes.zero).map(|_| argument(PTR));
        let bias = spec.bias.then(|| argument(PTR));
        let offsets = match spec.rows {
            RowSource::Dense => None,
            RowSource::Gathered | RowSource::Sorted => Some(argument(PTR)),
        };
        let map = match spec.rows {
            RowSource::Gathered => Some(argument(PTR)),
            RowSource::Dense | RowSource::Sorted => None,
        };
        let scale = match spec.scale {
            RowScale::None => None,
            RowScale::Input | RowScale::Output => Some(argument(PTR)),
        };
        let given = spec.given.iter().map(|g| (argument(PTR), g.mapped.then(|| argument(PTR)))).collect();
        let out = argument(PTR);
        let tokens = argument("i64");
        let lanes = target.lanes();
        Self { b, spec, schedule, lanes, a, w, scales, zeros, bias, offsets, map, scale, given, out, tokens, scratch }
    }

    fn c(&self, value: u64) -> V<'c> {
        self.b.i64(value.cast_signed())
    }

    /// `pointer` plus a constant number of bytes.
    fn at(&self, pointer: V<'c>, bytes: u64) -> V<'c> {
        if bytes == 0 { pointer } else { self.b.gep(pointer, "i8", self.c(bytes)) }
    }

    fn items(&self, begin: V<'c>, end: V<'c>) {
        let (b, s) = (self.b, self.schedule);
        let blocks = s.blocks(self.spec);
        b.each(begin, end, |item| {
            let block = b.remui(item, self.c(blocks));
            let part = b.divui(item, self.c(blocks));
            let (expert, first, last) = match self.offsets {
                None => {
                    let first = b.mulc(part, s.dense_rows.cast_signed());
                    (self.c(0), first, b.minsi(b.addc(first, s.dense_rows.cast_signed()), self.tokens))
                }
                Some(offsets) => {
                    let at = b.gep(offsets, "i32", part);
                    let load = |i| b.cast("arith.extsi", b.load(b.gepc(at, "i32", i), "i32", 4), "i64");
                    (part, load(0), load(1))
                }
            };
            let rows = b.subi(last, first);
            // With many rows packing counts, so that one item does the columns of its neighbours as well.
            let many = b.cmpi("sge", rows, self.c(s.merge_rows));
            let merged = b.select(many, self.c(s.merge), self.c(1));
            let leads = b.cmpi("eq", b.remui(block, merged), self.c(0));
            let some = b.cmpi("sgt", rows, self.c(0));
            b.if_(b.andi(some, leads), || {
                let begin = b.mulc(block, s.units_per_item.cast_signed());
                let end = b.mulc(b.addi(block, merged), s.units_per_item.cast_signed());
                let end = b.minsi(end, self.c(s.units(self.spec)));
                self.chunks(Item { expert, first, last, begin, end });
            });
        });
    }

    fn chunks(&self, item: Item<'c>) {
        let (b, s) = (self.b, self.schedule);
        // Chunks of about equal size, so that no last chunk reads all weights for a few rows.
        let rows = b.subi(item.last, item.first);
        let count = b.ceil_div(rows, self.c(s.chunk_rows));
        let size = b.mulc(b.ceil_div(b.ceil_div(rows, count), self.c(s.mr as u64)), s.mr as i64);
        b.for_(item.first, item.last, size, &[], |first, _| {
            let rows = b.minsi(size, b.subi(item.last, first));
            let chunk = Chunk { first, rows };
            match s.k_blocks(self.spec) {
                1 => self.block(item, chunk, None),
                blocks => b.each(self.c(0), self.c(blocks), |index| self.block(item, chunk, Some(index))),
            }
            Vec::new()
        });
    }

    /// One packed block of `k`: the only one, or the one with this index.
    fn block(&self, item: Item<'c>, chunk: Chunk<'c>, index: Option<V<'c>>) {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        let k0 = index.map_or(self.c(0), |i| b.mulc(i, s.k_block.cast_signed()));
        let columns = match index {
            None => self.c(s.padded_k(spec)),
            Some(_) => b.minsi(self.c(s.k_block), b.subi(self.c(s.padded_k(spec)), k0)),
        };
        if !s.direct {
            self.pack(chunk, k0, columns);
        }
        let slots = self.at(self.scratch, s.pack_bytes(spec) + s.decoded_bytes(spec));
        let tiles = s.tiles();
        b.each(item.begin, item.end, |unit| {
            // Sums outlive a unit only when another block of `k` follows.
            let slots = match index {
                None => slots,
                Some(_) => {
                    let bytes = (tiles * s.slot_bytes(spec)).cast_signed();
                    b.gep(slots, "i8", b.mulc(b.subi(unit, item.begin), bytes))
                }
            };
            self.rows(item, chunk, unit, k0, columns, slots);
        });
    }

    /// All rows of a chunk times one unit, over the inputs from `k0`.
    fn rows(&self, item: Item<'c>, chunk: Chunk<'c>, unit: V<'c>, k0: V<'c>, columns: V<'c>, slots: V<'c>) {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        let steps = b.divui(columns, self.c(s.k_step()));
        let once = s.k_blocks(spec) == 1;
        let fresh = if once { b.bool(true) } else { b.cmpi("eq", k0, self.c(0)) };
        let complete = b.cmpi("eq", b.addi(k0, columns), self.c(s.padded_k(spec)));
        let numbers = self.panels(item.expert, unit);
        let stored = self.weights(numbers, k0);
        let [w, w1] = match spec.codes {
            Some(codes) if s.engine == Engine::Matrix => self.decode_unit(&codes, (stored, numbers), k0, columns),
            Some(_) | None => stored,
        };
        let scales = self.scales.map(|of| self.factors(of, item.expert, unit, self.scale_bytes()));
        let zeros = self.zeros.map(|of| self.factors(of, item.expert, unit, 4));
        let ahead = self.at(stored[0], s.panels_per_unit(spec) * s.panel_bytes(spec));
        let next = b.select(b.cmpi("slt", b.addc(unit, 1), item.end), ahead, stored[0]);
        // Where there are enough of them, full tiles fetch the next unit together, evenly: a line that comes from memory
        // holds a place among those that are on their way for long, and the loop needs places too. (LLVM leaves a
        // division of integers where it is used first, in the innermost loop; one of floats it moves out.) A few tiles
        // wait for memory: lower ones of about equal height, which ask for their own weights.
        let mr = self.c(s.mr as u64);
        let full = b.divui(chunk.rows, mr);
        let bytes = b.f32(s.step_bytes(spec) as f32);
        let share = b.cast("arith.fptosi", b.divf(bytes, b.cast("arith.sitofp", full, "f32")), "i64");
        let stream = self.stream(item, unit, stored[0], steps);
        let height = match s.engine {
            Engine::Matrix => mr,
            Engine::Vector | Engine::Pairs => {
                let tiles = b.ceil_div(chunk.rows, self.c(s.mr as u64 - 1));
                b.select(b.cmpi("ugt", full, self.c(FEW_TILES)), mr, b.ceil_div(chunk.rows, tiles))
            }
        };
        b.for_(self.c(0), chunk.rows, height, &[], |row, _| {
            let rows = b.minsi(b.subi(chunk.rows, row), height);
            let tile_index = b.divui(row, height);
            let sums =
                if once { slots } else { b.gep(slots, "i8", b.mulc(tile_index, s.slot_bytes(spec).cast_signed())) };
            let a = self.operand(chunk, row, k0);
            let tile = Tile {
                rows,
                a,
                w,
                w1,
                scales,
                zeros,
                k0,
                ahead,
                next,
                index: tile_index,
                stream,
                share,
                steps,
                sums,
                fresh,
            };
            match s.engine {
                Engine::Vector | Engine::Pairs => self.vector_tile(tile),
                Engine::Matrix => self.matrix_tile(tile, chunk),
            }
            let finish = || self.finish(item.expert, b.addi(chunk.first, row), rows, unit, sums);
            if once {
                finish();
            } else {
                b.if_(complete, finish);
            }
            Vec::new()
        });
    }

    /// The weights of an item, as the loops over those of `unit`, which are at `w`, read them.
    fn stream(&self, item: Item<'c>, unit: V<'c>, w: V<'c>, steps: V<'c>) -> Stream<'c> {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        if s.k_blocks(spec) > 1 {
            return Stream { base: w, before: self.c(0), steps };
        }
        let of_unit = b.mulc(steps, s.panels_per_unit(spec).cast_signed());
        let before = b.muli(b.subi(unit, item.begin), of_unit);
        let base = b.gep(w, "i8", b.mulc(before, -s.step_bytes(spec).cast_signed()));
        Stream { base, before, steps: b.muli(b.subi(item.end, item.begin), of_unit) }
    }

    /// Numbers of the first panel of a unit, and of the one beside it.
    fn panels(&self, expert: V<'c>, unit: V<'c>) -> [V<'c>; 2] {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        let panels = s.panels(spec) * spec.matrices as u64;
        let first = b.mulc(unit, s.panels_per_unit(spec).cast_signed());
        let base = b.mulc(expert, panels.cast_signed());
        // The last unit may lack its second tile: it repeats the first, and the result is dropped.
        [first, b.minsi(b.addc(first, 1), self.c(panels - 1))].map(|panel| b.addi(base, panel))
    }

    /// Addresses of packed panels at column `k0`.
    fn weights(&self, panels: [V<'c>; 2], k0: V<'c>) -> [V<'c>; 2] {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        // Places of one column of the packed weights: `panel` rows.
        let skip = b.mulc(k0, (s.panel() * spec.weight_bits() / 8).cast_signed());
        let bytes = s.panel_bytes(spec).cast_signed();
        panels.map(|panel| b.gep(b.gep(self.w, "i8", b.mulc(panel, bytes)), "i8", skip))
    }

    /// Address of the scales (or zeros), so many bytes each, of a unit.
    fn factors(&self, of: V<'c>, expert: V<'c>, unit: V<'c>, bytes: u64) -> V<'c> {
        let (b, s, spec) = (self.b, self.schedule, self.spec);
        let panels = b.mulc(expert, (s.panels(spec) * spec.matrices as u64).cast_signed());
        let panel = b.addi(panels, b.mulc(unit, s.panels_per_unit(spec).cast_signed()));
        b.gep(of, "i8", b.mulc(panel, s.factors_bytes(spec, bytes).cast_signed()))
    }

    /// Bytes of a scale.
    fn scale_bytes(&self) -> u64 {
        self.spec.codes.map_or(4, |codes| codes.scale.bytes())
    }
}
