//! Reads the input files: loads, the input of a published vector, or a trace.

use crate::error::{Code, PlaceError};
use crate::loads::Loads;
use crate::options::{Method, Options};
use crate::trace::Trace;
use serde_json::{Map, Value};

/// What is placed: loads, or the routes they come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Routing {
    /// Tokens per expert and layer.
    Loads(Loads),
    /// Expert ids per token and layer.
    Trace(Trace),
}

/// Input of [`crate::place`]: routing, and the options that came in the same file.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// Loads or trace.
    pub routing: Routing,
    /// Options of the file; those of the caller come first.
    pub given: Options,
}

impl From<Loads> for Input {
    fn from(loads: Loads) -> Self {
        Input { routing: Routing::Loads(loads), given: Options::default() }
    }
}

impl From<Trace> for Input {
    fn from(trace: Trace) -> Self {
        Input { routing: Routing::Trace(trace), given: Options::default() }
    }
}

const FORMS: &str =
    "give [[loads of layer 0], [loads of layer 1], ..], or an object with \"weight\" or \"expert_load\"";
const KEYS: [&str; 14] = [
    "weight",
    "expert_load",
    "num_replicas",
    "num_groups",
    "num_nodes",
    "num_gpus",
    "ep_size",
    "experts_per_gpu",
    "alpha",
    "lambda",
    "min_tokens_per_gemm",
    "method",
    "time_limit_s",
    "dtype",
];

impl Input {
    /// Reads LOADS: `[[loads] per layer]`, or an object in one of these forms (the input of a published vector):
    ///
    /// * `{"weight": [[..]], "num_replicas", "num_groups", "num_nodes", "num_gpus"}`: EPLB;
    /// * `{"expert_load": [..], "ep_size", "experts_per_gpu", "alpha", "min_tokens_per_gemm"}`: least-loaded.
    ///   It describes the planner itself, so no imbalance threshold applies unless `"lambda"` is given.
    ///
    /// A whole record with such an object under `"input"` is read as that object.
    ///
    /// # Errors
    /// Text that is not JSON, another form, an unknown key, or loads that [`Loads::new`] refuses.
    pub fn from_json(text: &str) -> Result<Self, PlaceError> {
        let text = text.trim_start_matches('\u{feff}');
        if text.trim().is_empty() {
            return Err(PlaceError::new(Code::Empty, "the file is empty", FORMS));
        }
        let value: Value = serde_json::from_str(text).map_err(|error| {
            let help = match error.classify() {
                serde_json::error::Category::Eof => "the text ends early; is the file complete?",
                serde_json::error::Category::Syntax | serde_json::error::Category::Data => {
                    "JSON has no comments, trailing commas, single quotes, NaN or Infinity; a trace of JSON lines is named .jsonl"
                }
                serde_json::error::Category::Io => FORMS,
            };
            PlaceError::new(Code::NotJson, format!("not JSON: {error}"), help)
        })?;
        match &value {
            Value::Array(_) => Ok(Input::from(Loads::new(matrix(&value)?)?)),
            Value::Object(map) => match map.get("input") {
                Some(Value::Object(input)) => from_object(input).map_err(|e| e.under("input")),
                Some(_) | None => from_object(map),
            },
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                Err(PlaceError::new(Code::UnknownForm, format!("the top level is {}", kind(&value)), FORMS))
            }
        }
    }

    /// Reads a TRACE of JSON lines; see [`Trace::from_jsonl`].
    ///
    /// # Errors
    /// As [`Trace::from_jsonl`].
    pub fn from_jsonl(text: &str) -> Result<Self, PlaceError> {
        Ok(Input::from(Trace::from_jsonl(text, None)?))
    }
}

