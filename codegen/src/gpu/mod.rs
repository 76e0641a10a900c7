//! Grouped products on NVIDIA GPUs.
//!
//! [`schedule`] and [`specialised`] pick tile shapes, [`Schedule::layout`] and [`Schedule::grid`] say how weights are packed and how
//! many blocks are launched, [`Schedule::parameters`] what the kernel is given, and [`emit`] makes the kernel. One
//! kernel serves every number of tokens and every routing: it holds one way for each range of row counts, and a
//! block takes the lowest tile that holds its rows.
//!
//! A block finds its expert and rows (`tile`), streams both operands through a ring of stages in shared memory
//! (`pipeline`, `swizzle`), multiplies (`fragments` on tensor cores, `simt` in f32) and stores (`epilogue`). On
//! Hopper one warpgroup streams (`wgmma`) while the others multiply (`warpgroup`).
//! The sums of a row use no other row, and always run over `k` in the same order.

mod coded;
mod codes;
mod decode;
mod device;
mod epilogue;
mod fragments;
mod pipeline;
mod schedule;
mod simt;
mod swizzle;
mod tile;
pub mod tuned;
mod warpgroup;
mod wgmma;

pub use decode::decode;
pub use schedule::{Kind, Mode, Schedule, Tile, schedule, specialised};

use crate::{
    Target,
    grouped::{Grouped, RowScale, RowSource},
    mlir::{Builder, FuncKind, V},
};
use device::{GLOBAL, SHARED, at_const, barrier, register};
use epilogue::Part;
use fragments::Mma;
use moec_abi::DType;
use schedule::matrices;
use simt::Simt;
use tile::{Height, Rows, Table, int};
use tuned::Choice;

/// A kernel for some numbers of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// What follows the product's name in names.
    pub name: &'static str,
    /// The kernel's schedule.
    pub schedule: Schedule,
    /// First and last number of tokens.
    pub tokens: [u64; 2],
}

/// The kernels of a product that nobody measured: together they take every number of tokens.
pub fn variants(spec: &Grouped, target: Target) -> Vec<Variant> {
    variants_as(spec, target, &Choice::usual(spec, target))
}

/// The kernels of a product, with the numbers of a measurement.
pub fn variants_as(spec: &Grouped, target: Target, choice: &Choice) -> Vec<Variant> {
    let few = decode(spec, target).map(|(schedule, most)| ("_few", schedule, most.min(choice.few_tokens)));
    // The kernels of one architecture come first; the portable ones serve everything else.
    let mut own = specialised(spec, target, choice);
    let (last, _) = own.pop().unwrap_or_else(|| (schedule(spec, target, choice), u64::MAX));
    let own = own.into_iter().map(|(schedule, most)| ("_rare", schedule, most));
    let all = few.into_iter().chain(own).chain([("", last, u64::MAX)]);
    let mut from = 0;
    let all = all.filter_map(|(name, schedule, most)| {
        let tokens = [from, most];
        let some = tokens[0] <= most && most > 0;
        if some {
            from = most.saturating_add(1);
        }
        some.then_some(Variant { name, schedule, tokens })
    });
    all.collect()
}

/// Whether launches for a target may start before their predecessors end. Every thread of their kernels, or every
/// block that reads nothing of the predecessor, then calls [`wait_for_predecessor`].
pub(crate) fn starts_early(target: Target) -> bool {
    target == Target::Sm90a
}

/// What earlier launches wrote is visible from here on, and the next launch may start. It starts no sooner, so that a
/// kernel that waits for nothing yet can rely on all launches before its predecessor.
pub(crate) fn wait_for_predecessor(b: &Builder<'_>) {
    b.intrinsic0("llvm.nvvm.griddepcontrol.wait", &[]);
    b.intrinsic0("llvm.nvvm.griddepcontrol.launch.dependents", &[]);
}

/// One parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// Address of the operand `a`.
    Operand,
    /// Address of the packed weights.
    Weights,
    /// Tensor map over the packed weights: [`Schedule::weight_map`].
    WeightMap,
    /// Address of the scales of codes.
    Scales,
    /// Address of the zeros of codes.
    Zeros,
    /// Address of the bias.
    Bias,
    /// Address of the first row of each expert.
    Offsets,
    /// Address of the map from sorted rows to rows of the operand.
    Map,
    /// Address of the scale of each row.
    Scale,
    /// Address of the numbers that a sum starts from.
    Given(usize),
    /// Address of their map.
    GivenMap(usize),
    /// Address of the result.
    Out,
    /// Number of tokens.
    Tokens,
}

