//! How a row kernel runs: on a CPU thread, block by block of rows, or one warp per row.
//!
//! Everything above this module is written once in terms of a few primitives: do something for
//! each element of a row, reduce over a row, repeat uniformly. A CPU thread runs them as vector
//! loops over a block of rows; a warp spreads the elements of one row over its lanes.

use crate::{
    Target, math,
    mlir::{Builder, V},
};
use std::cell::Cell;

/// Rows that a CPU thread works on together, so that weights are read once for all of them.
pub(crate) const CPU_ROWS: u64 = 8;

/// Warps in a thread block of a row kernel; each has a row of its own.
pub(crate) const GPU_WARPS: u32 = 4;

/// Place in a row: an element, or `width` neighbours from `at` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ix<'c> {
    /// First element, i64.
    pub(crate) at: V<'c>,
    /// Elements; 1 is a scalar.
    pub(crate) width: usize,
}

/// What a reduction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fold {
    /// Sum.
    Sum,
    /// Largest; NaN if any is NaN.
    Max,
    /// Smallest; NaN if any is NaN.
    Min,
}

impl Fold {
    fn identity(self) -> f32 {
        match self {
            Self::Sum => 0.0,
            Self::Max => f32::NEG_INFINITY,
            Self::Min => f32::INFINITY,
        }
    }
    fn apply<'c>(self, b: &Builder<'c>, x: V<'c>, y: V<'c>) -> V<'c> {
        match self {
            Self::Sum => b.addf(x, y),
            Self::Max => b.maximumf(x, y),
            Self::Min => b.minimumf(x, y),
        }
    }
}

/// Row-private memory: one array for each row in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scratch {
    offset: u64,
    stride: u64,
}

