//! Layers of real shape, narrowed, on rows of every kind: tokens on both sides of tile edges, routings from even to
//! all-to-one, and rows that hold what models never should.
//!
//! Every expert, group and choice is that of the model; widths are about a thirtieth, which leaves some that no tile divides.

use crate::layers::Sample;
use moec::{
    Compiler, Target,
    abi::DType,
    frontend::Form,
    routing::{self, Routing},
    run::{Prepared, Tensor, Weights, prepare},
    runtime::Device,
};
use std::{path::Path, sync::Arc};

/// Models that differ in experts, choices, groups or shared experts.
pub const MODELS: [&str; 14] = [
    "mixtral-8x7b",
    "llama4-maverick",
    "dbrx",
    "granite-3.0-3b-a800m",
    "olmoe-1b-7b",
    "deepseek-moe-16b",
    "qwen3-30b-a3b",
    "gpt-oss-120b",
    "glm-4.5-air",
    "deepseek-v3",
    "kimi-k2",
    "qwen3-next-80b-a3b",
    "ernie-4.5-21b-a3b",
    "longcat-flash",
];

/// Numbers of tokens.
pub const TOKENS: [u64; 15] = [0, 1, 2, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 4096];

/// What the rows of a launch hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Random; with random weights every expert alike.
    Uniform,
    /// The expert of rank `i` is wanted in proportion to `i^-1.2`.
    Zipf,
    /// All tokens want the same experts.
    AllToOne,
    /// No token wants the last expert.
    OneEmpty,
    /// Every row the same.
    Equal,
    /// Zeros: all logits are equal.
    Zero,
    /// Negative zeros.
    MinusZero,
    /// Numbers below the least normal one.
    Denormal,
    /// One row holds a NaN.
    OneNan,
    /// All rows are NaN.
    Nan,
    /// One row holds positive infinity.
    PlusInfinity,
    /// One row holds negative infinity.
    MinusInfinity,
}

impl Rows {
    /// All kinds.
    pub const ALL: [Self; 12] = [
        Self::Uniform,
        Self::Zipf,
        Self::AllToOne,
        Self::OneEmpty,
        Self::Equal,
        Self::Zero,
        Self::MinusZero,
        Self::Denormal,
        Self::OneNan,
        Self::Nan,
        Self::PlusInfinity,
        Self::MinusInfinity,
    ];

    fn routing(self) -> Routing {
        match self {
            Self::Zipf => Routing::Zipf(1.2),
            Self::AllToOne => Routing::AllToOne,
            Self::OneEmpty => Routing::OneEmpty,
            Self::Uniform
            | Self::Equal
            | Self::Zero
            | Self::MinusZero
            | Self::Denormal
            | Self::OneNan
            | Self::Nan
            | Self::PlusInfinity
            | Self::MinusInfinity => Routing::Uniform,
        }
    }

    /// Puts into random rows what this kind holds.
    fn spoil(self, tensor: &mut Tensor) {
        let Some(rows @ 1..) = tensor.shape.first().map(|n| *n as usize) else { return };
        let each = tensor.bytes.len() / rows;
        let one = |tensor: &mut Tensor, value: f32| {
            let size = tensor.dtype.bytes() as usize;
            let at = rows / 2 * each + each / 2 / size * size;
            tensor.bytes[at..at + size].copy_from_slice(&number(tensor.dtype, value));
        };
        let all = |tensor: &mut Tensor, value: f32| {
            let number = number(tensor.dtype, value);
            tensor.bytes.chunks_mut(number.len()).for_each(|bytes| bytes.copy_from_slice(&number));
        };
        match self {
            Self::Uniform | Self::Zipf | Self::AllToOne | Self::OneEmpty => {}
            Self::Equal => {
                let first = tensor.bytes[..each].to_vec();
                tensor.bytes.chunks_mut(each).for_each(|row| row.copy_from_slice(&first));
            }
            Self::Zero => all(tensor, 0.0),
            Self::MinusZero => all(tensor, -0.0),
            Self::Denormal => all(tensor, f32::from_bits(0x0042_0000)),
            Self::OneNan => one(tensor, f32::NAN),
            Self::Nan => all(tensor, f32::NAN),
            Self::PlusInfinity => one(tensor, f32::INFINITY),
            Self::MinusInfinity => one(tensor, f32::NEG_INFINITY),
        }
    }
}

