//! Sizes: constants, or expressions in the number of tokens `T`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{collections::BTreeMap, fmt};

/// A size that may depend on the number of tokens `T`, which is only known at run time.
///
/// The forms are closed under what the ops need: `c`, `T`, sums, products and
/// rounded-up quotients. The constructors ([`Dim::add`], [`Dim::mul`], [`Dim::ceil_div`]) keep
/// values in a normal form (a sum of products by falling degree), so that equal sizes compare equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
    /// Rows that came from other ranks, by how many collectives they passed; known when they have arrived.
    Received(u64),
}

/// A sum of products: factors (each `T` or a quotient, sorted) to the constant before them.
type Terms = BTreeMap<Vec<Dim>, u64>;

impl Dim {
    /// The value for `tokens` rows, or `None` when it exceeds 64 bits.
    pub fn eval(&self, tokens: u64) -> Option<u64> {
        match self {
            Self::Const(c) => Some(*c),
            Self::Tokens => Some(tokens),
            Self::Add(a, b) => a.eval(tokens)?.checked_add(b.eval(tokens)?),
            Self::Mul(a, b) => a.eval(tokens)?.checked_mul(b.eval(tokens)?),
            Self::CeilDiv(_, 0) | Self::Received(_) => None,
            Self::CeilDiv(a, d) => Some(a.eval(tokens)?.div_ceil(*d)),
        }
    }

    /// The number, if it does not depend on `T`.
    pub const fn known(&self) -> Option<u64> {
        match self {
            Self::Const(c) => Some(*c),
            Self::Tokens | Self::Add(..) | Self::Mul(..) | Self::CeilDiv(..) | Self::Received(_) => None,
        }
    }

    /// `self + other`; `None` on overflow of a constant.
    #[expect(clippy::should_implement_trait, reason = "a sum may not exist")]
    pub fn add(self, other: Self) -> Option<Self> {
        if let (Self::Const(a), Self::Const(b)) = (&self, &other) {
            return a.checked_add(*b).map(Self::Const);
        }
        let mut sum = self.terms()?;
        for (factors, c) in other.terms()? {
            insert(&mut sum, factors, c)?;
        }
        Some(Self::from_terms(&sum))
    }

    /// `self * other`; constants come first. `None` on overflow of a constant.
    #[expect(clippy::should_implement_trait, reason = "a product may not exist")]
    pub fn mul(self, other: Self) -> Option<Self> {
        if let (Self::Const(a), Self::Const(b)) = (&self, &other) {
            return a.checked_mul(*b).map(Self::Const);
        }
        Some(Self::from_terms(&product(&self.terms()?, &other.terms()?)?))
    }

    /// `ceil(self / divisor)`; 0 as divisor counts as 1. Multiples of the divisor move out of the quotient.
    pub fn ceil_div(self, divisor: u64) -> Self {
        if divisor <= 1 {
            return self;
        }
        if let Self::Const(c) = self {
            return Self::Const(c.div_ceil(divisor));
        }
        let Some(terms) = self.terms() else { return Self::CeilDiv(Box::new(self), divisor) };
        let (mut whole, mut rest) = (Terms::new(), Terms::new());
        for (factors, c) in terms {
            if c / divisor > 0 {
                whole.insert(factors.clone(), c / divisor);
            }
            if c % divisor > 0 {
                rest.insert(factors, c % divisor);
            }
        }
        if rest.is_empty() {
            return Self::from_terms(&whole);
        }
        let common = rest.values().fold(divisor, |a, b| gcd(a, *b));
        let rest: Terms = rest.into_iter().map(|(f, c)| (f, c / common)).collect();
        let quotient = Self::quotient(Self::from_terms(&rest), divisor / common);
        let whole = Self::from_terms(&whole);
        match whole.clone().add(quotient.clone()) {
            Some(sum) => sum,
            None => Self::Add(Box::new(whole), Box::new(quotient)),
        }
    }

    /// A quotient that has no whole part; a quotient of a quotient is one quotient.
    fn quotient(inner: Self, divisor: u64) -> Self {
        if divisor == 1 {
            return inner;
        }
        match inner {
            Self::Const(c) => Self::Const(c.div_ceil(divisor)),
            Self::CeilDiv(d, inside) if inside.checked_mul(divisor).is_some() => Self::CeilDiv(d, inside * divisor),
            d @ (Self::Tokens | Self::Add(..) | Self::Mul(..) | Self::CeilDiv(..) | Self::Received(_)) => {
                Self::CeilDiv(Box::new(d), divisor)
            }
        }
    }

