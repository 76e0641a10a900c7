//! Strided views of stored tensors: the steps from a checkpoint tensor to a matrix.
//!
//! No allocation and no element is touched here; a view says where each element lies. Both the
//! packing of [`moec-runtime`](https://docs.rs/moec-runtime) and the packing inside a generated C
//! library use it, so that they cannot differ.

/// Most axes that a stored tensor or a view may have.
pub const MAX_RANK: usize = 8;

/// One step of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Entry `e` (the expert) of axis 0; the axis disappears.
    Expert,
    /// Entry of axis 0; the axis disappears.
    Index(u64),
    /// Rows `e * rows .. (e + 1) * rows` of axis 0.
    ExpertRows(u64),
    /// `len` entries of `axis` from `start`, `step` apart.
    Slice {
        /// Axis, from the outermost.
        axis: u64,
        /// First entry.
        start: u64,
        /// Entries.
        len: u64,
        /// Distance.
        step: u64,
    },
    /// Swap the last two axes.
    Transpose,
    /// Another shape for the same elements.
    Reshape(&'a [u64]),
}

/// Why a step does not fit a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewError {
    /// The tensor has too few axes for the step, or more than [`MAX_RANK`].
    Rank,
    /// The step asks for entries that the axis does not have.
    Range,
    /// The number of elements differs.
    Size,
    /// The elements do not lie at regular distances in the new shape; they have to be copied.
    Copy,
}

/// Where the elements of a view lie, in elements from the start of the stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    rank: usize,
    sizes: [u64; MAX_RANK],
    strides: [u64; MAX_RANK],
    offset: u64,
}

/// A view with two axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixAccess {
    /// Position of element `(0, 0)`.
    pub offset: u64,
    /// Elements between rows.
    pub row_stride: u64,
    /// Elements between columns.
    pub column_stride: u64,
}

/// Entry `axis`, without a way to panic; the launcher is linked into programs that must not stop.
fn at(axes: &[u64; MAX_RANK], axis: usize) -> u64 {
    axes.get(axis).copied().unwrap_or(1)
}

fn set(axes: &mut [u64; MAX_RANK], axis: usize, value: u64) {
    if let Some(entry) = axes.get_mut(axis) {
        *entry = value;
    }
}

impl Access {
    /// All elements of a tensor, in row-major order.
    ///
    /// # Errors
    /// Too many axes, or more than 2^64 elements.
    pub fn contiguous(shape: &[u64]) -> Result<Self, ViewError> {
        let mut access = Self { rank: shape.len(), sizes: [1; MAX_RANK], strides: [0; MAX_RANK], offset: 0 };
        let mut stride = 1u64;
        for (axis, &size) in shape.iter().enumerate().rev() {
            *access.sizes.get_mut(axis).ok_or(ViewError::Rank)? = size;
            *access.strides.get_mut(axis).ok_or(ViewError::Rank)? = stride;
            stride = stride.checked_mul(size.max(1)).ok_or(ViewError::Size)?;
        }
        Ok(access)
    }

    /// Sizes of the axes, outermost first.
    pub fn shape(&self) -> &[u64] {
        self.sizes.get(..self.rank).unwrap_or(&[])
    }

    fn strides(&self) -> &[u64] {
        self.strides.get(..self.rank).unwrap_or(&[])
    }

    /// Number of elements.
    pub fn len(&self) -> u64 {
        self.shape().iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }

    /// Position of the `index`-th element in row-major order.
    pub fn position(&self, mut index: u64) -> u64 {
        let mut at = self.offset;
        for (&size, &stride) in self.shape().iter().zip(self.strides()).rev() {
            let size = size.max(1);
            at += index % size * stride;
            index /= size;
        }
        at
    }

    /// First position and one past the last position of all elements; `(0, 0)` when there are none.
    pub fn span(&self) -> (u64, u64) {
        if self.is_empty() {
            return (0, 0);
        }
        let last: u64 = self.shape().iter().zip(self.strides()).map(|(&size, &stride)| (size - 1) * stride).sum();
        (self.offset, self.offset + last + 1)
    }

    /// Applies one step for expert number `expert`.
    ///
    /// # Errors
    /// The step does not fit; the view is unchanged.
    pub fn apply(&mut self, step: Step<'_>, expert: u64) -> Result<(), ViewError> {
        match step {
            Step::Expert => self.entry(expert),
            Step::Index(index) => self.entry(index),
            Step::ExpertRows(rows) => {
                let start = expert.checked_mul(rows).ok_or(ViewError::Range)?;
                self.slice(0, start, rows, 1)
            }
            Step::Slice { axis, start, len, step } => {
                self.slice(usize::try_from(axis).map_err(|_| ViewError::Rank)?, start, len, step)
            }
            Step::Transpose => {
                let swap = |axes: &mut [u64; MAX_RANK]| match axes.get_mut(..self.rank) {
                    Some([.., rows, columns]) => {
                        core::mem::swap(rows, columns);
                        Ok(())
                    }
                    Some(_) | None => Err(ViewError::Rank),
                };
                swap(&mut self.sizes)?;
                swap(&mut self.strides)
            }
            Step::Reshape(shape) => self.reshape(shape),
        }
    }

