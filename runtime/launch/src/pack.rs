//! Packs plain tensors into a weight slot without allocation, for C hosts that hold a checkpoint in memory.

use crate::{
    format::{self, dtype},
    program::Program,
    status::{Result, Status},
    view::{Access, MAX_RANK, MatrixAccess, Step},
};
use core::num::NonZeroU64;

/// A tensor in memory: row-major elements of the machine's byte order.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Tensor {
    /// First element.
    pub data: *const core::ffi::c_void,
    /// Element type, a number of [`format::dtype`].
    pub dtype: u32,
    /// Number of axes.
    pub rank: u32,
    /// Sizes, outermost first.
    pub shape: *const u64,
}

/// The record of a slot.
struct Slot<'a> {
    program: Program<'a>,
    record: &'a [u64; format::SLOT],
}

impl<'a> Slot<'a> {
    fn new(program: Program<'a>, index: usize) -> Result<Self> {
        let record = program.record(format::H_SLOTS, index, format::SLOT)?.first_chunk().ok_or(Status::BAD_PROGRAM)?;
        Ok(Self { program, record })
    }

    fn bytes(&self) -> u64 {
        self.record[0]
    }

    fn place(&self) -> u64 {
        self.record[1]
    }

    fn dtype(&self) -> u64 {
        self.record[4]
    }

    fn matrices(&self) -> u64 {
        self.record[5]
    }

    fn matrix(&self, index: u64) -> Result<&'a [u64; format::MATRIX]> {
        let at = index.checked_mul(format::MATRIX as u64).and_then(|n| n.checked_add(self.record[6]));
        let at = usize::try_from(at.ok_or(Status::BAD_PROGRAM)?).map_err(|_| Status::BAD_PROGRAM)?;
        self.program.words(at, format::MATRIX)?.first_chunk().ok_or(Status::BAD_PROGRAM)
    }

    /// Start and end of an expert in the slot, in bytes.
    fn expert(&self, e: u64) -> Result<(u64, u64)> {
        let at = self.record[11].checked_add(e).and_then(|n| usize::try_from(n).ok()).ok_or(Status::BAD_PROGRAM)?;
        let (start, end) = (self.program.word(at)?, self.program.word(at.wrapping_add(1))?);
        if start > end || end > self.bytes() { Err(Status::BAD_PROGRAM) } else { Ok((start, end)) }
    }
}

/// The number for expert `e` in a list of one number for all, or one for each.
fn pick(program: &Program<'_>, count: u64, at: u64, e: u64) -> Result<u64> {
    let index = if count == 1 { 0 } else { e };
    if index >= count {
        return Err(Status::BAD_PROGRAM);
    }
    program.word(at.checked_add(index).and_then(|n| usize::try_from(n).ok()).ok_or(Status::BAD_PROGRAM)?)
}

fn up(value: u64, unit: u64) -> Result<u64> {
    value.checked_next_multiple_of(unit.max(1)).ok_or(Status::OVERFLOW)
}

/// Distances in a packed expert, in elements.
#[derive(Clone, Copy)]
struct Order {
    panel: NonZeroU64,
    depth: NonZeroU64,
    /// Between panels of rows, between matrices, between rows of a panel, between groups of columns.
    panel_step: u64,
    matrix_step: u64,
    row_step: u64,
    group_step: u64,
    /// Elements of the expert.
    total: u64,
}

/// `value`, or 1.
fn some(value: u64) -> NonZeroU64 {
    NonZeroU64::new(value).unwrap_or(NonZeroU64::MIN)
}

fn panels(rows: u64, panel: NonZeroU64) -> u64 {
    rows / panel + u64::from(rows % panel != 0)
}

impl Order {
    fn new(record: &[u64; format::SLOT], rows: u64, columns: u64) -> Result<Self> {
        let n = record[5];
        let times = |a: u64, b: u64| a.checked_mul(b).ok_or(Status::OVERFLOW);
        let [a, b, c] = [record[8], record[9], record[10]];
        match record[7] {
            0 => {
                let width = up(columns, a)?;
                let matrix = times(rows, width)?;
                let (panel, depth) = (some(rows), some(width));
                let total = times(matrix, n)?;
                Ok(Self { panel, depth, panel_step: 0, matrix_step: matrix, row_step: width, group_step: 0, total })
            }
            1 => {
                let (panel, depth) = (some(a), some(b));
                let width = up(up(columns, c)?, b)?;
                let matrix = times(panel.get(), width)?;
                let panel_step = times(matrix, n)?;
                let total = times(panel_step, panels(rows, panel))?;
                let group_step = times(panel.get(), depth.get())?;
                Ok(Self { panel, depth, panel_step, matrix_step: matrix, row_step: depth.get(), group_step, total })
            }
            2 => {
                let (panel, width) = (some(a), up(columns, b)?);
                let matrix = times(panel.get(), width)?;
                let panel_step = times(matrix, n)?;
                let total = times(panel_step, panels(rows, panel))?;
                let depth = some(width);
                Ok(Self { panel, depth, panel_step, matrix_step: matrix, row_step: width, group_step: 0, total })
            }
            _ => Err(Status::BAD_PROGRAM),
        }
    }
}

