//! Sizes: constants, or expressions in the number of tokens `T`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A size that may depend on the number of tokens `T`, which is only known at run time.
///
/// The forms are closed under what the ops need: `c`, `T`, sums, products and
/// rounded-up quotients. `Dim` values are kept in a normal form by the constructors,
/// so that equal sizes compare equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dim {
    /// A number known when compiling.
    Const(u64),
    /// The number of tokens.
    Tokens,
    /// Sum of two sizes.
    Add(Box<Dim>, Box<Dim>),
    /// Product of two sizes.
    Mul(Box<Dim>, Box<Dim>),
    /// Quotient rounded up.
    CeilDiv(Box<Dim>, u64),
}

impl Dim {
    /// The value for `tokens` rows, or `None` when it exceeds 64 bits.
    pub fn eval(&self, tokens: u64) -> Option<u64> {
        match self {
            Self::Const(c) => Some(*c),
            Self::Tokens => Some(tokens),
            Self::Add(a, b) => a.eval(tokens)?.checked_add(b.eval(tokens)?),
            Self::Mul(a, b) => a.eval(tokens)?.checked_mul(b.eval(tokens)?),
            Self::CeilDiv(a, d) => Some(a.eval(tokens)?.div_ceil(*d)),
        }
    }

    /// The number, if it does not depend on `T`.
    pub const fn known(&self) -> Option<u64> {
        match self {
            Self::Const(c) => Some(*c),
            Self::Tokens | Self::Add(..) | Self::Mul(..) | Self::CeilDiv(..) => None,
        }
    }

    /// `self + other`; `None` on overflow of a constant.
    pub fn add(self, other: Self) -> Option<Self> {
        Some(match (self, other) {
            (Self::Const(a), Self::Const(b)) => Self::Const(a.checked_add(b)?),
            (d, Self::Const(0)) | (Self::Const(0), d) => d,
            (a, b) => Self::Add(Box::new(a), Box::new(b)),
        })
    }

    /// `self * other`; constants come first. `None` on overflow of a constant.
    pub fn mul(self, other: Self) -> Option<Self> {
        Some(match (self, other) {
            (Self::Const(a), Self::Const(b)) => Self::Const(a.checked_mul(b)?),
            (d, Self::Const(1)) | (Self::Const(1), d) => d,
            (Self::Const(0), _) | (_, Self::Const(0)) => Self::Const(0),
            (d, c @ Self::Const(_)) => c.mul(d)?,
            (Self::Const(a), Self::Mul(b, d)) if b.known().is_some() => {
                Self::Mul(Box::new(Self::Const(a.checked_mul(b.known()?)?)), d)
            }
            (a, b) => Self::Mul(Box::new(a), Box::new(b)),
        })
    }

    /// `ceil(self / divisor)`; `divisor` must not be zero. Exact quotients of `c * d` are simplified.
    pub fn ceil_div(self, divisor: u64) -> Self {
        match self {
            d if divisor == 1 => d,
            Self::Const(c) => Self::Const(c.div_ceil(divisor)),
            Self::Mul(a, b) if a.known().is_some_and(|c| c % divisor == 0) => {
                let c = a.known().unwrap_or(0) / divisor;
                if c == 1 { *b } else { Self::Mul(Box::new(Self::Const(c)), b) }
            }
            d => Self::CeilDiv(Box::new(d), divisor),
        }
    }
}

impl From<u64> for Dim {
    fn from(value: u64) -> Self {
        Self::Const(value)
    }
}

/// `T`, `64`, `8*T`, `(T + 3)`, `ceil(T / 4)`.
impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Const(c) => write!(f, "{c}"),
            Self::Tokens => f.write_str("T"),
            Self::Add(a, b) => write!(f, "({a} + {b})"),
            Self::Mul(a, b) => write!(f, "{a}*{b}"),
            Self::CeilDiv(a, d) => write!(f, "ceil({a} / {d})"),
        }
    }
}
