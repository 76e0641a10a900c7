//! A program as an array of words that a launcher reads without parsing or allocation.

use crate::{
    Arg, BufferKind, DType, Expr, Grid, Layout, Packing, Program, Slot, View,
    format::{self, dtype},
};

/// Why a program cannot be encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncodeError {
    /// A launch runs on a GPU, or has a tensor map.
    NotCpu(String),
    /// A buffer or slot that an argument or buffer names is not there.
    Dangling(String),
    /// An expression needs a deeper stack than a launcher has.
    TooDeep(String),
    /// Sizes do not fit in 64 bits, or there are too many slots.
    TooLarge(String),
}

impl std::fmt::Display for EncodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotCpu(what) => write!(f, "{what} is not for a CPU"),
            Self::Dangling(what) => write!(f, "{what} names a buffer or slot that is not there"),
            Self::TooDeep(what) => write!(f, "an expression of {what} is nested too deeply"),
            Self::TooLarge(what) => write!(f, "{what} is too large"),
        }
    }
}

impl std::error::Error for EncodeError {}

/// Number of an element type in encoded programs.
pub const fn dtype_number(of: DType) -> u64 {
    match of {
        DType::F64 => dtype::F64,
        DType::F32 => dtype::F32,
        DType::Bf16 => dtype::BF16,
        DType::F16 => dtype::F16,
        DType::F8e4m3 => dtype::F8E4M3,
        DType::F8e5m2 => dtype::F8E5M2,
        DType::U8 => dtype::U8,
        DType::I8 => dtype::I8,
        DType::I32 => dtype::I32,
        DType::I64 => dtype::I64,
    }
}

/// Byte offset of each slot in packed weights, and the total; see [`format::WEIGHTS_PAGE`].
pub fn weight_offsets(slots: &[Slot]) -> Option<(Vec<u64>, u64)> {
    let mut at = format::WEIGHTS_PAGE;
    let mut offsets = Vec::with_capacity(slots.len());
    for slot in slots {
        offsets.push(at);
        at = at.checked_add(slot.bytes)?.checked_next_multiple_of(format::WEIGHTS_PAGE)?;
    }
    Some((offsets, at))
}

/// The processor level in [`format::H_CPU`] for a target name.
pub fn cpu_level(target: &str) -> u64 {
    match target {
        "x86-64-v3" => 3,
        "x86-64-v4" => 4,
        "x86-64-v4-bf16" => 5,
        "x86-64-v4-amx" => 6,
        _ => 0,
    }
}

struct Words(Vec<u64>);

impl Words {
    /// Appends words and says where they are.
    fn put(&mut self, words: &[u64]) -> u64 {
        let at = self.0.len() as u64;
        self.0.extend_from_slice(words);
        at
    }

    fn expr(&mut self, expr: &Expr, what: &str) -> Result<u64, EncodeError> {
        let mut code = vec![0];
        if postfix(expr, &mut code) > format::STACK {
            return Err(EncodeError::TooDeep(what.into()));
        }
        code[0] = code.len() as u64 - 1;
        Ok(self.put(&code))
    }

    fn text(&mut self, text: &str) -> u64 {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize((bytes.len() + 1).next_multiple_of(8), 0);
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|c| u64::from_le_bytes(*c)).collect();
        self.put(&words)
    }
}

/// Appends postfix code and returns the stack depth. The deeper side of a commutative operation
/// comes first, so that depth grows with the logarithm of the size.
fn postfix(expr: &Expr, code: &mut Vec<u64>) -> usize {
    let mut both = |a: &Expr, b: &Expr, op: u64| {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let (a, b) = (postfix(a, &mut first), postfix(b, &mut second));
        let (depth, later) = if a >= b { (a, b) } else { (b, a) };
        if a < b {
            std::mem::swap(&mut first, &mut second);
        }
        code.extend(first);
        code.extend(second);
        code.push(op);
        depth.max(later + 1)
    };
    match expr {
        Expr::Const(value) => {
            code.extend([0, *value]);
            1
        }
        Expr::Tokens => {
            code.push(1);
            1
        }
        Expr::Add(a, b) => both(a, b, 2),
        Expr::Mul(a, b) => both(a, b, 3),
        Expr::CeilDiv(a, divisor) => {
            let depth = postfix(a, code);
            code.extend([4, (*divisor).max(1)]);
            depth
        }
        Expr::Min(a, b) => both(a, b, 5),
        Expr::Max(a, b) => both(a, b, 6),
    }
}

