//! Sums of products over named axes.

use crate::{
    Dim, Type, codes,
    infer::{Cx, OpError, OpResult, arithmetic, sizes, want_tensor},
};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// `%y = einsum %a, %b {eq = "te,teh->th"}`: explicit form with an arrow, letters only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Einsum {
    /// Axes of the operands and of the result.
    pub eq: String,
}

/// The axes of an equation, a letter each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Equation {
    pub(crate) operands: Vec<Vec<char>>,
    pub(crate) result: Vec<char>,
}

impl Einsum {
    /// The axes of operands and result.
    pub(crate) fn equation(&self) -> OpResult<Equation> {
        let wrong = |why: String| OpError::new(codes::EQUATION, format!("equation `{}`: {why}", self.eq));
        let text: String = self.eq.chars().filter(|c| *c != ' ').collect();
        let (left, right) =
            text.split_once("->").ok_or_else(|| wrong("`->` and the result's axes are missing".into()))?;
        let letters = |part: &str| -> OpResult<Vec<char>> {
            match part.chars().find(|c| !c.is_ascii_alphabetic()) {
                Some(c) => Err(wrong(format!("`{c}` is no axis, axes are letters"))),
                None => Ok(part.chars().collect()),
            }
        };
        let operands = left.split(',').map(letters).collect::<OpResult<Vec<_>>>()?;
        let result = letters(right)?;
        for (i, c) in result.iter().enumerate() {
            if result.iter().take(i).any(|d| d == c) {
                return Err(wrong(format!("the result has the axis `{c}` twice")));
            }
            if !operands.iter().flatten().any(|d| d == c) {
                return Err(wrong(format!("no operand has the axis `{c}` of the result")));
            }
        }
        Ok(Equation { operands, result })
    }

    /// Letters of the axes of each operand, and of the result; `None` when the equation is not valid.
    pub fn letters(&self) -> Option<(Vec<Vec<char>>, Vec<char>)> {
        self.equation().ok().map(|e| (e.operands, e.result))
    }

    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let equation = self.equation()?;
        if equation.operands.len() != operands.len() {
            return Err(OpError::new(
                codes::ARITY,
                format!("has {} operands, the equation `{}` {}", operands.len(), self.eq, equation.operands.len()),
            ));
        }
        let mut axes: IndexMap<char, Dim> = IndexMap::new();
        for (ty, letters) in operands.iter().zip(&equation.operands) {
            let shape = &want_tensor(ty, "an operand")?.shape;
            if shape.len() != letters.len() {
                let axes: String = letters.iter().collect();
                return Err(OpError::new(codes::EQUATION, format!("`{axes}` stands for an operand {}", sizes(shape))));
            }
            for (letter, dim) in letters.iter().zip(shape) {
                let known = axes.entry(*letter).or_insert_with(|| dim.clone());
                if *known == Dim::Const(1) {
                    known.clone_from(dim);
                } else if known != dim && *dim != Dim::Const(1) {
                    return Err(OpError::new(codes::SHAPE, format!("axis `{letter}` is {known} and {dim}")));
                }
            }
        }
        Ok(arithmetic(equation.result.iter().filter_map(|c| axes.get(c).cloned()).collect()))
    }
}
