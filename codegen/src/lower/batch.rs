//! Ops that need the whole batch, and values that need no kernel at all.

use super::{
    Kernels, Lowering,
    memory::{Place, dim},
    weights,
};
use crate::{
    CodegenError,
    batch::{BatchArg, BatchKernel},
    rows::{InputPart, OutputPart, type_of},
};
use moec_abi::{Arg, DType, Expr, Layout};
use moec_ir::{
    NodeId, Op, Type,
    ops::{Kernel, Shape},
};

impl<'g> Lowering<'g> {
    /// A kernel with one op.
    pub(super) fn batch(&mut self, id: NodeId, kernel: &'g Kernel) -> Result<(), CodegenError> {
        if self.shares_memory(id, kernel)? {
            return Ok(());
        }
        let graph = self.graph;
        let operands = graph.operands(id);
        let dtypes = operands.iter().map(|o| self.memory.place(*o).and_then(Place::dtype)).collect();
        let place = match type_of(graph, id)? {
            Type::Tensor(_) | Type::Route(_) => self.memory.allocate(graph, id, self.target)?,
            Type::Ragged(ragged) => {
                let plan = operands.iter().find_map(|o| match self.memory.place(*o) {
                    Some(Place::Plan { .. }) => Some(*o),
                    Some(Place::Ragged { plan, .. }) => Some(*plan),
                    Some(Place::Tensor { .. } | Place::Route { .. }) | None => None,
                });
                let Some(plan) = plan else { return self.fail(id, "the rows have no plan") };
                let width = ragged.row.iter().product();
                self.memory.ragged(graph, id, plan, (DType::F32, width))?
            }
            Type::Plan(_) => return self.fail(id, "a plan has a kernel of its own"),
        };
        let symbol = self.symbol(id, "");
        let result = place.dtype().unwrap_or(DType::F32);
        let planned = BatchKernel::plan(symbol.clone(), &kernel.body, dtypes, result)?;
        let mut args = Vec::new();
        for arg in &planned.args {
            args.push(match arg {
                BatchArg::Input { operand, part } => match operands.get(*operand) {
                    Some(operand) => self.part(id, *operand, *part)?,
                    None => return self.fail(id, "an operand has no memory"),
                },
                BatchArg::Weight { name, dtype } => {
                    let rows = Layout::Rows { columns: 1 };
                    let slot = weights::whole(&kernel.body, id, graph, name, rows, *dtype)?;
                    Arg::Buffer(self.memory.weight(&mut self.slots, slot))
                }
                BatchArg::Output(part) => {
                    let buffer = match part {
                        OutputPart::Data => place.data(),
                        OutputPart::Idx => place.idx(),
                        OutputPart::Weights => place.weights(),
                    };
                    match buffer {
                        Some(buffer) => Arg::Buffer(buffer),
                        None => return self.fail(id, "the result has no memory"),
                    }
                }
                BatchArg::Scratch(n) => {
                    let name = format!("{}.scratch", graph.node(id).name);
                    Arg::Buffer(self.memory.scratch(name, DType::F32, vec![dim(n)]))
                }
                BatchArg::Size(n) => Arg::Value(dim(n)),
            });
        }
        let (grid, units) = planned.grid(self.target);
        args.push(Arg::Value(units));
        self.launch(id, symbol, args, grid);
        self.kernels.push(Kernels::Batch(planned));
        Ok(())
    }

    /// Memory of a part of a value.
    fn part(&self, id: NodeId, operand: NodeId, part: InputPart) -> Result<Arg, CodegenError> {
        let Some(place) = self.memory.place(operand) else { return self.fail(id, "an operand has no memory") };
        let plan = match place {
            Place::Plan { .. } => Some(place),
            Place::Ragged { plan, width, .. } => {
                let row = match type_of(self.graph, operand)? {
                    Type::Ragged(ragged) => ragged.row.iter().product(),
                    Type::Tensor(_) | Type::Route(_) | Type::Plan(_) => *width,
                };
                if row != *width {
                    return self.fail(id, "rows of an operand are padded");
                }
                self.memory.place(*plan)
            }
            Place::Tensor { .. } | Place::Route { .. } => None,
        };
        let buffer = match (part, plan) {
            (InputPart::Data, _) => place.data(),
            (InputPart::Idx, _) => place.idx(),
            (InputPart::Weights, _) => place.weights(),
            (InputPart::Positions, _) => place.positions(),
            (InputPart::Map, Some(Place::Plan { map, .. })) => Some(*map),
            (InputPart::Scale, Some(Place::Plan { scale, .. })) => *scale,
            (InputPart::Offsets, Some(Place::Plan { offsets, experts, .. })) => {
                return Ok(Arg::Offset { buffer: *offsets, bytes: Expr::Const(experts * 4) });
            }
            (InputPart::Map | InputPart::Scale | InputPart::Offsets, _) => None,
        };
        match buffer {
            Some(buffer) => Ok(Arg::Buffer(buffer)),
            None => self.fail(id, "an operand has no such memory"),
        }
    }

    /// Values that are there already: weights as they are packed, and other shapes of a value.
    fn shares_memory(&mut self, id: NodeId, kernel: &'g Kernel) -> Result<bool, CodegenError> {
        let Some(result) = kernel.body.outputs.first().map(|o| o.node) else { return Ok(false) };
        let (graph, node) = (self.graph, kernel.body.node(result));
        if graph.is_output(id) || node.round.is_some() || graph.node(id).round.is_some() {
            return Ok(false);
        }
        if let Op::Param(op) = &node.op
            && kernel.body.weights.get(&op.w).is_some_and(|w| w.dtype.is_float())
        {
            let bf16 = kernel.body.weights.get(&op.w).is_some_and(|w| w.dtype == moec_ir::DType::Bf16);
            let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
            let slot = weights::whole(&kernel.body, id, graph, &op.w, Layout::Rows { columns: 1 }, dtype)?;
            let buffer = self.memory.weight(&mut self.slots, slot);
            self.memory.alias(id, Place::Tensor { buffer, dtype });
            return Ok(true);
        }
        if !matches!(node.op, Op::Shape(Shape::Reshape { .. })) {
            return Ok(false);
        }
        let source = graph.operands(id).first().and_then(|o| self.memory.place(*o)).cloned();
        match source {
            Some(place @ (Place::Tensor { .. } | Place::Route { .. })) => {
                self.memory.alias(id, place);
                Ok(true)
            }
            Some(Place::Plan { .. } | Place::Ragged { .. }) | None => Ok(false),
        }
    }
}
