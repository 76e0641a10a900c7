//! Tokens to the module as written. Names are resolved later, in [`crate::decode`].

use crate::Error;
use crate::lex::{Token, TokenKind, lex};
use crate::syntax::{Ast, Function, Init, Instr, Operand, Space, Stmt, Ty, Var};

/// Deepest nesting of braces; a bound, so that hostile text cannot exhaust the stack.
const MAX_DEPTH: usize = 200;
/// Largest alignment of a variable.
const MAX_ALIGN: u32 = 1 << 16;
/// Largest parameter in bytes.
const MAX_PARAM: u64 = 1 << 16;

/// Parses a whole module.
///
/// # Errors
///
/// [`Error::Parse`] with the line.
pub(crate) fn parse(ptx: &str) -> Result<Ast, Error> {
    let mut p = Parser { tokens: lex(ptx)?, at: 0 };
    p.module()
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |t| t.line)
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, Error> {
        Err(Error::Parse { line: self.line(), message: message.into() })
    }

    fn peek(&self) -> Option<&TokenKind> {
        self.tokens.get(self.at).map(|t| &t.kind)
    }

    fn is(&self, c: char) -> bool {
        self.peek() == Some(&TokenKind::Punct(c))
    }

    fn take(&mut self, c: char) -> bool {
        let yes = self.is(c);
        self.at += usize::from(yes);
        yes
    }

    fn expect(&mut self, c: char) -> Result<(), Error> {
        if self.take(c) { Ok(()) } else { self.fail(format!("expected `{c}`, found {}", self.describe())) }
    }

    fn describe(&self) -> String {
        match self.peek() {
            None => "the end of the text".into(),
            Some(TokenKind::Word(w)) => format!("`{w}`"),
            Some(TokenKind::Punct(c)) => format!("`{c}`"),
            Some(TokenKind::Text(t)) => format!("\"{t}\""),
        }
    }

    fn peek_word(&self) -> Option<&str> {
        match self.peek() {
            Some(TokenKind::Word(w)) => Some(w),
            Some(TokenKind::Punct(_) | TokenKind::Text(_)) | None => None,
        }
    }

    fn word(&mut self) -> Result<String, Error> {
        match self.peek_word().map(str::to_owned) {
            Some(w) => {
                self.at += 1;
                Ok(w)
            }
            None => self.fail(format!("expected a name, found {}", self.describe())),
        }
    }

    fn number(&mut self) -> Result<u64, Error> {
        let negative = self.take('-');
        let w = self.word()?;
        match int(&w) {
            Some(v) => Ok(if negative { v.wrapping_neg() } else { v }),
            None => self.fail(format!("expected a number, found `{w}`")),
        }
    }

    fn module(&mut self) -> Result<Ast, Error> {
        let mut ast = Ast::default();
        while self.peek().is_some() {
            if self.take(';') {
                continue;
            }
            let w = self.word()?;
            match w.as_str() {
                ".version" | ".address_size" => {
                    self.word()?;
                }
                ".target" => {
                    ast.target = self.word()?;
                    while self.take(',') {
                        self.word()?;
                    }
                }
                ".visible" | ".extern" | ".weak" | ".common" => {}
                ".entry" | ".func" => {
                    let f = self.function(w == ".entry")?;
                    // A prototype may come before the body.
                    if f.has_body || !ast.functions.iter().any(|g| g.name == f.name) {
                        ast.functions.retain(|g| g.name != f.name || g.has_body);
                        ast.functions.push(f);
                    }
                }
                ".global" | ".const" | ".shared" | ".local" | ".param" => {
                    let vars = self.variables(&w)?;
                    ast.vars.extend(vars);
                }
                ".pragma" | ".alias" => self.skip_statement()?,
                ".section" => {
                    self.word()?;
                    self.skip_braces()?;
                }
                _ => return self.fail(format!("unknown directive `{w}`")),
            }
        }
        Ok(ast)
    }

    fn skip_statement(&mut self) -> Result<(), Error> {
        while !self.take(';') {
            if self.peek().is_none() {
                return self.fail("statement without end");
            }
            self.at += 1;
        }
        Ok(())
    }

    fn skip_braces(&mut self) -> Result<(), Error> {
        self.expect('{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.peek() {
                None => return self.fail("expected `}`"),
                Some(TokenKind::Punct('{')) => depth += 1,
                Some(TokenKind::Punct('}')) => depth -= 1,
                Some(TokenKind::Punct(_) | TokenKind::Word(_) | TokenKind::Text(_)) => {}
            }
            self.at += 1;
        }
        Ok(())
    }

    fn function(&mut self, is_entry: bool) -> Result<Function, Error> {
        let mut f = Function { is_entry, ..Function::default() };
        while matches!(self.peek_word(), Some(".attribute")) {
            self.at += 1;
            self.parens()?;
        }
        if self.is('(') {
            f.rets = self.params()?;
        }
        f.name = self.word()?;
        if self.is('(') {
            f.params = self.params()?;
        }
        loop {
            if self.take(';') {
                return Ok(f);
            }
            if self.is('{') {
                break;
            }
            let w = self.word()?;
            match w.as_str() {
                ".maxntid" => f.max_threads = Some(self.triple()?),
                ".reqntid" => f.req_threads = Some(self.triple()?),
                ".reqnctapercluster" => f.req_cluster = Some(self.triple()?),
                ".maxnreg" => f.max_regs = u32::try_from(self.number()?).ok(),
                ".minnctapersm" | ".maxnctapersm" | ".maxclusterrank" => {
                    self.number()?;
                }
                ".explicitcluster" | ".noreturn" | ".blocksareclusters" => {}
                ".pragma" => self.skip_statement()?,
                ".attribute" | ".abi_preserve" | ".abi_preserve_control" => {
                    if self.is('(') {
                        self.parens()?;
                    } else {
                        self.number()?;
                    }
                }
                _ => return self.fail(format!("unknown directive `{w}` of a function")),
            }
        }
        self.expect('{')?;
        f.has_body = true;
        f.body = self.body()?;
        Ok(f)
    }

    fn parens(&mut self) -> Result<(), Error> {
        self.expect('(')?;
        while !self.take(')') {
            if self.peek().is_none() {
                return self.fail("expected `)`");
            }
            self.at += 1;
        }
        Ok(())
    }

    fn triple(&mut self) -> Result<[u32; 3], Error> {
        let mut out = [1; 3];
        for (i, o) in out.iter_mut().enumerate() {
            if i > 0 && !self.take(',') {
                break;
            }
            let n = self.number()?;
            *o = match u32::try_from(n) {
                Ok(n) => n,
                Err(_) => return self.fail("dimension is too large"),
            };
        }
        Ok(out)
    }

    fn params(&mut self) -> Result<Vec<Var>, Error> {
        self.expect('(')?;
        let mut out = Vec::new();
        while !self.take(')') {
            let w = self.word()?;
            if w != ".param" && w != ".reg" {
                return self.fail(format!("expected `.param`, found `{w}`"));
            }
            out.push(self.variable(Space::Param)?.0);
            if !self.take(',') && !self.is(')') {
                return self.fail(format!("expected `,` or `)`, found {}", self.describe()));
            }
        }
        Ok(out)
    }

    fn variables(&mut self, space: &str) -> Result<Vec<Var>, Error> {
        let space = match space {
            ".global" => Space::Global,
            ".const" => Space::Const,
            ".shared" => Space::Shared,
            ".local" => Space::Local,
            _ => Space::Param,
        };
        let (first, vector) = self.variable(space)?;
        let mut out = vec![first];
        while self.take(',') {
            let like = out[0].clone();
            let name = self.word()?;
            out.push(self.declarator(Var { name, init: Vec::new(), ..like }, vector)?);
        }
        self.expect(';')?;
        Ok(out)
    }

    /// Everything of a declaration after its space; returns the length of its vector type too.
    fn variable(&mut self, space: Space) -> Result<(Var, u32), Error> {
        let line = self.line();
        let (mut align, mut ty, mut vector) = (None, None, 1);
        loop {
            let w = self.word()?;
            match w.as_str() {
                ".align" => match u32::try_from(self.number()?) {
                    Ok(n) if n.is_power_of_two() && n <= MAX_ALIGN => align = Some(n),
                    Ok(_) | Err(_) => return self.fail("an alignment is a small power of two"),
                },
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                ".ptr" | ".global" | ".shared" | ".const" | ".local" | ".unified" => {}
                ".attribute" => self.parens()?,
                _ => match w.strip_prefix('.').and_then(Ty::parse) {
                    // The alignment after `.ptr` is that of what the pointer points to.
                    Some(t) => {
                        ty = Some(t);
                        if self.peek_word() == Some(".ptr") {
                            while self.peek_word().is_some_and(|w| w.starts_with('.')) {
                                if self.word()? == ".align" {
                                    self.number()?;
                                }
                            }
                        }
                    }
                    None if w.starts_with('.') => return self.fail(format!("unknown `{w}` in a declaration")),
                    None => {
                        let Some(ty) = ty else { return self.fail("declaration without a type") };
                        let align = align.unwrap_or(ty.bytes() * vector).max(1);
                        let var = Var { name: w, space, ty, align, bytes: 0, init: Vec::new(), line };
                        return Ok((self.declarator(var, vector)?, vector));
                    }
                },
            }
        }
    }

    fn declarator(&mut self, mut var: Var, vector: u32) -> Result<Var, Error> {
        let mut count = u64::from(vector);
        let mut open = false;
        while self.take('[') {
            if self.take(']') {
                open = true;
                continue;
            }
            let n = self.number()?;
            count = count.saturating_mul(n);
            self.expect(']')?;
        }
        if self.take('=') {
            self.initialiser(&mut var.init, 0)?;
        }
        if open {
            count = var.init.len() as u64;
        }
        var.bytes = count.saturating_mul(u64::from(var.ty.bytes()));
        let most = if var.space == Space::Param { MAX_PARAM } else { 1 << 40 };
        if var.bytes > most {
            return self.fail(format!("`{}` is too large", var.name));
        }
        Ok(var)
    }

    fn initialiser(&mut self, out: &mut Vec<Init>, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return self.fail("initialiser is nested too deeply");
        }
        if self.take('{') {
            while !self.take('}') {
                self.initialiser(out, depth + 1)?;
                if !self.take(',') && !self.is('}') {
                    return self.fail("expected `,` or `}` in an initialiser");
                }
            }
            return Ok(());
        }
        let negative = self.take('-');
        let w = self.word()?;
        let init = if let Some(v) = int(&w) {
            Init::Bits(if negative { v.wrapping_neg() } else { v })
        } else if let Some(v) = float(&w) {
            Init::Float(if negative { -v } else { v })
        } else {
            let generic = w == "generic";
            let name = if generic {
                self.expect('(')?;
                let n = self.word()?;
                self.expect(')')?;
                n
            } else {
                w
            };
            let mut offset = 0i64;
            while self.is('+') || self.is('-') {
                let minus = !self.take('+') && self.take('-');
                let n = self.number()? as i64;
                offset = offset.wrapping_add(if minus { n.wrapping_neg() } else { n });
            }
            Init::Address(name, offset, generic)
        };
        out.push(init);
        Ok(())
    }

    fn body(&mut self) -> Result<Vec<Stmt>, Error> {
        let mut out = Vec::new();
        let mut depth = 0;
        loop {
            if self.take(';') {
                continue;
            }
            if self.take('{') {
                depth += 1;
                out.push(Stmt::Open);
                continue;
            }
            if self.take('}') {
                if depth == 0 {
                    return Ok(out);
                }
                depth -= 1;
                out.push(Stmt::Close);
                continue;
            }
            self.statement(&mut out)?;
        }
    }

    fn statement(&mut self, out: &mut Vec<Stmt>) -> Result<(), Error> {
        let line = self.line();
        let guard = if self.take('@') {
            let negative = self.take('!');
            Some((self.word()?, negative))
        } else {
            None
        };
        let name = self.word()?;
        if guard.is_none() && self.is(':') {
            self.at += 1;
            match self.peek_word() {
                Some(".branchtargets" | ".calltargets") => {
                    self.at += 1;
                    let mut list = vec![self.word()?];
                    while self.take(',') {
                        list.push(self.word()?);
                    }
                    self.expect(';')?;
                    out.push(Stmt::Targets(name, list));
                }
                Some(".callprototype") => {
                    self.skip_statement()?;
                    out.push(Stmt::Targets(name, Vec::new()));
                }
                Some(_) | None => out.push(Stmt::Label(name)),
            }
            return Ok(());
        }
        match name.as_str() {
            ".reg" => return self.registers(out),
            ".param" | ".local" | ".shared" | ".global" | ".const" => {
                out.extend(self.variables(&name)?.into_iter().map(Stmt::Var));
                return Ok(());
            }
            ".pragma" => return self.skip_statement(),
            ".section" => {
                self.word()?;
                return self.skip_braces();
            }
            _ if name.starts_with('.') => return self.fail(format!("unknown directive `{name}`")),
            _ => {}
        }
        let mut operands = Vec::new();
        while !self.take(';') {
            operands.push(self.operand(0)?);
            if !self.take(',') && !self.is(';') && !self.is('(') && !matches!(operands.last(), Some(Operand::Group(_)))
            {
                return self
                    .fail(format!("expected `,` or `;` after an operand of `{name}`, found {}", self.describe()));
            }
        }
        out.push(Stmt::Instr(Instr { line, guard, name, operands }));
        Ok(())
    }

    fn registers(&mut self, out: &mut Vec<Stmt>) -> Result<(), Error> {
        let mut w = self.word()?;
        if matches!(w.as_str(), ".v2" | ".v4") {
            return self.fail("vector registers are not known; declare scalars");
        }
        let Some(ty) = w.strip_prefix('.').and_then(Ty::parse) else {
            return self.fail(format!("unknown register type `{w}`"));
        };
        loop {
            w = self.word()?;
            let count = if self.take('<') {
                let n = self.number()?;
                self.expect('>')?;
                match u32::try_from(n) {
                    Ok(n) if n <= 1 << 20 => Some(n),
                    Ok(_) | Err(_) => return self.fail("too many registers"),
                }
            } else {
                None
            };
            out.push(Stmt::Reg(ty, w, count));
            if !self.take(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn operand(&mut self, depth: usize) -> Result<Operand, Error> {
        if depth > MAX_DEPTH {
            return self.fail("operand is nested too deeply");
        }
        if self.take('{') {
            return Ok(Operand::Vector(self.list('}', depth)?));
        }
        if self.take('(') {
            return Ok(Operand::Group(self.list(')', depth)?));
        }
        if self.take('!') {
            return Ok(Operand::Not(Box::new(self.operand(depth + 1)?)));
        }
        if self.take('[') {
            let first = self.operand(depth + 1)?;
            let (base, mut offset) = match first {
                Operand::Offset(name, o) => (Operand::Word(name), o),
                other @ (Operand::Word(_)
                | Operand::Int(_)
                | Operand::Float(_)
                | Operand::Not(_)
                | Operand::Pair(..)
                | Operand::Vector(_)
                | Operand::Mem(..)
                | Operand::Group(_)
                | Operand::Missing(_)) => (other, 0),
            };
            while self.take('+') {
                offset = offset.wrapping_add(self.number()? as i64);
            }
            let extra = if self.take(',') {
                self.list(']', depth)?
            } else {
                self.expect(']')?;
                Vec::new()
            };
            return Ok(Operand::Mem(Box::new(base), offset, extra));
        }
        let negative = self.take('-');
        let w = self.word()?;
        let single = if let Some(v) = int(&w) {
            Operand::Int(if negative { v.wrapping_neg() } else { v })
        } else if let Some(v) = float(&w) {
            Operand::Float(if negative { -v } else { v })
        } else if negative {
            return self.fail(format!("expected a number after `-`, found `{w}`"));
        } else if self.is('+') || self.is('-') {
            let mut offset = 0i64;
            while self.is('+') || self.is('-') {
                let minus = !self.take('+') && self.take('-');
                let n = self.number()? as i64;
                offset = offset.wrapping_add(if minus { n.wrapping_neg() } else { n });
            }
            Operand::Offset(w, offset)
        } else {
            Operand::Word(w)
        };
        if self.take('|') {
            return Ok(Operand::Pair(Box::new(single), Box::new(self.operand(depth + 1)?)));
        }
        Ok(single)
    }

    fn list(&mut self, end: char, depth: usize) -> Result<Vec<Operand>, Error> {
        let mut out = Vec::new();
        while !self.take(end) {
            out.push(self.operand(depth + 1)?);
            if !self.take(',') && !self.is(end) {
                return self.fail(format!("expected `,` or `{end}`, found {}", self.describe()));
            }
        }
        Ok(out)
    }
}

/// An integer literal in any of the bases of PTX, or the bits of a `0f` literal.
fn int(w: &str) -> Option<u64> {
    if !w.as_bytes().first()?.is_ascii_digit() {
        return None;
    }
    if let Some(h) = w.strip_prefix("0f").or(w.strip_prefix("0F")).filter(|h| h.len() == 8) {
        return u64::from_str_radix(h, 16).ok();
    }
    if let Some(h) = w.strip_prefix("0d").or(w.strip_prefix("0D")).filter(|h| h.len() == 16) {
        return u64::from_str_radix(h, 16).ok();
    }
    let w = w.strip_suffix('U').unwrap_or(w);
    if let Some(h) = w.strip_prefix("0x").or(w.strip_prefix("0X")) {
        return u64::from_str_radix(h, 16).ok();
    }
    if let Some(b) = w.strip_prefix("0b").or(w.strip_prefix("0B")) {
        return u64::from_str_radix(b, 2).ok();
    }
    if w.len() > 1 && w.starts_with('0') && !w.contains('.') {
        return u64::from_str_radix(w, 8).ok();
    }
    w.parse().ok()
}

/// A decimal float literal.
fn float(w: &str) -> Option<f64> {
    if w.as_bytes().first()?.is_ascii_digit() && w.contains('.') { w.parse().ok() } else { None }
}
