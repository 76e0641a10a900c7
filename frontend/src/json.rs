//! JSON text to values that know where they stand.
//!
//! Configs come from strangers, so every message points into the text: each key and value carries
//! its bytes. The parser keeps its own stack, so nesting costs no call frames, and it stops at the
//! limits of [`crate::limits`]. It accepts exactly JSON, with one addition: bare `NaN` and
//! `Infinity`, which Python writes, become [`Kind::NotFinite`], and the caller decides.

use crate::limits;
use moec_ir::{Code, Diagnostic, Span};
use std::{collections::BTreeMap, fmt};

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
        match &self.kind {
            Kind::Object(members) => Some(members),
            _ => None,
        }
    }

    /// The items, if this is an array.
    pub fn array(&self) -> Option<&[Value]> {
        match &self.kind {
            Kind::Array(items) => Some(items),
            _ => None,
        }
    }

    /// The text, if this is a string.
    pub fn string(&self) -> Option<&str> {
        match &self.kind {
            Kind::String(text) => Some(text),
            _ => None,
        }
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
    let mut parser = Parser { text, at: 0, keys: 0, most_keys };
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

/// An open bracket.
struct Frame {
    start: usize,
    body: Body,
}

enum Body {
    Array(Vec<Value>),
    Object { members: Vec<Member>, seen: BTreeMap<String, Span>, key: String, key_span: Span },
}

impl Frame {
    fn attach(&mut self, value: Value) {
        match &mut self.body {
            Body::Array(items) => items.push(value),
            Body::Object { members, key, key_span, .. } => {
                members.push(Member { key: std::mem::take(key), key_span: *key_span, value });
            }
        }
    }

    fn close(self, end: usize) -> Value {
        let kind = match self.body {
            Body::Array(items) => Kind::Array(items),
            Body::Object { members, .. } => Kind::Object(members),
        };
        Value { span: Span { start: self.start, end }, kind }
    }

    const fn closer(&self) -> u8 {
        match self.body {
            Body::Array(_) => b']',
            Body::Object { .. } => b'}',
        }
    }

    const fn name(&self) -> &'static str {
        match self.body {
            Body::Array(_) => "list",
            Body::Object { .. } => "object",
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    keys: u64,
    most_keys: u64,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn document(&mut self) -> Result<Value, Diagnostic> {
        let mut stack: Vec<Frame> = Vec::new();
        loop {
            self.space()?;
            let start = self.at;
            let mut value = match self.peek() {
                Some(open @ (b'[' | b'{')) => {
                    if stack.len() >= limits::CONFIG_DEPTH {
                        return Err(self.too_deep(start));
                    }
                    self.at += 1;
                    self.space()?;
                    let body = if open == b'[' {
                        Body::Array(Vec::new())
                    } else {
                        Body::Object {
                            members: Vec::new(),
                            seen: BTreeMap::new(),
                            key: String::new(),
                            key_span: Span::default(),
                        }
                    };
                    let mut frame = Frame { start, body };
                    if self.peek() == Some(frame.closer()) {
                        self.at += 1;
                        frame.close(self.at)
                    } else {
                        self.key(&mut frame)?;
                        stack.push(frame);
                        continue;
                    }
                }
                _ => self.scalar(stack.last())?,
            };
            loop {
                let Some(frame) = stack.last_mut() else {
                    return Ok(value);
                };
                frame.attach(value);
                self.space()?;
                match self.peek() {
                    Some(b',') => {
                        let comma = self.at;
                        self.at += 1;
                        self.space()?;
                        if matches!(self.peek(), Some(b']' | b'}')) {
                            return Err(syntax("a comma before the closing bracket")
                                .primary(Span { start: comma, end: comma + 1 }, "trailing comma")
                                .help("remove the comma; JSON has no trailing commas"));
                        }
                        self.key(frame)?;
                        break;
                    }
                    Some(c) if c == frame.closer() => {
                        self.at += 1;
                        match stack.pop() {
                            Some(frame) => value = frame.close(self.at),
                            None => return Err(self.expected("a value")),
                        }
                    }
                    None => return Err(self.cut_off(frame)),
                    Some(_) => {
                        let what = if frame.closer() == b']' { "`,` or `]`" } else { "`,` or `}`" };
                        return Err(self.expected(what));
                    }
                }
            }
        }
    }

    /// Reads `"key":` when the frame is an object.
    fn key(&mut self, frame: &mut Frame) -> Result<(), Diagnostic> {
        if self.peek().is_none() {
            return Err(self.cut_off(frame));
        }
        let open = frame.start;
        let Body::Object { seen, key, key_span, .. } = &mut frame.body else {
            return Ok(());
        };
        let start = self.at;
        if self.peek() != Some(b'"') {
            return Err(self.expected("a key in double quotes"));
        }
        let name = self.string()?;
        let span = Span { start, end: self.at };
        if let Some(c) = name.chars().find(|c| c.is_control()) {
            return Err(Diagnostic::error(
                Code("E0107"),
                format!("a key holds the control character {}", c.escape_unicode()),
            )
            .primary(span, format!("the key is \"{}\"", cut(&name)))
            .help("remove the character"));
        }
        if let Some(first) = seen.get(&name) {
            return Err(Diagnostic::error(
                Code("E0106"),
                format!("the key \"{}\" stands twice in one object", cut(&name)),
            )
            .primary(span, "again here")
            .secondary(*first, "first here")
            .help("keep one of the two"));
        }
        self.keys += 1;
        if self.keys > self.most_keys {
            return Err(Diagnostic::error(Code("E0110"), format!("more than {} keys", self.most_keys))
                .primary(span, "this one is too many"));
        }
        self.space()?;
        match self.peek() {
            Some(b':') => self.at += 1,
            None => return Err(cut_off_at(self.text.len(), open, "object")),
            Some(_) => return Err(self.expected("`:`")),
        }
        seen.insert(name.clone(), span);
        *key = name;
        *key_span = span;
        Ok(())
    }

    fn scalar(&mut self, frame: Option<&Frame>) -> Result<Value, Diagnostic> {
        let start = self.at;
        let kind = match self.peek() {
            Some(b'"') => Kind::String(self.string()?),
            Some(b'-' | b'0'..=b'9') => self.number(frame)?,
            Some(b'\'') => {
                return Err(syntax("single quotes")
                    .primary(Span { start, end: start + 1 }, "a string starts with `\"`")
                    .help("JSON strings use double quotes"));
            }
            Some(c) if c.is_ascii_alphabetic() => self.word()?,
            Some(_) => return Err(self.expected("a value")),
            None => {
                return Err(match frame {
                    Some(frame) => self.cut_off(frame),
                    None => syntax("the file ends where a value is due"),
                });
            }
        };
        Ok(Value { span: Span { start, end: self.at }, kind })
    }

    fn word(&mut self) -> Result<Kind, Diagnostic> {
        let rest = &self.text[self.at..];
        let len = rest.bytes().take_while(u8::is_ascii_alphanumeric).count();
        let word = &rest[..len];
        let span = Span { start: self.at, end: self.at + len };
        self.at += len;
        let help = match word {
            "null" => return Ok(Kind::Null),
            "true" => return Ok(Kind::Bool(true)),
            "false" => return Ok(Kind::Bool(false)),
            "NaN" | "Infinity" => return Ok(Kind::NotFinite(word.to_owned())),
            "True" => "JSON spells it true",
            "False" => "JSON spells it false",
            "None" => "JSON spells it null",
            _ if self.at == self.text.len() && ["null", "true", "false"].iter().any(|w| w.starts_with(word)) => {
                return Err(syntax(format!("the file ends inside `{word}`")).primary(span, "cut off here"));
            }
            _ => "strings stand in double quotes",
        };
        Err(syntax(format!("`{}` is not JSON", cut(word))).primary(span, "expected a value").help(help))
    }

    fn number(&mut self, frame: Option<&Frame>) -> Result<Kind, Diagnostic> {
        let start = self.at;
        let rest = &self.text.as_bytes()[start..];
        if rest.starts_with(b"-Infinity") {
            self.at += "-Infinity".len();
            return Ok(Kind::NotFinite("-Infinity".to_owned()));
        }
        let digits = |from: usize| rest.get(from..).unwrap_or(&[]).iter().take_while(|b| b.is_ascii_digit()).count();
        let mut n = usize::from(rest.first() == Some(&b'-'));
        let whole = digits(n);
        let mut good = whole > 0 && !(whole > 1 && rest.get(n) == Some(&b'0'));
        n += whole;
        if rest.get(n) == Some(&b'.') {
            let part = digits(n + 1);
            good &= part > 0;
            n += 1 + part;
        }
        if matches!(rest.get(n), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(rest.get(n + 1), Some(b'+' | b'-')));
            let part = digits(n + 1 + sign);
            good &= part > 0;
            n += 1 + sign + part;
        }
        self.at += n;
        let span = Span { start, end: start + n };
        if !good && self.at == self.text.len() {
            let error = syntax("the file ends inside a number").primary(span, "cut off here");
            return Err(match frame {
                Some(frame) => error.secondary(
                    Span { start: frame.start, end: frame.start + 1 },
                    format!("inside this {}", frame.name()),
                ),
                None => error,
            });
        }
        if !good {
            return Err(syntax(format!("`{}` is not a JSON number", cut(&self.text[span.start..span.end])))
                .primary(span, "not a number")
                .help("write it like 8, -1, 0.5 or 1e-6, without leading zeros"));
        }
        Ok(Kind::Number(self.text[span.start..span.end].to_owned()))
    }

    fn string(&mut self) -> Result<String, Diagnostic> {
        let open = self.at;
        let mut out = String::new();
        self.at += 1;
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.bytes().take_while(|b| !matches!(b, b'"' | b'\\' | 0..0x20)).count();
            out.push_str(&rest[..plain]);
            self.at += plain;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => out.push(self.escape(open)?),
                Some(c) => {
                    return Err(Diagnostic::error(
                        Code("E0107"),
                        format!("a string holds the control character {}", char::from(c).escape_unicode()),
                    )
                    .primary(Span { start: self.at, end: self.at + 1 }, "control character")
                    .secondary(Span { start: open, end: open + 1 }, "the string starts here")
                    .help("close the string on its line, or write the character as an escape"));
                }
                None => return Err(cut_off_at(self.text.len(), open, "string")),
            }
        }
    }

    fn escape(&mut self, open: usize) -> Result<char, Diagnostic> {
        let start = self.at;
        self.at += 1;
        let Some(c) = self.peek() else {
            return Err(cut_off_at(self.text.len(), open, "string"));
        };
        self.at += 1;
        Ok(match c {
            b'"' => '"',
            b'\\' => '\\',
            b'/' => '/',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let high = self.hex(open, start)?;
                let code = if (0xd800..0xdc00).contains(&high) && self.text[self.at..].starts_with("\\u") {
                    self.at += 2;
                    let low = self.hex(open, start)?;
                    if (0xdc00..0xe000).contains(&low) {
                        0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00)
                    } else {
                        high
                    }
                } else {
                    high
                };
                char::from_u32(code).ok_or_else(|| {
                    Diagnostic::error(Code("E0102"), format!("byte {start}: half of a surrogate pair"))
                        .primary(Span { start, end: self.at }, "no character")
                        .help("it looks like broken UTF-16; write both halves or the character itself")
                })?
            }
            _ => {
                self.at = start + 1;
                let end = self.whole_chars(Span { start: self.at, end: self.at + 1 }).end;
                return Err(syntax("unknown escape in a string")
                    .primary(Span { start, end }, "no such escape")
                    .help("write a backslash as \\\\"));
            }
        })
    }

    fn hex(&mut self, open: usize, start: usize) -> Result<u32, Diagnostic> {
        let digits = self.text.as_bytes().get(self.at..).unwrap_or(&[]);
        let four = digits.iter().take(4).take_while(|b| b.is_ascii_hexdigit()).count();
        if four < 4 {
            if digits.len() < 4 && digits.len() == four {
                return Err(cut_off_at(self.text.len(), open, "string"));
            }
            return Err(syntax("`\\u` needs four hexadecimal digits")
                .primary(Span { start, end: self.at + four }, "too few digits"));
        }
        let code = u32::from_str_radix(&self.text[self.at..self.at + 4], 16).unwrap_or(0xd800);
        self.at += 4;
        Ok(code)
    }

    fn space(&mut self) -> Result<(), Diagnostic> {
        let rest = &self.text.as_bytes()[self.at..];
        self.at += rest.iter().take_while(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r')).count();
        if let Some(c @ (b'/' | b'#')) = self.peek() {
            let start = self.at;
            let end = if c == b'/' && matches!(self.text.as_bytes().get(start + 1), Some(b'/' | b'*')) {
                start + 2
            } else {
                start + 1
            };
            return Err(syntax("a comment")
                .primary(Span { start, end }, "comment")
                .help("remove it; JSON has no comments"));
        }
        Ok(())
    }

    fn expected(&self, what: &str) -> Diagnostic {
        let Some(c) = self.text.get(self.at..).and_then(|t| t.chars().next()) else {
            return syntax(format!("the file ends where {what} is due"));
        };
        let span = Span { start: self.at, end: self.at + c.len_utf8() };
        let error = syntax(format!("expected {what}, found `{}`", cut(&c.to_string())))
            .primary(span, format!("expected {what}"));
        match c {
            '\'' => error.help("JSON strings use double quotes"),
            _ if c.is_ascii_alphabetic() => error.help("keys and strings stand in double quotes"),
            _ => error,
        }
    }

    fn cut_off(&self, frame: &Frame) -> Diagnostic {
        cut_off_at(self.text.len(), frame.start, frame.name())
    }

    fn too_deep(&self, at: usize) -> Diagnostic {
        Diagnostic::error(Code("E0108"), format!("nested deeper than {} brackets", limits::CONFIG_DEPTH))
            .primary(Span { start: at, end: at + 1 }, "this one is too deep")
    }

    /// Extends a span so that it ends between characters.
    fn whole_chars(&self, mut span: Span) -> Span {
        while span.end < self.text.len() && !self.text.is_char_boundary(span.end) {
            span.end += 1;
        }
        span.end = span.end.min(self.text.len());
        span
    }
}

fn syntax(message: impl Into<String>) -> Diagnostic {
    Diagnostic::error(Code("E0103"), message)
}

fn cut_off_at(len: usize, open: usize, what: &str) -> Diagnostic {
    syntax(format!("the file ends inside a {what}").replace("a object", "an object"))
        .primary(Span { start: len, end: len }, "the text ends here")
        .secondary(Span { start: open, end: open + 1 }, format!("this {what} is open"))
        .help("the file is cut off; download or copy it again")
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