impl Parameter {
    /// MLIR type and attributes.
    fn ty(self) -> (&'static str, &'static str) {
        match self {
            Self::Operand
            | Self::Weights
            | Self::Scales
            | Self::Zeros
            | Self::Bias
            | Self::Offsets
            | Self::Map
            | Self::Scale
            | Self::Given(_)
            | Self::GivenMap(_)
            | Self::Out => (GLOBAL, "{}"),
            Self::WeightMap => {
                ("!llvm.ptr", "{llvm.byval = !llvm.array<128 x i8>, llvm.align = 64 : i64, nvvm.grid_constant}")
            }
            Self::Tokens => ("i64", "{}"),
        }
    }
}

/// Arguments of the kernel.
#[derive(Clone, Copy)]
struct Args<'c> {
    a: V<'c>,
    w: V<'c>,
    scales: Option<V<'c>>,
    zeros: Option<V<'c>>,
    bias: Option<V<'c>>,
    offsets: Option<V<'c>>,
    map: Option<V<'c>>,
    scale: Option<V<'c>>,
    /// Given numbers and their maps: one for each sum at most.
    given: [Option<(V<'c>, Option<V<'c>>)>; 2],
    out: V<'c>,
    tokens: V<'c>,
}

/// A kernel under construction, as seen by the threads that work together on a tile.
#[derive(Clone, Copy)]
struct Kernel<'b, 'c> {
    b: &'b Builder<'c>,
    spec: &'b Grouped,
    schedule: &'b Schedule,
    mode: &'b Mode,
    height: Height<'c>,
    args: Args<'c>,
    /// Start of the ring in dynamic shared memory; before it lie barriers, if there are any.
    shared: V<'c>,
    /// Where many tiles are looked up: which there are.
    table: Option<Table<'c>>,
    /// How many threads there are, and the number of this one, its warp and its lane (i32).
    threads: u32,
    thread: V<'c>,
    warp: V<'c>,
    lane: V<'c>,
}

/// Emits the kernel `spec.symbol` with the parameters of [`Schedule::parameters`].
pub fn emit(b: &Builder<'_>, spec: &Grouped, schedule: &Schedule, target: Target) {
    debug_assert!(target.is_gpu(), "{}", target.name());
    let parameters = schedule.parameters(spec);
    let types: Vec<_> = parameters.iter().map(|p| p.ty()).collect();
    let ring = format!("{}_shared", spec.symbol);
    b.shared(&ring, 0, 1024);
    // How many blocks a cluster has is said by the launch.
    let kind = FuncKind::Kernel { threads: schedule.threads(), blocks: schedule.blocks, cluster: 1 };
    b.func(&spec.symbol, kind, &types, |values| {
        let find = |wanted| parameters.iter().position(|p| *p == wanted).map(|i| values[i]);
        let args = Args {
            a: find(Parameter::Operand).expect("an operand"),
            w: find(Parameter::Weights).or(find(Parameter::WeightMap)).expect("weights"),
            scales: find(Parameter::Scales),
            zeros: find(Parameter::Zeros),
            bias: find(Parameter::Bias),
            offsets: find(Parameter::Offsets),
            map: find(Parameter::Map),
            scale: find(Parameter::Scale),
            given: [0, 1].map(|i| find(Parameter::Given(i)).map(|numbers| (numbers, find(Parameter::GivenMap(i))))),
            out: find(Parameter::Out).expect("a result"),
            tokens: find(Parameter::Tokens).expect("a number of tokens"),
        };
        let shared = at_const(b, b.address_of(&ring, SHARED), u64::from(schedule.header(spec)));
        let thread = register(b, "tid.x");
        let (warp, lane) = (b.shrui(thread, b.i32(5)), b.andi(thread, b.i32(31)));
        let mode = &schedule.modes[0];
        let kernel = Kernel {
            b,
            spec,
            schedule,
            mode,
            height: Height::new(b, mode),
            args,
            shared,
            table: None,
            threads: schedule.threads(),
            thread,
            warp,
            lane,
        };
        match schedule.kind {
            Kind::MmaSync | Kind::Simt => kernel.modes(&schedule.modes, &|kernel: &Kernel<'_, '_>| {
                let pairs = kernel.pairs();
                let id = register(b, "ctaid.x");
                b.if_(b.cmpi("ult", id, pairs), || {
                    kernel.with_pair(id, pairs, |rows, column_tile| {
                        kernel.ways(&kernel.mode.tiles, rows, &|tile| kernel.way(tile, rows, column_tile));
                    });
                });
            }),
            Kind::Decode => kernel.decode(),
            Kind::Wgmma => kernel.specialised(),
        }
    });
}

