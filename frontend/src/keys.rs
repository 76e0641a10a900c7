//! Reading keys of a config: aliases, nesting, ranges, and what was read.
//!
//! A family asks for what it needs; every misuse becomes a diagnostic with a place, and a stand-in
//! value is returned, so that one run reports all independent errors. [`Keys::checked`] ends a
//! reader before its stand-ins could be used.

use crate::{
    json::{Kind, Member, Value, cut},
    quantization::Modules,
};
use moec_ir::{Code, DType, Diagnostic, Span, nearest};
use std::collections::{BTreeMap, BTreeSet};

/// A config with errors, which are kept in [`Keys`].
#[derive(Debug)]
pub(crate) struct Refused;

/// A number that was read, with its place.
#[derive(Clone, Debug)]
pub(crate) struct Num {
    /// The value, or a stand-in when `known` is false.
    pub(crate) value: u64,
    /// Where it stands; absent for defaults.
    pub(crate) span: Option<Span>,
    /// The key, as the file spells it.
    pub(crate) key: String,
    /// Whether the value is good.
    pub(crate) known: bool,
}

/// A number for all layers, or one for each.
#[derive(Clone, Debug)]
pub(crate) struct PerLayer(Vec<Num>);

impl PerLayer {
    /// The number of layer `i`.
    pub(crate) fn of(&self, i: u64) -> &Num {
        let at = usize::try_from(i).unwrap_or(usize::MAX).min(self.0.len().saturating_sub(1));
        &self.0[at]
    }

    /// The first number.
    pub(crate) fn first(&self) -> &Num {
        &self.0[0]
    }
}

/// Weight quantisation of the checkpoint.
#[derive(Clone, Debug)]
pub(crate) enum Quant {
    /// FP8 with a scale for each tile of so many outputs and inputs.
    Fp8 {
        /// Outputs and inputs of a tile; a matrix that has fewer has one tile.
        block: [u64; 2],
        /// What stands behind a tensor's name in the name of its scales.
        scale: &'static str,
        /// Modules that stay as they are.
        keep: Vec<Modules>,
    },
    /// MXFP4 experts.
    Mxfp4,
}

/// The keys of a config.
pub(crate) struct Keys<'a> {
    /// Objects that are searched, innermost first.
    levels: Vec<&'a [Member]>,
    /// Places of keys that were asked for.
    used: BTreeSet<usize>,
    /// Names that were asked for, for suggestions.
    pub(crate) asked: BTreeSet<String>,
    /// Findings that refuse the config.
    pub(crate) errors: Vec<Diagnostic>,
    /// Findings that do not.
    pub(crate) warnings: Vec<Diagnostic>,
    /// The entry of the family table.
    pub(crate) model_type: String,
    /// Type of activations and weights.
    pub(crate) dtype: DType,
    /// How weights are stored.
    pub(crate) quant: Option<Quant>,
}

