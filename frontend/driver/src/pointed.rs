//! Refusals of files that a user wrote, pointed into the text.

use moec_frontend::json::{self, Kind, Value};
use moec_ir::{Code, Diagnostic, Span, nearest};
use moec_place::PlaceError;
use moec_plan::PlanError;

/// What a reader of a JSON file refuses: the member is a path such as `gpu.hbm_gbps` or `weight.0.3`.
pub struct Refusal {
    code: Code,
    message: String,
    help: String,
    at: Option<String>,
}

impl From<PlanError> for Refusal {
    fn from(e: PlanError) -> Self {
        Self { code: Code(e.code), message: e.message, help: e.help, at: e.at }
    }
}

impl From<PlaceError> for Refusal {
    fn from(e: PlaceError) -> Self {
        Self { code: Code(e.code.as_str()), message: e.message, help: e.help, at: e.at }
    }
}

impl Refusal {
    /// A refusal that is about a member.
    pub fn new(code: &'static str, message: impl Into<String>, help: impl Into<String>, at: impl Into<String>) -> Self {
        Self { code: Code(code), message: message.into(), help: help.into(), at: Some(at.into()) }
    }

    /// The finding for the text of `file`: what is no JSON comes first, then figures that are none, then the refusal.
    pub fn point(self, file: &str, text: &str) -> Diagnostic {
        let found = match json::parse(text) {
            Err(broken) if broken.help.is_some() => broken,
            Err(broken) => broken.help(self.help),
            Ok(value) => match not_finite(&value) {
                Some((figure, span)) => Diagnostic::error(self.code, format!("{figure} is not a figure"))
                    .primary(span, "this member")
                    .help("give a finite number"),
                None => {
                    let (span, label) = match self.at.as_deref() {
                        None | Some("") => (value.span, "this file"),
                        Some(at) => member(&value, at),
                    };
                    Diagnostic::error(self.code, self.message).primary(span, label).help(self.help)
                }
            },
        };
        Diagnostic { file: Some(file.to_owned()), ..found }
    }

    /// The finding for a file of JSON lines, where a refusal names a line.
    pub fn point_line(self, file: &str, text: &str) -> Diagnostic {
        let number = self.at.as_deref().and_then(|at| at.strip_prefix("line ")?.parse::<usize>().ok());
        let before = |number: usize| text.split_inclusive('\n').take(number - 1).map(str::len).sum::<usize>();
        let line = number.filter(|n| *n > 0).and_then(|n| Some((before(n), text.lines().nth(n - 1)?.len())));
        let found = Diagnostic::error(self.code, self.message).help(self.help);
        let found = match line {
            Some((start, length)) => found.primary(Span { start, end: start + length.max(1) }, "this line"),
            None => found,
        };
        Diagnostic { file: Some(file.to_owned()), ..found }
    }
}

/// A key that stands twice in a file that was read: readers take one of the two.
pub fn ambiguous(file: &str, text: &str) -> Option<Diagnostic> {
    json::parse(text).err().map(|twice| Diagnostic { file: Some(file.to_owned()), ..twice })
}

/// Warnings about members of `file` that mean nothing, with the names that have a meaning in their place.
pub fn unread(file: &str, members: Vec<(String, Vec<String>)>) -> Vec<Diagnostic> {
    let warning = |(member, known): (String, Vec<String>)| {
        let last = member.rsplit('.').next().unwrap_or(&member);
        let warning = Diagnostic::warning(Code("W0201"), format!("unknown key {member} in {file}"));
        match nearest(last, known.iter().map(String::as_str)) {
            Some(near) => warning.help(format!("did you mean {near}?")),
            None => warning,
        }
    };
    members.into_iter().map(warning).collect()
}

/// Where a member stands; of a missing one, what it is missing from.
fn member(file: &Value, path: &str) -> (Span, &'static str) {
    let mut at = file;
    for step in path.split('.') {
        let item = step.parse::<usize>().ok().and_then(|i| at.array()?.get(i));
        match item.or_else(|| at.get(step)) {
            Some(inner) => at = inner,
            None => return (at.span, "missing here"),
        }
    }
    (at.span, "this member")
}

/// The first `NaN` or infinity of a file.
fn not_finite(value: &Value) -> Option<(&str, Span)> {
    match &value.kind {
        Kind::NotFinite(figure) => Some((figure, value.span)),
        Kind::Array(items) => items.iter().find_map(not_finite),
        Kind::Object(members) => members.iter().find_map(|m| not_finite(&m.value)),
        Kind::Null | Kind::Bool(_) | Kind::Number(_) | Kind::String(_) => None,
    }
}