/// Applies the views of a matrix to a tensor.
fn view(program: &Program<'_>, matrix: &[u64; format::MATRIX], tensor: &Tensor, expert: u64) -> Result<Access> {
    let misfit = |_| Status::TENSOR_MISMATCH;
    if tensor.rank as usize > MAX_RANK {
        return Err(Status::TENSOR_MISMATCH);
    }
    if tensor.data.is_null() || (tensor.shape.is_null() && tensor.rank > 0) {
        return Err(Status::NULL_POINTER);
    }
    let mut shape = [0; MAX_RANK];
    for (axis, size) in shape.iter_mut().enumerate().take(tensor.rank as usize) {
        // SAFETY: the caller of `pack` vouches for as many sizes as axes.
        *size = unsafe { *tensor.shape.add(axis) };
    }
    let mut access = Access::contiguous(shape.get(..tensor.rank as usize).unwrap_or(&[])).map_err(misfit)?;
    let size = |n: u64| usize::try_from(n).map_err(|_| Status::BAD_PROGRAM);
    for i in 0..size(matrix[2])? {
        let at = i.checked_mul(format::VIEW).and_then(|n| n.checked_add(size(matrix[3]).ok()?));
        let record = program.words(at.ok_or(Status::BAD_PROGRAM)?, format::VIEW)?;
        let &[kind, a, b, c, d] = record.first_chunk().ok_or(Status::BAD_PROGRAM)?;
        let step = match kind {
            0 => Step::Expert,
            1 => Step::Index(a),
            2 => Step::ExpertRows(a),
            3 => Step::Slice { axis: a, start: b, len: c, step: d },
            4 => Step::Transpose,
            5 => Step::Reshape(program.words(size(b)?, size(a)?)?),
            _ => return Err(Status::BAD_PROGRAM),
        };
        access.apply(step, expert).map_err(misfit)?;
    }
    Ok(access)
}

fn bf16_from(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    ((if value.is_nan() { bits | 0x0040_0000 } else { rounded }) >> 16) as u16
}

/// One element as f32.
///
/// # Safety
/// `data` has an element of type `of` at `index`.
unsafe fn get(data: *const u8, of: u64, index: usize) -> f32 {
    if of == dtype::F32 {
        // SAFETY: as the caller vouches.
        unsafe { data.cast::<f32>().add(index).read_unaligned() }
    } else {
        // SAFETY: as the caller vouches; the only other type here is bfloat16.
        f32::from_bits(u32::from(unsafe { data.cast::<u16>().add(index).read_unaligned() }) << 16)
    }
}

/// Moves or converts one matrix.
///
/// # Safety
/// `out` has room for `order`, `tensor` holds all elements of `access`.
unsafe fn place(tensor: &Tensor, types: [u64; 3], access: MatrixAccess, size: (u64, u64), order: Order, out: *mut u8) {
    let [stored, rounded, packed] = types;
    let bytes = dtype::bytes(packed) as usize;
    let same = stored == rounded && rounded == packed;
    let data = tensor.data.cast::<u8>();
    for row in 0..size.0 {
        let start = row / order.panel * order.panel_step + row % order.panel * order.row_step;
        for column in 0..size.1 {
            let to = (start + column / order.depth * order.group_step + column % order.depth) as usize;
            let from = (access.offset + row * access.row_stride + column * access.column_stride) as usize;
            // SAFETY: both positions lie in their memory, as the caller vouches.
            unsafe {
                if same {
                    core::ptr::copy_nonoverlapping(data.add(from * bytes), out.add(to * bytes), bytes);
                    continue;
                }
                let mut value = get(data, stored, from);
                if rounded == dtype::BF16 {
                    value = f32::from_bits(u32::from(bf16_from(value)) << 16);
                }
                if packed == dtype::F32 {
                    out.cast::<f32>().add(to).write_unaligned(value);
                } else {
                    out.cast::<u16>().add(to).write_unaligned(bf16_from(value));
                }
            }
        }
    }
}

/// Writes the header of packed weights; every slot is missing still.
///
/// # Safety
/// `weights` has `bytes` writable bytes.
///
/// # Errors
/// Null, misaligned, or too short.
pub unsafe fn begin(program: &Program<'_>, weights: *mut u8, bytes: u64) -> Result<()> {
    check(program, weights, bytes)?;
    let header = [format::WEIGHTS_MAGIC, program.fingerprint(), program.weights_bytes(), program.slots() as u64];
    // SAFETY: `check` found room for the header page.
    unsafe {
        weights.write_bytes(0, format::WEIGHTS_PAGE as usize);
        for (i, word) in header.into_iter().enumerate() {
            weights.cast::<u64>().add(i).write(word);
        }
    }
    Ok(())
}

