//! Routed expert ids per token and layer.

use crate::error::{Code, PlaceError};
use crate::loads::{Loads, MAX_SIDE};
use serde_json::Value;

/// Most entries (tokens x layers x slots) of a trace.
const MAX_ENTRIES: usize = 1 << 30;

/// Which experts each token used in each layer; -1 marks an unused slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    experts: usize,
    tokens: usize,
    layers: usize,
    top_k: usize,
    /// `[token][layer][slot]`, row-major.
    ids: Vec<i32>,
}

impl Trace {
    /// A trace from ids in row-major `[tokens, layers, top_k]` order.
    ///
    /// Without `experts`, the count is the largest id plus one.
    ///
    /// # Errors
    /// Wrong length, no entry, an id below -1 or not below `experts`.
    pub fn from_ids(
        ids: &[i64],
        tokens: usize,
        layers: usize,
        top_k: usize,
        experts: Option<usize>,
    ) -> Result<Self, PlaceError> {
        let entries = tokens.checked_mul(layers).and_then(|n| n.checked_mul(top_k));
        if entries != Some(ids.len()) {
            return Err(PlaceError::new(
                Code::BadTrace,
                format!("{} ids for {tokens} tokens x {layers} layers x {top_k} slots", ids.len()),
                "give ids in row-major [tokens, layers, top_k] order",
            ));
        }
        let largest = ids.iter().copied().max().unwrap_or(-1);
        if largest < 0 {
            return Err(PlaceError::new(
                Code::Empty,
                "the trace routes no token to any expert",
                "give at least one token with one expert id",
            ));
        }
        if ids.len() > MAX_ENTRIES || layers > MAX_SIDE {
            return Err(PlaceError::new(
                Code::TooLarge,
                format!("a trace of {tokens} tokens x {layers} layers x {top_k} slots"),
                format!("at most {MAX_ENTRIES} entries and {MAX_SIDE} layers are read; sample the tokens"),
            ));
        }
        let limit = experts.unwrap_or(MAX_SIDE).min(MAX_SIDE);
        for (index, &id) in ids.iter().enumerate() {
            if id < -1 || id >= limit as i64 {
                let (token, layer) = (index / (layers * top_k), index / top_k % layers);
                return Err(PlaceError::new(
                    Code::BadTrace,
                    format!("token {token}, layer {layer}: expert id {id}"),
                    format!("ids lie between 0 and {}, or are -1 for an unused slot", limit - 1),
                ));
            }
        }
        Ok(Trace {
            experts: experts.unwrap_or(largest as usize + 1),
            tokens,
            layers,
            top_k,
            ids: ids.iter().map(|&id| id as i32).collect(),
        })
    }

    /// A trace from one row-major `[tokens, top_k]` tensor per layer; narrower layers are padded with -1.
    ///
    /// # Errors
    /// As [`Trace::from_ids`]; layers must have the same number of tokens.
    pub fn from_layers(layers: &[(&[i64], usize)], experts: Option<usize>) -> Result<Self, PlaceError> {
        let empty = PlaceError::new(Code::Empty, "the trace holds no layer", "give one tensor per layer");
        let Some(&(first, first_k)) = layers.first() else {
            return Err(empty);
        };
        let tokens = first.len().checked_div(first_k).unwrap_or(0);
        let top_k = layers.iter().map(|layer| layer.1).max().unwrap_or(0);
        for (index, (ids, k)) in layers.iter().enumerate() {
            if k.checked_mul(tokens) != Some(ids.len()) {
                return Err(PlaceError::new(
                    Code::Ragged,
                    format!("layer {index} has {} ids of {k} a token, layer 0 has {tokens} tokens", ids.len()),
                    "record the same tokens in every layer",
                ));
            }
        }
        let mut ids = Vec::with_capacity(tokens * layers.len() * top_k);
        for token in 0..tokens {
            for (layer, k) in layers {
                ids.extend_from_slice(&layer[token * k..(token + 1) * k]);
                ids.extend(std::iter::repeat_n(-1, top_k - k));
            }
        }
        Trace::from_ids(&ids, tokens, layers.len(), top_k, experts)
    }

