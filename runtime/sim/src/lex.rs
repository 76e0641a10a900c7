//! PTX text to tokens.
//!
//! A word is a maximal run of letters, digits, `_ $ % .` and `::`, so that an instruction with all its suffixes is
//! one token. Comments and the debug directives `.loc` and `.file` are dropped here.

use crate::Error;

/// One token with the line it stands on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) kind: TokenKind,
    pub(crate) line: u32,
}

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TokenKind {
    Word(String),
    Punct(char),
    Text(String),
}

/// Splits `ptx` into tokens.
///
/// # Errors
///
/// On an unterminated comment or string and on characters that PTX does not have.
pub(crate) fn lex(ptx: &str) -> Result<Vec<Token>, Error> {
    let c = ptx.as_bytes();
    let mut out = Vec::new();
    let (mut i, mut line) = (0, 1u32);
    let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$' | b'%' | b'.');
    while i < c.len() {
        match c[i] {
            b'\n' => {
                line += 1;
                i += 1;
            }
            b if b.is_ascii_whitespace() || b == 0 => i += 1,
            b'/' if c.get(i + 1) == Some(&b'/') => {
                while i < c.len() && c[i] != b'\n' {
                    i += 1;
                }
            }
            b'/' if c.get(i + 1) == Some(&b'*') => {
                let start = line;
                i += 2;
                loop {
                    match c.get(i) {
                        None => return Err(Error::Parse { line: start, message: "comment without end".into() }),
                        Some(b'*') if c.get(i + 1) == Some(&b'/') => break,
                        Some(b'\n') => line += 1,
                        Some(_) => {}
                    }
                    i += 1;
                }
                i += 2;
            }
            b'"' => {
                let start = i + 1;
                i = start;
                while c.get(i).is_some_and(|b| *b != b'"' && *b != b'\n') {
                    i += 1;
                }
                if c.get(i) != Some(&b'"') {
                    return Err(Error::Parse { line, message: "string without end".into() });
                }
                out.push(Token { kind: TokenKind::Text(String::from_utf8_lossy(&c[start..i]).into_owned()), line });
                i += 1;
            }
            b if word(b) => {
                let start = i;
                loop {
                    if c.get(i).is_some_and(|b| word(*b)) {
                        i += 1;
                    } else if c.get(i) == Some(&b':')
                        && c.get(i + 1) == Some(&b':')
                        && c.get(i + 2).is_some_and(|b| word(*b))
                    {
                        i += 2;
                    } else {
                        break;
                    }
                }
                let text = String::from_utf8_lossy(&c[start..i]).into_owned();
                if text == ".loc" || text == ".file" {
                    while i < c.len() && c[i] != b'\n' {
                        i += 1;
                    }
                } else if let Some(rest) = text.strip_prefix('.') {
                    // Directives may be written without spaces between: `.reg.b16`.
                    out.extend(rest.split('.').map(|part| Token { kind: TokenKind::Word(format!(".{part}")), line }));
                } else {
                    out.push(Token { kind: TokenKind::Word(text), line });
                }
            }
            b @ (b'{' | b'}' | b'(' | b')' | b'[' | b']' | b'<' | b'>' | b',' | b';' | b':' | b'=' | b'+' | b'-'
            | b'@' | b'!' | b'|' | b'*' | b'~') => {
                out.push(Token { kind: TokenKind::Punct(b as char), line });
                i += 1;
            }
            b => return Err(Error::Parse { line, message: format!("unexpected character {:?}", b as char) }),
        }
    }
    Ok(out)
}