    fn terms(&self) -> Option<Terms> {
        Some(match self {
            Self::Const(0) => Terms::new(),
            Self::Const(c) => Terms::from([(Vec::new(), *c)]),
            Self::Tokens => Terms::from([(vec![Self::Tokens], 1)]),
            Self::CeilDiv(..) | Self::Received(_) => Terms::from([(vec![self.clone()], 1)]),
            Self::Add(a, b) => {
                let mut sum = a.terms()?;
                for (factors, c) in b.terms()? {
                    insert(&mut sum, factors, c)?;
                }
                sum
            }
            Self::Mul(a, b) => product(&a.terms()?, &b.terms()?)?,
        })
    }

    /// Highest degree first, so that constants come last: `(8*T*T + T + 3)`.
    fn from_terms(terms: &Terms) -> Self {
        let mut sorted: Vec<(&Vec<Self>, &u64)> = terms.iter().collect();
        sorted.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        let mut sum: Option<Self> = None;
        for (factors, c) in sorted {
            let mut term = (factors.is_empty() || *c != 1).then_some(Self::Const(*c));
            for factor in factors {
                term = Some(match term {
                    None => factor.clone(),
                    Some(t) => Self::Mul(Box::new(t), Box::new(factor.clone())),
                });
            }
            let term = term.unwrap_or(Self::Const(1));
            sum = Some(match sum {
                None => term,
                Some(s) => Self::Add(Box::new(s), Box::new(term)),
            });
        }
        sum.unwrap_or(Self::Const(0))
    }
}

fn insert(terms: &mut Terms, factors: Vec<Dim>, c: u64) -> Option<()> {
    let entry = terms.entry(factors).or_insert(0);
    *entry = entry.checked_add(c)?;
    Some(())
}

fn product(a: &Terms, b: &Terms) -> Option<Terms> {
    let mut result = Terms::new();
    for (fa, ca) in a {
        for (fb, cb) in b {
            let mut factors: Vec<Dim> = fa.iter().chain(fb).cloned().collect();
            factors.sort();
            insert(&mut result, factors, ca.checked_mul(*cb)?)?;
        }
    }
    Some(result)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
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
            Self::Add(..) => {
                f.write_str("(")?;
                write_sum(self, f)?;
                f.write_str(")")
            }
            Self::Mul(a, b) => write!(f, "{a}*{b}"),
            Self::CeilDiv(a, d) => write!(f, "ceil({a} / {d})"),
            Self::Received(n) => write!(f, "R{n}"),
        }
    }
}

/// A sum without its parentheses.
fn write_sum(dim: &Dim, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match dim {
        Dim::Add(a, b) => {
            write_sum(a, f)?;
            write!(f, " + {b}")
        }
        Dim::Const(_) | Dim::Tokens | Dim::Mul(..) | Dim::CeilDiv(..) | Dim::Received(_) => write!(f, "{dim}"),
    }
}

impl std::str::FromStr for Dim {
    type Err = String;

    /// Reads what [`fmt::Display`] writes; the result is in normal form.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut reader = DimReader { text: text.as_bytes(), at: 0 };
        let dim = reader.sum(0)?;
        reader.space();
        if reader.at == text.len() { Ok(dim) } else { Err(reader.unexpected()) }
    }
}

/// Recursive descent over a size; depth is bounded.
struct DimReader<'a> {
    text: &'a [u8],
    at: usize,
}

