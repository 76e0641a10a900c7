//! From checkpoint tensors to the values of a matrix.
//!
//! A [`Bound`] source knows where each value of one expert's matrix lies and how to decode it. It
//! reads only the bytes that the expert needs, so that stacked tensors are never held whole.

use crate::{
    error::{Code, Result, RuntimeError},
    number::{self, E2M1, E4M3, E5M2, e8m0},
    recipe::{Dense, compose},
    tensors::{Bytes, TensorView, Tensors},
};
use half::{bf16, f16};
use moec_abi::{DType, Packing, Source, View};
use moec_launch::view::{Access, MatrixAccess, Step, ViewError};

/// Values of one matrix of one expert, row by row, rounded to the type of the source.
///
/// `expert` is the number that `{e}` and the views stand for, `prefix` what `{p}` stands for.
///
/// # Errors
/// A tensor is missing, has another shape or type than the source needs, or cannot be read.
pub fn materialize(
    source: &Source,
    rows: u64,
    columns: u64,
    expert: u64,
    prefix: &str,
    tensors: &dyn Tensors,
) -> Result<Vec<f32>> {
    let bound = Bound::new(source, rows, columns, expert, prefix, tensors)?;
    let elements = usize::try_from(rows.saturating_mul(columns))
        .map_err(|_| RuntimeError::new(Code::Memory, format!("{rows} x {columns} values do not fit in memory")))?;
    let mut out = vec![0.0; elements];
    if columns > 0 {
        for (row, values) in (0..rows).zip(out.chunks_mut(columns as usize)) {
            bound.row(row, 0, values);
        }
    }
    Ok(out)
}

/// How stored elements become numbers. Index 0 is element `base` of the decoded tensor.
enum Codec<'a> {
    Plain {
        dtype: DType,
        bytes: Bytes<'a>,
    },
    Fp8 {
        table: &'static number::Table,
        bytes: Bytes<'a>,
        tiles: Tiles,
    },
    Mxfp4 {
        blocks: Bytes<'a>,
        scales: Bytes<'a>,
    },
    /// The factors of FP8 tiles themselves, for each row.
    Factors {
        tiles: Tiles,
    },
}

/// Factors of FP8 tiles; the last two axes of a tensor are tiled.
struct Tiles {
    factors: Vec<f32>,
    /// First element of the tensor that `bytes` holds, counted from the first matrix that `factors` holds.
    base: u64,
    rows: u64,
    columns: u64,
    block: [u64; 2],
}

impl Tiles {
    /// Start of the row of factors for the row that holds `index`, and the column.
    fn locate(&self, index: u64) -> (u64, u64) {
        let index = index + self.base;
        let (row, column) = (index / self.columns, index % self.columns);
        let (matrix, row) = (row / self.rows, row % self.rows);
        let grid = (self.rows.div_ceil(self.block[0]), self.columns.div_ceil(self.block[1]));
        ((matrix * grid.0 + row / self.block[0]) * grid.1, column)
    }

    fn factor(&self, index: u64) -> f32 {
        let (start, column) = self.locate(index);
        self.factors[(start + column / self.block[1]) as usize]
    }
}

/// Where values come from.
enum Origin<'a> {
    Stored(TensorView<'a>),
    Composed(Dense),
}

/// A source bound to the stored bytes of one expert.
pub(crate) struct Bound<'a> {
    codec: Codec<'a>,
    access: MatrixAccess,
    /// Positions of the elements where they lie irregularly; then `access` counts in this table.
    table: Option<Vec<u64>>,
    dtype: DType,
}

