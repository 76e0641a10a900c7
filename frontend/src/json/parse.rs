//! The parser: one pass over the text, with a stack of its own.

use super::{Kind, Member, Value, cut};
use crate::limits;
use moec_ir::{Code, Diagnostic, Span};
use std::collections::BTreeMap;

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

/// A place in a text.
pub(super) struct Parser<'a> {
    text: &'a str,
    /// Bytes that are read.
    pub(super) at: usize,
    keys: u64,
    most_keys: u64,
}

impl<'a> Parser<'a> {
    /// The start of a text.
    pub(super) const fn new(text: &'a str, most_keys: u64) -> Self {
        Self { text, at: 0, keys: 0, most_keys }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    pub(super) fn document(&mut self) -> Result<Value, Diagnostic> {
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

    pub(super) fn space(&mut self) -> Result<(), Diagnostic> {
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
    pub(super) fn whole_chars(&self, mut span: Span) -> Span {
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