impl Schedule {
    /// What the kernel is given, in order.
    pub fn parameters(&self, spec: &Grouped) -> Vec<Parameter> {
        let weights = match self.kind {
            Kind::MmaSync | Kind::Simt | Kind::Decode => Parameter::Weights,
            Kind::Wgmma => Parameter::WeightMap,
        };
        let given = spec
            .given
            .iter()
            .enumerate()
            .flat_map(|(i, given)| [(Parameter::Given(i), true), (Parameter::GivenMap(i), given.mapped)]);
        [
            (Parameter::Operand, true),
            (weights, true),
            (Parameter::Scales, spec.codes.is_some()),
            (Parameter::Zeros, spec.codes.is_some_and(|codes| codes.zero)),
            (Parameter::Bias, spec.bias),
            (Parameter::Offsets, spec.rows != RowSource::Dense),
            (Parameter::Map, spec.rows == RowSource::Gathered),
            (Parameter::Scale, spec.scale != RowScale::None),
        ]
        .into_iter()
        .chain(given)
        .chain([(Parameter::Out, true), (Parameter::Tokens, true)])
        .filter_map(|(parameter, present)| present.then_some(parameter))
        .collect()
    }
}

impl<'c> Kernel<'_, 'c> {
    /// Takes the first of `modes` whose limit holds the rows of the launch.
    fn modes(&self, modes: &[Mode], body: &dyn Fn(&Kernel<'_, 'c>)) {
        let b = self.b;
        let Some((mode, rest)) = modes.split_first() else { return };
        let run = || body(&Kernel { mode, height: Height::new(b, mode), ..*self });
        match mode.limit {
            Some(limit) if !rest.is_empty() => {
                let limit = b.i32(int(i64::try_from(limit).expect("limits are small")));
                self.either(b.cmpi("sle", self.launch_rows(), limit), run, || self.modes(rest, body));
            }
            Some(_) | None => run(),
        }
    }

    /// Takes the lowest of `tiles` that holds the rows.
    fn ways(&self, tiles: &[Tile], rows: Rows<'c>, body: &dyn Fn(&Tile)) {
        let b = self.b;
        match tiles {
            [] => {}
            [tile] => body(tile),
            [tile, higher @ ..] => {
                let low = b.cmpi("sle", rows.count, b.i32(int(i64::from(tile.rows))));
                self.either(low, || body(tile), || self.ways(higher, rows, body));
            }
        }
    }

    fn either(&self, condition: V<'c>, then: impl FnOnce(), otherwise: impl FnOnce()) {
        let (then, otherwise) = (
            || {
                then();
                Vec::new()
            },
            || {
                otherwise();
                Vec::new()
            },
        );
        self.b.if_else(condition, &[], then, otherwise);
    }

    fn way(&self, tile: &Tile, rows: Rows<'c>, column_tile: V<'c>) {
        let zero = self.b.f32(0.0);
        let (origin, places, sums) = match self.schedule.kind {
            Kind::MmaSync | Kind::Decode | Kind::Wgmma => {
                let products = Mma::new(self, tile, rows, column_tile);
                let sums = self.accumulate(tile, rows, column_tile, vec![zero; products.sums()], &products);
                (products.lane_origin(self), products.places(self.spec.matrices), sums)
            }
            Kind::Simt => {
                let products = Simt::new(self, tile, rows, column_tile);
                let sums = self.accumulate(tile, rows, column_tile, vec![zero; products.sums()], &products);
                (products.lane_origin(self), products.places(self.spec.matrices), sums)
            }
        };
        let columns = self.mode.out_columns(self.spec);
        let first_column = self.b.mulc(column_tile, i64::from(columns));
        // Lanes of fragments lie as the swizzle wants them; those of plain multiply-adds want gaps.
        let swizzled = self.schedule.kind == Kind::MmaSync;
        let part = Part { base: self.shared, first_row: 0, rows: tile.rows, first_column, columns, swizzled };
        self.store(rows, &part, origin, |values| self.write(&part, &places, &sums, values));
    }

    /// As [`wait_for_predecessor`], if the launch may start early at all.
    fn wait_for_predecessor(&self) {
        if self.schedule.dependent {
            wait_for_predecessor(self.b);
        }
    }

    /// The threads that work on the tile meet.
    fn meet(&self) {
        match self.schedule.kind {
            Kind::MmaSync | Kind::Simt | Kind::Decode => barrier(self.b),
            Kind::Wgmma => self.meet_group(),
        }
    }

    /// Column of the result that belongs to a packed column at the start of a block of rows.
    fn result_column(&self, packed: V<'c>) -> V<'c> {
        self.b.divui(packed, self.b.i32(int(i64::from(matrices(self.spec)))))
    }

    /// MLIR name of an element type.
    fn element(&self, dtype: DType) -> &'static str {
        match dtype {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F64
            | DType::F16
            | DType::F8e4m3
            | DType::F8e5m2
            | DType::U8
            | DType::I8
            | DType::I32
            | DType::I64 => {
                unreachable!("grouped products of {dtype:?}")
            }
        }
    }
}