/// Encodes a CPU program; [`format`] says how.
///
/// # Errors
/// The program is not for a CPU, or is not well formed.
pub fn encode(program: &Program) -> Result<Vec<u64>, EncodeError> {
    let mut words = Words(vec![0; format::HEADER]);
    let workspace = words.expr(&program.workspace, "the workspace")?;
    let (buffers, inputs, outputs) = buffers(program, &mut words)?;
    let (slots, weights) = slots(program, &mut words)?;
    let launches = launches(program, &mut words)?;
    let mut fits = Vec::new();
    for fit in &program.fits {
        fits.extend([words.expr(&fit.size, &fit.what)?, fit.least, fit.most, fit.multiple.max(1)]);
    }
    let fits = words.put(&fits);
    let mut texts = Vec::new();
    for wanted in ["input", "output"] {
        for buffer in &program.buffers {
            let name = match &buffer.kind {
                BufferKind::Input { name } if wanted == "input" => name,
                BufferKind::Output { name } if wanted == "output" => name,
                BufferKind::Input { .. }
                | BufferKind::Output { .. }
                | BufferKind::Weight { .. }
                | BufferKind::Workspace => continue,
            };
            texts.push(words.text(&format!("{wanted} {name} is null")));
            let bytes = buffer.dtype.bytes();
            texts.push(words.text(&format!("{wanted} {name} is not aligned to {bytes} bytes")));
        }
    }
    let texts = words.put(&texts);

    let most = |of: &dyn Fn(&crate::Launch) -> u64| program.launches.iter().map(of).max().unwrap_or(0);
    let scratch = most(&|l| match &l.grid {
        Grid::Cpu(grid) => grid.scratch,
        Grid::Gpu(_) => 0,
    });
    let header = [
        format::MAGIC,
        format::VERSION,
        words.0.len() as u64,
        fingerprint(&program.slots),
        cpu_level(&program.target),
        program.max_tokens,
        workspace,
        weights,
        program.buffers.len() as u64,
        buffers,
        program.slots.len() as u64,
        slots,
        program.launches.len() as u64,
        launches,
        most(&|l| l.args.len() as u64),
        scratch,
        inputs,
        outputs,
        texts,
        program.fits.len() as u64,
        fits,
    ];
    words.0[..format::HEADER].copy_from_slice(&header);
    Ok(words.0)
}

fn buffers(program: &Program, words: &mut Words) -> Result<(u64, u64, u64), EncodeError> {
    let mut records = Vec::new();
    let (mut inputs, mut outputs) = (0, 0);
    for buffer in &program.buffers {
        let count = |n: &mut u64| {
            *n += 1;
            *n - 1
        };
        let (kind, ordinal) = match &buffer.kind {
            BufferKind::Input { .. } => (0, count(&mut inputs)),
            BufferKind::Output { .. } => (1, count(&mut outputs)),
            BufferKind::Weight { slot } if *slot >= program.slots.len() => {
                return Err(EncodeError::Dangling(format!("buffer {}", buffer.name)));
            }
            BufferKind::Weight { slot } => (2, *slot as u64),
            BufferKind::Workspace => (3, 0),
        };
        let bytes = buffer.shape.iter().fold(Expr::Const(buffer.dtype.bytes()), |n, s| s.clone().times(n));
        let (bytes, offset) = (words.expr(&bytes, &buffer.name)?, words.expr(&buffer.offset, &buffer.name)?);
        records.extend([kind, ordinal, buffer.dtype.bytes(), bytes, offset, u64::from(buffer.zeroed)]);
    }
    Ok((words.put(&records), inputs, outputs))
}

