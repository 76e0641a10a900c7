//! Packing: the bytes of a weight slot in the order that a kernel reads.
//!
//! A slot is cut into strips (a panel, a block, or some rows of one matrix) that are packed
//! independently on all cores. Where type and order allow, bytes move straight from the stored
//! tensor into place, so that the usual case runs at the speed of memory and keeps every bit.

use crate::{
    error::{Code, Result, RuntimeError},
    number,
    tensors::Tensors,
    weights::Bound,
};
use moec_abi::{DType, Layout, Slot};
use moec_launch::view::MatrixAccess;
use rayon::prelude::*;

/// Columns that are decoded at a time; with a panel of rows they stay in the first-level cache.
const TILE_COLUMNS: usize = 64;

/// Writes the packed bytes of `slot` for the layer with this `prefix`; all of `out` is written.
///
/// # Errors
/// A tensor is missing or does not fit, or `out` has another length than [`Slot::bytes`].
pub fn pack(slot: &Slot, prefix: &str, tensors: &dyn Tensors, out: &mut [u8]) -> Result<()> {
    let wrong = |what: &str| RuntimeError::new(Code::Artefact, format!("weight slot {}: {what}", slot.name));
    if out.len() as u64 != slot.bytes {
        return Err(wrong(&format!("{} bytes were passed for {}", out.len(), slot.bytes)));
    }
    let experts = slot.parts(out).ok_or_else(|| wrong("offsets of experts do not lie in the slot"))?;
    experts.into_par_iter().enumerate().try_for_each(|(e, out)| pack_expert(slot, e as u64, prefix, tensors, out))
}

/// Bytes of one expert, which are those of all its matrices.
fn pack_expert(slot: &Slot, e: u64, prefix: &str, tensors: &dyn Tensors, out: &mut [u8]) -> Result<()> {
    let wrong = |what: &str| RuntimeError::new(Code::Artefact, format!("weight slot {}: {what}", slot.name));
    let (rows, columns) = slot.size_of(e).ok_or_else(|| wrong("matrices of different sizes"))?;
    let needed = slot.expert_bytes(e).ok_or_else(|| wrong("too large"))?;
    if needed > out.len() as u64 {
        return Err(wrong(&format!("expert {e} needs {needed} bytes and has {}", out.len())));
    }
    let (out, padding) = out.split_at_mut(needed as usize);
    padding.fill(0);
    if needed == 0 {
        return Ok(());
    }
    let number = slot.number(e);
    let bound: Vec<Bound<'_>> = slot
        .matrices
        .iter()
        .map(|m| Bound::new(&m.source, rows, columns, number, prefix, tensors))
        .collect::<Result<_>>()?;
    let strips = Strips::new(slot, rows, columns);
    out.par_chunks_mut(strips.bytes).enumerate().for_each(|(i, strip)| strips.pack(i as u64, &bound, strip));
    Ok(())
}

/// How the bytes of one expert fall into strips, and each strip into matrices and rows.
struct Strips {
    /// Bytes of a strip; the last one may be shorter.
    bytes: usize,
    /// Rows of each matrix in a strip.
    rows: u64,
    /// Strips to a matrix; 0: every strip holds all matrices.
    per_matrix: u64,
    dtype: DType,
    matrix_rows: u64,
    columns: u64,
    padded: u64,
    /// Elements between rows of one matrix, between groups of `depth` columns, and between matrices.
    row_step: usize,
    group_step: usize,
    matrix_step: usize,
    depth: usize,
    /// Lanes and the elements of a unit, where the elements of a group are those of lanes in turn.
    fragments: Option<[usize; 2]>,
}

