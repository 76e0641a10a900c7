//! Types of all values: the walk over the graph, and what the rules of the ops share.

use crate::{
    Code, DType, Diagnostic, Dim, Graph, NodeId, Op, RaggedType, RouteType, TensorType, Type, Weight, WeightName, codes,
};
use indexmap::IndexMap;

/// Findings after which the walk stops.
const MAX_FINDINGS: usize = 20;

/// Why an operation cannot take its operands. The graph adds the node's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpError {
    pub(crate) code: Code,
    pub(crate) message: String,
    pub(crate) help: Option<String>,
}

impl OpError {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), help: None }
    }

    #[must_use]
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The finding, with the node that it is about.
    pub(crate) fn at(self, name: &str, op: &str) -> Diagnostic {
        let found = Diagnostic::error(self.code, format!("node `{name}` ({op}): {}", self.message)).about(name);
        match self.help {
            Some(help) => found.help(help),
            None => found,
        }
    }
}

pub(crate) type OpResult<T> = Result<T, OpError>;

/// `Err` for a size beyond 64 bits.
pub(crate) fn overflow() -> OpError {
    OpError::new(codes::OVERFLOW, "a size exceeds 64 bits")
}

/// What the rules of ops may look at besides operands.
pub(crate) struct Cx<'a> {
    pub(crate) weights: &'a IndexMap<WeightName, Weight>,
}

impl Cx<'_> {
    pub(crate) fn weight(&self, name: &str) -> OpResult<&Weight> {
        self.weights
            .get(name)
            .ok_or_else(|| OpError::new(codes::WEIGHT, format!("weight `{name}` is not declared in the graph")))
    }

    /// Shape of a weight that is the same for all experts.
    pub(crate) fn shape(&self, name: &str) -> OpResult<Vec<u64>> {
        let weight = self.weight(name)?;
        weight
            .shape
            .iter()
            .map(|extent| match extent {
                crate::Extent::Fixed(n) => Ok(*n),
                crate::Extent::PerExpert(_) => Err(OpError::new(
                    codes::SHAPE,
                    format!("weight `{name}` has one size per expert, here one size is needed"),
                )),
            })
            .collect()
    }

    /// Shape of expert `e`'s tensor.
    pub(crate) fn shape_at(&self, name: &str, e: u64) -> OpResult<Vec<u64>> {
        let weight = self.weight(name)?;
        weight
            .shape
            .iter()
            .map(|extent| {
                usize::try_from(e)
                    .ok()
                    .and_then(|e| extent.of(e))
                    .ok_or_else(|| OpError::new(codes::EXTENT, format!("weight `{name}` has no size for expert {e}")))
            })
            .collect()
    }

    /// Shape of a weight that must be a matrix.
    pub(crate) fn matrix(&self, name: &str) -> OpResult<[u64; 2]> {
        let shape = self.shape(name)?;
        <[u64; 2]>::try_from(shape.as_slice()).map_err(|_| {
            OpError::new(codes::SHAPE, format!("weight `{name}` is {}, a matrix is needed", numbers(&shape)))
        })
    }

    /// Checks that a weight is a vector of `n`.
    pub(crate) fn want_vector(&self, name: &str, n: u64) -> OpResult<()> {
        let shape = self.shape(name)?;
        if shape == [n] {
            return Ok(());
        }
        Err(OpError::new(codes::SHAPE, format!("weight `{name}` is {}, [{n}] is needed", numbers(&shape))))
    }
}

/// `[2, 3]`.
pub(crate) fn numbers(shape: &[u64]) -> String {
    format!("[{}]", shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", "))
}

/// `[T, 3]`.
pub(crate) fn sizes(shape: &[Dim]) -> String {
    format!("[{}]", shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "))
}

/// The operands, when there are exactly `N`.
pub(crate) fn arity<'a, const N: usize>(operands: &[&'a Type]) -> OpResult<[&'a Type; N]> {
    <[&Type; N]>::try_from(operands)
        .map_err(|_| OpError::new(codes::ARITY, format!("has {} operands, takes {N}", operands.len())))
}

pub(crate) fn want_tensor<'a>(ty: &'a Type, what: &str) -> OpResult<&'a TensorType> {
    ty.tensor().ok_or_else(|| OpError::new(codes::KIND, format!("{what} must be a tensor, is a {}", ty.kind())))
}

pub(crate) fn want_route<'a>(ty: &'a Type, what: &str) -> OpResult<&'a RouteType> {
    ty.route().ok_or_else(|| OpError::new(codes::KIND, format!("{what} must be a route, is a {}", ty.kind())))
}

pub(crate) fn want_ragged<'a>(ty: &'a Type, what: &str) -> OpResult<&'a RaggedType> {
    ty.ragged().ok_or_else(|| {
        OpError::new(codes::KIND, format!("{what} must be rows sorted by expert, is a {}", ty.kind()))
            .help("put a `dispatch` in front")
    })
}

/// Shape `[rows, columns]` with known columns.
pub(crate) fn want_rows<'a>(ty: &'a Type, what: &str) -> OpResult<(&'a Dim, u64)> {
    let tensor = want_tensor(ty, what)?;
    match tensor.shape.as_slice() {
        [rows, columns] => Ok((rows, want_known(columns, what)?)),
        shape => Err(OpError::new(codes::SHAPE, format!("{what} must be [rows, n], is {}", sizes(shape)))),
    }
}

