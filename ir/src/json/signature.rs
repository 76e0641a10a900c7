//! Shapes and element types of inputs and weights, which graph JSON does not carry.

use crate::{
    DType, Dim, Extent, Source, TensorType, Weight, codes,
    infer::{OpError, OpResult},
};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Element type and sizes of a stored tensor. In a template a size may be a list, one for each expert.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorShape {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<Extent>,
}

/// What the weights file and the caller say about names that a graph uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signature {
    /// Inputs, in the order of the interface.
    pub inputs: IndexMap<String, TensorType>,
    /// Tensors by name. A name may be a template with `{e}` or `{g}`.
    pub tensors: IndexMap<String, TensorShape>,
}

impl Signature {
    /// Declares an input.
    #[must_use]
    pub fn input(mut self, name: impl Into<String>, dtype: DType, shape: Vec<Dim>) -> Self {
        self.inputs.insert(name.into(), TensorType { dtype, shape });
        self
    }

    /// Declares a tensor.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>, dtype: DType, shape: &[u64]) -> Self {
        let shape = shape.iter().copied().map(Extent::Fixed).collect();
        self.tensors.insert(name.into(), TensorShape { dtype, shape });
        self
    }

    /// The weight behind a name that is used for these experts or groups.
    pub(crate) fn weight(&self, name: &str, used: &BTreeSet<u64>) -> OpResult<Weight> {
        let source = Source::plain(name);
        if let Some(found) = self.tensors.get(name) {
            return Ok(Weight { dtype: found.dtype, shape: found.shape.clone(), source });
        }
        let mark = match (name.contains("{e}"), name.contains("{g}")) {
            (false, false) => return Err(self.unknown(name)),
            (true, false) => "{e}",
            (false, true) => "{g}",
            (true, true) => {
                let text = format!("the shape of `{name}` depends on expert and group; give it in `tensors`");
                return Err(OpError::new(codes::SIGNATURE, text));
            }
        };
        let mut entries: Vec<(u64, &TensorShape)> = Vec::new();
        for e in used {
            let expanded = name.replace(mark, &e.to_string());
            entries.push((*e, self.tensors.get(&expanded).ok_or_else(|| self.unknown(&expanded))?));
        }
        let Some((_, first)) = entries.first() else { return Err(self.unknown(name)) };
        for (e, entry) in &entries {
            if entry.dtype != first.dtype || entry.shape.len() != first.shape.len() {
                let text = format!("`{name}` for {e} has another element type or number of sizes than the first");
                return Err(OpError::new(codes::SIGNATURE, text));
            }
        }
        let shape = (0..first.shape.len()).map(|axis| extent(axis, &entries)).collect();
        Ok(Weight { dtype: first.dtype, shape, source })
    }

    fn unknown(&self, name: &str) -> OpError {
        let error = OpError::new(codes::SIGNATURE, format!("there is no tensor `{name}`"));
        match crate::nearest::nearest(name, self.tensors.keys().map(String::as_str)) {
            Some(near) => error.help(format!("the nearest name is `{near}`")),
            None => error,
        }
    }
}

/// One size for all entries, or a list; entries that are not used count as 0.
fn extent(axis: usize, entries: &[(u64, &TensorShape)]) -> Extent {
    let size = |entry: &TensorShape| entry.shape.get(axis).map_or(0, Extent::max);
    let first = entries.first().map_or(0, |(_, entry)| size(entry));
    if entries.iter().all(|(_, entry)| size(entry) == first) {
        return Extent::Fixed(first);
    }
    let last = entries.last().map_or(0, |(e, _)| *e);
    let mut sizes = Vec::new();
    for e in 0..=last {
        sizes.push(entries.iter().find(|(at, _)| *at == e).map_or(0, |(_, entry)| size(entry)));
    }
    Extent::PerExpert(sizes)
}
