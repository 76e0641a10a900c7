//! Types in text: `bf16[T, 64]`, `route[T, 8 of 128, weighted]`, `rows[T, 8 of 128; bf16[64]]`.

use super::lex::{Lexer, Parsed};
use crate::{DType, Dim, Extent, RaggedType, RouteType, TensorType, Type, codes, nearest::nearest};

impl Lexer<'_> {
    pub(super) fn dtype(&mut self) -> Parsed<DType> {
        let start = self.place();
        let word = self.word();
        self.dtype_named(start, word)
    }

    fn dtype_named(&mut self, start: usize, word: &str) -> Parsed<DType> {
        if word.is_empty() {
            return Err(self.expected("an element type"));
        }
        DType::ALL.into_iter().find(|d| d.name() == word).ok_or_else(|| {
            let found = self.error_at(start, codes::SYNTAX, format!("there is no element type `{word}`"));
            match nearest(word, DType::ALL.iter().map(|d| d.name())) {
                Some(near) => Box::new(found.help(format!("the nearest name is `{near}`"))),
                None => found,
            }
        })
    }

    fn dim(&mut self, end: &[char]) -> Parsed<Dim> {
        let start = self.place();
        let text = self.until(end);
        text.parse().map_err(|e: String| self.error_at(start, codes::SYNTAX, e))
    }

    /// `[T, 64]`.
    fn sizes(&mut self) -> Parsed<Vec<Dim>> {
        self.want('[')?;
        let mut shape = Vec::new();
        while !self.eat(']') {
            shape.push(self.dim(&[',', ']'])?);
            if !self.eat(',') {
                self.want(']')?;
                break;
            }
        }
        Ok(shape)
    }

    /// `[64, (12, 3, 0)]`.
    pub(super) fn extents(&mut self) -> Parsed<Vec<Extent>> {
        self.want('[')?;
        let mut shape = Vec::new();
        while !self.eat(']') {
            if self.eat('(') {
                let mut sizes = Vec::new();
                while !self.eat(')') {
                    sizes.push(self.number("a size")?);
                    if !self.eat(',') {
                        self.want(')')?;
                        break;
                    }
                }
                shape.push(Extent::PerExpert(sizes));
            } else {
                shape.push(Extent::Fixed(self.number("a size")?));
            }
            if !self.eat(',') {
                self.want(']')?;
                break;
            }
        }
        Ok(shape)
    }

    /// Any type.
    pub(super) fn ty(&mut self) -> Parsed<Type> {
        let start = self.place();
        match self.word() {
            "route" => self.route_type().map(|(route, _)| Type::Route(route)),
            "plan" => self.route_type().map(|(route, _)| Type::Plan(route)),
            "rows" => self.ragged_type().map(Type::Ragged),
            word => {
                let dtype = self.dtype_named(start, word)?;
                Ok(Type::Tensor(TensorType { dtype, shape: self.sizes()? }))
            }
        }
    }

    /// `[T, 8 of 128, weighted]`.
    fn route_type(&mut self) -> Parsed<(RouteType, u64)> {
        self.want('[')?;
        let route = self.route_fields()?;
        if route.1 != 1 {
            return Err(self.expected("no `repeat`"));
        }
        self.want(']')?;
        Ok(route)
    }

    /// `T, 8 of 128, weighted, repeat 4`.
    fn route_fields(&mut self) -> Parsed<(RouteType, u64)> {
        let rows = self.dim(&[','])?;
        self.want(',')?;
        let slots = self.number("a number of slots")?;
        self.want_word("of")?;
        let experts = self.number("a number of experts")?;
        let (mut weighted, mut repeat) = (false, 1);
        while self.eat(',') {
            if self.eat_word("weighted") {
                weighted = true;
            } else {
                self.want_word("repeat")?;
                repeat = self.number("a number of tokens")?;
            }
        }
        Ok((RouteType { rows, slots, experts, weighted }, repeat))
    }

    fn ragged_type(&mut self) -> Parsed<RaggedType> {
        self.want('[')?;
        let (route, repeat) = self.route_fields()?;
        self.want(';')?;
        let dtype = self.dtype()?;
        self.want('[')?;
        let mut row = Vec::new();
        while !self.eat(']') {
            row.push(self.number("a size")?);
            if !self.eat(',') {
                self.want(']')?;
                break;
            }
        }
        self.want(']')?;
        Ok(RaggedType { route, repeat, dtype, row })
    }
}
