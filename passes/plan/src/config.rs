//! Reads the sizes of a Hugging Face `config.json`, generously.
//!
//! Only sizes matter here, so unknown keys are ignored and each size has a list
//! of the names that model families give it. Multimodal configurations nest the
//! language model in `text_config` (or `thinker_config.text_config`).

use crate::{
    error::PlanError,
    model::{Attention, FeedForward, Layer, ModelShape},
};
use serde_json::Value;

const HIDDEN: &[&str] = &["hidden_size", "d_model", "n_embd"];
const LAYERS: &[&str] = &["num_hidden_layers", "n_layers", "num_layers", "n_layer"];
const HEADS: &[&str] = &["num_attention_heads", "n_heads", "num_heads", "n_head", "encoder_attention_heads"];
const KV_HEADS: &[&str] = &["num_key_value_heads", "attn_config.kv_n_heads", "num_attention_groups"];
const HEAD_DIM: &[&str] = &["head_dim", "d_kv", "attention_head_dim", "kv_channels"];
const EXPERTS: &[&str] = &[
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "ffn_config.moe_num_experts",
    "moe_num_primary_experts",
    "num_routed_experts",
];
const TOP_K: &[&str] = &[
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "ffn_config.moe_top_k",
    "top_k_experts",
    "moe_num_active_primary_experts",
    "num_selected_experts",
];
const EXPERT_WIDTH: &[&str] = &[
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_config.ffn_hidden_size",
    "moe_ffn_hidden_size",
    "intermediate_size",
    "ffn_hidden_size",
    "d_ff",
    "encoder_ffn_dim",
];
const DENSE_WIDTH: &[&str] = &[
    "intermediate_size_mlp",
    "intermediate_size",
    "ffn_hidden_size",
    "d_ff",
    "encoder_ffn_dim",
    "ffn_config.ffn_hidden_size",
    "moe_intermediate_size",
];
const SHARED_WIDTH: &[&str] = &[
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "share_expert_dim",
];
const SHARED_COUNT: &[&str] =
    &["n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"];

/// View of the configuration that knows nested names and lists per layer.
struct Config<'a>(&'a Value);

impl Config<'_> {
    fn get(&self, path: &str) -> Option<&Value> {
        path.split('.').try_fold(self.0, |value, key| value.get(key)).filter(|v| !v.is_null())
    }

    /// First of the names that holds an integer; of a list, entry `layer` or the last.
    fn at(&self, names: &[&str], layer: usize) -> Option<u64> {
        names.iter().find_map(|name| match self.get(name)? {
            Value::Array(list) => list.get(layer).or(list.last())?.as_u64(),
            other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_)) => {
                other.as_u64()
            }
        })
    }

    fn number(&self, names: &[&str]) -> Option<u64> {
        self.at(names, 0)
    }

    fn need(&self, what: &str, names: &[&str]) -> Result<u64, PlanError> {
        self.number(names).ok_or_else(|| {
            PlanError::model(format!("the configuration has no {what}"), format!("set one of {}", names.join(", ")))
        })
    }
}