/// State of the kernel under construction.
#[derive(Debug)]
pub(crate) struct Exec<'a, 'c> {
    /// Where ops go.
    pub(crate) b: &'a Builder<'c>,
    /// Machine.
    pub(crate) target: Target,
    /// Row in flight: its number in the block (CPU) and in the batch, both i64.
    row: Cell<(V<'c>, V<'c>)>,
    /// Rows of this block, i64 (CPU).
    rows: V<'c>,
    /// First row of this block, i64.
    first: V<'c>,
    scratch: V<'c>,
    used: Cell<u64>,
    lane: Option<V<'c>>,
    warp: Option<(V<'c>, u32)>,
    /// Whether lanes depend on each other: then one warp has all of a row.
    together: Cell<bool>,
    /// Which part of the columns this warp has, and how many there are.
    part: Option<(V<'c>, u32)>,
}

impl<'a, 'c> Exec<'a, 'c> {
    /// A CPU thread with rows `first..first + rows` and its scratch.
    pub(crate) fn cpu(b: &'a Builder<'c>, target: Target, first: V<'c>, rows: V<'c>, scratch: V<'c>) -> Self {
        let zero = b.i64(0);
        Self {
            b,
            target,
            row: Cell::new((zero, first)),
            rows,
            first,
            scratch,
            used: Cell::new(0),
            lane: None,
            warp: None,
            together: Cell::new(false),
            part: None,
        }
    }

    /// A warp with the row `row` and its part of shared memory.
    ///
    /// `warp` is the number of the warp in its block, and how many there are: arrays of the warps of a block
    /// lie side by side, so that their place does not depend on the scratch that a warp needs in all. With `part`,
    /// the warp has only that part of the columns, of so many.
    pub(crate) fn warp(
        b: &'a Builder<'c>,
        target: Target,
        row: V<'c>,
        lane: V<'c>,
        scratch: V<'c>,
        warp: (V<'c>, u32),
        part: Option<(V<'c>, u32)>,
    ) -> Self {
        let zero = b.i64(0);
        Self {
            b,
            target,
            row: Cell::new((zero, row)),
            rows: b.i64(1),
            first: row,
            scratch,
            used: Cell::new(0),
            lane: Some(lane),
            warp: Some(warp),
            together: Cell::new(false),
            part,
        }
    }

    /// Whether this is a GPU warp.
    pub(crate) const fn is_warp(&self) -> bool {
        self.lane.is_some()
    }

    /// The lane of the warp, i64, on a GPU.
    pub(crate) fn lane(&self) -> Option<V<'c>> {
        self.together.set(true);
        self.lane
    }

    /// Whether lanes depended on each other so far.
    pub(crate) const fn together(&self) -> bool {
        self.together.get()
    }

    /// Number of the row in the batch, i64.
    pub(crate) fn token(&self) -> V<'c> {
        self.row.get().1
    }

    /// Emits `body` as if the row in flight were row `token` of the batch.
    pub(crate) fn with_token<R>(&self, token: V<'c>, body: impl FnOnce() -> R) -> R {
        let own = self.row.get();
        self.row.set((own.0, token));
        let result = body();
        self.row.set(own);
        result
    }

    /// First row of the block and number of rows in it, i64.
    pub(crate) const fn block(&self) -> (V<'c>, V<'c>) {
        (self.first, self.rows)
    }

    /// Bytes of scratch of one row block (CPU thread) or one warp.
    pub(crate) fn scratch_bytes(&self) -> u64 {
        self.used.get()
    }

    /// An array of `bytes` for each row in flight.
    pub(crate) fn alloc(&self, bytes: u64) -> Scratch {
        self.together.set(true);
        let stride = bytes.next_multiple_of(64);
        let offset = self.used.get();
        let rows = if self.is_warp() { 1 } else { CPU_ROWS };
        self.used.set(offset + stride * rows);
        Scratch { offset, stride }
    }

    /// Address of the array of the row in flight.
    pub(crate) fn at(&self, scratch: Scratch) -> V<'c> {
        self.at_row(scratch, self.row.get().0)
    }

    /// Address of the array of row `r` (i64) of the block.
    pub(crate) fn at_row(&self, scratch: Scratch, r: V<'c>) -> V<'c> {
        let b = self.b;
        let c = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let (row, rows) = self.warp.map_or((r, 1), |(warp, warps)| (warp, u64::from(warps)));
        let base = b.gep(self.scratch, "i8", b.i64(c(scratch.offset * rows)));
        b.gep(base, "i8", b.mulc(row, c(scratch.stride)))
    }

    /// Emits `body` once for every row in flight.
    pub(crate) fn each_row(&self, body: impl FnOnce()) {
        if self.is_warp() {
            body();
            return;
        }
        let b = self.b;
        let outer = self.row.get();
        b.each(b.i64(0), self.rows, |r| {
            self.row.set((r, b.addi(self.first, r)));
            body();
        });
        self.row.set(outer);
    }

    /// Emits `body` for each of `n` elements of the row; with `vector`, for several neighbours at once.
    pub(crate) fn each(&self, n: u64, vector: bool, body: impl Fn(Ix<'c>)) {
        let b = self.b;
        let count = i64::try_from(n).unwrap_or(i64::MAX);
        if let Some(lane) = self.lane {
            if n == 1 {
                self.single(|| body(Ix { at: b.i64(0), width: 1 }));
                return;
            }
            let body = |i, _: &[V<'c>]| {
                body(Ix { at: i, width: 1 });
                Vec::new()
            };
            if let Some((part, parts)) = self.part {
                let start = b.addi(lane, b.shli(part, b.i64(5)));
                b.for_(start, b.i64(count), b.i64(32 * i64::from(parts)), &[], body);
            } else {
                self.turns(lane, count, &[], body);
                self.sync();
            }
            return;
        }
        let width = self.target.lanes();
        let whole = if vector { count - count % i64::try_from(width).unwrap_or(1) } else { 0 };
        if whole > 0 {
            b.for_(b.i64(0), b.i64(whole), b.i64(i64::try_from(width).unwrap_or(1)), &[], |i, _| {
                body(Ix { at: i, width });
                Vec::new()
            });
        }
        if whole < count {
            b.each(b.i64(whole), b.i64(count), |i| body(Ix { at: i, width: 1 }));
        }
    }

    /// Reduces `n` values of the row; every lane gets the result.
    pub(crate) fn fold(&self, n: u64, vector: bool, fold: Fold, value: impl Fn(Ix<'c>) -> V<'c>) -> V<'c> {
        let b = self.b;
        let count = i64::try_from(n).unwrap_or(i64::MAX);
        let identity = b.f32(fold.identity());
        self.together.set(true);
        if let Some(lane) = self.lane {
            let part = self
                .turns(lane, count, &[identity], |i, acc| vec![fold.apply(b, acc[0], value(Ix { at: i, width: 1 }))])
                [0];
            return self.butterfly(part, |x, y| fold.apply(b, x, y));
        }
        let width = self.target.lanes();
        let whole = if vector { count - count % i64::try_from(width).unwrap_or(1) } else { 0 };
        let mut total = identity;
        if whole > 0 {
            let init = b.f32s(fold.identity(), width);
            let step = b.i64(i64::try_from(width).unwrap_or(1));
            let mut lanes = b.for_(b.i64(0), b.i64(whole), step, &[init], |i, acc| {
                vec![fold.apply(b, acc[0], value(Ix { at: i, width }))]
            })[0];
            let mut half = width / 2;
            while half > 0 {
                lanes = fold.apply(b, b.lanes(lanes, 0, half), b.lanes(lanes, half, half));
                half /= 2;
            }
            total = b.op("vector.extract", &[lanes], "f32", &[("static_position", "array<i64: 0>")]);
        }
        if whole < count {
            total = b.for_(b.i64(whole), b.i64(count), b.i64(1), &[total], |i, acc| {
                vec![fold.apply(b, acc[0], value(Ix { at: i, width: 1 }))]
            })[0];
        }
        total
    }

    /// Largest of `n` i64 keys of the row; every lane gets the result.
    pub(crate) fn largest_key(&self, n: u64, key: impl Fn(V<'c>) -> V<'c>) -> V<'c> {
        let b = self.b;
        let count = i64::try_from(n).unwrap_or(i64::MAX);
        self.together.set(true);
        let least = [b.i64(i64::MIN)];
        let larger = |i, acc: &[V<'c>]| vec![b.maxsi(acc[0], key(i))];
        match self.lane {
            Some(lane) => self.butterfly(self.turns(lane, count, &least, larger)[0], |x, y| b.maxsi(x, y)),
            None => b.for_(b.i64(0), b.i64(count), b.i64(1), &least, larger)[0],
        }
    }

    /// A lane's turns through `count` elements, every 32nd of which is its own.
    pub(crate) fn turns(
        &self,
        lane: V<'c>,
        count: i64,
        init: &[V<'c>],
        body: impl FnOnce(V<'c>, &[V<'c>]) -> Vec<V<'c>>,
    ) -> Vec<V<'c>> {
        let b = self.b;
        if count % 32 != 0 {
            return b.for_(lane, b.i64(count), b.i64(32), init, body);
        }
        // The same number for every lane, so that a few turns become straight lines.
        b.for_(b.i64(0), b.i64(count / 32), b.i64(1), init, |turn, carried| {
            body(b.addi(lane, b.shli(turn, b.i64(5))), carried)
        })
    }

    fn butterfly(&self, value: V<'c>, apply: impl Fn(V<'c>, V<'c>) -> V<'c>) -> V<'c> {
        [16, 8, 4, 2, 1].into_iter().fold(value, |v, distance| apply(v, self.shuffle(v, distance)))
    }

    /// Sum of a value over the lanes of the warp; every lane gets it.
    pub(crate) fn total(&self, value: V<'c>) -> V<'c> {
        self.together.set(true);
        if self.is_warp() { self.butterfly(value, |x, y| self.b.addf(x, y)) } else { value }
    }

    /// The value of the lane `distance` away (exclusive or).
    fn shuffle(&self, value: V<'c>, distance: i32) -> V<'c> {
        use melior::ir::ValueLike as _;
        let b = self.b;
        let one = |v: V<'c>, name: &str, ty: &str| {
            b.intrinsic(&format!("llvm.nvvm.shfl.sync.bfly.{name}"), &[b.i32(-1), v, b.i32(distance), b.i32(31)], ty)
        };
        match value.r#type().to_string().as_str() {
            "f32" => one(value, "f32", "f32"),
            "i64" => {
                let low = one(b.cast("arith.trunci", value, "i32"), "i32", "i32");
                let high = b.cast("arith.trunci", b.shrui(value, b.i64(32)), "i32");
                let high = one(high, "i32", "i32");
                let high = b.shli(b.cast("arith.extui", high, "i64"), b.i64(32));
                b.ori(high, b.cast("arith.extui", low, "i64"))
            }
            _ => one(value, "i32", "i32"),
        }
    }

    /// Emits `body` for one lane only; all lanes see its writes afterwards.
    pub(crate) fn single(&self, body: impl FnOnce()) {
        self.together.set(true);
        match self.lane {
            None => body(),
            Some(lane) => {
                // Other lanes may still read what is about to change.
                self.sync();
                self.b.if_(self.b.cmpi("eq", lane, self.b.i64(0)), body);
                self.sync();
            }
        }
    }

    /// Repeats `body` for `0..n`, the same on every lane.
    pub(crate) fn repeat(&self, n: u64, body: impl FnOnce(V<'c>)) {
        self.b.each(self.b.i64(0), self.b.i64(i64::try_from(n).unwrap_or(i64::MAX)), body);
    }

    /// Makes writes of a lane to scratch visible to the other lanes.
    pub(crate) fn sync(&self) {
        if self.is_warp() {
            self.b.op0("nvvm.bar.warp.sync", &[self.b.i32(-1)], &[]);
        }
    }

    /// Loads f32 values from memory of a float type.
    pub(crate) fn load(&self, base: V<'c>, ty: moec_abi::DType, ix: Ix<'c>) -> V<'c> {
        let b = self.b;
        let element = element(ty);
        let at = b.gep(base, element, ix.at);
        let size = u32::try_from(ty.bytes()).unwrap_or(1);
        let vector = |t: &str| if ix.width == 1 { t.to_owned() } else { format!("vector<{}x{t}>", ix.width) };
        let raw = b.load(at, &vector(element), size);
        match ty {
            moec_abi::DType::F32 => raw,
            moec_abi::DType::F64 => b.cast("arith.truncf", raw, &vector("f32")),
            moec_abi::DType::Bf16 => math::from_bf16(b, self.target, raw),
            moec_abi::DType::F16 => b.cast("arith.extf", raw, &vector("f32")),
            moec_abi::DType::I32 | moec_abi::DType::I64 | moec_abi::DType::I8 => {
                b.cast("arith.sitofp", raw, &vector("f32"))
            }
            moec_abi::DType::U8 | moec_abi::DType::F8e4m3 | moec_abi::DType::F8e5m2 => {
                b.cast("arith.uitofp", raw, &vector("f32"))
            }
        }
    }

    /// Stores f32 values into memory of a float type, rounding to nearest even.
    pub(crate) fn store(&self, value: V<'c>, base: V<'c>, ty: moec_abi::DType, ix: Ix<'c>) {
        let b = self.b;
        let element = element(ty);
        let at = b.gep(base, element, ix.at);
        let size = u32::try_from(ty.bytes()).unwrap_or(1);
        let value = if ty == moec_abi::DType::F32 {
            value
        } else if ty == moec_abi::DType::Bf16 {
            math::to_bf16(b, self.target, value)
        } else {
            let to = if ix.width == 1 { element.to_owned() } else { format!("vector<{}x{element}>", ix.width) };
            b.cast("arith.truncf", value, &to)
        };
        b.store(value, at, size);
    }

    /// The value rounded to a float type and back.
    pub(crate) fn round(&self, value: V<'c>, ty: moec_ir::DType, width: usize) -> V<'c> {
        let b = self.b;
        let vector = |t: &str| if width == 1 { t.to_owned() } else { format!("vector<{width}x{t}>") };
        match ty {
            moec_ir::DType::Bf16 => math::from_bf16(b, self.target, math::to_bf16(b, self.target, value)),
            moec_ir::DType::F16 => b.cast("arith.extf", b.cast("arith.truncf", value, &vector("f16")), &vector("f32")),
            moec_ir::DType::F64
            | moec_ir::DType::F32
            | moec_ir::DType::F8e4m3
            | moec_ir::DType::F8e5m2
            | moec_ir::DType::U8
            | moec_ir::DType::I8
            | moec_ir::DType::I32
            | moec_ir::DType::I64 => value,
        }
    }
}

/// MLIR name of an element in memory.
pub(crate) const fn element(ty: moec_abi::DType) -> &'static str {
    match ty {
        moec_abi::DType::F64 => "f64",
        moec_abi::DType::F32 => "f32",
        moec_abi::DType::Bf16 => "bf16",
        moec_abi::DType::F16 => "f16",
        moec_abi::DType::F8e4m3 | moec_abi::DType::F8e5m2 | moec_abi::DType::U8 | moec_abi::DType::I8 => "i8",
        moec_abi::DType::I32 => "i32",
        moec_abi::DType::I64 => "i64",
    }
}