impl Strips {
    fn new(slot: &Slot, rows: u64, columns: u64) -> Self {
        let padded = slot.layout.padded_columns(columns);
        let size = slot.dtype.bytes();
        let n = slot.matrices.len() as u64;
        let (strip_rows, per_matrix, row_step, group_step, matrix_step, depth) = match slot.layout {
            // One strip for each matrix: rows of a matrix are not padded, so equal strips would not
            // end where a matrix ends.
            Layout::Rows { .. } => (rows, 1, padded, 0, 0, padded),
            Layout::Panels { panel, depth, .. } => (panel, 0, depth, panel * depth, panel * padded, depth),
            Layout::Interleaved { block, .. } => (block, 0, padded, 0, block * padded, padded),
            Layout::Fragments { lanes, unit, .. } => {
                let (panel, depth) = (Layout::FRAGMENT, Layout::FRAGMENT * lanes * unit);
                (panel, 0, depth, panel * depth, panel * padded, depth)
            }
        };
        let fragments = match slot.layout {
            Layout::Fragments { lanes, unit, .. } => Some([lanes as usize, unit as usize]),
            Layout::Rows { .. } | Layout::Panels { .. } | Layout::Interleaved { .. } => None,
        };
        let matrices = if per_matrix == 0 { n } else { 1 };
        Self {
            bytes: ((strip_rows * matrices * padded * size) as usize).max(1),
            rows: strip_rows,
            per_matrix,
            dtype: slot.dtype,
            matrix_rows: rows,
            columns,
            padded,
            row_step: row_step as usize,
            group_step: group_step as usize,
            matrix_step: matrix_step as usize,
            depth: depth as usize,
            fragments,
        }
    }

    fn pack(&self, index: u64, bound: &[Bound<'_>], out: &mut [u8]) {
        let size = self.dtype.bytes() as usize;
        if self.per_matrix == 1 {
            // Rows of one matrix, cut again for more cores.
            let Some(source) = bound.get(index as usize) else { return };
            out.par_chunks_mut(self.row_step * size * 32).enumerate().for_each(|(i, out)| {
                let first = i as u64 * 32;
                self.matrix(source, first, (self.matrix_rows - first).min(32), out);
            });
            return;
        }
        let first = index * self.rows;
        let rows = self.matrix_rows.saturating_sub(first).min(self.rows);
        for (source, out) in bound.iter().zip(out.chunks_mut((self.matrix_step * size).max(1))) {
            self.matrix(source, first, rows, out);
            if let Some([lanes, unit]) = self.fragments {
                deal(out, lanes, unit * size);
            }
        }
    }

    /// Rows `first..first + rows` of one matrix.
    fn matrix(&self, source: &Bound<'_>, first: u64, rows: u64, out: &mut [u8]) {
        if self.padded != self.columns || (self.per_matrix == 0 && rows < self.rows) {
            out.fill(0);
        }
        match source.raw(self.dtype) {
            Some((bytes, at)) if at.column_stride == 1 => {
                let size = self.dtype.bytes();
                let start = ((at.offset + first * at.row_stride) * size) as usize;
                let stride = (at.row_stride * size) as usize;
                self.scatter(&bytes[start..], stride, rows as usize, 0, self.columns as usize, out);
            }
            Some((bytes, at)) if at.row_stride == 1 => self.turn(bytes, at, first, rows as usize, out),
            Some(_) | None => self.convert(source, first, rows, out),
        }
    }

    /// Moves a matrix that is stored column by column: each tile is turned, then placed.
    fn turn(&self, bytes: &[u8], at: MatrixAccess, first: u64, rows: usize, out: &mut [u8]) {
        let size = self.dtype.bytes() as usize;
        let mut tile = vec![0; rows * TILE_COLUMNS * size];
        let mut column = 0;
        while column < self.columns {
            let width = (self.columns - column).min(TILE_COLUMNS as u64) as usize;
            let start = (at.offset + first + column * at.column_stride) as usize * size;
            let source = &bytes[start..];
            let place = Place { source, stride: at.column_stride as usize * size, rows: width, group: width * size };
            match size {
                1 => place.groups::<1>(rows, &mut tile),
                2 => place.groups::<2>(rows, &mut tile),
                4 => place.groups::<4>(rows, &mut tile),
                _ => place.groups::<8>(rows, &mut tile),
            }
            self.scatter(&tile, width * size, rows, column as usize, width, out);
            column += width as u64;
        }
    }

    /// Decodes, converts and places tile by tile.
    fn convert(&self, source: &Bound<'_>, first: u64, rows: u64, out: &mut [u8]) {
        let size = self.dtype.bytes() as usize;
        let (mut values, mut line) = (Vec::new(), Vec::new());
        let mut bytes = vec![0; rows as usize * TILE_COLUMNS * size];
        let mut column = 0;
        while column < self.columns {
            let width = (self.columns - column).min(TILE_COLUMNS as u64) as usize;
            let bytes = &mut bytes[..rows as usize * width * size];
            match self.dtype {
                DType::F32 | DType::Bf16 | DType::F16 => {
                    // Every value is written below, so that old ones need not be cleared.
                    values.resize(rows as usize * width, 0.0);
                    source.tile(first, column, width, &mut values, &mut line);
                    encode_all(self.dtype, &values, bytes);
                }
                DType::F64 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
                    for r in 0..rows as usize {
                        for c in 0..width {
                            let value = source.value(first + r as u64, column + c as u64);
                            number::encode(self.dtype, value, bytes, r * width + c);
                        }
                    }
                }
            }
            self.scatter(bytes, width * size, rows as usize, column as usize, width, out);
            column += width as u64;
        }
    }