fn from_object(map: &Map<String, Value>) -> Result<Input, PlaceError> {
    if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(PlaceError::new(
            Code::UnknownForm,
            format!("unknown key {:?}", key.chars().take(60).collect::<String>()),
            format!("known keys: {}", KEYS.join(", ")),
        )
        .at(key));
    }
    let method = match map.get("method") {
        None => None,
        Some(Value::String(name)) => Some(Method::from_name(name).map_err(|e| e.at("method"))?),
        Some(other) => return Err(unexpected("method", "a method name", other).at("method")),
    };
    let mut given = Options {
        method,
        gpus: count(map, "num_gpus")?.or(count(map, "ep_size")?),
        nodes: count(map, "num_nodes")?,
        replicas: count(map, "num_replicas")?,
        groups: count(map, "num_groups")?,
        experts_per_gpu: count(map, "experts_per_gpu")?,
        alpha: number(map, "alpha")?,
        lambda: number(map, "lambda")?,
        min_tokens: count(map, "min_tokens_per_gemm")?.map(|n| n as u64),
        time_limit_s: number(map, "time_limit_s")?,
        ..Options::default()
    };
    let (rows, from) = match (map.get("weight"), map.get("expert_load")) {
        (Some(weight), None) => {
            given.method = given.method.or(Some(Method::Eplb));
            (matrix(weight), "weight")
        }
        (None, Some(load)) => {
            given.method = given.method.or(Some(Method::LeastLoaded));
            given.lambda = given.lambda.or(Some(0.0));
            let rows = match load {
                Value::Array(items) if items.iter().any(Value::is_number) => row(load, 0).map(|row| vec![row]),
                Value::Null
                | Value::Bool(_)
                | Value::Number(_)
                | Value::String(_)
                | Value::Array(_)
                | Value::Object(_) => matrix(load),
            };
            (rows, "expert_load")
        }
        (Some(_), Some(_)) => {
            return Err(PlaceError::new(
                Code::UnknownForm,
                "both \"weight\" and \"expert_load\" are given",
                "keep the one that holds the loads",
            ));
        }
        (None, None) => return Err(PlaceError::new(Code::UnknownForm, "no loads in the object", FORMS)),
    };
    // One list of loads stands for a layer: in the file there is no list around it.
    let flat = map.get(from).and_then(Value::as_array).is_some_and(|items| items.iter().any(Value::is_number));
    let place = |e: PlaceError| match e.at.as_deref().filter(|_| flat).and_then(|at| at.split_once('.')) {
        Some((_, expert)) => e.clone().at(expert),
        None => e,
    };
    let loads = rows.and_then(Loads::new).map_err(|e| place(e).under(from))?;
    Ok(Input { routing: Routing::Loads(loads), given })
}

fn matrix(value: &Value) -> Result<Vec<Vec<f64>>, PlaceError> {
    let Value::Array(rows) = value else {
        return Err(unexpected("the loads", "an array of layers", value));
    };
    if rows.iter().any(Value::is_number) {
        return Err(PlaceError::new(
            Code::UnknownForm,
            "the loads are one list of numbers, not one list per layer",
            "for one layer write [[..]]",
        ));
    }
    rows.iter().enumerate().map(|(layer, value)| row(value, layer)).collect()
}

fn row(value: &Value, layer: usize) -> Result<Vec<f64>, PlaceError> {
    let Value::Array(items) = value else {
        return Err(unexpected(&format!("layer {layer}"), "an array of loads", value).at(layer.to_string()));
    };
    let load = |(expert, item): (usize, &Value)| {
        let wrong = || unexpected(&format!("layer {layer}, expert {expert}"), "a number", item);
        item.as_f64().ok_or_else(|| wrong().at(format!("{layer}.{expert}")))
    };
    items.iter().enumerate().map(load).collect()
}

fn count(map: &Map<String, Value>, key: &str) -> Result<Option<usize>, PlaceError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(unexpected(key, "a whole number of at least 0", value).at(key)),
        },
    }
}

fn number(map: &Map<String, Value>, key: &str) -> Result<Option<f64>, PlaceError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(n) => Ok(Some(n)),
            None => Err(unexpected(key, "a number", value).at(key)),
        },
    }
}

fn unexpected(what: &str, wanted: &str, found: &Value) -> PlaceError {
    PlaceError::new(Code::UnknownForm, format!("{what}: expected {wanted}, found {}", kind(found)), FORMS)
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => format!("{:?}", s.chars().take(60).collect::<String>()),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}
