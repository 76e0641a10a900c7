//! JSON text to values that know where they stand.
//!
//! Configs come from strangers, so every message points into the text: each key and value carries
//! its bytes. The parser keeps its own stack, so nesting costs no call frames, and it stops at the
//! limits of [`crate::limits`]. It accepts exactly JSON, with one addition: bare `NaN` and
//! `Infinity`, which Python writes, become [`Kind::NotFinite`], and the caller decides.

mod parse;

use self::parse::Parser;
use crate::limits;
use moec_ir::{Code, Diagnostic, Span};
use std::fmt;

/// A value and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// Bytes of the value, with quotes and brackets.
    pub span: Span,
    /// What it is.
    pub kind: Kind,
}

/// The kinds of JSON values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `null`.
    Null,
    /// `true`, `false`.
    Bool(bool),
    /// A number, as written.
    Number(String),
    /// `NaN`, `Infinity`, `-Infinity`: not JSON, but written by Python.
    NotFinite(String),
    /// A string, unescaped.
    String(String),
    /// `[..]`.
    Array(Vec<Value>),
    /// `{..}`, in the order of the text.
    Object(Vec<Member>),
}

/// One `"key": value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The key, unescaped.
    pub key: String,
    /// Bytes of the key, with quotes.
    pub key_span: Span,
    /// The value.
    pub value: Value,
}

impl Value {
    /// The members, if this is an object.
    pub fn object(&self) -> Option<&[Member]> {
        if let Kind::Object(members) = &self.kind { Some(members) } else { None }
    }

    /// The items, if this is an array.
    pub fn array(&self) -> Option<&[Value]> {
        if let Kind::Array(items) = &self.kind { Some(items) } else { None }
    }

    /// The text, if this is a string.
    pub fn string(&self) -> Option<&str> {
        if let Kind::String(text) = &self.kind { Some(text) } else { None }
    }

    /// The value of a key of this object.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.object()?.iter().find(|m| m.key == key).map(|m| &m.value)
    }

    /// Name of the kind, for messages.
    pub const fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::Null => "null",
            Kind::Bool(_) => "a boolean",
            Kind::Number(_) | Kind::NotFinite(_) => "a number",
            Kind::String(_) => "a string",
            Kind::Array(_) => "a list",
            Kind::Object(_) => "an object",
        }
    }
}

/// The value as JSON, for messages; long texts are cut.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Null => f.write_str("null"),
            Kind::Bool(b) => write!(f, "{b}"),
            Kind::Number(n) | Kind::NotFinite(n) => f.write_str(&cut(n)),
            Kind::String(s) => write!(f, "\"{}\"", cut(s)),
            Kind::Array(items) if items.is_empty() => f.write_str("[]"),
            Kind::Array(items) => write!(f, "a list of {}", items.len()),
            Kind::Object(members) if members.is_empty() => f.write_str("{}"),
            Kind::Object(members) => write!(f, "an object of {} keys", members.len()),
        }
    }
}

/// Text for a message: at most 60 characters, control characters escaped.
pub fn cut(text: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown: String = text.chars().take(SHOWN).flat_map(escape).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

fn escape(c: char) -> Vec<char> {
    // Direction marks would reorder the line on a terminal.
    if c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
        c.escape_unicode().collect()
    } else {
        vec![c]
    }
}

/// Decodes the bytes of a JSON file.
///
/// # Errors
/// `E0101` when there is nothing, `E0102` for another encoding, `E0109` beyond the size limit.
pub fn decode(bytes: &[u8]) -> Result<&str, Diagnostic> {
    if bytes.len() as u64 > limits::CONFIG_BYTES {
        return Err(Diagnostic::error(
            Code("E0109"),
            format!("the file is larger than {} MiB", limits::CONFIG_BYTES >> 20),
        )
        .help("a config.json has a few kilobytes; is this the right file?"));
    }
    let body = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Diagnostic::error(Code("E0101"), "the file is empty").help("expected a JSON object"));
    }
    match std::str::from_utf8(body) {
        // A zero byte next to ASCII is UTF-16 or UTF-32 that happens to be valid UTF-8.
        Ok(text) if body.len() > 1 && (body[0] == 0 || body[1] == 0) => Err(encoding(0, "UTF-16", text.len())),
        Ok(_) => std::str::from_utf8(bytes).map_err(|e| encoding(e.valid_up_to(), "Latin-1", bytes.len())),
        Err(error) => {
            let at = error.valid_up_to();
            let guess = match body {
                [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
                _ if error.error_len().is_none() => "UTF-8 that is cut off",
                _ => "Latin-1",
            };
            Err(encoding(at + (bytes.len() - body.len()), guess, bytes.len()))
        }
    }
}

fn encoding(at: usize, guess: &str, len: usize) -> Diagnostic {
    Diagnostic::error(Code("E0102"), format!("the file is not UTF-8: byte {at}"))
        .primary(Span { start: at, end: (at + 1).min(len) }, "not UTF-8 from here")
        .help(format!("it looks like {guess}; save it as UTF-8"))
}

/// Parses one JSON document.
///
/// # Errors
/// `E0101` to `E0111`: the first thing in the text that is not JSON, or beyond a limit.
pub fn parse(text: &str) -> Result<Value, Diagnostic> {
    parse_within(text, limits::CONFIG_KEYS)
}

/// As [`parse`], with another limit of keys.
pub(crate) fn parse_within(text: &str, most_keys: u64) -> Result<Value, Diagnostic> {
    let mut parser = Parser::new(text, most_keys);
    if text.starts_with('\u{feff}') {
        parser.at = '\u{feff}'.len_utf8();
    }
    if text.get(parser.at..).unwrap_or("").trim().is_empty() {
        return Err(Diagnostic::error(Code("E0101"), "the file is empty").help("expected a JSON object"));
    }
    let value = parser.document()?;
    parser.space()?;
    if parser.at < text.len() {
        let rest = Span { start: parser.at, end: text.len().min(parser.at + 1) };
        return Err(Diagnostic::error(Code("E0104"), "text after the end of the JSON value")
            .primary(parser.whole_chars(rest), "a second value starts here")
            .secondary(value.span, "the first value")
            .help("keep one value per file"));
    }
    Ok(value)
}

/// Parses a document whose top level must be an object.
///
/// # Errors
/// As [`parse`], and `E0105` when the top level is something else.
pub fn parse_object(text: &str) -> Result<Value, Diagnostic> {
    let value = parse(text)?;
    match value.kind {
        Kind::Object(_) => Ok(value),
        Kind::Null | Kind::Bool(_) | Kind::Number(_) | Kind::NotFinite(_) | Kind::String(_) | Kind::Array(_) => {
            let found = value.kind_name();
            Err(Diagnostic::error(Code("E0105"), format!("the top level is {found}, not an object"))
                .primary(Span { start: value.span.start, end: value.span.start + 1 }, "expected `{`")
                .help("a config.json is an object: { \"model_type\": .. }"))
        }
    }
}

#[cfg(test)]
#[path = "json/tests.rs"]
mod tests;