/// A size that must not depend on `T`.
pub(crate) fn want_known(dim: &Dim, what: &str) -> OpResult<u64> {
    dim.known().ok_or_else(|| OpError::new(codes::SHAPE, format!("{what}: the size {dim} must not depend on T")))
}

/// The last axis of a shape, and the rest.
pub(crate) fn want_last<'a>(shape: &'a [Dim], what: &str) -> OpResult<(&'a [Dim], u64)> {
    match shape.split_last() {
        Some((last, rest)) => Ok((rest, want_known(last, what)?)),
        None => Err(OpError::new(codes::SHAPE, format!("{what} is a scalar, at least one axis is needed"))),
    }
}

/// Position of an axis that may count from the last.
pub(crate) fn axis_of(axis: i64, rank: usize) -> OpResult<usize> {
    let size = i64::try_from(rank).unwrap_or(i64::MAX);
    let at = if axis < 0 { axis.saturating_add(size) } else { axis };
    usize::try_from(at)
        .ok()
        .filter(|a| *a < rank)
        .ok_or_else(|| OpError::new(codes::SHAPE, format!("axis {axis} does not exist in {rank} axes")))
}

/// Product of sizes.
pub(crate) fn volume(shape: &[Dim]) -> OpResult<Dim> {
    shape.iter().try_fold(Dim::Const(1), |n, d| n.mul(d.clone())).ok_or_else(overflow)
}

/// Shape of an elementwise result: sizes are equal, or 1 on one side.
pub(crate) fn broadcast(a: &[Dim], b: &[Dim]) -> OpResult<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let from_end = |shape: &[Dim], i: usize| shape.len().checked_sub(i + 1).and_then(|at| shape.get(at).cloned());
    let mut shape = Vec::with_capacity(rank);
    for i in (0..rank).rev() {
        shape.push(match (from_end(a, i), from_end(b, i)) {
            (Some(x), Some(y)) if x == y => x,
            (Some(Dim::Const(1)) | None, Some(y)) => y,
            (Some(x), Some(Dim::Const(1)) | None) => x,
            (Some(_), Some(_)) | (None, None) => {
                return Err(OpError::new(
                    codes::SHAPE,
                    format!("{} and {} do not fit element by element", sizes(a), sizes(b)),
                ));
            }
        });
    }
    Ok(shape)
}

/// A shape of constants.
pub(crate) fn fixed(shape: &[u64]) -> Vec<Dim> {
    shape.iter().copied().map(Dim::Const).collect()
}

/// A value in the arithmetic type.
pub(crate) fn arithmetic(shape: Vec<Dim>) -> Type {
    Type::Tensor(TensorType { dtype: DType::F32, shape })
}

impl Graph {
    /// Computes the type of every value, operands first.
    ///
    /// Element types: an input has its own; ops that move or expand data (`shape`, `gather`,
    /// `param`, `dispatch`, `experts`, `combine`, `ffn`, `attention`) keep the type of their data;
    /// all other values are in the arithmetic type f32. Where `round` is set, it decides.
    ///
    /// # Errors
    /// The violated rules, at most 20, each with the node. Values behind them stay without type.
    pub fn infer(&mut self) -> Result<(), Vec<Diagnostic>> {
        self.infer_with(None)
    }

    /// As [`Graph::infer`]; inputs take these types, in the order of [`Graph::inputs`].
    pub(crate) fn infer_with(&mut self, inputs: Option<&[&Type]>) -> Result<(), Vec<Diagnostic>> {
        let order = self.order();
        let mut found = Vec::new();
        if order.len() < self.len() {
            found.push(crate::verify::cycle(self));
        }
        let mut input = 0;
        for id in order {
            let given = if matches!(self.node(id).op, Op::Input(_)) {
                input += 1;
                inputs.and_then(|types| types.get(input - 1).map(|ty| (*ty).clone()))
            } else {
                None
            };
            let ty = match given {
                Some(ty) => Some(ty),
                None => self.infer_node(id, &mut found),
            };
            self.set_type(id, ty);
            if found.len() >= MAX_FINDINGS {
                break;
            }
        }
        if found.is_empty() { Ok(()) } else { Err(found) }
    }

    /// The type of one node; `None` when it or an operand has none.
    fn infer_node(&mut self, id: NodeId, found: &mut Vec<Diagnostic>) -> Option<Type> {
        let types: Option<Vec<Type>> = self.operands(id).into_iter().map(|o| self.node(o).ty.clone()).collect();
        let types = types?;
        let operands: Vec<&Type> = types.iter().collect();
        let name = self.node(id).name.clone();
        let kernel = if let Op::Kernel(kernel) = self.op_mut(id) { Some(kernel.infer(&operands)) } else { None };
        let result = match kernel {
            Some(Ok(ty)) => Ok(ty),
            Some(Err(inner)) => {
                found.extend(inner.into_iter().map(|mut d| {
                    d.message = format!("kernel `{name}`: {}", d.message);
                    d
                }));
                return None;
            }
            None => self.node(id).op.infer(&Cx { weights: &self.weights }, &operands),
        };
        match result {
            Ok(ty) => Some(match self.node(id).round {
                Some(dtype) => ty.with_dtype(dtype),
                None => ty,
            }),
            Err(error) => {
                found.push(error.at(&name, self.node(id).op.name()));
                None
            }
        }
    }
}
