//! Values of a row kernel: expressions per element, computed where they are used.

use super::exec::{Exec, Ix, Scratch};
use crate::mlir::V;
use moec_abi::DType;
use std::rc::Rc;

type Get<'c> = Rc<dyn Fn(&Exec<'_, 'c>, Ix<'c>) -> V<'c> + 'c>;
type Prepare<'c> = Rc<dyn Fn(&Exec<'_, 'c>) + 'c>;

/// One row of a tensor: a function from the position in the row to an f32 (or, if `ints`, an i32).
#[derive(Clone)]
pub(crate) struct Row<'c> {
    /// Sizes of the row, outermost first; empty for one number per row.
    pub(crate) shape: Vec<u64>,
    /// Whether several neighbours can be had at once.
    pub(crate) vector: bool,
    /// Whether elements are i32 instead of f32.
    pub(crate) ints: bool,
    /// Whether reading an element twice costs no more than a load.
    pub(crate) cheap: bool,
    get: Get<'c>,
    prepare: Vec<Prepare<'c>>,
}

impl<'c> Row<'c> {
    /// A row given by a function of the position.
    pub(crate) fn new(shape: Vec<u64>, vector: bool, get: impl Fn(&Exec<'_, 'c>, Ix<'c>) -> V<'c> + 'c) -> Self {
        Self { shape, vector, ints: false, cheap: false, get: Rc::new(get), prepare: Vec::new() }
    }

    /// Marks reads as no dearer than a load.
    #[must_use]
    pub(crate) fn cheap(mut self) -> Self {
        self.cheap = true;
        self
    }

    /// Marks elements as integers.
    #[must_use]
    pub(crate) fn ints(mut self) -> Self {
        self.ints = true;
        self
    }

    /// Elements as f32.
    #[must_use]
    pub(crate) fn numbers(self) -> Self {
        if !self.ints {
            return self;
        }
        let inner = self.clone();
        let row =
            Self::new(self.shape.clone(), false, move |x, ix| x.b.cast("arith.sitofp", inner.scalar(x, ix.at), "f32"));
        row.after(&[&self])
    }

    /// Another shape for the same elements.
    #[must_use]
    pub(crate) fn reshaped(mut self, shape: Vec<u64>) -> Self {
        self.shape = shape;
        self
    }

    /// Adds code that must run at the start of every row before elements are read.
    #[must_use]
    pub(crate) fn prepared_by(mut self, prepare: impl Fn(&Exec<'_, 'c>) + 'c) -> Self {
        self.prepare.push(Rc::new(prepare));
        self
    }

    /// Takes over what the operands need to be prepared.
    #[must_use]
    pub(crate) fn after(mut self, operands: &[&Row<'c>]) -> Self {
        let inherited: Vec<_> = operands.iter().flat_map(|o| o.prepare.iter().cloned()).collect();
        self.prepare.splice(0..0, inherited);
        self
    }

    /// Elements of the row.
    pub(crate) fn len(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Emits what must come first in a row.
    pub(crate) fn prepare(&self, x: &Exec<'_, 'c>) {
        for step in &self.prepare {
            step(x);
        }
    }

    /// Emits the elements at `ix`.
    pub(crate) fn get(&self, x: &Exec<'_, 'c>, ix: Ix<'c>) -> V<'c> {
        (self.get)(x, ix)
    }

    /// Emits the element at position `at` (i64).
    pub(crate) fn scalar(&self, x: &Exec<'_, 'c>, at: V<'c>) -> V<'c> {
        self.get(x, Ix { at, width: 1 })
    }

    /// Computes all rows in flight now and keeps them in scratch memory.
    #[must_use]
    pub(crate) fn stored(self, x: &Exec<'_, 'c>) -> Self {
        if self.cheap {
            return self;
        }
        let scratch = x.alloc(self.len() * 4);
        x.each_row(|| {
            self.prepare(x);
            // A round trip through memory is at least as wide as the row's own expression.
            x.each(self.len(), self.vector, |ix| {
                let value = self.get(x, ix);
                let at = x.b.gep(x.at(scratch), "f32", ix.at);
                x.b.store(value, at, 4);
            });
        });
        if self.ints { Self::from_scratch_ints(scratch, self.shape) } else { Self::from_scratch(scratch, self.shape) }
    }

    /// The row kept in scratch memory (4 bytes per element).
    pub(crate) fn from_scratch(scratch: Scratch, shape: Vec<u64>) -> Self {
        Self::new(shape, true, move |x, ix| x.load(x.at(scratch), DType::F32, ix)).cheap()
    }

    /// The row as f32 in scratch memory, so that rows have addresses.
    #[must_use]
    pub(crate) fn in_scratch(mut self, x: &Exec<'_, 'c>) -> Placed {
        self.cheap = false;
        let scratch = x.alloc(self.len() * 4);
        x.each_row(|| {
            self.prepare(x);
            x.each(self.len(), self.vector, |ix| {
                x.store(self.get(x, ix), x.at(scratch), DType::F32, ix);
            });
        });
        Placed(scratch)
    }

    /// The first elements of the row, in another shape.
    #[must_use]
    pub(crate) fn narrowed(mut self, shape: Vec<u64>) -> Self {
        self.shape = shape;
        self
    }

    /// Integers kept in scratch memory.
    pub(crate) fn from_scratch_ints(scratch: Scratch, shape: Vec<u64>) -> Self {
        Self::new(shape, false, move |x, ix| {
            let at = x.b.gep(x.at(scratch), "i32", ix.at);
            x.b.load(at, "i32", 4)
        })
        .cheap()
        .ints()
    }
}

/// Rows of f32 in scratch memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed(Scratch);

impl Placed {
    /// Address of row `r` (i64) of the block.
    pub(crate) fn place<'c>(self, x: &Exec<'_, 'c>, r: V<'c>) -> V<'c> {
        x.at_row(self.0, r)
    }
}

/// The choice of a row: ids of its slots, -1 where empty, and weights.
#[derive(Clone)]
pub(crate) struct Choice<'c> {
    /// Slots.
    pub(crate) slots: u64,
    /// Experts.
    pub(crate) experts: u64,
    /// Ids, `[slots]` integers.
    pub(crate) idx: Row<'c>,
    /// Weights or scores, `[slots]`.
    pub(crate) w: Option<Row<'c>>,
}
