//! What a node reads: operands, weights, and inputs in memory.

use super::{Value, Walker};
use crate::{
    CodegenError,
    mlir::V,
    rows::{
        InputPart,
        combine::Sorted,
        exec::Ix,
        linear, type_of,
        value::{Choice, Row},
    },
};
use moec_abi::DType;
use moec_ir::{Extent, NodeId, Type, WeightName};

impl<'c> Walker<'_, 'c> {
    /// Shape of one row of a tensor value.
    pub(super) fn row_shape(&self, id: NodeId) -> Result<Vec<u64>, CodegenError> {
        match type_of(self.body, id)? {
            Type::Tensor(tensor) => tensor
                .shape
                .iter()
                .skip(1)
                .map(|d| match d.known() {
                    Some(n) => Ok(n),
                    None => self.fail(id, "the size of a row depends on the number of tokens"),
                })
                .collect(),
            Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => self.fail(id, "a tensor is needed"),
        }
    }

    pub(super) fn input(
        &self,
        id: NodeId,
        memory: &[(InputPart, V<'c>)],
        dtype: Option<DType>,
        partial: bool,
    ) -> Result<Value<'c>, CodegenError> {
        let find = |part| match memory.iter().find(|(p, _)| *p == part) {
            Some((_, pointer)) => Ok(*pointer),
            None => self.fail(id, "memory of an operand is missing"),
        };
        Ok(match type_of(self.body, id)? {
            Type::Tensor(tensor) if self.is_shared(id) => {
                let shape: Option<Vec<u64>> = tensor.shape.iter().map(moec_ir::Dim::known).collect();
                let Some(shape) = shape else {
                    return self.fail(id, "a value for all rows must have a known size");
                };
                Value::Row(shared(find(InputPart::Data)?, dtype.unwrap_or(DType::F32), shape))
            }
            Type::Tensor(_) => {
                let shape = self.row_shape(id)?;
                let dtype = dtype.unwrap_or(DType::F32);
                Value::Row(global(find(InputPart::Data)?, dtype, shape))
            }
            Type::Route(route) | Type::Plan(route) => {
                let idx = global(find(InputPart::Idx)?, DType::I32, vec![route.slots]);
                let w = if route.weighted {
                    Some(global(find(InputPart::Weights)?, DType::F32, vec![route.slots]))
                } else {
                    None
                };
                Value::Choice(Choice { slots: route.slots, experts: route.experts, idx, w })
            }
            Type::Ragged(ragged) => Value::Sorted(Sorted {
                rows: find(InputPart::Data)?,
                dtype: dtype.unwrap_or(DType::F32),
                width: ragged.row.iter().product(),
                positions: find(InputPart::Positions)?,
                partial,
            }),
        })
    }

    /// Whether the value is the same for all rows wherever it is used.
    pub(super) fn is_shared(&self, id: NodeId) -> bool {
        let users = self.body.users(id);
        let shared = |user: &NodeId| {
            let operands = self.body.operands(*user);
            (0..operands.len()).all(|i| operands[i] != id || self.body.is_shared_by_rows(*user, i))
        };
        !users.is_empty() && users.iter().all(shared)
    }

    /// An operand as numbers.
    pub(super) fn row(&self, id: NodeId, operand: usize) -> Result<Row<'c>, CodegenError> {
        Ok(self.held(id, operand)?.numbers())
    }

    /// An operand as it is held: numbers, or integers.
    pub(super) fn held(&self, id: NodeId, operand: usize) -> Result<Row<'c>, CodegenError> {
        match self.body.operands(id).get(operand).and_then(|o| self.values.get(o)) {
            Some(Value::Row(row)) => Ok(row.clone()),
            _ => self.fail(id, "an operand is no tensor of rows"),
        }
    }

    /// The second operand of a selection that is bounded at run time.
    pub(super) fn bound(&self, id: NodeId, is_there: bool) -> Result<Option<Row<'c>>, CodegenError> {
        if is_there { self.row(id, 1).map(Some) } else { Ok(None) }
    }

    pub(super) fn choice(&self, id: NodeId, operand: usize) -> Result<Choice<'c>, CodegenError> {
        match self.body.operands(id).get(operand).and_then(|o| self.values.get(o)) {
            Some(Value::Choice(choice)) => Ok(choice.clone()),
            _ => self.fail(id, "an operand is no route"),
        }
    }

    pub(super) fn memory(&self, id: NodeId, name: &str) -> Result<(V<'c>, DType), CodegenError> {
        match self.weights.get(name) {
            Some(found) => Ok(*found),
            None => self.fail(id, "a weight has no memory"),
        }
    }

    pub(super) fn sizes(&self, id: NodeId, name: &str) -> Result<Vec<u64>, CodegenError> {
        let Some(weight) = self.body.weights.get(name) else { return self.fail(id, "a weight is not declared") };
        weight
            .shape
            .iter()
            .map(|extent| match extent {
                Extent::Fixed(n) => Ok(*n),
                Extent::PerExpert(_) => self.fail(id, "a weight has one size per expert"),
            })
            .collect()
    }

    /// A weight as a row that is the same for all tokens.
    pub(super) fn table(&self, id: NodeId, name: &str) -> Result<Row<'c>, CodegenError> {
        let (at, dtype) = self.memory(id, name)?;
        let shape = self.sizes(id, name)?;
        Ok(Row::new(shape, true, move |x, ix| x.load(at, dtype, ix)).cheap())
    }

    pub(super) fn optional(&self, id: NodeId, name: Option<&WeightName>) -> Result<Option<Row<'c>>, CodegenError> {
        name.map(|n| self.table(id, n)).transpose()
    }

    pub(super) fn matrix(&self, id: NodeId, name: &str) -> Result<linear::Matrix<'c>, CodegenError> {
        let (at, dtype) = self.memory(id, name)?;
        match self.sizes(id, name)?.as_slice() {
            [n, k] => Ok(linear::Matrix { at, dtype, n: *n, k: *k }),
            _ => self.fail(id, "the weight is no matrix"),
        }
    }
}

/// A value in global memory that is the same for all rows.
pub(super) fn shared<'c>(pointer: V<'c>, dtype: DType, shape: Vec<u64>) -> Row<'c> {
    let ints = matches!(dtype, DType::I32 | DType::I64);
    // Numbers are wanted wherever such values stand.
    Row::new(shape, !ints, move |x, ix| x.load(pointer, dtype, ix)).cheap()
}

/// A row of a tensor in global memory.
pub(super) fn global<'c>(pointer: V<'c>, dtype: DType, shape: Vec<u64>) -> Row<'c> {
    let len = i64::try_from(shape.iter().product::<u64>()).unwrap_or(i64::MAX);
    let ints = matches!(dtype, DType::I32 | DType::I64);
    let row = Row::new(shape, !ints, move |x, ix| {
        let b = x.b;
        let at = b.addi(b.mulc(x.token(), len), ix.at);
        match dtype {
            DType::I32 => b.load(b.gep(pointer, "i32", at), "i32", 4),
            DType::I64 => b.cast("arith.trunci", b.load(b.gep(pointer, "i64", at), "i64", 8), "i32"),
            DType::F64
            | DType::F32
            | DType::Bf16
            | DType::F16
            | DType::F8e4m3
            | DType::F8e5m2
            | DType::U8
            | DType::I8 => x.load(pointer, dtype, Ix { at, width: ix.width }),
        }
    })
    .cheap();
    if ints { row.ints() } else { row }
}