impl<'a> Bound<'a> {
    pub(crate) fn new(
        source: &Source,
        rows: u64,
        columns: u64,
        expert: u64,
        prefix: &str,
        tensors: &'a dyn Tensors,
    ) -> Result<Self> {
        let name = expand(&source.tensor, prefix, expert);
        let (origin, shape) = match &source.packing {
            Packing::Composed(recipe) => {
                let dense = compose(recipe, expert, prefix, tensors)?;
                let shape = vec![dense.rows as u64, dense.columns as u64];
                (Origin::Composed(dense), shape)
            }
            Packing::Fp8Factors { of, .. } => {
                let stored = find(tensors, &name)?;
                let coded = find(tensors, &expand(of, prefix, expert))?;
                let shape = match coded.shape.as_slice() {
                    [outer @ .., _] => [outer, &[columns]].concat(),
                    [] => stored.shape.clone(),
                };
                (Origin::Stored(stored), shape)
            }
            Packing::Plain
            | Packing::Fp8Block { .. }
            | Packing::Mxfp4 { .. }
            | Packing::Fp8Codes
            | Packing::Mxfp4Codes
            | Packing::Mxfp4Exponents => {
                let stored = find(tensors, &name)?;
                let shape = decoded_shape(&source.packing, &stored, &name)?;
                (Origin::Stored(stored), shape)
            }
        };
        let mismatch = |what: &str| {
            let message = format!("tensor {name} of shape {shape:?} {what} {rows} x {columns}");
            RuntimeError::new(Code::TensorMismatch, message)
                .with_help("the checkpoint does not belong to the configuration that was compiled")
        };
        let (access, mut table) =
            resolve(&shape, &source.view, expert).map_err(|e| mismatch(&format!("{}; wanted", say(e))))?;
        let mut matrix = match access.matrix(rows, columns) {
            Ok(matrix) => matrix,
            Err(ViewError::Copy) => {
                table = Some(positions(&access, table.as_deref()));
                MatrixAccess { offset: 0, row_stride: columns, column_stride: 1 }
            }
            Err(ViewError::Rank | ViewError::Range | ViewError::Size) => return Err(mismatch("does not give")),
        };
        let (start, end) = match &table {
            Some(table) => (table.iter().copied().min().unwrap_or(0), table.iter().copied().max().map_or(0, |m| m + 1)),
            None => access.span(),
        };
        let (codec, base) = match origin {
            Origin::Composed(dense) => {
                let bytes = dense.values.iter().flat_map(|v| v.to_le_bytes()).collect();
                (Codec::Plain { dtype: DType::F32, bytes: Bytes::Owned(bytes) }, 0)
            }
            Origin::Stored(stored) => {
                load(&source.packing, &stored, &shape, start, end, tensors, |n| expand(n, prefix, expert))?
            }
        };
        match &mut table {
            Some(table) => table.iter_mut().for_each(|at| *at -= base),
            None => matrix.offset = matrix.offset.saturating_sub(base),
        }
        Ok(Self { codec, access: matrix, table, dtype: source.dtype })
    }

    /// Stored bytes that need no decoding to become elements of `dtype`, and where they lie.
    pub(crate) fn raw(&self, dtype: DType) -> Option<(&[u8], MatrixAccess)> {
        match &self.codec {
            Codec::Plain { dtype: stored, bytes }
                if *stored == dtype && self.dtype == dtype && self.table.is_none() =>
            {
                Some((bytes, self.access))
            }
            Codec::Plain { .. } | Codec::Fp8 { .. } | Codec::Mxfp4 { .. } | Codec::Factors { .. } => None,
        }
    }

    fn position(&self, row: u64, column: u64) -> u64 {
        let at = self.access.offset + row * self.access.row_stride + column * self.access.column_stride;
        match &self.table {
            Some(table) => table[at as usize],
            None => at,
        }
    }

    /// One value, rounded.
    pub(crate) fn value(&self, row: u64, column: u64) -> f64 {
        let index = self.position(row, column);
        let value = match &self.codec {
            Codec::Plain { dtype, bytes } => number::decode(*dtype, bytes, index as usize),
            Codec::Fp8 { table, bytes, tiles } => {
                f64::from(table.0[usize::from(bytes[index as usize])] * tiles.factor(index))
            }
            Codec::Mxfp4 { blocks, scales } => {
                let byte = blocks[index as usize / 2];
                let code = if index.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
                f64::from(E2M1[usize::from(code)]) * f64::from(e8m0(scales[index as usize / 32]))
            }
            Codec::Factors { tiles } => f64::from(tiles.factor(index)),
        };
        number::round(self.dtype, value)
    }

    /// Values of `row` from `column` on, rounded.
    pub(crate) fn row(&self, row: u64, column: u64, out: &mut [f32]) {
        if self.table.is_some() {
            for (value, c) in out.iter_mut().zip(column..) {
                *value = self.value(row, c) as f32;
            }
        } else {
            self.run(self.position(row, column), self.access.column_stride, out);
        }
    }

    /// Values of the rectangle from `(row, column)` on, `width` to a row; reads along the stored order.
    pub(crate) fn tile(&self, row: u64, column: u64, width: usize, out: &mut [f32], line: &mut Vec<f32>) {
        if width == 0 {
            return;
        }
        let along_columns =
            self.table.is_some() || self.access.column_stride == 1 || self.access.row_stride != 1 || width == 1;
        if along_columns {
            for (r, values) in (row..).zip(out.chunks_mut(width)) {
                self.row(r, column, values);
            }
            return;
        }
        let rows = out.len() / width;
        line.clear();
        line.resize(rows, 0.0);
        for c in 0..width {
            self.run(self.position(row, column + c as u64), 1, line);
            for (r, value) in line.iter().enumerate() {
                out[r * width + c] = *value;
            }
        }
    }