impl DimReader<'_> {
    fn space(&mut self) {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    fn eat(&mut self, token: &str) -> bool {
        self.space();
        let found = self.text.get(self.at..).is_some_and(|t| t.starts_with(token.as_bytes()));
        if found {
            self.at += token.len();
        }
        found
    }

    fn unexpected(&self) -> String {
        match self.text.get(self.at) {
            Some(c) => format!("unexpected `{}` in a size", char::from(*c)),
            None => "a size ends too early".to_owned(),
        }
    }

    fn sum(&mut self, depth: u32) -> Result<Dim, String> {
        if depth > 32 {
            return Err("a size has more than 32 nested parts".to_owned());
        }
        let mut value = self.product(depth)?;
        while self.eat("+") {
            value = value.add(self.product(depth)?).ok_or("a size exceeds 64 bits")?;
        }
        Ok(value)
    }

    fn product(&mut self, depth: u32) -> Result<Dim, String> {
        let mut value = self.atom(depth)?;
        while self.eat("*") {
            value = value.mul(self.atom(depth)?).ok_or("a size exceeds 64 bits")?;
        }
        Ok(value)
    }

    fn atom(&mut self, depth: u32) -> Result<Dim, String> {
        if self.eat("ceil(") {
            let value = self.sum(depth + 1)?;
            if !self.eat("/") {
                return Err(self.unexpected());
            }
            let divisor = self.number()?;
            if divisor == 0 {
                return Err("a size is divided by 0".to_owned());
            }
            return if self.eat(")") { Ok(value.ceil_div(divisor)) } else { Err(self.unexpected()) };
        }
        if self.eat("(") {
            let value = self.sum(depth + 1)?;
            return if self.eat(")") { Ok(value) } else { Err(self.unexpected()) };
        }
        if self.eat("T") {
            Ok(Dim::Tokens)
        } else if self.eat("R") {
            self.number().map(Dim::Received)
        } else {
            self.number().map(Dim::Const)
        }
    }

    fn number(&mut self) -> Result<u64, String> {
        self.space();
        let start = self.at;
        while self.text.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
        if start == self.at {
            return Err(self.unexpected());
        }
        let digits = std::str::from_utf8(self.text.get(start..self.at).unwrap_or_default()).unwrap_or_default();
        digits.parse().map_err(|_| format!("{digits} exceeds 64 bits"))
    }
}

/// Constants are numbers, other sizes strings: `64`, `"T"`, `"8*T"`.
impl Serialize for Dim {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Const(c) => serializer.serialize_u64(*c),
            Self::Tokens | Self::Add(..) | Self::Mul(..) | Self::CeilDiv(..) | Self::Received(_) => {
                serializer.collect_str(self)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Dim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(c) => Ok(Self::Const(c)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Dim;

    fn dim(text: &str) -> Dim {
        text.parse().unwrap()
    }

    #[test]
    fn equal_sizes_are_equal_values() {
        assert_eq!(dim("3 + T"), dim("T + 1 + 2"));
        assert_eq!(dim("2*(T + 3)"), dim("T + T + 6"));
        assert_eq!(dim("T*4*T"), dim("4*T*T"));
        assert_eq!(dim("ceil(8*T / 8)"), Dim::Tokens);
        assert_eq!(dim("ceil(16*T / 80)"), dim("ceil(T / 5)"));
        assert_eq!(dim("ceil(5*T / 4)"), dim("T + ceil(T / 4)"));
        assert_eq!(dim("ceil(ceil(T / 4) / 2)"), dim("ceil(T / 8)"));
        assert_eq!(dim("0*T"), Dim::Const(0));
    }

    #[test]
    fn printed_sizes_read_back() {
        for text in
            ["T", "64", "8*T", "(T + 3)", "ceil(T / 4)", "4*ceil(T / 4)", "(2*T*T + T + 1)", "ceil((T + 3) / 4)"]
        {
            assert_eq!(dim(text).to_string(), text);
        }
    }

    #[test]
    fn normal_form_keeps_the_value() {
        for text in ["ceil(7*T + 5 / 3)", "(T + 2)*(T + 3)", "ceil(ceil(T / 3) + T / 2)", "6*ceil(9*T / 6)"] {
            for tokens in 0..40u64 {
                let t = tokens;
                let expected = match text {
                    "ceil(7*T + 5 / 3)" => (7 * t + 5).div_ceil(3),
                    "(T + 2)*(T + 3)" => (t + 2) * (t + 3),
                    "ceil(ceil(T / 3) + T / 2)" => (t.div_ceil(3) + t).div_ceil(2),
                    _ => 6 * (9 * t).div_ceil(6),
                };
                assert_eq!(dim(text).eval(tokens), Some(expected), "{text} at {tokens}");
            }
        }
    }

    #[test]
    fn overflow_is_reported() {
        assert_eq!(Dim::Const(u64::MAX).add(Dim::Const(1)), None);
        assert_eq!(Dim::Const(u64::MAX).mul(Dim::Const(2)), None);
        assert_eq!(dim("9000000000*T").mul(dim("9000000000*T")), None);
        assert!("99999999999999999999".parse::<Dim>().is_err());
        assert!("T + ".parse::<Dim>().is_err());
        assert!("(".repeat(100_000).parse::<Dim>().is_err());
    }
}