impl ModelShape {
    /// Reads the sizes of a Hugging Face `config.json`.
    ///
    /// # Errors
    /// `E0405` when a size is missing, zero or absurd; the help names the keys that are understood.
    pub fn from_config_json(config: &Value) -> Result<Self, PlanError> {
        let nested = config
            .pointer("/thinker_config/text_config")
            .or_else(|| config.get("text_config"))
            .filter(|v| v.is_object())
            .unwrap_or(config);
        let c = Config(nested);
        if !nested.is_object() {
            return Err(PlanError::model("the configuration is not a JSON object", "give the config.json of a model"));
        }
        let name = [nested, config]
            .iter()
            .find_map(|v| v.get("_name_or_path").and_then(Value::as_str).filter(|s| !s.is_empty()))
            .or_else(|| config.get("model_type").and_then(Value::as_str))
            .unwrap_or("model");
        let count = c.need("number of layers", LAYERS)?.saturating_add(encoder_layers(&c));
        if count == 0 || count > 10_000 {
            return Err(PlanError::model(format!("{count} layers is outside 1..=10000"), "set num_hidden_layers"));
        }
        let hidden = c.need("hidden size", HIDDEN)?;
        let mut layers = Vec::new();
        for index in 0..count as usize {
            layers.push(Layer { attention: attention(&c, index, hidden)?, feed_forward: feed_forward(&c, index)? });
        }
        let mut shape = Self::new(name, hidden, c.need("vocabulary", &["vocab_size", "padded_vocab_size"])?, layers)?;
        shape.tied_embeddings = c.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
        shape.mtp_layers = c.number(&["num_nextn_predict_layers", "num_mtp_modules"]).unwrap_or(0);
        // GPT-OSS: biases and a clamp in every expert, whether or not the configuration spells it out.
        shape.unfused_experts =
            c.get("swiglu_limit").is_some() || config.get("model_type").and_then(Value::as_str) == Some("gpt_oss");
        shape.dtype_bytes = match c.get("torch_dtype").or_else(|| c.get("dtype")).and_then(Value::as_str) {
            Some("float32") => 4.0,
            Some(_) | None => 2.0,
        };
        shape.check()?;
        Ok(shape)
    }
}

/// Encoder layers of an encoder-decoder, which come on top of the decoder's.
fn encoder_layers(c: &Config<'_>) -> u64 {
    let both = c.get("is_encoder_decoder").and_then(Value::as_bool).unwrap_or(false);
    if both { c.number(&["num_decoder_layers", "decoder_layers"]).unwrap_or(0) } else { 0 }
}

fn attention(c: &Config<'_>, index: usize, hidden: u64) -> Result<Attention, PlanError> {
    let heads = c.at(HEADS, index).map_or_else(|| c.need("number of attention heads", HEADS), Ok)?.max(1);
    if is_linear(c, index) {
        let key_heads = c.number(&["linear_num_key_heads"]);
        return Ok(match key_heads {
            Some(key_heads) => Attention::Linear {
                key_heads,
                value_heads: c.number(&["linear_num_value_heads"]).unwrap_or(key_heads),
                key_dim: c.number(&["linear_key_head_dim"]).unwrap_or(128),
                value_dim: c.number(&["linear_value_head_dim"]).unwrap_or(128),
            },
            // Mamba: an inner width of expand x hidden and a state per channel.
            None => Attention::Linear {
                key_heads: 1,
                value_heads: (c.number(&["mamba_expand"]).unwrap_or(2).saturating_mul(hidden) / 64).max(1),
                key_dim: c.number(&["mamba_d_state", "ssm_state_size"]).unwrap_or(16),
                value_dim: 64,
            },
        });
    }
    if let Some(kv_lora_rank) = c.number(&["kv_lora_rank"]) {
        return Ok(Attention::Mla {
            heads,
            q_lora_rank: c.number(&["q_lora_rank"]).unwrap_or(0),
            kv_lora_rank,
            qk_nope_head_dim: c.number(&["qk_nope_head_dim"]).unwrap_or(128),
            qk_rope_head_dim: c.number(&["qk_rope_head_dim"]).unwrap_or(64),
            v_head_dim: c.number(&["v_head_dim"]).unwrap_or(128),
        });
    }
    let sliding = layer_type(c, index).is_some_and(|t| t.contains("sliding") || t.contains("chunked"));
    Ok(Attention::Gqa {
        heads,
        kv_heads: c.at(KV_HEADS, index).unwrap_or(heads),
        head_dim: c.number(HEAD_DIM).unwrap_or(hidden / heads).max(1),
        window: if sliding { c.number(&["sliding_window", "attention_chunk_size"]) } else { None },
    })
}

fn layer_type<'a>(c: &'a Config<'_>, index: usize) -> Option<&'a str> {
    ["layer_types", "layers_block_type"].iter().find_map(|k| c.get(k)?.as_array()?.get(index)?.as_str())
}

