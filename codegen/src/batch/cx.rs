//! What the body of a batch kernel works with: memory, sizes, and threads.

use super::{BatchArg, BatchKernel, unsupported};
use crate::{
    CodegenError, Target, math,
    mlir::{Builder, V},
    rows::{InputPart, OutputPart, element, type_of},
};
use indexmap::IndexMap;
use moec_abi::DType;
use moec_ir::{Dim, Extent, Graph, NodeId, RouteType, Type, WeightName};

/// A number as a constant of the code.
pub(super) fn c(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[expect(clippy::cast_possible_truncation, reason = "kernels compute in f32")]
pub(super) const fn narrow(value: f64) -> f32 {
    value as f32
}

/// A tensor in memory.
#[derive(Clone, Debug)]
pub(super) struct Array<'c> {
    pub(super) at: V<'c>,
    pub(super) dtype: DType,
    pub(super) shape: Vec<Dim>,
}

/// A route in memory.
#[derive(Clone, Debug)]
pub(super) struct Slots<'c> {
    pub(super) idx: V<'c>,
    pub(super) w: Option<V<'c>>,
    pub(super) ty: RouteType,
}

/// The kernel under construction.
pub(super) struct Cx<'a, 'c> {
    pub(super) b: &'a Builder<'c>,
    pub(super) target: Target,
    pub(super) body: &'a Graph,
    pub(super) node: NodeId,
    inputs: Vec<((usize, InputPart), V<'c>)>,
    dtypes: &'a [Option<DType>],
    weights: IndexMap<&'a WeightName, (V<'c>, DType)>,
    outputs: Vec<(OutputPart, V<'c>)>,
    pub(super) scratch: Vec<V<'c>>,
    sizes: IndexMap<Dim, V<'c>>,
    result: DType,
    team: Option<(V<'c>, V<'c>)>,
}

impl<'a, 'c> Cx<'a, 'c> {
    pub(super) fn new(
        kernel: &'a BatchKernel<'_>,
        b: &'a Builder<'c>,
        target: Target,
        values: &[V<'c>],
        team: Option<(V<'c>, V<'c>)>,
    ) -> Self {
        let mut cx = Self {
            b,
            target,
            body: kernel.body,
            node: kernel.node,
            inputs: Vec::new(),
            dtypes: &kernel.operands,
            weights: IndexMap::new(),
            outputs: Vec::new(),
            scratch: Vec::new(),
            sizes: IndexMap::new(),
            result: kernel.result,
            team,
        };
        for (arg, value) in kernel.args.iter().zip(values) {
            match arg {
                BatchArg::Input { operand, part } => cx.inputs.push(((*operand, *part), *value)),
                BatchArg::Weight { name, dtype } => {
                    cx.weights.insert(name, (*value, *dtype));
                }
                BatchArg::Output(part) => cx.outputs.push((*part, *value)),
                BatchArg::Scratch(_) => cx.scratch.push(*value),
                BatchArg::Size(dim) => {
                    cx.sizes.insert(dim.clone(), *value);
                }
            }
        }
        cx
    }

    pub(super) fn fail<T>(&self, what: &str) -> Result<T, CodegenError> {
        unsupported(self.body, self.node, what)
    }

    /// A size as a number.
    pub(super) fn size(&self, dim: &Dim) -> V<'c> {
        let b = self.b;
        match dim {
            Dim::Const(n) => b.i64(c(*n)),
            Dim::Tokens | Dim::Add(..) | Dim::Mul(..) | Dim::CeilDiv(..) | Dim::Received(_) => {
                match (self.sizes.get(dim), dim) {
                    (Some(value), _) => *value,
                    (None, Dim::Add(x, y)) => b.addi(self.size(x), self.size(y)),
                    (None, Dim::Mul(x, y)) => b.muli(self.size(x), self.size(y)),
                    (None, Dim::CeilDiv(x, n)) => b.divui(b.addc(self.size(x), c(*n) - 1), b.i64(c((*n).max(1)))),
                    // Every `T` stands in a shape, so it is an argument or part of one.
                    (None, Dim::Tokens | Dim::Const(_) | Dim::Received(_)) => b.i64(0),
                }
            }
        }
    }

    /// The node behind operand `i` of the op, and its position among the kernel's operands.
    fn source(&self, i: usize) -> Result<(NodeId, usize), CodegenError> {
        let id = self.body.operands(self.node).get(i).copied();
        let place = id.and_then(|id| self.body.inputs().iter().position(|n| *n == id));
        match (id, place) {
            (Some(id), Some(place)) => Ok((id, place)),
            (None, _) | (_, None) => self.fail("an operand is missing"),
        }
    }

