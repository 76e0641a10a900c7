//! Runs a program: binds addresses, then one launch after the other.

use crate::{
    CpuKernel,
    pool::Pool,
    program::{Buffer, Kind, Program},
    status::{Result, Status},
    sys,
};

/// Alignment of workspace and packed weights in bytes.
pub const ALIGN: u64 = 64;

/// What one call of a program works on.
pub struct Call<'a> {
    /// Number of tokens.
    pub tokens: u64,
    /// Addresses of the inputs, in the order of the program's buffers.
    pub inputs: &'a [*const u8],
    /// Addresses of the outputs.
    pub outputs: &'a [*mut u8],
    /// Address of the packed bytes of each slot.
    pub weights: &'a [*const u8],
    /// Workspace; its content does not matter.
    pub workspace: *mut u8,
    /// Its length in bytes.
    pub workspace_bytes: u64,
}

/// Checks everything that can be checked about pointers and sizes.
fn check(program: &Program<'_>, call: &Call<'_>) -> Result<()> {
    if call.inputs.len() != program.inputs() || call.outputs.len() != program.outputs() {
        return Err(Status::BAD_PROGRAM);
    }
    if call.weights.len() != program.slots() {
        return Err(Status::NOT_BOUND);
    }
    let needed = program.workspace_bytes(call.tokens)?;
    if call.workspace_bytes < needed {
        return Err(Status::WORKSPACE_TOO_SMALL);
    }
    if needed > 0 && call.workspace.is_null() {
        return Err(Status::NULL_POINTER);
    }
    let misaligned = |address: usize, align: u64| !(address as u64).is_multiple_of(align.max(1));
    if needed > 0 && misaligned(call.workspace.addr(), ALIGN) {
        return Err(Status::MISALIGNED);
    }
    for weights in call.weights {
        if weights.is_null() {
            return Err(Status::NOT_BOUND);
        }
        if misaligned(weights.addr(), ALIGN) {
            return Err(Status::MISALIGNED);
        }
    }
    for i in 0..program.buffers() {
        let buffer = program.buffer(i)?;
        let (pointer, place) = match buffer.kind {
            Kind::Input => (address(call, &buffer, 0)?, buffer.ordinal),
            Kind::Output => (address(call, &buffer, 0)?, buffer.ordinal + program.inputs()),
            Kind::Weight => continue,
            Kind::Workspace => {
                let end = program.buffer_offset(&buffer, call.tokens)?;
                let end = end.checked_add(program.buffer_bytes(&buffer, call.tokens)?).ok_or(Status::OVERFLOW)?;
                if end > needed {
                    return Err(Status::BAD_PROGRAM);
                }
                continue;
            }
        };
        // A buffer without elements may have no address.
        if pointer == 0 && program.buffer_bytes(&buffer, call.tokens)? > 0 {
            return Err(Status::NULL_POINTER.about(place));
        }
        if !pointer.is_multiple_of(buffer.align.max(1)) {
            return Err(Status::MISALIGNED.about(place));
        }
    }
    Ok(())
}

fn address(call: &Call<'_>, buffer: &Buffer, offset: u64) -> Result<u64> {
    let bad = Status::BAD_PROGRAM;
    let start = match buffer.kind {
        Kind::Input => call.inputs.get(buffer.ordinal).ok_or(bad)?.addr(),
        Kind::Output => call.outputs.get(buffer.ordinal).ok_or(bad)?.addr(),
        Kind::Weight => call.weights.get(buffer.ordinal).ok_or(bad)?.addr(),
        Kind::Workspace => call.workspace.addr(),
    };
    (start as u64).checked_add(offset).ok_or(Status::OVERFLOW)
}

/// Runs all launches. `kernels` holds one kernel for each launch; `table` has room for
/// [`Program::max_args`] words; `times`, if any, gets the nanoseconds of each launch.
///
/// Nothing is launched where all outputs are empty, as they are for zero tokens (but counts over the tokens).
///
/// # Errors
/// What [`Status`] lists; nothing was launched then.
///
/// # Safety
/// The kernels are those that were compiled with the program, and the addresses of `call` are valid
/// for the sizes that the program gives for this number of tokens.
pub unsafe fn run(
    program: &Program<'_>,
    kernels: &[CpuKernel],
    pool: &Pool,
    call: &Call<'_>,
    table: &mut [u64],
    times: Option<&mut [u64]>,
) -> Result<()> {
    // SAFETY: as the caller vouches; the table is borrowed exclusively.
    unsafe { run_raw(program, kernels, pool, call, table, times) }
}

/// As [`run`], with a table that only the call that holds the pool touches.
///
/// # Safety
/// As for [`run`], and the table is valid and belongs to this pool.
pub(crate) unsafe fn run_raw(
    program: &Program<'_>,
    kernels: &[CpuKernel],
    pool: &Pool,
    call: &Call<'_>,
    table: *mut [u64],
    mut times: Option<&mut [u64]>,
) -> Result<()> {
    program.accepts(call.tokens)?;
    if program.writes_nothing(call.tokens)? {
        return Ok(());
    }
    check(program, call)?;
    if kernels.len() != program.launches()
        || table.len() < program.max_args()
        || (pool.scratch_bytes() as u64) < program.scratch()
    {
        return Err(Status::BAD_PROGRAM);
    }
    let session = pool.enter()?;
    // SAFETY: whoever holds the pool has the table for itself.
    let table = unsafe { &mut *table };
    for i in 0..program.buffers() {
        let buffer = program.buffer(i)?;
        if buffer.zeroed && buffer.kind == Kind::Workspace {
            let (offset, bytes) =
                (program.buffer_offset(&buffer, call.tokens)?, program.buffer_bytes(&buffer, call.tokens)?);
            // SAFETY: `check` found that the buffer lies in the workspace, which the caller vouches for.
            unsafe { call.workspace.add(offset as usize).write_bytes(0, bytes as usize) };
        }
    }
    for (i, kernel) in kernels.iter().enumerate() {
        let start = if times.is_some() { sys::now() } else { 0 };
        let launch = program.launch(i)?;
        for (a, word) in table.iter_mut().enumerate().take(launch.args) {
            *word = program.arg(&launch, a, call.tokens, |index| {
                let buffer = program.buffer(index)?;
                let offset = match buffer.kind {
                    Kind::Workspace => program.buffer_offset(&buffer, call.tokens)?,
                    Kind::Input | Kind::Output | Kind::Weight => 0,
                };
                address(call, &buffer, offset)
            })?;
        }
        let items = program.items(&launch, call.tokens)?;
        // SAFETY: the caller vouches for kernels and addresses; the table lives until all items are done.
        unsafe { session.run(*kernel, table.as_mut_ptr(), items, launch.grain) };
        if let Some(time) = times.as_deref_mut().and_then(|t| t.get_mut(i)) {
            *time = sys::now().saturating_sub(start);
        }
    }
    Ok(())
}
