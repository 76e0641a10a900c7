//! Tensor ops that move numbers: shapes and tables.

use super::{Value, Walker};
use crate::{
    CodegenError,
    rows::{
        exec::Ix,
        tensor,
        value::{Choice, Row},
    },
};
use moec_ir::{NodeId, ops::Shape};

impl<'c> Walker<'_, 'c> {
    /// Axis of a tensor as an axis of its rows.
    pub(super) fn axis(&self, id: NodeId, axis: i64, rank: usize) -> Result<usize, CodegenError> {
        let rank = i64::try_from(rank).unwrap_or(i64::MAX);
        let axis = if axis < 0 { axis + rank } else { axis };
        match usize::try_from(axis - 1) {
            Ok(axis) => Ok(axis),
            Err(_) => self.fail(id, "works along the rows, not inside them"),
        }
    }

    pub(super) fn shape(&self, id: NodeId, op: &Shape) -> Result<Value<'c>, CodegenError> {
        if let (Shape::Concat { .. }, Some(Value::Choice(_))) =
            (op, self.body.operands(id).first().and_then(|o| self.values.get(o)))
        {
            return self.join(id);
        }
        let row = self.held(id, 0)?;
        let rank = row.shape.len() + 1;
        let shape = self.row_shape(id)?;
        Ok(Value::Row(match op {
            Shape::Concat { axis } => {
                let axis = self.axis(id, *axis, rank)?;
                let rows: Vec<Row<'c>> = (0..self.body.operands(id).len())
                    .map(|i| self.held(id, i).map(|r| if r.cheap { r } else { r.stored(self.x) }))
                    .collect::<Result<_, _>>()?;
                tensor::concat(&rows, axis)
            }
            Shape::Slice { axis, range } => {
                let axis = self.axis(id, *axis, rank)?;
                match range.steps(Some(row.shape[axis])) {
                    Some(steps) => tensor::slice(&row, axis, steps, shape[axis]),
                    None => return self.fail(id, "the range is not on the axis"),
                }
            }
            Shape::Reshape { .. } => {
                if shape.iter().product::<u64>() != row.len() {
                    return self.fail(id, "changes the rows");
                }
                row.reshaped(shape)
            }
            Shape::Transpose { perm } => {
                let inside = perm.iter().skip(1).map(|p| self.axis(id, *p, rank));
                let perm = inside.collect::<Result<Vec<_>, _>>()?;
                tensor::transpose(&row, &perm)
            }
            Shape::Repeat { n, axis } => tensor::repeat(&row, self.axis(id, *axis, rank)?, *n),
            Shape::Stack { axis } => {
                let axis = self.axis(id, *axis, rank + 1)?;
                let rows: Vec<Row<'c>> = (0..self.body.operands(id).len())
                    .map(|i| {
                        self.held(id, i).map(|r| {
                            let mut one = r.shape.clone();
                            one.insert(axis, 1);
                            if r.cheap { r } else { r.stored(self.x) }.reshaped(one)
                        })
                    })
                    .collect::<Result<_, _>>()?;
                tensor::concat(&rows, axis)
            }
            Shape::Pad { .. } => return self.fail(id, "changes the number of rows"),
        }))
    }

    /// Routes joined slot by slot.
    pub(super) fn join(&self, id: NodeId) -> Result<Value<'c>, CodegenError> {
        let choices: Vec<Choice<'c>> =
            (0..self.body.operands(id).len()).map(|i| self.choice(id, i)).collect::<Result<_, _>>()?;
        let idx: Vec<Row<'c>> = choices.iter().map(|c| c.idx.clone()).collect();
        let w: Option<Vec<Row<'c>>> = choices.iter().map(|c| c.w.clone()).collect();
        Ok(Value::Choice(Choice {
            slots: choices.iter().map(|c| c.slots).sum(),
            experts: choices.iter().map(|c| c.experts).max().unwrap_or(0),
            idx: tensor::concat(&idx, 0),
            w: w.map(|w| tensor::concat(&w, 0)),
        }))
    }

    pub(super) fn gather(&self, id: NodeId, name: &str) -> Result<Value<'c>, CodegenError> {
        let ids = match self.body.operands(id).first().and_then(|o| self.values.get(o)) {
            Some(Value::Row(row)) => row.clone(),
            Some(Value::Choice(choice)) => choice.idx.clone(),
            _ => return self.fail(id, "ids are needed"),
        };
        let (at, dtype) = self.memory(id, name)?;
        let sizes = self.sizes(id, name)?;
        let width: u64 = sizes.iter().skip(1).product();
        let rows = sizes.first().copied().unwrap_or(1);
        let ints = self.body.weights.get(name).is_some_and(|w| !w.dtype.is_float());
        let mut shape = ids.shape.clone();
        shape.extend(sizes.iter().skip(1));
        let (inner, c) = (ids.clone(), |n: u64| i64::try_from(n).unwrap_or(i64::MAX));
        let row = Row::new(shape, false, move |x, ix| {
            let b = x.b;
            let which = inner.scalar(x, b.divui(ix.at, b.i64(c(width.max(1)))));
            let which = b.cast("arith.extsi", which, "i64");
            // An id outside of the table must not become an address; that of an empty slot, -1, is the last row.
            let last = b.i64(c(rows.saturating_sub(1)));
            let which = b.select(b.cmpi("slt", which, b.i64(0)), last, b.minsi(which, last));
            let place = b.addi(b.mulc(which, c(width)), b.remui(ix.at, b.i64(c(width.max(1)))));
            let value = x.load(at, dtype, Ix { at: place, width: 1 });
            if ints { b.cast("arith.fptosi", value, "i32") } else { value }
        })
        .after(&[&ids]);
        Ok(Value::Row(if ints { row.ints() } else { row }))
    }
}