    /// `out.len()` values from element `start`, `stride` apart.
    fn run(&self, start: u64, stride: u64, out: &mut [f32]) {
        let at = |i: usize| start as usize + i * stride as usize;
        match &self.codec {
            Codec::Plain { dtype: DType::Bf16, bytes } => {
                each(bytes, start, stride, out, |b| bf16::from_le_bytes(b).to_f32());
            }
            Codec::Plain { dtype: DType::F32, bytes } => each(bytes, start, stride, out, f32::from_le_bytes),
            Codec::Plain { dtype: DType::F16, bytes } => {
                each(bytes, start, stride, out, |b| f16::from_le_bytes(b).to_f32());
            }
            Codec::Plain { dtype, bytes } => {
                for (i, value) in out.iter_mut().enumerate() {
                    *value = number::round(self.dtype, number::decode(*dtype, bytes, at(i))) as f32;
                }
                return;
            }
            Codec::Fp8 { table, bytes, tiles } if stride == 1 => {
                let (factors, column) = tiles.locate(start);
                let codes = &bytes[start as usize..start as usize + out.len()];
                // A run stays in its row, because runs follow the last axis of a matrix.
                if column + out.len() as u64 <= tiles.columns {
                    let (mut done, mut column) = (0, column);
                    while done < out.len() {
                        let tile = column / tiles.block[1];
                        let len = (((tile + 1) * tiles.block[1] - column) as usize).min(out.len() - done);
                        let factor = tiles.factors[(factors + tile) as usize];
                        for (value, code) in out[done..done + len].iter_mut().zip(&codes[done..done + len]) {
                            *value = table.0[usize::from(*code)] * factor;
                        }
                        done += len;
                        column += len as u64;
                    }
                } else {
                    for (i, (value, code)) in out.iter_mut().zip(codes).enumerate() {
                        *value = table.0[usize::from(*code)] * tiles.factor(start + i as u64);
                    }
                }
            }
            Codec::Fp8 { table, bytes, tiles } => {
                for (i, value) in out.iter_mut().enumerate() {
                    *value = table.0[usize::from(bytes[at(i)])] * tiles.factor(at(i) as u64);
                }
            }
            Codec::Mxfp4 { blocks, scales } => {
                for (i, value) in out.iter_mut().enumerate() {
                    let byte = blocks[at(i) / 2];
                    let code = if at(i).is_multiple_of(2) { byte & 15 } else { byte >> 4 };
                    *value = E2M1[usize::from(code)] * e8m0(scales[at(i) / 32]);
                }
            }
            Codec::Factors { tiles } => {
                for (i, value) in out.iter_mut().enumerate() {
                    *value = tiles.factor(at(i) as u64);
                }
            }
        }
        match (&self.codec, self.dtype) {
            // Nothing to round: the values are of this type already.
            (Codec::Plain { dtype, .. }, wanted) if *dtype == wanted => {}
            (_, DType::F32 | DType::F64) => {}
            (_, DType::Bf16) => out.iter_mut().for_each(|v| *v = number::bf16_from(*v).to_f32()),
            (_, DType::F16 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64) => {
                out.iter_mut().for_each(|v| *v = number::round_f32(self.dtype, *v));
            }
        }
    }
}

fn each<const N: usize>(bytes: &[u8], start: u64, stride: u64, out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    let Some(bytes) = bytes.get(start as usize * N..) else { return };
    let (chunks, _) = bytes.as_chunks::<N>();
    if stride == 1 {
        out.iter_mut().zip(chunks).for_each(|(value, chunk)| *value = decode(*chunk));
    } else {
        let step = (stride as usize).max(1);
        out.iter_mut().zip(chunks.iter().step_by(step)).for_each(|(value, chunk)| *value = decode(*chunk));
    }
}

/// The tensor name with prefix and expert filled in.
pub fn expand(name: &str, prefix: &str, expert: u64) -> String {
    name.replace("{p}", prefix).replace("{e}", &expert.to_string())
}

fn find<'a>(tensors: &'a dyn Tensors, name: &str) -> Result<TensorView<'a>> {
    tensors.find(name).ok_or_else(|| {
        RuntimeError::new(Code::TensorMissing, format!("no tensor named {name}"))
            .with_help("check that all shards of the checkpoint are there and that it belongs to this model")
    })
}