fn launches(program: &Program, words: &mut Words) -> Result<u64, EncodeError> {
    let mut records = Vec::new();
    for launch in &program.launches {
        let Grid::Cpu(grid) = &launch.grid else {
            return Err(EncodeError::NotCpu(format!("launch {}", launch.name)));
        };
        let mut args = Vec::new();
        for arg in &launch.args {
            let known = |buffer: &usize| match program.buffers.get(*buffer) {
                Some(_) => Ok(*buffer as u64),
                None => Err(EncodeError::Dangling(format!("launch {}", launch.name))),
            };
            match arg {
                Arg::Buffer(buffer) => args.extend([0, known(buffer)?, 0]),
                Arg::Offset { buffer, bytes } => {
                    args.extend([1, known(buffer)?, words.expr(bytes, &launch.name)?]);
                }
                Arg::Value(value) => args.extend([2, 0, words.expr(value, &launch.name)?]),
                Arg::TensorMap(_) => return Err(EncodeError::NotCpu(format!("launch {}", launch.name))),
            }
        }
        let (items, at) = (words.expr(&grid.items, &launch.name)?, words.put(&args));
        records.extend([items, grid.grain.max(1), grid.scratch, launch.args.len() as u64, at]);
    }
    Ok(words.put(&records))
}

fn slots(program: &Program, words: &mut Words) -> Result<(u64, u64), EncodeError> {
    let (places, total) =
        weight_offsets(&program.slots).ok_or_else(|| EncodeError::TooLarge("the sum of all weights".into()))?;
    if program.slots.len() > format::MAX_SLOTS {
        return Err(EncodeError::TooLarge("the number of weight slots".into()));
    }
    let mut records = Vec::new();
    for (slot, place) in program.slots.iter().zip(places) {
        let mut matrices = Vec::new();
        for matrix in &slot.matrices {
            let plain = u64::from(slot.is_native(matrix));
            let (count, views) = views(&matrix.source.view, words);
            let (rows, columns) = (words.put(&matrix.rows), words.put(&matrix.columns));
            let dtype = dtype_number(matrix.source.dtype);
            let (n_rows, n_columns) = (matrix.rows.len() as u64, matrix.columns.len() as u64);
            matrices.extend([dtype, plain, count, views, n_rows, rows, n_columns, columns]);
        }
        let matrices = words.put(&matrices);
        let offsets = words.put(&slot.offsets);
        let (layout, numbers) = layout_numbers(&slot.layout);
        records.extend([slot.bytes, place, slot.experts, slot.first_expert, dtype_number(slot.dtype)]);
        records.extend([slot.matrices.len() as u64, matrices, layout]);
        records.extend(numbers);
        records.push(offsets);
    }
    Ok((words.put(&records), total))
}

fn layout_numbers(layout: &Layout) -> (u64, [u64; 3]) {
    match *layout {
        Layout::Rows { columns } => (0, [columns, 0, 0]),
        Layout::Panels { panel, depth, columns } => (1, [panel, depth, columns]),
        Layout::Interleaved { block, columns } => (2, [block, columns, 0]),
        Layout::Fragments { lanes, unit, columns } => (3, [lanes, unit, columns]),
    }
}

fn views(views: &[View], words: &mut Words) -> (u64, u64) {
    let mut records = Vec::new();
    for view in views {
        records.extend(match view {
            View::Expert => [0; 5],
            View::Index { index } => [1, *index, 0, 0, 0],
            View::ExpertRows { rows } => [2, *rows, 0, 0, 0],
            View::Slice { axis, start, len, step } => [3, *axis, *start, *len, *step],
            View::Transpose => [4, 0, 0, 0, 0],
            View::Reshape { shape } => [5, shape.len() as u64, words.put(shape), 0, 0],
        });
    }
    (views.len() as u64, words.put(&records))
}

/// A sum over everything that decides what packed bytes mean.
pub fn fingerprint(slots: &[Slot]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |word: u64| {
        for byte in word.to_le_bytes() {
            sum = (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for slot in slots {
        let (layout, numbers) = layout_numbers(&slot.layout);
        [slot.bytes, slot.experts, dtype_number(slot.dtype), slot.matrices.len() as u64, layout]
            .into_iter()
            .chain(numbers)
            .chain(slot.offsets.iter().copied())
            .chain(slot.numbers.iter().copied())
            .for_each(&mut add);
        for matrix in &slot.matrices {
            matrix.rows.iter().chain(&matrix.columns).copied().for_each(&mut add);
            matrix.source.tensor.bytes().for_each(|b| add(u64::from(b)));
            if let Packing::Composed(recipe) = &matrix.source.packing {
                format!("{recipe:?}").bytes().for_each(|b| add(u64::from(b)));
            }
        }
    }
    sum
}