/// A key that was found.
#[derive(Clone, Copy)]
pub(crate) struct Found<'a> {
    pub(crate) key: &'a str,
    pub(crate) value: &'a Value,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(root: &'a [Member], model_type: &str) -> Self {
        Self {
            levels: vec![root],
            used: BTreeSet::new(),
            asked: BTreeSet::new(),
            errors: Vec::new(),
            warnings: Vec::new(),
            model_type: model_type.to_owned(),
            dtype: DType::Bf16,
            quant: None,
        }
    }

    /// Searches the object under `key` first from now on. Nothing happens when there is none.
    pub(crate) fn enter(&mut self, key: &str) -> bool {
        self.asked.insert(key.to_owned());
        for level in self.levels.clone() {
            if let Some(member) = level.iter().find(|m| m.key == key)
                && let Kind::Object(members) = &member.value.kind
            {
                self.used.insert(member.key_span.start);
                self.levels.insert(0, members);
                return true;
            }
        }
        false
    }

    /// Ends a reader that has met errors.
    pub(crate) fn checked(&self) -> Result<(), Refused> {
        if self.errors.is_empty() { Ok(()) } else { Err(Refused) }
    }

    /// Keys of the searched objects that nobody asked for.
    pub(crate) fn unused(&self) -> Vec<&'a Member> {
        self.levels.iter().flat_map(|l| l.iter()).filter(|m| !self.used.contains(&m.key_span.start)).collect()
    }

    /// Marks a key as understood without reading it.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.asked.insert((*name).to_owned());
            for level in self.levels.clone() {
                for member in level.iter().filter(|m| m.key == *name) {
                    self.used.insert(member.key_span.start);
                }
            }
        }
    }

    fn all(&mut self, names: &[&str]) -> Vec<Found<'a>> {
        let mut found = Vec::new();
        self.asked.extend(names.iter().map(|n| (*n).to_owned()));
        for level in self.levels.clone() {
            for name in names {
                for member in level.iter().filter(|m| m.key == *name) {
                    self.used.insert(member.key_span.start);
                    found.push(Found { key: &member.key, value: &member.value });
                }
            }
        }
        found
    }

    /// The first of these keys, innermost object first. Null counts only when there is nothing else.
    pub(crate) fn quiet(&mut self, names: &[&str]) -> Option<Found<'a>> {
        let found = self.all(names);
        found.iter().find(|f| f.value.kind != Kind::Null).or(found.first()).copied()
    }

    /// As [`Keys::quiet`]; spellings with different values are `E0211`.
    pub(crate) fn find(&mut self, names: &[&str]) -> Option<Found<'a>> {
        let found = self.all(names);
        let first = found.iter().find(|f| f.value.kind != Kind::Null).or(found.first()).copied()?;
        let other = found.iter().find(|f| f.value.kind != Kind::Null && !same(f.value, first.value));
        if let Some(other) = other {
            self.errors.push(
                Diagnostic::error(
                    Code("E0211"),
                    format!(
                        "{} and {} disagree",
                        first.key,
                        if other.key == first.key { "its outer spelling" } else { other.key }
                    ),
                )
                .primary(other.value.span, format!("{} is {} here", other.key, other.value))
                .secondary(first.value.span, format!("{} is {} here", first.key, first.value))
                .help("keep one of them"),
            );
        }
        Some(first)
    }

    /// A whole number that must be there.
    pub(crate) fn size(&mut self, names: &[&str], min: u64, max: u64) -> Num {
        let found = self.find(names);
        self.required_size(names, found, min, max)
    }

    fn required_size(&mut self, names: &[&str], found: Option<Found<'a>>, min: u64, max: u64) -> Num {
        match found {
            None => {
                self.missing(names);
                stand_in(names[0], None)
            }
            Some(f) if f.value.kind == Kind::Null => {
                self.null(f);
                stand_in(f.key, Some(f.value.span))
            }
            Some(f) => self.whole(f.key, f.value, min, max),
        }
    }

    /// A whole number, or the default when it is missing or null.
    pub(crate) fn size_or(&mut self, names: &[&str], default: u64, min: u64, max: u64) -> Num {
        match self.find(names) {
            Some(f) if f.value.kind != Kind::Null => self.whole(f.key, f.value, min, max),
            _ => Num { value: default, span: None, key: names[0].to_owned(), known: true },
        }
    }

    /// A whole number, if it is there and not null.
    pub(crate) fn optional(&mut self, names: &[&str], min: u64, max: u64) -> Option<Num> {
        let found = self.find(names)?;
        if found.value.kind == Kind::Null { None } else { Some(self.whole(found.key, found.value, min, max)) }
    }

    /// A whole number, or a list with one for each layer.
    pub(crate) fn per_layer(
        &mut self,
        names: &[&str],
        default: Option<u64>,
        layers: u64,
        min: u64,
        max: u64,
    ) -> PerLayer {
        match (self.find(names), default) {
            (Some(f), _) if f.value.array().is_some() => {
                let items = f.value.array().unwrap_or(&[]);
                if (items.len() as u64) < layers || items.is_empty() {
                    self.errors.push(
                        Diagnostic::error(
                            Code("E0214"),
                            format!("{} has {} entries for {layers} layers", f.key, items.len()),
                        )
                        .primary(f.value.span, "one entry for each layer is needed")
                        .help("give one number, or a list as long as the number of layers"),
                    );
                    return PerLayer(vec![stand_in(f.key, Some(f.value.span))]);
                }
                PerLayer(items.iter().map(|item| self.whole(f.key, item, min, max)).collect())
            }
            (Some(f), Some(value)) if f.value.kind == Kind::Null => {
                PerLayer(vec![Num { value, span: None, key: f.key.to_owned(), known: true }])
            }
            (None, Some(value)) => PerLayer(vec![Num { value, span: None, key: names[0].to_owned(), known: true }]),
            (found, _) => PerLayer(vec![self.required_size(names, found, min, max)]),
        }
    }

    /// One whole number from a value.
    pub(crate) fn whole(&mut self, key: &str, value: &Value, min: u64, max: u64) -> Num {
        let Kind::Number(text) = &value.kind else {
            self.wrong_kind(key, value, "a whole number");
            return stand_in(key, Some(value.span));
        };
        let digits = text.strip_prefix('-').unwrap_or(text);
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            let mut error =
                Diagnostic::error(Code("E0201"), format!("{key} is {}, expected a whole number", cut(text)))
                    .primary(value.span, "not a whole number");
            if let Some((whole, zeros)) = text.split_once('.')
                && zeros.bytes().all(|b| b == b'0')
            {
                error = error.help(format!("write {whole}"));
            }
            self.errors.push(error);
            return stand_in(key, Some(value.span));
        }
        match text.parse::<u64>() {
            Ok(n) if (min..=max).contains(&n) => {
                Num { value: n, span: Some(value.span), key: key.to_owned(), known: true }
            }
            _ => {
                self.errors.push(
                    Diagnostic::error(Code("E0202"), format!("{key} is {}, out of range", cut(text)))
                        .primary(value.span, format!("{min} to {max} is allowed")),
                );
                stand_in(key, Some(value.span))
            }
        }
    }

    /// A finite number, or the default when it is missing or null.
    pub(crate) fn real_or(&mut self, names: &[&str], default: f64) -> (f64, Option<Span>) {
        match self.find(names) {
            Some(f) if f.value.kind != Kind::Null => {
                (self.real_of(f.key, f.value).unwrap_or(default), Some(f.value.span))
            }
            _ => (default, None),
        }
    }

    /// A finite number, if it is there and not null.
    pub(crate) fn real(&mut self, names: &[&str]) -> Option<f64> {
        let found = self.find(names)?;
        if found.value.kind == Kind::Null { None } else { self.real_of(found.key, found.value) }
    }

    /// One finite number from a value.
    pub(crate) fn real_of(&mut self, key: &str, value: &Value) -> Option<f64> {
        let Kind::Number(text) = &value.kind else {
            self.wrong_kind(key, value, "a number");
            return None;
        };
        let number: f64 = text.parse().unwrap_or(f64::INFINITY);
        if !number.is_finite() {
            self.errors.push(
                Diagnostic::error(Code("E0202"), format!("{key} is {}, out of range", cut(text)))
                    .primary(value.span, "larger than any 64-bit number"),
            );
            return None;
        }
        Some(number)
    }

    /// A factor that scales results: neither 0 nor beyond 32-bit floats.
    pub(crate) fn factor(&mut self, names: &[&str], default: f64) -> f64 {
        let (value, span) = self.real_or(names, default);
        #[expect(clippy::cast_possible_truncation, reason = "the cast is the question")]
        let narrow = value as f32;
        if let Some(span) = span
            && (value == 0.0 || narrow.is_infinite())
        {
            let why = if value == 0.0 { "would remove all routed experts" } else { "overflows 32-bit floats" };
            self.errors.push(
                Diagnostic::error(Code("E0202"), format!("{} is out of range", names[0]))
                    .primary(span, why)
                    .help("leave it out for 1.0"),
            );
        }
        value
    }

    /// A boolean, or the default when it is missing or null.
    pub(crate) fn flag(&mut self, names: &[&str], default: bool) -> bool {
        let Some(found) = self.find(names) else { return default };
        match &found.value.kind {
            Kind::Bool(b) => *b,
            Kind::Null => default,
            Kind::Number(_) | Kind::NotFinite(_) | Kind::String(_) | Kind::Array(_) | Kind::Object(_) => {
                self.wrong_kind(found.key, found.value, "true or false");
                default
            }
        }
    }

    /// A string, if it is there and not null.
    pub(crate) fn text(&mut self, names: &[&str]) -> Option<(&'a str, Found<'a>)> {
        let found = self.find(names)?;
        match &found.value.kind {
            Kind::String(text) => Some((text, found)),
            Kind::Null => None,
            Kind::Bool(_) | Kind::Number(_) | Kind::NotFinite(_) | Kind::Array(_) | Kind::Object(_) => {
                self.wrong_kind(found.key, found.value, "a string");
                None
            }
        }
    }

    /// A list, if it is there and not null.
    pub(crate) fn list(&mut self, names: &[&str]) -> Option<(&'a [Value], Found<'a>)> {
        let found = self.find(names)?;
        match &found.value.kind {
            Kind::Array(items) => Some((items, found)),
            Kind::Null => None,
            Kind::Bool(_) | Kind::Number(_) | Kind::NotFinite(_) | Kind::String(_) | Kind::Object(_) => {
                self.wrong_kind(found.key, found.value, "a list");
                None
            }
        }
    }

    /// One of several words; others are `E0212`.
    pub(crate) fn choice<T: Copy>(&mut self, names: &[&str], default: T, known: &[(&str, T)]) -> T {
        let Some((word, found)) = self.text(names) else { return default };
        if let Some((_, value)) = known.iter().find(|(name, _)| *name == word) {
            return *value;
        }
        let options: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let near = nearest(word, options.iter().copied()).map_or(String::new(), |n| format!("; the nearest is {n}"));
        self.errors.push(
            Diagnostic::error(
                Code("E0212"),
                format!("{} is \"{}\", which {} does not have", found.key, cut(word), self.model_type),
            )
            .primary(found.value.span, "unknown")
            .help(format!("known: {}{near}", options.join(", "))),
        );
        default
    }

    fn wrong_kind(&mut self, key: &str, value: &Value, expected: &str) {
        // Numbers that JSON does not have are reported for the whole file.
        if !matches!(value.kind, Kind::NotFinite(_)) {
            let error = Diagnostic::error(Code("E0201"), format!("{key} is {value}, expected {expected}"));
            self.errors.push(error.primary(value.span, "wrong kind"));
        }
    }

    /// `E0204`: the key is missing.
    pub(crate) fn missing(&mut self, names: &[&str]) {
        let level = self.levels[0];
        let mut error = Diagnostic::error(Code("E0204"), format!("{} is missing", names[0]));
        if names.len() > 1 {
            error = error.note(format!("also known as {}", names[1..].join(", ")));
        }
        let keys: Vec<&str> = level.iter().map(|m| m.key.as_str()).collect();
        if let Some(near) = nearest(names[0], keys.iter().copied())
            && let Some(member) = level.iter().find(|m| m.key == near)
            && !self.used.contains(&member.key_span.start)
        {
            error = error.primary(member.key_span, "did you mean this key?");
        } else if let Some(member) = level.first() {
            error = error.primary(member.key_span, "not in this object");
        }
        self.errors.push(error.help(format!("{} needs it", self.model_type)));
    }

    /// `E0204`: the key is null.
    pub(crate) fn null(&mut self, found: Found<'_>) {
        self.errors.push(
            Diagnostic::error(Code("E0204"), format!("{} is null", found.key))
                .primary(found.value.span, "a value is needed")
                .help(format!("{} needs it", self.model_type)),
        );
    }
}

fn stand_in(key: &str, span: Option<Span>) -> Num {
    Num { value: 1, span, key: key.to_owned(), known: false }
}

/// Whether two spellings mean the same value; 1 and 1.0 do.
fn same(a: &Value, b: &Value) -> bool {
    match (&a.kind, &b.kind) {
        (Kind::Number(x), Kind::Number(y)) => {
            x == y || matches!((x.parse::<f64>(), y.parse::<f64>()), (Ok(x), Ok(y)) if x.to_bits() == y.to_bits())
        }
        (Kind::Array(x), Kind::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y)),
        (Kind::Object(x), Kind::Object(y)) => {
            let by_key: BTreeMap<&str, &Value> = y.iter().map(|m| (m.key.as_str(), &m.value)).collect();
            x.len() == y.len() && x.iter().all(|m| by_key.get(m.key.as_str()).is_some_and(|v| same(&m.value, v)))
        }
        (x, y) => x == y,
    }
}
