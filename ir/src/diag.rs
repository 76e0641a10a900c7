//! Diagnostics as plain data; only the command line turns them into text or JSON.

use serde::Serialize;

/// A code of the table behind `moec explain`, such as `E0203`. Once published it keeps its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Code(pub &'static str);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is produced.
    Error,
    /// Something is produced; the user should know.
    Warning,
    /// A choice of the compiler.
    Remark,
}

/// Bytes `start..end` of a source text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// A place in the user's text and what is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Label {
    /// Where.
    pub span: Span,
    /// What is there, lower case, no full stop.
    pub text: String,
    /// The one place that the message is about.
    pub primary: bool,
}

/// One finding about the user's input: what is, what was needed, what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Entry of the table behind `moec explain`.
    pub code: Code,
    /// The message; stands alone, lower case, no full stop.
    pub message: String,
    /// The file that the labels point into, as the user named it.
    pub file: Option<String>,
    /// The node that it is about, if it is about one.
    pub node: Option<String>,
    /// Places, the primary one first.
    pub labels: Vec<Label>,
    /// The next step.
    pub help: Option<String>,
    /// Further facts, a line each.
    pub notes: Vec<String>,
}

impl Diagnostic {
    /// A finding of this severity without places.
    pub fn new(severity: Severity, code: Code, message: impl Into<String>) -> Self {
        Self {
            severity,
            code,
            message: message.into(),
            file: None,
            node: None,
            labels: Vec::new(),
            help: None,
            notes: Vec::new(),
        }
    }

    /// An error.
    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, code, message)
    }

    /// A warning.
    pub fn warning(code: Code, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, code, message)
    }

    /// A remark.
    pub fn remark(code: Code, message: impl Into<String>) -> Self {
        Self::new(Severity::Remark, code, message)
    }

    /// Adds the place that the message is about.
    #[must_use]
    pub fn primary(mut self, span: Span, text: impl Into<String>) -> Self {
        self.labels.insert(0, Label { span, text: text.into(), primary: true });
        self
    }

    /// Says which node it is about; readers of files turn that into a place.
    #[must_use]
    pub fn about(mut self, node: &str) -> Self {
        self.node = Some(node.to_owned());
        self
    }

    /// Adds another place.
    #[must_use]
    pub fn secondary(mut self, span: Span, text: impl Into<String>) -> Self {
        self.labels.push(Label { span, text: text.into(), primary: false });
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn help(mut self, text: impl Into<String>) -> Self {
        self.help = Some(text.into());
        self
    }

    /// Adds a fact.
    #[must_use]
    pub fn note(mut self, text: impl Into<String>) -> Self {
        self.notes.push(text.into());
        self
    }
}
