//! Tokens of the text form, and attribute values.

use crate::{Code, Diagnostic, Span, codes};
use serde_json::{Map, Number, Value};

/// Nested attribute values.
const MAX_NESTED: usize = 64;

/// A place in the text.
pub(super) struct Lexer<'a> {
    text: &'a str,
    at: usize,
}

pub(super) type Parsed<T> = Result<T, Box<Diagnostic>>;

impl<'a> Lexer<'a> {
    pub(super) const fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Skips blanks and comments.
    pub(super) fn blank(&mut self) {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            if !trimmed.starts_with("//") {
                return;
            }
            self.at += trimmed.find('\n').unwrap_or(trimmed.len());
        }
    }

    /// Position of the next token.
    pub(super) fn place(&mut self) -> usize {
        self.blank();
        self.at
    }

    pub(super) const fn span_from(&self, start: usize) -> Span {
        Span { start, end: self.at }
    }

    /// A finding about the text from `start` to here, or the next character.
    pub(super) fn error_at(&self, start: usize, code: Code, message: impl Into<String>) -> Box<Diagnostic> {
        let end =
            if self.at > start { self.at } else { start + self.text[start..].chars().next().map_or(0, char::len_utf8) };
        let message = message.into();
        Box::new(Diagnostic::error(code, message).primary(Span { start, end }, "here"))
    }

    /// A finding that something else was expected here.
    pub(super) fn expected(&mut self, what: &str) -> Box<Diagnostic> {
        let start = self.place();
        let message = match self.rest().chars().next() {
            Some(c) => format!("expected {what}, found `{c}`"),
            None => format!("expected {what}, the text ends"),
        };
        self.error_at(start, codes::SYNTAX, message)
    }

    pub(super) fn at_end(&mut self) -> bool {
        self.blank();
        self.rest().is_empty()
    }

    pub(super) fn peek(&mut self) -> Option<char> {
        self.blank();
        self.rest().chars().next()
    }

    pub(super) fn eat(&mut self, symbol: char) -> bool {
        let found = self.peek() == Some(symbol);
        if found {
            self.at += symbol.len_utf8();
        }
        found
    }

    pub(super) fn want(&mut self, symbol: char) -> Parsed<()> {
        if self.eat(symbol) { Ok(()) } else { Err(self.expected(&format!("`{symbol}`"))) }
    }

    /// A run of letters, digits, `_` and `.`; may be empty.
    pub(super) fn word(&mut self) -> &'a str {
        self.blank();
        self.run(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
    }

    fn run(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let len = rest.find(|c| !accept(c)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    /// Takes the word if it comes next.
    pub(super) fn eat_word(&mut self, word: &str) -> bool {
        let start = self.place();
        if self.word() == word {
            return true;
        }
        self.at = start;
        false
    }

    pub(super) fn want_word(&mut self, word: &str) -> Parsed<()> {
        if self.eat_word(word) { Ok(()) } else { Err(self.expected(&format!("`{word}`"))) }
    }

    /// A word or a quoted text.
    pub(super) fn name(&mut self, what: &str) -> Parsed<String> {
        if self.peek() == Some('"') {
            return self.string();
        }
        let word = self.word();
        if word.is_empty() { Err(self.expected(what)) } else { Ok(word.to_owned()) }
    }

    /// A quoted text with the escapes of JSON.
    pub(super) fn string(&mut self) -> Parsed<String> {
        let start = self.place();
        if !self.eat('"') {
            return Err(self.expected("a quoted text"));
        }
        let mut escaped = false;
        for (i, c) in self.rest().char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => {
                    self.at += i + 1;
                    return serde_json::from_str(&self.text[start..self.at])
                        .map_err(|e| self.error_at(start, codes::SYNTAX, format!("a quoted text: {e}")));
                }
                _ => {}
            }
        }
        Err(self.error_at(start, codes::SYNTAX, "a quoted text has no end"))
    }

    pub(super) fn number(&mut self, what: &str) -> Parsed<u64> {
        let start = self.place();
        let digits = self.run(|c| c.is_ascii_digit());
        match digits.parse() {
            Ok(n) => Ok(n),
            Err(_) if digits.is_empty() => Err(self.expected(what)),
            Err(_) => Err(self.error_at(start, codes::SYNTAX, format!("{digits} exceeds 64 bits"))),
        }
    }

    /// The text up to one of the symbols, outside parentheses; the symbol stays.
    pub(super) fn until(&mut self, symbols: &[char]) -> &'a str {
        self.blank();
        let rest = self.rest();
        let mut depth = 0usize;
        let mut len = rest.len();
        for (i, c) in rest.char_indices() {
            match c {
                '(' => depth += 1,
                ')' if depth > 0 => depth -= 1,
                c if depth == 0 && symbols.contains(&c) => {
                    len = i;
                    break;
                }
                _ => {}
            }
        }
        self.at += len;
        &rest[..len]
    }

    /// `{key = value, ..}`.
    pub(super) fn attributes(&mut self) -> Parsed<Map<String, Value>> {
        self.object(0)
    }

    fn object(&mut self, depth: usize) -> Parsed<Map<String, Value>> {
        self.want('{')?;
        let mut map = Map::new();
        while !self.eat('}') {
            let start = self.place();
            let key = self.name("an attribute or `}`")?;
            self.want('=')?;
            let value = self.value(depth + 1)?;
            if map.contains_key(&key) {
                return Err(self.error_at(start, codes::ATTRIBUTE, format!("attribute `{key}` is given twice")));
            }
            map.insert(key, value);
            if !self.eat(',') {
                self.want('}')?;
                break;
            }
        }
        Ok(map)
    }

    fn value(&mut self, depth: usize) -> Parsed<Value> {
        let start = self.place();
        if depth > MAX_NESTED {
            let text = format!("more than {MAX_NESTED} values inside each other");
            return Err(self.error_at(start, codes::DEPTH, text));
        }
        match self.peek() {
            Some('{') => self.object(depth).map(Value::Object),
            Some('"') => self.string().map(Value::String),
            Some('[') => {
                self.want('[')?;
                let mut items = Vec::new();
                while !self.eat(']') {
                    items.push(self.value(depth + 1)?);
                    if !self.eat(',') {
                        self.want(']')?;
                        break;
                    }
                }
                Ok(Value::Array(items))
            }
            Some(_) | None => self.scalar(start),
        }
    }

    fn scalar(&mut self, start: usize) -> Parsed<Value> {
        let word = self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+'));
        match word {
            "true" => return Ok(Value::Bool(true)),
            "false" => return Ok(Value::Bool(false)),
            "null" => return Ok(Value::Null),
            _ => {}
        }
        let number = if word.contains(['.', 'e', 'E']) {
            word.parse::<f64>().ok().and_then(Number::from_f64)
        } else if word.starts_with('-') {
            word.parse::<i64>().ok().map(Number::from)
        } else {
            word.parse::<u64>().ok().map(Number::from)
        };
        match number {
            Some(n) => Ok(Value::Number(n)),
            None if word.is_empty() => Err(self.expected("a value")),
            None => Err(self.error_at(start, codes::SYNTAX, format!("`{word}` is no value"))),
        }
    }
}