fn check(program: &Program<'_>, weights: *const u8, bytes: u64) -> Result<()> {
    if weights.is_null() {
        return Err(Status::NULL_POINTER);
    }
    if !(weights.addr() as u64).is_multiple_of(64) {
        return Err(Status::MISALIGNED);
    }
    if bytes < program.weights_bytes() || bytes < format::WEIGHTS_PAGE || program.slots() > format::MAX_SLOTS {
        return Err(Status::WEIGHTS_MISMATCH);
    }
    Ok(())
}

/// Packs slot `index` from `tensors`: those of the first matrix for each expert, then of the second, and so on.
///
/// # Safety
/// Each tensor has as many sizes as axes and as many elements as its sizes say; `weights` has `bytes`
/// writable bytes.
///
/// # Errors
/// The tensors do not fit, or their encoding is not plain float32 or bfloat16.
pub unsafe fn pack(
    program: &Program<'_>,
    index: usize,
    tensors: &[Tensor],
    weights: *mut u8,
    bytes: u64,
) -> Result<()> {
    check(program, weights, bytes)?;
    let slot = Slot::new(*program, index)?;
    let end = slot.place().checked_add(slot.bytes()).ok_or(Status::BAD_PROGRAM)?;
    if end > bytes {
        return Err(Status::BAD_PROGRAM);
    }
    let (experts, matrices) = (slot.record[2], slot.matrices());
    if experts.checked_mul(matrices) != Some(tensors.len() as u64) {
        return Err(Status::TENSOR_MISMATCH);
    }
    // SAFETY: the slot lies in the weights.
    let out = unsafe { weights.add(slot.place() as usize) };
    // Padding up to the next page too, so that equal weights are equal bytes.
    let padded = up(slot.bytes(), format::WEIGHTS_PAGE)?.min(bytes - slot.place());
    // SAFETY: as above.
    unsafe { out.write_bytes(0, padded as usize) };
    for e in 0..experts {
        let (start, end) = slot.expert(e)?;
        for m in 0..matrices {
            let matrix = slot.matrix(m)?;
            let size = (pick(program, matrix[4], matrix[5], e)?, pick(program, matrix[6], matrix[7], e)?);
            let order = Order::new(slot.record, size.0, size.1)?;
            if order.total.checked_mul(dtype::bytes(slot.dtype())).is_none_or(|n| n > end - start) {
                return Err(Status::BAD_PROGRAM);
            }
            let tensor = tensors.get((m * experts + e) as usize).ok_or(Status::TENSOR_MISMATCH)?;
            let types = [u64::from(tensor.dtype), matrix[0], slot.dtype()];
            let float = |of: &u64| *of == dtype::F32 || *of == dtype::BF16;
            let same = types.iter().all(|of| *of == types[0]) && dtype::bytes(types[0]) > 0;
            if matrix[1] != 1 || !(same || types.iter().all(float)) {
                return Err(Status::PACK_UNSUPPORTED);
            }
            if size.0 == 0 || size.1 == 0 {
                continue;
            }
            let access = view(program, matrix, tensor, slot.record[3].wrapping_add(e))?;
            let access = access.matrix(size.0, size.1).map_err(|_| Status::TENSOR_MISMATCH)?;
            let first = (start + m * order.matrix_step * dtype::bytes(slot.dtype())) as usize;
            // SAFETY: the expert has room for `order`; the view lies in the tensor.
            unsafe { place(tensor, types, access, size, order, out.add(first)) };
        }
    }
    if index < format::MAX_SLOTS {
        // SAFETY: the flag lies in the header page.
        unsafe { weights.add(format::WEIGHTS_FLAGS + index).write(1) };
    }
    Ok(())
}

/// Checks packed weights and gives the address of each slot.
///
/// # Safety
/// `weights` has `bytes` readable bytes.
///
/// # Errors
/// Null, misaligned, made for another program, or not complete.
pub unsafe fn slots(program: &Program<'_>, weights: *const u8, bytes: u64, out: &mut [*const u8]) -> Result<()> {
    check(program, weights, bytes)?;
    let wanted = [format::WEIGHTS_MAGIC, program.fingerprint(), program.weights_bytes(), program.slots() as u64];
    for (i, word) in wanted.into_iter().enumerate() {
        // SAFETY: `check` found a header page.
        if unsafe { weights.cast::<u64>().add(i).read() } != word {
            return Err(Status::WEIGHTS_MISMATCH);
        }
    }
    for i in 0..program.slots() {
        // SAFETY: the flag lies in the header page; `check` refuses more slots than flags.
        if unsafe { weights.add(format::WEIGHTS_FLAGS + i).read() } != 1 {
            return Err(Status::WEIGHTS_MISMATCH);
        }
        let slot = Slot::new(*program, i)?;
        if slot.place().checked_add(slot.bytes()).is_none_or(|end| end > bytes) {
            return Err(Status::BAD_PROGRAM);
        }
        // SAFETY: the slot lies in the weights.
        *out.get_mut(i).ok_or(Status::BAD_PROGRAM)? = unsafe { weights.add(slot.place() as usize) };
    }
    Ok(())
}
