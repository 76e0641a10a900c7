//! `quantization_config`: how a checkpoint stores its weights.
//!
//! FP8 weights have scales for tiles (`fp8` with `weight_block_size`), for every output (`fbgemm_fp8`) or for the whole
//! matrix (`fp8` without tiles, `modelopt`); `compressed-tensors` says which. What these methods do to activations is not
//! part of the layer: rows are multiplied as they come.

use crate::{
    json::{Kind, Value},
    keys::{Keys, Quant},
    limits,
};
use moec_ir::{Code, Diagnostic, Span};
use regex::Regex;

/// What is not read: where it stands, what it is, and a label.
type Refusal = (Span, String, &'static str);

/// One scale for each output: tiles of one row, as long as there are.
const OUTPUT: [u64; 2] = [1, limits::SIZE];
/// One scale for the matrix.
const MATRIX: [u64; 2] = [limits::SIZE, limits::SIZE];
/// Names of scales: the tensor's with this behind.
const SCALE: &str = "_scale";
const SCALE_INV: &str = "_scale_inv";

/// Modules that a checkpoint leaves as they are.
#[derive(Clone, Debug)]
pub(crate) struct Modules {
    /// Neighbouring parts of a module's name; `*` is any part.
    parts: Vec<String>,
    /// A pattern of the whole name.
    pattern: Option<Regex>,
}

impl Modules {
    /// What an entry of the config means: parts of a name, a name with `*`, or a regular expression after `re:`.
    fn new(entry: &str) -> Result<Self, regex::Error> {
        let pattern = match entry.strip_prefix("re:") {
            Some(start) => Some(format!("^(?:{start})")),
            None => entry.contains('*').then(|| format!("^{}$", regex::escape(entry).replace(r"\*", ".*"))),
        };
        let parts = entry.split('.').filter(|p| !p.is_empty()).map(str::to_owned).collect();
        Ok(Self { parts, pattern: pattern.map(|p| Regex::new(&p)).transpose()? })
    }

    /// Whether the module of a tensor is among them; `{e}` stands for any expert.
    pub(crate) fn hold(&self, tensor: &str) -> bool {
        let names: Vec<&str> = tensor.split('.').collect();
        let parts = |window: &[&str]| {
            let same = |(n, p): (&&str, &String)| p == "*" || *n == p || *n == "{e}" && p.parse::<u64>().is_ok();
            window.iter().zip(&self.parts).all(same)
        };
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor).replace("{e}", "0");
        !self.parts.is_empty() && names.windows(self.parts.len()).any(parts)
            || self.pattern.as_ref().is_some_and(|p| p.is_match(&module))
    }
}

/// How the checkpoint stores its weights, by its config.
pub(crate) fn quantization(keys: &mut Keys<'_>) -> Option<Quant> {
    let section = keys.find(&["quantization_config"])?.value;
    let result = match &section.kind {
        Kind::Object(_) => method(section, &keys.model_type),
        Kind::Null => return None,
        Kind::Bool(_) | Kind::Number(_) | Kind::NotFinite(_) | Kind::String(_) | Kind::Array(_) => {
            Err((section.span, format!("quantization_config is {section}"), "expected an object"))
        }
    };
    let refused = |(span, message, label): Refusal| {
        Diagnostic::error(Code("E0213"), message)
            .primary(span, label)
            .help("known: fp8, fbgemm_fp8, modelopt and compressed-tensors with FP8 weights, mxfp4 (gpt_oss)")
    };
    result.map_err(|why| keys.errors.push(refused(why))).ok()
}

fn method(section: &Value, model_type: &str) -> Result<Quant, Refusal> {
    let method = section.get("quant_method");
    match method.and_then(Value::string) {
        Some("mxfp4") if model_type == "gpt_oss" => Ok(Quant::Mxfp4),
        Some("fp8") => fp8(section),
        Some("fbgemm_fp8") => scaled(section, OUTPUT, SCALE),
        Some("modelopt") => modelopt(section),
        Some("compressed-tensors") => compressed(section),
        _ => {
            let (span, name) = method.map_or((section.span, "missing".to_owned()), |m| (m.span, m.to_string()));
            Err((span, format!("quant_method is {name}, which moec cannot read"), "unknown method"))
        }
    }
}

/// FP8 with these tiles, except in the modules that the section names.
fn scaled(section: &Value, block: [u64; 2], scale: &'static str) -> Result<Quant, Refusal> {
    let lists = ["modules_to_not_convert", "ignored_layers", "exclude_modules", "ignore"];
    let mut keep = Vec::new();
    for entry in lists.iter().filter_map(|name| section.get(name)?.array()).flatten() {
        let module = entry.string().map(Modules::new);
        let Some(Ok(module)) = module else {
            return Err((
                entry.span,
                format!("an ignored module is {entry}"),
                "expected a name, or a pattern after re:",
            ));
        };
        keep.push(module);
    }
    Ok(Quant::Fp8 { block, scale, keep })
}

