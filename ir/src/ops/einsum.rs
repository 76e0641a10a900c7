//! Sums of products over named axes.

use crate::{
    Dim, Type, codes,
    infer::{Cx, OpError, OpResult, arithmetic, sizes, want_tensor},
};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// `%y = einsum %a, %b {eq = "te,teh->th"}`: a letter for each axis, `...` for any number of axes.
///
/// Axes under `...` are counted from the last. Without an arrow the result has them, then the letters that stand once,
/// in their order.
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

/// Stands for any number of axes.
const ELLIPSIS: &str = "...";

/// Letters that stand once, in their order.
fn once(left: &str) -> Vec<char> {
    let mut letters: Vec<char> = left.chars().filter(char::is_ascii_alphabetic).collect();
    letters.sort_unstable();
    letters.chunk_by(|a, b| a == b).filter(|same| same.len() == 1).flatten().copied().collect()
}

impl Einsum {
    /// The axes of operands of these ranks, and of the result.
    pub(crate) fn equation(&self, ranks: &[usize]) -> OpResult<Equation> {
        let wrong = |why: String| OpError::new(codes::EQUATION, format!("equation `{}`: {why}", self.eq));
        let text: String = self.eq.chars().filter(|c| *c != ' ').collect();
        let (left, right) = text.split_once("->").map_or((&text[..], None), |(left, right)| (left, Some(right)));
        let parts: Vec<&str> = left.split(',').collect();
        if parts.len() != ranks.len() {
            let text = format!("has {} operands, the equation `{}` {}", ranks.len(), self.eq, parts.len());
            return Err(OpError::new(codes::ARITY, text));
        }
        // Axes that `...` stands for get letters that the equation has not.
        let hidden = |part: &str, rank: usize| {
            let named = part.chars().filter(char::is_ascii_alphabetic).count();
            if part.contains(ELLIPSIS) { rank.saturating_sub(named) } else { 0 }
        };
        let most = parts.iter().zip(ranks).map(|(part, rank)| hidden(part, *rank)).max().unwrap_or(0);
        let free: Vec<char> = ('A'..='Z').chain('a'..='z').filter(|c| !text.contains(*c)).take(most).collect();
        if free.len() < most {
            return Err(wrong(format!("has too few letters for {most} axes under `...`")));
        }
        let letters = |part: &str, hidden: usize| -> OpResult<Vec<char>> {
            let (before, after) = part.split_once(ELLIPSIS).unwrap_or((part, ""));
            if let Some(c) = before.chars().chain(after.chars()).find(|c| !c.is_ascii_alphabetic()) {
                return Err(wrong(format!("`{c}` is no axis, axes are letters")));
            }
            Ok(before.chars().chain(free[most - hidden..].iter().copied()).chain(after.chars()).collect())
        };
        let operands: Vec<Vec<char>> =
            parts.iter().zip(ranks).map(|(part, rank)| letters(part, hidden(part, *rank))).collect::<OpResult<_>>()?;
        let result = match right {
            Some(right) if most > 0 && !right.contains(ELLIPSIS) => {
                return Err(wrong("the result has no place for the axes under `...`".into()));
            }
            Some(right) if right.contains(ELLIPSIS) => letters(right, most)?,
            Some(right) => letters(right, 0)?,
            None => free.iter().copied().chain(once(left)).collect(),
        };
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

    /// Letters of the axes of operands of these ranks, and of the result; `None` when the equation is not valid.
    pub fn letters(&self, ranks: &[usize]) -> Option<(Vec<Vec<char>>, Vec<char>)> {
        self.equation(ranks).ok().map(|e| (e.operands, e.result))
    }

    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        let shapes =
            operands.iter().map(|ty| Ok(&want_tensor(ty, "an operand")?.shape)).collect::<OpResult<Vec<_>>>()?;
        let equation = self.equation(&shapes.iter().map(|shape| shape.len()).collect::<Vec<_>>())?;
        let mut axes: IndexMap<char, Dim> = IndexMap::new();
        for (shape, letters) in shapes.into_iter().zip(&equation.operands) {
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
