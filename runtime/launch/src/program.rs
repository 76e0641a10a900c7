//! Reads an encoded program: bounds-checked words, no allocation.

use crate::{
    format,
    status::{Result, Status},
};
use core::num::NonZeroU64;

/// An encoded program whose every position was checked.
#[derive(Clone, Copy)]
pub struct Program<'a> {
    words: &'a [u64],
}

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Passed by the caller, read.
    Input,
    /// Passed by the caller, written.
    Output,
    /// Packed weights.
    Weight,
    /// In the workspace.
    Workspace,
}

/// A buffer record.
#[derive(Clone, Copy)]
pub struct Buffer {
    /// What it is for.
    pub kind: Kind,
    /// Position among inputs or outputs, or the slot.
    pub ordinal: usize,
    /// Alignment in bytes that a caller's pointer must have.
    pub align: u64,
    bytes: u64,
    offset: u64,
    /// Must hold zeros before the first launch.
    pub zeroed: bool,
}

/// A launch record.
#[derive(Clone, Copy)]
pub struct Launch {
    items: u64,
    /// Items that one thread takes at a time.
    pub grain: u64,
    /// Bytes of scratch of each thread.
    pub scratch: u64,
    /// Number of arguments.
    pub args: usize,
    at: usize,
}

impl<'a> Program<'a> {
    /// Checks all records of `words`, of which later words are ignored.
    ///
    /// # Errors
    /// [`Status::BAD_PROGRAM`].
    pub fn new(words: &'a [u64]) -> Result<Self> {
        let bad = Status::BAD_PROGRAM;
        let header = words.get(..format::HEADER).ok_or(bad)?;
        if header.first() != Some(&format::MAGIC) || header.get(format::H_VERSION) != Some(&format::VERSION) {
            return Err(bad);
        }
        let count = header.get(format::H_WORDS).and_then(|&n| usize::try_from(n).ok()).ok_or(bad)?;
        let program = Self { words: words.get(..count).ok_or(bad)? };
        program.check()?;
        Ok(program)
    }

    /// The program at `first`, whose header says how long it is.
    ///
    /// # Safety
    /// `first` is the start of words that [`encode`] of `moec-abi` made and that live as long as `'a`.
    ///
    /// [`encode`]: https://docs.rs/moec-abi
    ///
    /// # Errors
    /// [`Status::BAD_PROGRAM`].
    pub unsafe fn from_pointer(first: *const u64) -> Result<Self> {
        if first.is_null() {
            return Err(Status::NULL_POINTER);
        }
        // SAFETY: the caller vouches for an encoded program, which has at least a header.
        let header = unsafe { core::slice::from_raw_parts(first, format::HEADER) };
        if header.first() != Some(&format::MAGIC) {
            return Err(Status::BAD_PROGRAM);
        }
        let count = header.get(format::H_WORDS).and_then(|&n| usize::try_from(n).ok()).ok_or(Status::BAD_PROGRAM)?;
        // SAFETY: the header of an encoded program holds its length.
        Self::new(unsafe { core::slice::from_raw_parts(first, count) })
    }

    fn check(&self) -> Result<()> {
        let sample = self.max_tokens().min(1);
        self.workspace_bytes(sample)?;
        for i in 0..self.buffers() {
            let buffer = self.buffer(i)?;
            self.buffer_bytes(&buffer, sample)?;
            self.buffer_offset(&buffer, sample)?;
            let limit = match buffer.kind {
                Kind::Input => self.inputs(),
                Kind::Output => self.outputs(),
                Kind::Weight => self.slots(),
                Kind::Workspace => 1,
            };
            if buffer.ordinal >= limit || !buffer.align.is_power_of_two() {
                return Err(Status::BAD_PROGRAM);
            }
        }
        for i in 0..self.count(format::H_FITS) {
            self.fits(i, sample)?;
        }
        for i in 0..self.launches() {
            let launch = self.launch(i)?;
            self.items(&launch, sample)?;
            if launch.args > self.max_args() || launch.scratch > self.scratch() || launch.grain == 0 {
                return Err(Status::BAD_PROGRAM);
            }
            for a in 0..launch.args {
                self.arg(
                    &launch,
                    a,
                    sample,
                    |buffer| if buffer < self.buffers() { Ok(0) } else { Err(Status::BAD_PROGRAM) },
                )?;
            }
        }
        Ok(())
    }

    pub(crate) fn word(&self, at: usize) -> Result<u64> {
        self.words.get(at).copied().ok_or(Status::BAD_PROGRAM)
    }

    pub(crate) fn size(&self, at: usize) -> Result<usize> {
        usize::try_from(self.word(at)?).map_err(|_| Status::BAD_PROGRAM)
    }