fn fp8(section: &Value) -> Result<Quant, Refusal> {
    expect(section, "fmt", &["e4m3", "float8_e4m3fn"], "only e4m3 is known")?;
    match section.get("weight_block_size") {
        // Without the key the scale is a factor (vLLM, AutoFP8); transformers writes null and keeps its name.
        None => scaled(section, MATRIX, SCALE),
        Some(size) if matches!(size.kind, Kind::Null) => scaled(section, MATRIX, SCALE_INV),
        Some(size) => scaled(section, tile(size, "weight_block_size")?, SCALE_INV),
    }
}

fn modelopt(section: &Value) -> Result<Quant, Refusal> {
    // `hf_quant_config.json` has one level more.
    let section = section.get("quantization").unwrap_or(section);
    if section.get("quant_algo").is_none() {
        return Err((section.span, "quant_algo is missing".to_owned(), "modelopt needs it"));
    }
    expect(section, "quant_algo", &["FP8"], "only FP8 is known")?;
    scaled(section, MATRIX, SCALE)
}

fn compressed(section: &Value) -> Result<Quant, Refusal> {
    let formats = ["float-quantized", "naive-quantized"];
    expect(section, "format", &formats, "only 8-bit floats are known")?;
    let groups = section.get("config_groups").and_then(Value::object).unwrap_or(&[]);
    let mut block = None;
    for group in groups {
        let group = &group.value;
        expect(group, "format", &formats, "only 8-bit floats are known")?;
        let targets = group.get("targets");
        let all = targets.and_then(Value::array).is_some_and(|t| t.iter().any(|t| t.string() == Some("Linear")));
        if !all {
            let (span, text) = targets.map_or((group.span, "missing".to_owned()), |t| (t.span, t.to_string()));
            return Err((span, format!("targets is {text}"), "only groups for every \"Linear\" are known"));
        }
        let Some(weights) = group.get("weights").filter(|w| matches!(w.kind, Kind::Object(_))) else {
            return Err((group.span, "weights is missing".to_owned(), "the group does not say how weights are stored"));
        };
        expect(weights, "type", &["float"], "only 8-bit floats are known")?;
        if let Some(bits) = weights.get("num_bits").filter(|b| !matches!(&b.kind, Kind::Number(n) if n == "8")) {
            return Err((bits.span, format!("num_bits is {bits}"), "only 8-bit floats are known"));
        }
        if let Some(symmetric) = weights.get("symmetric").filter(|s| matches!(s.kind, Kind::Bool(false))) {
            return Err((symmetric.span, "symmetric is false".to_owned(), "floats have no zero point"));
        }
        let strategy = weights.get("strategy");
        let found = match (strategy.and_then(Value::string), weights.get("block_structure")) {
            (Some("tensor"), _) => MATRIX,
            (Some("channel"), _) => OUTPUT,
            (Some("block"), Some(size)) => tile(size, "block_structure")?,
            (_, _) => {
                let (span, text) = strategy.map_or((weights.span, "missing".to_owned()), |s| (s.span, s.to_string()));
                return Err((
                    span,
                    format!("strategy is {text}"),
                    "known: tensor, channel, and block with block_structure",
                ));
            }
        };
        if block.is_some_and(|before| before != found) {
            return Err((group.span, "config_groups differ".to_owned(), "all groups must be stored alike"));
        }
        block = Some(found);
    }
    match block {
        Some(block) => scaled(section, block, SCALE),
        None => Err((section.span, "config_groups is missing".to_owned(), "compressed-tensors needs it")),
    }
}

/// Refuses a value of a key that is none of these.
fn expect(section: &Value, key: &str, known: &[&str], label: &'static str) -> Result<(), Refusal> {
    match section.get(key).filter(|v| !matches!(v.kind, Kind::Null)) {
        Some(value) if !value.string().is_some_and(|v| known.contains(&v)) => {
            Err((value.span, format!("{key} is {value}"), label))
        }
        Some(_) | None => Ok(()),
    }
}

/// Rows and columns of a tile.
fn tile(size: &Value, key: &str) -> Result<[u64; 2], Refusal> {
    let side = |side: &Value| match &side.kind {
        Kind::Number(text) => text.parse().ok().filter(|n| (1..=limits::SIZE).contains(n)),
        Kind::Null | Kind::Bool(_) | Kind::NotFinite(_) | Kind::String(_) | Kind::Array(_) | Kind::Object(_) => None,
    };
    let sides: Vec<Option<u64>> = size.array().unwrap_or(&[]).iter().map(side).collect();
    match sides[..] {
        [Some(rows), Some(columns)] => Ok([rows, columns]),
        _ => Err((size.span, format!("{key} is {size}"), "expected two sizes above 0, as in [128, 128]")),
    }
}