    /// Places columns `column..column + width` of `rows` rows; `source` holds them row by row, `stride` bytes apart.
    fn scatter(&self, source: &[u8], stride: usize, rows: usize, column: usize, width: usize, out: &mut [u8]) {
        let size = self.dtype.bytes() as usize;
        if self.group_step == 0 {
            for r in 0..rows {
                let at = (r * self.row_step + column) * size;
                out[at..at + width * size].copy_from_slice(&source[r * stride..r * stride + width * size]);
            }
            return;
        }
        let place = Place { source, stride, rows, group: self.group_step * size };
        let (unit, aligned) = (self.depth * size, column.is_multiple_of(self.depth));
        let groups = if aligned { width / self.depth } else { 0 };
        let start = column / self.depth * place.group;
        match (aligned, unit) {
            (true, 1) => place.groups::<1>(groups, &mut out[start..]),
            (true, 2) => place.groups::<2>(groups, &mut out[start..]),
            (true, 4) => place.groups::<4>(groups, &mut out[start..]),
            (true, 8) => place.groups::<8>(groups, &mut out[start..]),
            (true, 16) => place.groups::<16>(groups, &mut out[start..]),
            (true | false, _) => {
                self.elements(&place, 0, column, width, out);
                return;
            }
        }
        self.elements(&place, groups * self.depth, column, width, out);
    }

    /// Columns from `done` on, one element at a time: what does not fill a group.
    fn elements(&self, place: &Place<'_>, done: usize, column: usize, width: usize, out: &mut [u8]) {
        let size = self.dtype.bytes() as usize;
        for c in done..width {
            let group = (column + c) / self.depth * self.group_step + (column + c) % self.depth;
            for r in 0..place.rows {
                let (from, to) = (r * place.stride + c * size, (r * self.row_step + group) * size);
                out[to..to + size].copy_from_slice(&place.source[from..from + size]);
            }
        }
    }
}

/// Brings units of `unit` bytes, which lanes take in turn, into the order of lanes, eight of each.
fn deal(out: &mut [u8], lanes: usize, unit: usize) {
    match (lanes, unit) {
        (4, 2) => turn_groups::<4, 2>(out),
        (4, 1) => turn_groups::<4, 1>(out),
        (2, 1) => turn_groups::<2, 1>(out),
        _ => {
            let mut group = Vec::new();
            for out in out.chunks_exact_mut((lanes * unit * PIECES).max(1)) {
                group.clear();
                group.extend_from_slice(out);
                for (i, to) in out.chunks_mut(unit).enumerate() {
                    let from = (i % PIECES * lanes + i / PIECES) * unit;
                    to.copy_from_slice(&group[from..from + unit]);
                }
            }
        }
    }
}

