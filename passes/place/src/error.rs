//! What can be wrong with a placement request: one error type, one code each.

use serde::{Serialize, Serializer};

/// Kinds of refusal; the text form (`E08xx`) is stable once published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Code {
    /// The text is not JSON.
    NotJson,
    /// The JSON is not a form that placement reads (wrong type, unknown key).
    UnknownForm,
    /// No layer, no expert or no token.
    Empty,
    /// Layers (or tokens) of different lengths.
    Ragged,
    /// A load that is negative, not finite, too large or not whole.
    BadLoad,
    /// A count that is zero or missing (GPUs, nodes, groups).
    BadCount,
    /// A count that has to divide another one and does not.
    NotDivisible,
    /// Fewer replica slots than experts.
    TooFewSlots,
    /// The method needs another kind of input.
    WrongInput,
    /// A trace entry outside the experts, or lines of unequal shape.
    BadTrace,
    /// A size above what this crate accepts.
    TooLarge,
    /// A numeric option outside its range.
    BadOption,
    /// The integer solver gave no answer.
    Solver,
}

impl Code {
    /// All codes, in the order of their numbers.
    pub const ALL: [Code; 13] = [
        Code::NotJson,
        Code::UnknownForm,
        Code::Empty,
        Code::Ragged,
        Code::BadLoad,
        Code::BadCount,
        Code::NotDivisible,
        Code::TooFewSlots,
        Code::WrongInput,
        Code::BadTrace,
        Code::TooLarge,
        Code::BadOption,
        Code::Solver,
    ];

    /// The published form, `E0411` to `E0423`.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::NotJson => "E0411",
            Code::UnknownForm => "E0412",
            Code::Empty => "E0413",
            Code::Ragged => "E0414",
            Code::BadLoad => "E0415",
            Code::BadCount => "E0416",
            Code::NotDivisible => "E0417",
            Code::TooFewSlots => "E0418",
            Code::WrongInput => "E0419",
            Code::BadTrace => "E0420",
            Code::TooLarge => "E0421",
            Code::BadOption => "E0422",
            Code::Solver => "E0423",
        }
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A refused request: what is, and what would work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct PlaceError {
    /// Kind of refusal.
    pub code: Code,
    /// What is wrong, in the words of the user's input.
    pub message: String,
    /// What would work instead.
    pub help: String,
    /// Member of the user's file that it is about, such as `weight.0.3`; of JSON lines, `line 7`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}

impl PlaceError {
    /// A refusal from its three parts.
    pub fn new(code: Code, message: impl Into<String>, help: impl Into<String>) -> Self {
        PlaceError { code, message: message.into(), help: help.into(), at: None }
    }

    /// Says which member of the file it is about.
    #[must_use]
    pub fn at(self, member: impl Into<String>) -> Self {
        PlaceError { at: Some(member.into()), ..self }
    }

    /// Says in which member of the file the one lies that it is about.
    #[must_use]
    pub(crate) fn under(self, member: &str) -> Self {
        let at = self.at.as_deref().map_or_else(|| member.to_owned(), |at| format!("{member}.{at}"));
        self.at(at)
    }
}

/// Multiples of `step` around `near`, as text for a help line.
pub(crate) fn nearby_multiples(step: usize, near: usize, at_least: usize) -> String {
    let step = step.max(1);
    let first = at_least.div_ceil(step).max(1) * step;
    let below = (near / step) * step;
    let above = below + step;
    if below >= first { format!("{below} or {above}") } else { format!("{first} or {}", first + step) }
}

/// Divisors of `n`, as text for a help line (at most twelve).
pub(crate) fn divisors(n: usize) -> String {
    let all: Vec<String> = (1..=n).filter(|d| n.is_multiple_of(*d)).map(|d| d.to_string()).collect();
    if all.len() <= 12 {
        return all.join(", ");
    }
    format!("{}, .., {}", all[..10].join(", "), all[all.len() - 1])
}