/// Shape of the tensor after decoding.
fn decoded_shape(packing: &Packing, stored: &TensorView<'_>, name: &str) -> Result<Vec<u64>> {
    let wrong = |needed: &str| {
        let message = format!("tensor {name} is {:?} {:?}, not {needed}", stored.dtype, stored.shape);
        Err(RuntimeError::new(Code::TensorMismatch, message))
    };
    match packing {
        Packing::Plain | Packing::Composed(_) | Packing::Fp8Factors { .. } => Ok(stored.shape.clone()),
        Packing::Fp8Codes if stored.dtype == DType::F8e4m3 => Ok(stored.shape.clone()),
        Packing::Fp8Codes => wrong("E4M3 numbers, which kernels decode"),
        Packing::Mxfp4Exponents if stored.dtype == DType::U8 => Ok(stored.shape.clone()),
        Packing::Mxfp4Exponents => wrong("bytes of exponents"),
        Packing::Mxfp4Codes => match (stored.dtype, stored.shape.as_slice()) {
            (DType::U8, [outer @ .., blocks, 16]) => Ok([outer, &[blocks.checked_mul(16).unwrap_or(0)]].concat()),
            (_, _) => wrong("bytes of shape [.., blocks, 16]"),
        },
        Packing::Fp8Block { block, .. } => match stored.dtype {
            DType::F8e4m3 | DType::F8e5m2 if stored.shape.len() >= 2 && !block.contains(&0) => Ok(stored.shape.clone()),
            DType::F8e4m3 | DType::F8e5m2 => wrong("a matrix of 8-bit floats in tiles"),
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
                wrong("8-bit floats")
            }
        },
        Packing::Mxfp4 { .. } => match (stored.dtype, stored.shape.as_slice()) {
            (DType::U8, [outer @ .., blocks, 16]) => {
                let mut shape = outer.to_vec();
                shape.push(blocks.checked_mul(32).unwrap_or(0));
                Ok(shape)
            }
            (_, _) => wrong("bytes of shape [.., blocks, 16]"),
        },
    }
}

/// Whether shapes are equal but for sides of 1, which tensors of scales leave out.
fn same_sides(a: &[u64], b: &[u64]) -> bool {
    a.iter().filter(|n| **n != 1).eq(b.iter().filter(|n| **n != 1))
}

fn step(view: &View) -> Step<'_> {
    match view {
        View::Expert => Step::Expert,
        View::Index { index } => Step::Index(*index),
        View::ExpertRows { rows } => Step::ExpertRows(*rows),
        View::Slice { axis, start, len, step } => Step::Slice { axis: *axis, start: *start, len: *len, step: *step },
        View::Transpose => Step::Transpose,
        View::Reshape { shape } => Step::Reshape(shape),
    }
}

/// Applies all views. Where a reshape needs a copy, the second value holds the positions so far.
fn resolve(shape: &[u64], views: &[View], expert: u64) -> Result<(Access, Option<Vec<u64>>), ViewError> {
    let mut access = Access::contiguous(shape)?;
    let mut table = None;
    for view in views {
        match (access.apply(step(view), expert), view) {
            (Ok(()), _) => {}
            (Err(ViewError::Copy), View::Reshape { shape }) => {
                table = Some(positions(&access, table.as_deref()));
                access = Access::contiguous(shape)?;
            }
            (Err(e), _) => return Err(e),
        }
    }
    Ok((access, table))
}

fn positions(access: &Access, table: Option<&[u64]>) -> Vec<u64> {
    (0..access.len())
        .map(|i| match table {
            Some(table) => table[access.position(i) as usize],
            None => access.position(i),
        })
        .collect()
}

fn say(error: ViewError) -> &'static str {
    match error {
        ViewError::Rank => "has too few axes",
        ViewError::Range => "is too small",
        ViewError::Size => "has another number of elements",
        ViewError::Copy => "lies irregularly",
    }
}