/// Pieces of a lane in a group.
const PIECES: usize = Layout::FRAGMENT as usize;

/// As [`deal`], for sizes that are known.
fn turn_groups<const LANES: usize, const UNIT: usize>(out: &mut [u8]) {
    let (units, _) = out.as_chunks_mut::<UNIT>();
    for group in units.chunks_exact_mut(PIECES * LANES) {
        let mut pieces = [[[0; UNIT]; LANES]; PIECES];
        pieces.as_flattened_mut().copy_from_slice(group);
        for (lane, to) in group.chunks_exact_mut(PIECES).enumerate() {
            for (piece, to) in pieces.iter().zip(to) {
                *to = piece[lane];
            }
        }
    }
}

/// A move of groups of `N` bytes from rows to panels; distances in bytes.
struct Place<'a> {
    source: &'a [u8],
    stride: usize,
    rows: usize,
    group: usize,
}

impl Place<'_> {
    /// Groups of `N` bytes that are neighbours in a row go `group` bytes apart; rows are neighbours.
    fn groups<const N: usize>(&self, groups: usize, out: &mut [u8]) {
        // A few cache lines of each row at a time, so that every line is read once and the piece of the
        // panel that is written stays in the cache.
        let line = (256 / N).max(1);
        let mut first = 0;
        while first < groups {
            let count = line.min(groups - first);
            let out = &mut out[first * self.group..];
            let units = |row: usize| {
                let from = row * self.stride + first * N;
                self.source[from..from + count * N].as_chunks::<N>().0
            };
            let mut row = 0;
            while row + 4 <= self.rows {
                self.four(std::array::from_fn(|i| units(row + i)), &mut out[row * N..]);
                row += 4;
            }
            for row in row..self.rows {
                for (unit, to) in units(row).iter().zip(out[row * N..].chunks_mut(self.group)) {
                    to[..N].copy_from_slice(unit);
                }
            }
            first += count;
        }
    }

    /// Four rows at once: squares of 4 x 4 groups, which compilers turn into shuffles.
    fn four<const N: usize>(&self, rows: [&[[u8; N]]; 4], out: &mut [u8]) {
        let [a, b, c, d] = rows;
        let squares = a.as_chunks::<4>().0.iter().zip(b.as_chunks::<4>().0).zip(c.as_chunks::<4>().0);
        let squares = squares.zip(d.as_chunks::<4>().0);
        let mut at = 0;
        for (((a, b), c), d) in squares {
            for i in 0..4 {
                put_four(&mut out[at..], [a[i], b[i], c[i], d[i]]);
                at += self.group;
            }
        }
        let done = a.len() / 4 * 4;
        for i in done..a.len() {
            put_four(&mut out[at..], [a[i], b[i], c[i], d[i]]);
            at += self.group;
        }
    }
}

#[inline]
fn put_four<const N: usize>(out: &mut [u8], units: [[u8; N]; 4]) {
    let (places, _) = out.as_chunks_mut::<N>();
    if let Some(places) = places.first_chunk_mut::<4>() {
        *places = units;
    }
}

fn encode_all(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        DType::F32 => {
            let (out, _) = bytes.as_chunks_mut::<4>();
            out.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes());
        }
        DType::Bf16 => {
            let (out, _) = bytes.as_chunks_mut::<2>();
            out.iter_mut().zip(values).for_each(|(o, v)| *o = number::bf16_from(*v).to_le_bytes());
        }
        DType::F16 | DType::F64 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
            for (i, value) in values.iter().enumerate() {
                number::encode(dtype, f64::from(*value), bytes, i);
            }
        }
    }
}