/// A number in the type of an input.
fn number(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        // The upper half: the values above need no more.
        DType::Bf16 => value.to_le_bytes()[2..].to_vec(),
        DType::F64 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
            unreachable!("hidden states of {dtype:?}")
        }
    }
}

/// The config with the numbers of these keys divided by `by`.
pub fn divided(config: &mut serde_json::Value, keys: &[&str], by: u64) {
    if let Some(map) = config.as_object_mut() {
        for (key, value) in map {
            match value.as_u64().filter(|_| keys.contains(&key.as_str())) {
                Some(n) => *value = (n / by).into(),
                None => divided(value, keys, by),
            }
        }
    }
}

/// Keys of widths.
const WIDTHS: [&str; 11] = [
    "hidden_size",
    "d_model",
    "intermediate_size",
    "intermediate_size_mlp",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_ffn_hidden_size",
    "zero_expert_size",
    "ffn_dim",
];

/// The narrowed mixture of a model of `tests/models`.
///
/// # Errors
/// The config is refused; the text says why.
pub fn form(model: &str) -> Result<Form, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(model).join("config.json");
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let mut last = String::new();
    // Blocks of codes have widths of their own.
    for by in [32, 30] {
        let mut config: serde_json::Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        divided(&mut config, &WIDTHS, by);
        match moec::read::bytes(config.to_string().as_bytes(), "config.json") {
            Ok(source) => {
                let forms = source.model.forms.iter();
                let widest = forms.max_by_key(|f| f.facts().expert_parameters);
                return widest.cloned().ok_or_else(|| "no mixture".to_owned());
            }
            Err(found) => last = found.iter().map(|d| d.message.clone()).collect::<Vec<_>>().join("; "),
        }
    }
    Err(format!("{model}: {last}"))
}

/// What a run found: launches, rows that were compared and left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Launches.
    pub launches: u64,
    /// Rows held against the interpreter.
    pub compared: u64,
    /// Rows left out, as their experts change with the last place of their elements.
    pub unsteady: u64,
}

/// Runs the narrowed mixture of `model` for each of `launches`, and holds rows of all against the interpreter.
///
/// # Errors
/// What differs, or why it cannot be run.
pub fn check(
    model: &str,
    target: Target,
    device: Arc<dyn Device>,
    launches: &[(u64, Rows)],
    rows: u64,
) -> Result<Found, String> {
    let said = |e: moec::Error| format!("{model} on {}: {e}", target.name());
    let form = form(model)?;
    let outputs = ["output", "topk_indices", "router_logits"].map(str::to_owned).to_vec();
    let compiler = Compiler { targets: vec![target], outputs, ..Compiler::default() };
    let name = model.replace(['-', '.'], "_");
    let compiled = compiler.compile_forms(&name, std::slice::from_ref(&form)).map_err(said)?;
    let artefact = Arc::new(compiled.load().map_err(|e| e.to_string())?);
    let layer: Prepared = prepare(&artefact, &device, None, &Weights::Random(1)).map_err(said)?;
    let (graph, facts) = (&compiled.forms[0].graph, form.facts());
    let mut sample = Sample::new(&layer, graph);
    for (set, (tokens, kind)) in (0..).zip(launches) {
        let what = format!("{model} on {}, {tokens} tokens, {kind:?}", target.name());
        let mut inputs = routing::inputs(&layer, graph, &facts, &kind.routing(), *tokens, set).map_err(said)?;
        inputs.iter_mut().for_each(|tensor| kind.spoil(tensor));
        sample.launch(&what, *tokens, &inputs, rows).map_err(|e| format!("{what}: {e}"))?;
    }
    sample.compare().map_err(|e| format!("{model} on {}: {e}", target.name()))?;
    Ok(Found { launches: launches.len() as u64, compared: sample.compared, unsteady: sample.unsteady })
}