    /// A trace from JSON lines, each of one of these forms:
    ///
    /// * `[[3, 7], [1, 4]]`: one token, the ids of each layer (a bare number where one expert is used);
    /// * `{"experts": [[3, 7], [1, 4]]}`: the same, other keys are ignored;
    /// * `{"token": 0, "layer": 1, "experts": [1, 4]}`: one token in one layer, in any order.
    ///
    /// # Errors
    /// A line that is none of these, or tokens with different numbers of layers.
    pub fn from_jsonl(text: &str, experts: Option<usize>) -> Result<Self, PlaceError> {
        let mut tokens: Vec<Vec<Option<Vec<i64>>>> = Vec::new();
        let mut lines = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim_start_matches('\u{feff}').trim();
            if !line.is_empty() {
                read_line(line, index + 1, &mut tokens).map_err(|e| e.at(format!("line {}", index + 1)))?;
                lines.resize(tokens.len(), index + 1);
            }
        }
        // The line that a token was met in first.
        let line = |token: usize| format!("line {}", lines.get(token).copied().unwrap_or(1));
        let layers = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let ids = tokens.iter().flatten().flatten();
        let top_k = ids.map(Vec::len).max().unwrap_or(0);
        let mut flat = Vec::new();
        for (token, rows) in tokens.iter().enumerate() {
            if rows.len() != layers || rows.iter().any(Option::is_none) {
                return Err(PlaceError::new(
                    Code::Ragged,
                    format!("token {token} does not name experts for all {layers} layers"),
                    "record every token in every layer; use -1 or [] where no expert was used",
                )
                .at(line(token)));
            }
            if flat.len() > MAX_ENTRIES {
                break;
            }
            for row in rows.iter().flatten() {
                flat.extend_from_slice(row);
                flat.extend(std::iter::repeat_n(-1, top_k - row.len()));
            }
        }
        let per_token = (layers * top_k).max(1);
        let limit = experts.unwrap_or(MAX_SIDE).min(MAX_SIDE) as i64;
        Trace::from_ids(&flat, flat.len() / per_token, layers, top_k, experts).map_err(|e| {
            match flat.iter().position(|id| !(-1..limit).contains(id)) {
                Some(index) => e.at(line(index / per_token)),
                None => e,
            }
        })
    }

    /// Number of experts per layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Slots per token and layer.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// The experts of one token in one layer, unused slots left out.
    pub fn routed(&self, token: usize, layer: usize) -> impl Iterator<Item = usize> + Clone {
        let start = (token * self.layers + layer) * self.top_k;
        let row = &self.ids[start..start + self.top_k];
        row.iter().filter(|&&id| id >= 0).map(|&id| id as usize)
    }

    /// Ids of one layer as row-major `[tokens, top_k]`.
    pub fn layer_ids(&self, layer: usize) -> Vec<i64> {
        let row = |token| {
            let start = (token * self.layers + layer) * self.top_k;
            self.ids[start..start + self.top_k].iter().map(|&id| i64::from(id))
        };
        (0..self.tokens).flat_map(row).collect()
    }

    /// Tokens per expert and layer.
    ///
    /// # Errors
    /// More experts than [`Loads`] accepts.
    pub fn loads(&self) -> Result<Loads, PlaceError> {
        let mut loads = vec![vec![0.0; self.experts]; self.layers];
        for token in 0..self.tokens {
            for (layer, load) in loads.iter_mut().enumerate() {
                self.routed(token, layer).for_each(|expert| load[expert] += 1.0);
            }
        }
        Loads::new(loads)
    }

    /// The same trace with `experts` experts, where a caller knows more than the ids show.
    pub(crate) fn with_experts(&self, experts: usize) -> Result<Self, PlaceError> {
        if experts < self.experts || experts > MAX_SIDE {
            return Err(PlaceError::new(
                Code::BadTrace,
                format!("{experts} experts were named, the trace uses id {}", self.experts - 1),
                format!("name between {} and {MAX_SIDE} experts", self.experts),
            ));
        }
        Ok(Trace { experts, ..self.clone() })
    }
}

fn read_line(line: &str, number: usize, tokens: &mut Vec<Vec<Option<Vec<i64>>>>) -> Result<(), PlaceError> {
    let wrong = |what: String| {
        PlaceError::new(
            Code::BadTrace,
            format!("line {number}: {what}"),
            "a line is [[ids of layer 0], [ids of layer 1], ..] for one token, or {\"token\": T, \"layer\": L, \"experts\": [ids]}",
        )
    };
    let value: Value = serde_json::from_str(line).map_err(|error| {
        PlaceError::new(
            Code::NotJson,
            format!(
                "line {number}, column {}: {}",
                error.column(),
                error.to_string().split(" at line").next().unwrap_or("")
            ),
            "every line of a trace is one JSON array or object",
        )
    })?;
    let (place, experts) = match &value {
        Value::Array(_) => (None, &value),
        Value::Object(map) => {
            let Some(experts) = map.get("experts") else {
                return Err(wrong("no key \"experts\"".into()));
            };
            let index = |key: &str| map.get(key).and_then(Value::as_u64).map(|n| n as usize);
            match (map.contains_key("layer"), index("token"), index("layer")) {
                (false, _, _) => (None, experts),
                (true, Some(token), Some(layer)) => (Some((token, layer)), experts),
                (true, _, _) => return Err(wrong("\"token\" and \"layer\" are not both whole numbers".into())),
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            return Err(wrong("neither an array nor an object".into()));
        }
    };
    let Value::Array(items) = experts else {
        return Err(wrong("\"experts\" is not an array".into()));
    };
    let Some((token, layer)) = place else {
        let rows: Option<Vec<_>> = items.iter().map(|item| ids(item).map(Some)).collect();
        tokens.push(rows.ok_or_else(|| wrong("expert ids are not whole numbers".into()))?);
        return Ok(());
    };
    // A gap would be filled with missing tokens: the next one, or one already seen, is what a recorder writes.
    if layer >= MAX_SIDE || token > tokens.len() + 65_536 {
        return Err(wrong(format!("token {token}, layer {layer} is far beyond the lines before")));
    }
    if tokens.len() <= token {
        tokens.resize(token + 1, Vec::new());
    }
    let rows = &mut tokens[token];
    if rows.len() <= layer {
        rows.resize(layer + 1, None);
    }
    if rows[layer].is_some() {
        return Err(wrong(format!("token {token}, layer {layer} is given twice")));
    }
    rows[layer] = Some(ids(experts).ok_or_else(|| wrong("expert ids are not whole numbers".into()))?);
    Ok(())
}

fn ids(value: &Value) -> Option<Vec<i64>> {
    match value {
        Value::Array(items) => items.iter().map(Value::as_i64).collect(),
        Value::Number(_) => value.as_i64().map(|id| vec![id]),
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Object(_) => None,
    }
}
