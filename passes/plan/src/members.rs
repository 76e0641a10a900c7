//! Members of a JSON file that a user wrote: the first that is not what it must be, and those that mean nothing.

use serde_json::Value;

/// What a member has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Object,
    List,
    Text,
    Number,
    Whole,
    Positive,
}

impl Due {
    fn name(self) -> &'static str {
        match self {
            Self::Object => "an object",
            Self::List => "a list",
            Self::Text => "text",
            Self::Number => "a number",
            Self::Whole => "a whole number",
            Self::Positive => "a whole number of at least 1",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Object => value.is_object(),
            Self::List => value.is_array(),
            Self::Text => value.is_string(),
            Self::Number => value.is_number(),
            Self::Whole => value.is_u64(),
            Self::Positive => value.as_u64().is_some_and(|n| n > 0),
        }
    }
}

/// Whether a member has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Needed,
    /// It can be left out.
    Free,
    /// It can be left out or `null`.
    OrNull,
}

/// The first of these members (paths joined by `.`, the file itself is empty) that is missing or not what it must be,
/// and what is wrong with it.
pub(crate) fn wrong(file: &Value, members: &[(&str, Due, Need)]) -> Option<(String, String)> {
    members.iter().find_map(|&(name, due, need)| {
        let pointer = if name.is_empty() { String::new() } else { format!("/{}", name.replace('.', "/")) };
        let Some(value) = file.pointer(&pointer).filter(|v| need != Need::OrNull || !v.is_null()) else {
            return (need == Need::Needed).then(|| (name.to_owned(), format!("{name} is missing")));
        };
        let named = if name.is_empty() { "the file" } else { name };
        (!due.fits(value)).then(|| (name.to_owned(), format!("{named} is {}, not {}", shown(value), due.name())))
    })
}

/// A value for a message: short, whatever it is.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(members) => format!("an object of {} keys", members.len()),
        Value::String(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// Members that are given and not known: the path of each, and the names that have a meaning in its place.
pub(crate) fn unread(given: &Value, known: &Value, path: &str, found: &mut Vec<(String, Vec<String>)>) {
    let (Some(given), Some(known)) = (given.as_object(), known.as_object()) else { return };
    for (name, value) in given {
        match known.get(name) {
            None => found.push((format!("{path}{name}"), known.keys().cloned().collect())),
            Some(inner) => unread(value, inner, &format!("{path}{name}."), found),
        }
    }
}
