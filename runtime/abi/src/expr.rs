//! Sizes as expressions in the number of tokens.

use serde::{Deserialize, Serialize};

/// An unsigned 64-bit expression in the number of tokens `T`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expr {
    /// A number.
    Const(u64),
    /// The number of tokens.
    Tokens,
    /// Sum.
    Add(Box<Expr>, Box<Expr>),
    /// Product.
    Mul(Box<Expr>, Box<Expr>),
    /// Quotient, rounded up; the divisor is not zero.
    CeilDiv(Box<Expr>, u64),
    /// The smaller.
    Min(Box<Expr>, Box<Expr>),
    /// The larger.
    Max(Box<Expr>, Box<Expr>),
}

impl Expr {
    /// The value for `tokens`; `None` when it does not fit in 64 bits.
    pub fn eval(&self, tokens: u64) -> Option<u64> {
        match self {
            Self::Const(c) => Some(*c),
            Self::Tokens => Some(tokens),
            Self::Add(a, b) => a.eval(tokens)?.checked_add(b.eval(tokens)?),
            Self::Mul(a, b) => a.eval(tokens)?.checked_mul(b.eval(tokens)?),
            Self::CeilDiv(a, d) => Some(a.eval(tokens)?.div_ceil((*d).max(1))),
            Self::Min(a, b) => Some(a.eval(tokens)?.min(b.eval(tokens)?)),
            Self::Max(a, b) => Some(a.eval(tokens)?.max(b.eval(tokens)?)),
        }
    }

    /// The number, if the expression does not contain `T`.
    pub const fn known(&self) -> Option<u64> {
        match self {
            Self::Const(c) => Some(*c),
            Self::Tokens | Self::Add(..) | Self::Mul(..) | Self::CeilDiv(..) | Self::Min(..) | Self::Max(..) => None,
        }
    }

    /// Sum, folded where both are numbers.
    #[must_use]
    pub fn plus(self, other: impl Into<Self>) -> Self {
        match (self, other.into()) {
            (Self::Const(a), Self::Const(b)) => Self::Const(a.saturating_add(b)),
            (e, Self::Const(0)) | (Self::Const(0), e) => e,
            (a, b) => Self::Add(Box::new(a), Box::new(b)),
        }
    }

    /// Product, folded where both are numbers.
    #[must_use]
    pub fn times(self, other: impl Into<Self>) -> Self {
        match (self, other.into()) {
            (Self::Const(a), Self::Const(b)) => Self::Const(a.saturating_mul(b)),
            (e, Self::Const(1)) | (Self::Const(1), e) => e,
            (a, b) => Self::Mul(Box::new(a), Box::new(b)),
        }
    }

    /// Quotient rounded up, folded for numbers.
    #[must_use]
    pub fn ceil_div(self, divisor: u64) -> Self {
        if divisor <= 1 {
            return self;
        }
        match self {
            Self::Const(c) => Self::Const(c.div_ceil(divisor)),
            e @ (Self::Tokens | Self::Add(..) | Self::Mul(..) | Self::CeilDiv(..) | Self::Min(..) | Self::Max(..)) => {
                Self::CeilDiv(Box::new(e), divisor)
            }
        }
    }

    /// The next multiple of `unit`.
    #[must_use]
    pub fn round_up(self, unit: u64) -> Self {
        self.ceil_div(unit).times(unit)
    }
}

impl From<u64> for Expr {
    fn from(value: u64) -> Self {
        Self::Const(value)
    }
}