    /// `count` words from `at`.
    pub(crate) fn words(&self, at: usize, count: usize) -> Result<&'a [u64]> {
        self.words.get(at..at.checked_add(count).ok_or(Status::BAD_PROGRAM)?).ok_or(Status::BAD_PROGRAM)
    }

    fn header(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }

    fn count(&self, at: usize) -> usize {
        usize::try_from(self.header(at)).unwrap_or(usize::MAX)
    }

    /// Words of record `index` in the table whose number and position are at `header`.
    pub(crate) fn record(&self, header: usize, index: usize, size: usize) -> Result<&'a [u64]> {
        if index >= self.count(header) {
            return Err(Status::BAD_PROGRAM);
        }
        let at = index.checked_mul(size).and_then(|n| n.checked_add(self.count(header + 1)));
        self.words(at.ok_or(Status::BAD_PROGRAM)?, size)
    }

    /// Most tokens of a call.
    pub fn max_tokens(&self) -> u64 {
        self.header(format::H_MAX_TOKENS)
    }

    /// Whether the program may be called with this number of tokens.
    ///
    /// # Errors
    /// [`Status::TOO_MANY_TOKENS`], or [`Status::UNFIT_TOKENS`] where a size does not come out.
    pub fn accepts(&self, tokens: u64) -> Result<()> {
        if tokens > self.max_tokens() {
            return Err(Status::TOO_MANY_TOKENS);
        }
        for i in 0..self.count(format::H_FITS) {
            if !self.fits(i, tokens)? {
                return Err(Status::UNFIT_TOKENS);
            }
        }
        Ok(())
    }

    /// Whether size `index` comes out.
    fn fits(&self, index: usize, tokens: u64) -> Result<bool> {
        let &[size, least, most, multiple] =
            self.record(format::H_FITS, index, format::FIT)?.first_chunk().ok_or(Status::BAD_PROGRAM)?;
        let size = self.eval(size, tokens)?;
        Ok((least..=most).contains(&size) && size.is_multiple_of(multiple))
    }

    /// Whether there are outputs, and all are empty for this number of tokens: a call has nothing to do then.
    ///
    /// # Errors
    /// A size does not fit in 64 bits.
    pub fn writes_nothing(&self, tokens: u64) -> Result<bool> {
        for i in 0..self.buffers() {
            let buffer = self.buffer(i)?;
            if buffer.kind == Kind::Output && self.buffer_bytes(&buffer, tokens)? > 0 {
                return Ok(false);
            }
        }
        Ok(self.outputs() > 0)
    }

    /// Needed processor level; see [`format::H_CPU`].
    pub fn cpu_level(&self) -> u64 {
        self.header(format::H_CPU)
    }

    /// What packed weights must carry.
    pub fn fingerprint(&self) -> u64 {
        self.header(format::H_FINGERPRINT)
    }

    /// Bytes of packed weights.
    pub fn weights_bytes(&self) -> u64 {
        self.header(format::H_WEIGHTS)
    }

    /// Number of buffers.
    pub fn buffers(&self) -> usize {
        self.count(format::H_BUFFERS)
    }

    /// Number of weight slots.
    pub fn slots(&self) -> usize {
        self.count(format::H_SLOTS)
    }

    /// Number of launches.
    pub fn launches(&self) -> usize {
        self.count(format::H_LAUNCHES)
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.count(format::H_INPUTS)
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.count(format::H_OUTPUTS)
    }

    /// Most arguments of a launch.
    pub fn max_args(&self) -> usize {
        self.count(format::H_MAX_ARGS)
    }

    /// Most bytes of scratch of a thread.
    pub fn scratch(&self) -> u64 {
        self.header(format::H_SCRATCH)
    }

    /// Bytes of workspace for `tokens`.
    ///
    /// # Errors
    /// The size does not fit in 64 bits.
    pub fn workspace_bytes(&self, tokens: u64) -> Result<u64> {
        self.eval(self.header(format::H_WORKSPACE), tokens)
    }

    /// Buffer record `index`.
    ///
    /// # Errors
    /// There is no such record.
    pub fn buffer(&self, index: usize) -> Result<Buffer> {
        let &[kind, ordinal, align, bytes, offset, zeroed] =
            self.record(format::H_BUFFERS, index, format::BUFFER)?.first_chunk().ok_or(Status::BAD_PROGRAM)?;
        let kind = match kind {
            0 => Kind::Input,
            1 => Kind::Output,
            2 => Kind::Weight,
            3 => Kind::Workspace,
            _ => return Err(Status::BAD_PROGRAM),
        };
        let ordinal = usize::try_from(ordinal).map_err(|_| Status::BAD_PROGRAM)?;
        Ok(Buffer { kind, ordinal, align, bytes, offset, zeroed: zeroed != 0 })
    }

    /// Bytes of a buffer for `tokens`.
    ///
    /// # Errors
    /// The size does not fit in 64 bits.
    pub fn buffer_bytes(&self, buffer: &Buffer, tokens: u64) -> Result<u64> {
        self.eval(buffer.bytes, tokens)
    }

    /// Position of a buffer in the workspace for `tokens`, in bytes.
    ///
    /// # Errors
    /// The size does not fit in 64 bits.
    pub fn buffer_offset(&self, buffer: &Buffer, tokens: u64) -> Result<u64> {
        self.eval(buffer.offset, tokens)
    }

    /// Launch record `index`.
    ///
    /// # Errors
    /// There is no such record.
    pub fn launch(&self, index: usize) -> Result<Launch> {
        let &[items, grain, scratch, args, at] =
            self.record(format::H_LAUNCHES, index, format::LAUNCH)?.first_chunk().ok_or(Status::BAD_PROGRAM)?;
        let size = |n| usize::try_from(n).map_err(|_| Status::BAD_PROGRAM);
        Ok(Launch { items, grain, scratch, args: size(args)?, at: size(at)? })
    }

    /// Items of a launch for `tokens`.
    ///
    /// # Errors
    /// The size does not fit in 64 bits.
    pub fn items(&self, launch: &Launch, tokens: u64) -> Result<u64> {
        self.eval(launch.items, tokens)
    }

    /// Argument `index` of a launch; `address` gives the address of a buffer.
    ///
    /// # Errors
    /// The value does not fit in 64 bits, or what `address` answers.
    #[inline]
    pub fn arg(
        &self,
        launch: &Launch,
        index: usize,
        tokens: u64,
        address: impl FnOnce(usize) -> Result<u64>,
    ) -> Result<u64> {
        let at = index.checked_mul(format::ARG).and_then(|n| n.checked_add(launch.at)).ok_or(Status::BAD_PROGRAM)?;
        let &[kind, buffer, expr] = self.words(at, format::ARG)?.first_chunk().ok_or(Status::BAD_PROGRAM)?;
        let buffer = usize::try_from(buffer).map_err(|_| Status::BAD_PROGRAM)?;
        match kind {
            0 => address(buffer),
            1 => address(buffer)?.checked_add(self.eval(expr, tokens)?).ok_or(Status::OVERFLOW),
            2 => self.eval(expr, tokens),
            _ => Err(Status::BAD_PROGRAM),
        }
    }

    /// Text about input or output `place` (inputs first): when null, or when misaligned.
    pub fn text(&self, place: usize, misaligned: bool) -> Option<&'a core::ffi::CStr> {
        let at = self.count(format::H_TEXTS).checked_add(place.checked_mul(2)? + usize::from(misaligned))?;
        let words = self.words.get(self.size(at).ok()?..)?;
        // SAFETY: a slice of words is a slice of eight times as many bytes.
        let bytes = unsafe { core::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size_of_val(words)) };
        let end = bytes.iter().position(|&byte| byte == 0)?;
        // SAFETY: the slice ends with its first zero.
        Some(unsafe { core::ffi::CStr::from_bytes_with_nul_unchecked(bytes.get(..=end)?) })
    }

    /// Value of the expression at `at`.
    fn eval(&self, at: u64, tokens: u64) -> Result<u64> {
        let at = usize::try_from(at).map_err(|_| Status::BAD_PROGRAM)?;
        let code = self.words(at.checked_add(1).ok_or(Status::BAD_PROGRAM)?, self.size(at)?)?;
        let mut stack = [0u64; format::STACK];
        let mut depth = 0usize;
        let mut code = code.iter().copied();
        while let Some(op) = code.next() {
            let value = match op {
                0 => code.next().ok_or(Status::BAD_PROGRAM)?,
                1 => tokens,
                2 | 3 | 5 | 6 => {
                    depth = depth.checked_sub(2).ok_or(Status::BAD_PROGRAM)?;
                    let (a, b) = match stack.get(depth..depth + 2) {
                        Some(&[a, b]) => (a, b),
                        Some(_) | None => return Err(Status::BAD_PROGRAM),
                    };
                    match op {
                        2 => a.checked_add(b).ok_or(Status::OVERFLOW)?,
                        3 => a.checked_mul(b).ok_or(Status::OVERFLOW)?,
                        5 => a.min(b),
                        _ => a.max(b),
                    }
                }
                4 => {
                    let divisor = code.next().and_then(NonZeroU64::new).ok_or(Status::BAD_PROGRAM)?;
                    depth = depth.checked_sub(1).ok_or(Status::BAD_PROGRAM)?;
                    let value = *stack.get(depth).ok_or(Status::BAD_PROGRAM)?;
                    value / divisor + u64::from(value % divisor != 0)
                }
                _ => return Err(Status::BAD_PROGRAM),
            };
            *stack.get_mut(depth).ok_or(Status::BAD_PROGRAM)? = value;
            depth += 1;
        }
        if depth == 1 { Ok(stack[0]) } else { Err(Status::BAD_PROGRAM) }
    }
}