/// Reads elements `start..end` of the decoded tensor; the second value is the first one that was read.
fn load<'a>(
    packing: &Packing,
    stored: &TensorView<'a>,
    shape: &[u64],
    start: u64,
    end: u64,
    tensors: &'a dyn Tensors,
    expand: impl Fn(&str) -> String,
) -> Result<(Codec<'a>, u64)> {
    let mismatch = |name: &str, is: &TensorView<'_>, needed: &[u64]| {
        let message = format!("tensor {name} is {:?} {:?}, not {needed:?}", is.dtype, is.shape);
        RuntimeError::new(Code::TensorMismatch, message)
    };
    match packing {
        Packing::Plain | Packing::Composed(_) => {
            let size = stored.dtype.bytes();
            Ok((Codec::Plain { dtype: stored.dtype, bytes: stored.read(start * size, end * size)? }, start))
        }
        Packing::Fp8Block { scale, block } => {
            let (outer, [rows, columns]) = match shape {
                [outer @ .., rows, columns] => (outer, [*rows, *columns]),
                _ => (&[] as &[u64], [1, 1]),
            };
            let name = expand(scale);
            let factors = find(tensors, &name)?;
            let grid = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
            let needed = [outer, &grid].concat();
            if !same_sides(&factors.shape, &needed) {
                return Err(mismatch(&name, &factors, &needed));
            }
            let (factors, base) = factors_of(&factors, grid, (rows * columns).max(1), [start, end])?;
            let table = if stored.dtype == DType::F8e5m2 { &*E5M2 } else { &*E4M3 };
            let tiles = Tiles { factors, base, rows, columns, block: *block };
            Ok((Codec::Fp8 { table, bytes: stored.read(start, end)?, tiles }, start))
        }
        Packing::Fp8Codes => {
            let bytes = stored.read(start, end)?;
            finite(bytes.iter().all(|code| code & 0x7f != 0x7f))?;
            Ok((Codec::Plain { dtype: DType::U8, bytes }, start))
        }
        Packing::Mxfp4Exponents => {
            let bytes = stored.read(start, end)?;
            finite(!bytes.contains(&0xff))?;
            Ok((Codec::Plain { dtype: DType::U8, bytes }, start))
        }
        Packing::Fp8Factors { of, rows: unit } => {
            let (outer, [rows, columns]) = match shape {
                [outer @ .., rows, columns] => (outer, [*rows, *columns]),
                _ => (&[] as &[u64], [1, 1]),
            };
            let grid = [rows.div_ceil((*unit).max(1)), columns];
            let needed = [outer, &grid].concat();
            if !same_sides(&stored.shape, &needed) {
                return Err(mismatch(&expand(of), stored, &needed));
            }
            let (factors, base) = factors_of(stored, grid, (rows * columns).max(1), [start, end])?;
            Ok((Codec::Factors { tiles: Tiles { factors, base, rows, columns, block: [(*unit).max(1), 1] } }, start))
        }
        Packing::Mxfp4Codes => Ok((Codec::Plain { dtype: DType::U8, bytes: stored.read(start, end)? }, start)),
        Packing::Mxfp4 { scales } => {
            let name = expand(scales);
            let exponents = find(tensors, &name)?;
            let needed = stored.shape.get(..stored.shape.len().saturating_sub(1)).unwrap_or(&[]);
            if exponents.shape != needed || exponents.dtype != DType::U8 {
                return Err(mismatch(&name, &exponents, needed));
            }
            let (first, last) = (start / 32, end.div_ceil(32));
            let codec =
                Codec::Mxfp4 { blocks: stored.read(first * 16, last * 16)?, scales: exponents.read(first, last)? };
            Ok((codec, first * 32))
        }
    }
}

/// Factors of the matrices of `size` elements that hold elements `start..end`, on a grid of tiles each, and the place of
/// `start` in the first of them.
fn factors_of(stored: &TensorView<'_>, grid: [u64; 2], size: u64, [start, end]: [u64; 2]) -> Result<(Vec<f32>, u64)> {
    let tiles = grid[0] * grid[1];
    let (first, last) = (start / size, end.div_ceil(size));
    let width = stored.dtype.bytes();
    let bytes = stored.read(first * tiles * width, last * tiles * width)?;
    let factors = (0..((last - first) * tiles) as usize).map(|i| match stored.dtype {
        DType::U8 => e8m0(bytes[i]),
        DType::F64
        | DType::F32
        | DType::Bf16
        | DType::F16
        | DType::F8e4m3
        | DType::F8e5m2
        | DType::I8
        | DType::I32
        | DType::I64 => number::decode(stored.dtype, &bytes, i) as f32,
    });
    Ok((factors.collect(), start - first * size))
}

/// Kernels that decode codes have no value that is not a number.
fn finite(holds: bool) -> Result<()> {
    if holds {
        return Ok(());
    }
    let message = "a code or a shared exponent of a weight stands for no number".to_owned();
    Err(RuntimeError::new(Code::TensorMismatch, message).with_help("check the checkpoint"))
}
