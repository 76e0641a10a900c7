//! Kernel ops: what fusion leaves.

use crate::{Diagnostic, Graph, Part, Type, codes};
use serde::{Deserialize, Serialize};

/// One generated kernel: a region of ops outlined from the graph.
///
/// The body *is* the meaning: the type of the kernel op is the type of the body's output, the
/// interpreter runs the body, and inlining the body undoes the fusion. The body's inputs stand in
/// operand order, and it has one output.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Which emitter compiles the body.
    pub kind: KernelKind,
    /// The ops that the kernel stands for.
    pub body: Box<Graph>,
}

/// Kinds of kernels; each has its emitters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelKind {
    /// Scores, selection and weights of a row: logits to route.
    Gate,
    /// Counts, offsets and gather map of a route.
    Plan,
    /// Gathered rows through gate and up matrices and the activation, grouped by expert.
    Up,
    /// Grouped product with the down matrix.
    Down,
    /// Weighted sum of expert rows per token, and what follows it row by row.
    Combine,
    /// Anything that works row by row.
    Rows,
    /// Product of all rows with one matrix.
    Dense,
    /// Attention over given queries, keys and values.
    Attention,
    /// Anything that needs the whole batch at once.
    Batch,
}

impl KernelKind {
    /// Name in IR text and in kernel symbols.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Plan => "plan",
            Self::Up => "up",
            Self::Down => "down",
            Self::Combine => "combine",
            Self::Rows => "rows",
            Self::Dense => "dense",
            Self::Attention => "attention",
            Self::Batch => "batch",
        }
    }

    /// Every kind, in declaration order.
    pub const ALL: [Self; 9] = [
        Self::Gate,
        Self::Plan,
        Self::Up,
        Self::Down,
        Self::Combine,
        Self::Rows,
        Self::Dense,
        Self::Attention,
        Self::Batch,
    ];
}

impl Kernel {
    /// Types the body with the operands as its inputs; the result is the type of the body's output.
    pub(crate) fn infer(&mut self, operands: &[&Type]) -> Result<Type, Vec<Diagnostic>> {
        let wrong = |text: String| vec![Diagnostic::error(codes::KERNEL, text)];
        let inputs = self.body.inputs().len();
        if inputs != operands.len() {
            return Err(wrong(format!("the body has {inputs} inputs, the kernel {} operands", operands.len())));
        }
        self.body.infer_with(Some(operands))?;
        let [output] = self.body.outputs.as_slice() else {
            return Err(wrong(format!("the body has {} outputs, a kernel has one", self.body.outputs.len())));
        };
        if output.part != Part::Whole {
            return Err(wrong("the body returns a part of a route, a kernel returns a value".to_owned()));
        }
        self.body.node(output.node).ty.clone().ok_or_else(|| wrong("the body's output has no type".to_owned()))
    }
}
