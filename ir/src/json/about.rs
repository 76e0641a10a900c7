//! What a graph file says about itself; no value depends on it.

use serde::{Deserialize, Serialize};

/// The entry `about` of a graph file: which works have this layer, and what is special about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// What is special, in a line.
    pub special: String,
    /// Works whose layer this is, or has this form.
    pub works: Vec<Work>,
}

/// A published work.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    /// Its short name.
    pub name: String,
    /// Identifiers at arXiv, where they are known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arxiv: Vec<String>,
}

#[derive(Deserialize)]
struct File {
    about: Option<About>,
}

impl About {
    /// What the text of a graph file says about itself; `None` when it says nothing, or is no graph file.
    pub fn of(text: &str) -> Option<Self> {
        serde_json::from_str::<File>(text).ok()?.about
    }
}