    /// Memory of a part of operand `i`.
    pub(super) fn memory(&self, i: usize, part: InputPart) -> Result<V<'c>, CodegenError> {
        let (_, place) = self.source(i)?;
        match self.inputs.iter().find(|(key, _)| *key == (place, part)) {
            Some((_, value)) => Ok(*value),
            None => self.fail("memory of an operand is missing"),
        }
    }

    /// Number of operands.
    pub(super) fn operands(&self) -> usize {
        self.body.operands(self.node).len()
    }

    /// Type of operand `i`.
    pub(super) fn ty(&self, i: usize) -> Result<&'a Type, CodegenError> {
        let (id, _) = self.source(i)?;
        type_of(self.body, id)
    }

    /// Operand `i` as a tensor, or the rows of a ragged operand.
    pub(super) fn array(&self, i: usize) -> Result<Array<'c>, CodegenError> {
        let (_, place) = self.source(i)?;
        let shape = match self.ty(i)? {
            Type::Tensor(tensor) => tensor.shape.clone(),
            Type::Ragged(ragged) => {
                let rows = ragged.route.rows.clone().mul(Dim::Const(ragged.route.slots * ragged.repeat));
                let Some(rows) = rows else { return self.fail("a size exceeds 64 bits") };
                [rows].into_iter().chain(ragged.row.iter().copied().map(Dim::Const)).collect()
            }
            Type::Route(_) | Type::Plan(_) => return self.fail("an operand is no tensor"),
        };
        let dtype = self.dtypes.get(place).copied().flatten().unwrap_or(DType::F32);
        Ok(Array { at: self.memory(i, InputPart::Data)?, dtype, shape })
    }

    /// Operand `i` as a route.
    pub(super) fn route(&self, i: usize) -> Result<Slots<'c>, CodegenError> {
        let Type::Route(ty) = self.ty(i)? else { return self.fail("an operand is no route") };
        let w = if ty.weighted { Some(self.memory(i, InputPart::Weights)?) } else { None };
        Ok(Slots { idx: self.memory(i, InputPart::Idx)?, w, ty: ty.clone() })
    }

    /// A weight.
    pub(super) fn weight(&self, name: &WeightName) -> Result<Array<'c>, CodegenError> {
        let (Some((at, dtype)), Some(weight)) = (self.weights.get(name), self.body.weights.get(name)) else {
            return self.fail("a weight has no memory");
        };
        let shape = weight.shape.iter().map(Extent::max).map(Dim::Const).collect();
        Ok(Array { at: *at, dtype: *dtype, shape })
    }

    /// Shape of the result.
    pub(super) fn shape(&self) -> Result<&'a [Dim], CodegenError> {
        match type_of(self.body, self.node)? {
            Type::Tensor(tensor) => Ok(&tensor.shape),
            Type::Route(_) | Type::Plan(_) | Type::Ragged(_) => self.fail("the result is no tensor"),
        }
    }

    /// Memory of the result.
    pub(super) fn output(&self, part: OutputPart) -> Result<V<'c>, CodegenError> {
        match self.outputs.iter().find(|(p, _)| *p == part) {
            Some((_, value)) => Ok(*value),
            None => self.fail("the result has no such part"),
        }
    }

    // Elements.

    /// Element `at` (i64) as f32.
    pub(super) fn float(&self, array: &Array<'c>, at: V<'c>) -> V<'c> {
        let b = self.b;
        let name = element(array.dtype);
        let raw = b.load(b.gep(array.at, name, at), name, u32::try_from(array.dtype.bytes()).unwrap_or(1));
        match array.dtype {
            DType::F32 => raw,
            DType::F64 => b.cast("arith.truncf", raw, "f32"),
            DType::Bf16 => math::from_bf16(b, self.target, raw),
            DType::F16 => b.cast("arith.extf", raw, "f32"),
            DType::I32 | DType::I64 | DType::I8 => b.cast("arith.sitofp", raw, "f32"),
            DType::U8 | DType::F8e4m3 | DType::F8e5m2 => b.cast("arith.uitofp", raw, "f32"),
        }
    }

    /// Element `at` (i64) as i64.
    pub(super) fn integer(&self, array: &Array<'c>, at: V<'c>) -> V<'c> {
        let b = self.b;
        let name = element(array.dtype);
        let raw = b.load(b.gep(array.at, name, at), name, u32::try_from(array.dtype.bytes()).unwrap_or(1));
        match array.dtype {
            DType::I64 => raw,
            DType::I32 | DType::I8 => b.cast("arith.extsi", raw, "i64"),
            DType::U8 | DType::F8e4m3 | DType::F8e5m2 => b.cast("arith.extui", raw, "i64"),
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => b.cast("arith.fptosi", raw, "i64"),
        }
    }

    /// Whether the result holds integers.
    pub(super) fn is_integer(&self) -> bool {
        match self.result {
            DType::I32 | DType::I64 | DType::I8 | DType::U8 => true,
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => false,
        }
    }

    /// Stores element `at` of the result: an f32, rounded where the model rounds.
    pub(super) fn put(&self, value: V<'c>, at: V<'c>) -> Result<(), CodegenError> {
        let b = self.b;
        let out = self.output(OutputPart::Data)?;
        let value = match self.body.node(self.node).round {
            Some(moec_ir::DType::Bf16) => math::from_bf16(b, self.target, math::to_bf16(b, self.target, value)),
            Some(moec_ir::DType::F16) => b.cast("arith.extf", b.cast("arith.truncf", value, "f16"), "f32"),
            Some(
                moec_ir::DType::F64
                | moec_ir::DType::F32
                | moec_ir::DType::F8e4m3
                | moec_ir::DType::F8e5m2
                | moec_ir::DType::U8
                | moec_ir::DType::I8
                | moec_ir::DType::I32
                | moec_ir::DType::I64,
            )
            | None => value,
        };
        let name = element(self.result);
        let value = match self.result {
            DType::F32 => value,
            DType::Bf16 => math::to_bf16(b, self.target, value),
            DType::F16 => b.cast("arith.truncf", value, "f16"),
            DType::F64 => b.cast("arith.extf", value, "f64"),
            DType::I32 | DType::I64 | DType::I8 | DType::U8 | DType::F8e4m3 | DType::F8e5m2 => {
                b.cast("arith.fptosi", value, name)
            }
        };
        b.store(value, b.gep(out, name, at), u32::try_from(self.result.bytes()).unwrap_or(1));
        Ok(())
    }

    /// Stores element `at` of the result: an i64.
    pub(super) fn put_integer(&self, value: V<'c>, at: V<'c>) -> Result<(), CodegenError> {
        let b = self.b;
        let name = element(self.result);
        let value = if self.result == DType::I64 { value } else { b.cast("arith.trunci", value, name) };
        let out = self.output(OutputPart::Data)?;
        b.store(value, b.gep(out, name, at), u32::try_from(self.result.bytes()).unwrap_or(1));
        Ok(())
    }

    // Positions.

    /// Coordinates of element `at` of an array.
    pub(super) fn coordinates(&self, at: V<'c>, shape: &[Dim]) -> Vec<V<'c>> {
        let b = self.b;
        let mut rest = at;
        let mut found = Vec::with_capacity(shape.len());
        for (axis, dim) in shape.iter().enumerate().rev() {
            if *dim == Dim::Const(1) {
                found.push(b.i64(0));
            } else if axis == 0 {
                found.push(rest);
            } else {
                let size = self.size(dim);
                found.push(b.remui(rest, size));
                rest = b.divui(rest, size);
            }
        }
        found.reverse();
        found
    }

    /// Distances of neighbours on each axis.
    pub(super) fn strides(&self, shape: &[Dim]) -> Vec<V<'c>> {
        let mut stride = self.b.i64(1);
        let mut found = Vec::with_capacity(shape.len());
        for dim in shape.iter().rev() {
            found.push(stride);
            stride = self.b.muli(stride, self.size(dim));
        }
        found.reverse();
        found
    }

    /// Position of the element with these coordinates.
    pub(super) fn position(&self, coordinates: &[V<'c>], shape: &[Dim]) -> V<'c> {
        let mut at = self.b.i64(0);
        for (coordinate, dim) in coordinates.iter().zip(shape) {
            at = self.b.addi(self.b.muli(at, self.size(dim)), *coordinate);
        }
        at
    }

    /// Position in an operand that is repeated along axes of size 1, aligned at the last axis.
    pub(super) fn repeated(&self, coordinates: &[V<'c>], shape: &[Dim]) -> V<'c> {
        let skip = coordinates.len().saturating_sub(shape.len());
        let own: Vec<V<'c>> = coordinates[skip..]
            .iter()
            .zip(shape)
            .map(|(v, dim)| if *dim == Dim::Const(1) { self.b.i64(0) } else { *v })
            .collect();
        self.position(&own, shape)
    }

    // Threads of a team.

    /// Does something for each of `n`, spread over the team; all see the writes afterwards.
    pub(super) fn each(&self, n: V<'c>, body: impl FnOnce(V<'c>)) {
        let b = self.b;
        match self.team {
            None => b.each(b.i64(0), n, body),
            Some((thread, threads)) => {
                b.for_(thread, n, threads, &[], |i, _| {
                    body(i);
                    Vec::new()
                });
                b.op0("nvvm.barrier0", &[], &[]);
            }
        }
    }
}