/// Whether a layer replaces softmax attention by a recurrent state.
fn is_linear(c: &Config<'_>, index: usize) -> bool {
    if let Some(kind) = layer_type(c, index) {
        return kind.contains("linear") || kind.contains("mamba") || kind == "conv";
    }
    if let Some(interval) = c.number(&["full_attention_interval"]).filter(|&n| n > 0) {
        return c.number(&["linear_num_key_heads"]).is_some() && !(index as u64 + 1).is_multiple_of(interval);
    }
    if let Some(period) = c.number(&["attn_layer_period"]).filter(|&n| n > 0) {
        return index as u64 % period != c.number(&["attn_layer_offset"]).unwrap_or(0) % period;
    }
    false
}

fn feed_forward(c: &Config<'_>, index: usize) -> Result<FeedForward, PlanError> {
    let gated = c.get("is_gated_act").and_then(Value::as_bool).unwrap_or(c.get("encoder_ffn_dim").is_none());
    let experts = c.at(EXPERTS, index).unwrap_or(0);
    if experts == 0 || !is_moe(c, index as u64, experts) {
        let intermediate = c.at(DENSE_WIDTH, index).map_or_else(|| c.need("dense width", DENSE_WIDTH), Ok)?;
        return Ok(FeedForward::Dense { intermediate, gated });
    }
    let width = c.at(EXPERT_WIDTH, index).map_or_else(|| c.need("expert width", EXPERT_WIDTH), Ok)?;
    let shared = match c.at(SHARED_WIDTH, index) {
        Some(width) => width,
        None => c.at(SHARED_COUNT, index).unwrap_or(0).saturating_mul(width),
    };
    Ok(FeedForward::Moe {
        experts,
        // Switch and NLLB route to one and two experts without saying so.
        top_k: c.at(TOP_K, index).unwrap_or(if c.get("encoder_ffn_dim").is_some() { 2 } else { 1 }),
        expert_intermediate: width,
        shared_intermediate: shared,
        gated,
    })
}

/// The layer rules of the model families.
fn is_moe(c: &Config<'_>, index: u64, experts: u64) -> bool {
    if let Some(kind) = c.get("mlp_layer_types").and_then(Value::as_array).and_then(|l| l.get(index as usize)?.as_str())
    {
        return kind != "dense";
    }
    if let Some(list) = c.get("moe_layers").and_then(Value::as_array) {
        return list.iter().any(|v| v.as_u64() == Some(index));
    }
    if let Some(step) = c.number(&["interleave_moe_layer_step"]).filter(|&n| n > 0) {
        return (index + 1).is_multiple_of(step);
    }
    if let Some(period) = c.number(&["expert_layer_period"]).filter(|&n| n > 0) {
        return experts > 1 && index % period == c.number(&["expert_layer_offset"]).unwrap_or(0) % period;
    }
    if let Some(sparse) = c.number(&["num_sparse_encoder_layers"]).filter(|&n| n > 0) {
        let step = (c.number(&["num_layers"]).unwrap_or(sparse) / sparse).max(1);
        return step == 1 || index % step == 1;
    }
    if let Some(step) = c.number(&["encoder_sparse_step"]).filter(|&n| n > 0) {
        return (index + 1).is_multiple_of(step);
    }
    let dense = c.number(&["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"]).unwrap_or(0);
    if index < dense || c.number(&["moe_layer_end_index"]).is_some_and(|end| index > end) {
        return false;
    }
    if c.get("mlp_only_layers").and_then(Value::as_array).is_some_and(|l| l.iter().any(|v| v.as_u64() == Some(index))) {
        return false;
    }
    match c.get("moe_layer_freq") {
        Some(Value::Array(list)) => list.get(index as usize).and_then(Value::as_u64) != Some(0),
        _ => c
            .number(&["decoder_sparse_step", "moe_layer_interval"])
            .is_none_or(|step| step > 0 && (index + 1).is_multiple_of(step)),
    }
}