    fn entry(&mut self, index: u64) -> Result<(), ViewError> {
        let (&size, &stride) = match (self.shape().first(), self.strides().first()) {
            (Some(size), Some(stride)) => (size, stride),
            (None, _) | (_, None) => return Err(ViewError::Rank),
        };
        if index >= size {
            return Err(ViewError::Range);
        }
        self.offset += index * stride;
        for axes in [&mut self.sizes, &mut self.strides] {
            for axis in 0..MAX_RANK - 1 {
                set(axes, axis, at(axes, axis + 1));
            }
        }
        self.rank -= 1;
        Ok(())
    }

    fn slice(&mut self, axis: usize, start: u64, len: u64, step: u64) -> Result<(), ViewError> {
        let size = *self.shape().get(axis).ok_or(ViewError::Rank)?;
        let step = step.max(1);
        if len > 0 {
            let last = (len - 1).checked_mul(step).and_then(|d| d.checked_add(start)).ok_or(ViewError::Range)?;
            if last >= size {
                return Err(ViewError::Range);
            }
        } else if start > size {
            return Err(ViewError::Range);
        }
        let stride = self.strides.get_mut(axis).ok_or(ViewError::Rank)?;
        self.offset += if len > 0 { start * *stride } else { 0 };
        *stride = stride.saturating_mul(step);
        *self.sizes.get_mut(axis).ok_or(ViewError::Rank)? = len;
        Ok(())
    }

    /// Another shape without moving elements.
    fn reshape(&mut self, shape: &[u64]) -> Result<(), ViewError> {
        let mut next = Self::contiguous(shape)?;
        next.offset = self.offset;
        let wanted = shape.iter().try_fold(1u64, |n, &s| n.checked_mul(s)).ok_or(ViewError::Size)?;
        if wanted != self.len() {
            return Err(ViewError::Size);
        }
        if wanted == 0 {
            *self = next;
            return Ok(());
        }
        // Axes of size 1 have no say; what is left is `old`.
        let (mut sizes, mut strides, mut count) = ([1; MAX_RANK], [0; MAX_RANK], 0);
        for (&size, &stride) in self.shape().iter().zip(self.strides()) {
            if size != 1 {
                set(&mut sizes, count, size);
                set(&mut strides, count, stride);
                count += 1;
            }
        }
        next.strides = [0; MAX_RANK];
        // Walk groups of old and new axes with equal products, from the outermost.
        let (mut old, mut new) = (0, 0);
        while old < count && new < next.rank {
            let (mut old_end, mut new_end) = (old + 1, new + 1);
            let (mut old_product, mut new_product) = (at(&sizes, old), at(&next.sizes, new));
            while old_product != new_product && old_end <= MAX_RANK && new_end <= MAX_RANK {
                if new_product < old_product {
                    new_product *= at(&next.sizes, new_end);
                    new_end += 1;
                } else {
                    old_product *= at(&sizes, old_end);
                    old_end += 1;
                }
            }
            if (old..old_end - 1).any(|axis| at(&strides, axis) != at(&sizes, axis + 1) * at(&strides, axis + 1)) {
                return Err(ViewError::Copy);
            }
            let mut stride = at(&strides, old_end - 1);
            for axis in (new..new_end).rev() {
                set(&mut next.strides, axis, stride);
                stride = stride.saturating_mul(at(&next.sizes, axis));
            }
            (old, new) = (old_end, new_end);
        }
        *self = next;
        Ok(())
    }

    /// The view as `rows x columns`; a vector counts as one column.
    ///
    /// # Errors
    /// [`ViewError::Size`] when no grouping of neighbouring axes gives these sizes, [`ViewError::Copy`]
    /// when one does but the elements lie irregularly.
    pub fn matrix(&self, rows: u64, columns: u64) -> Result<MatrixAccess, ViewError> {
        let shape = self.shape();
        let product = |sizes: Option<&[u64]>| sizes.map(|s| s.iter().product::<u64>());
        let fits = (0..=shape.len())
            .any(|split| product(shape.get(..split)) == Some(rows) && product(shape.get(split..)) == Some(columns));
        if !fits {
            return Err(ViewError::Size);
        }
        let mut matrix = *self;
        matrix.reshape(&[rows, columns])?;
        Ok(MatrixAccess { offset: matrix.offset, row_stride: matrix.strides[0], column_stride: matrix.strides[1] })
    }
}
