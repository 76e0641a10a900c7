//! What the planner knows of a model: sizes per layer, nothing about tensors.
//!
//! A frontend fills [`ModelShape`] directly; [`ModelShape::from_config_json`]
//! reads a Hugging Face `config.json`. Sizes are elements, not bytes.

use crate::error::PlanError;
use serde::{Deserialize, Serialize};

/// Largest value accepted for one size; larger ones are taken for errors.
///
/// Products of three sizes stay below 2^63.
pub const MAX_SIZE: u64 = 1 << 21;

/// Attention of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// Multi-head (`kv_heads == heads`) or grouped-query attention.
    Gqa {
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of a head.
        head_dim: u64,
        /// Sliding window in tokens; `None` attends to the whole context.
        window: Option<u64>,
    },
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).
    Mla {
        /// Query heads.
        heads: u64,
        /// Rank of the query compression; 0 means a full query projection.
        q_lora_rank: u64,
        /// Rank of the key-value compression, which is what the cache holds.
        kv_lora_rank: u64,
        /// Width of a head without position.
        qk_nope_head_dim: u64,
        /// Width of the rotary part of a head.
        qk_rope_head_dim: u64,
        /// Width of a value head.
        v_head_dim: u64,
    },
    /// Linear attention with a state of fixed size (gated delta rule, Mamba).
    Linear {
        /// Key heads.
        key_heads: u64,
        /// Value heads.
        value_heads: u64,
        /// Width of a key head.
        key_dim: u64,
        /// Width of a value head.
        value_dim: u64,
    },
}

/// Feed-forward part of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForward {
    /// One dense network.
    Dense {
        /// Inner width.
        intermediate: u64,
        /// Whether it has a gate (three matrices instead of two).
        gated: bool,
    },
    /// Routed experts, with an optional shared expert.
    Moe {
        /// Routed experts.
        experts: u64,
        /// Experts chosen per token.
        top_k: u64,
        /// Inner width of a routed expert.
        expert_intermediate: u64,
        /// Inner width of all shared experts together; 0 for none.
        shared_intermediate: u64,
        /// Whether experts have a gate (three matrices instead of two).
        gated: bool,
    },
}

impl FeedForward {
    /// Whether the layer routes tokens.
    pub fn is_moe(&self) -> bool {
        match self {
            Self::Dense { .. } => false,
            Self::Moe { .. } => true,
        }
    }
}

/// One decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Layer {
    /// Attention part.
    pub attention: Attention,
    /// Feed-forward part.
    pub feed_forward: FeedForward,
}

/// Sizes of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Name, for messages and reports.
    pub name: String,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Vocabulary.
    pub vocab: u64,
    /// Whether input and output embeddings are one tensor.
    pub tied_embeddings: bool,
    /// Bytes of a stored weight (2 for bf16).
    pub dtype_bytes: f64,
    /// Decoder layers, in order.
    pub layers: Vec<Layer>,
    /// Whether experts have biases or a clamped activation, which training stacks run as separate kernels.
    pub unfused_experts: bool,
    /// Extra multi-token-prediction layers, each like the last layer (training only).
    pub mtp_layers: u64,
}

/// Layers that are alike, with how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerClass {
    /// The layer.
    pub layer: Layer,
    /// How many layers are like it.
    pub count: u64,
}

impl ModelShape {
    /// Checks the sizes and makes a model.
    ///
    /// # Errors
    /// `E0405` names the size that is zero, too large or inconsistent.
    pub fn new(name: impl Into<String>, hidden: u64, vocab: u64, layers: Vec<Layer>) -> Result<Self, PlanError> {
        let shape = Self {
            name: name.into(),
            hidden,
            vocab,
            tied_embeddings: false,
            dtype_bytes: 2.0,
            layers,
            unfused_experts: false,
            mtp_layers: 0,
        };
        shape.check()?;
        Ok(shape)
    }

    /// Checks every size; done by all entry points, since the fields are public.
    ///
    /// # Errors
    /// `E0405` names the size that is zero, too large or inconsistent.
    pub fn check(&self) -> Result<(), PlanError> {
        size("hidden size", self.hidden)?;
        size("vocabulary", self.vocab)?;
        if self.layers.is_empty() || self.layers.len() > 10_000 {
            return Err(PlanError::model(
                format!("{} layers is outside 1..=10000", self.layers.len()),
                "set num_hidden_layers",
            ));
        }
        if !(self.dtype_bytes > 0.0 && self.dtype_bytes <= 16.0) {
            return Err(PlanError::model("bytes of a weight must lie in (0, 16]", "use 2 for bf16"));
        }
        if self.mtp_layers > 64 {
            return Err(PlanError::model("more than 64 prediction layers", "set num_nextn_predict_layers"));
        }
        for class in self.classes() {
            class.layer.check()?;
        }
        Ok(())
    }

    /// Distinct layers in order of first use.
    pub fn classes(&self) -> Vec<LayerClass> {
        let mut classes: Vec<LayerClass> = Vec::new();
        for &layer in &self.layers {
            match classes.iter_mut().find(|c| c.layer == layer) {
                Some(class) => class.count += 1,
                None => classes.push(LayerClass { layer, count: 1 }),
            }
        }
        classes
    }

    /// Largest number of routed experts of any layer; 0 for a dense model.
    pub fn experts(&self) -> u64 {
        self.classes().iter().map(|c| c.layer.experts()).max().unwrap_or(0)
    }

    /// Parameters of all layers and embeddings, without prediction layers.
    pub fn parameters(&self) -> f64 {
        let embeddings = if self.tied_embeddings { 1.0 } else { 2.0 };
        let layers: f64 = self
            .classes()
            .iter()
            .map(|c| c.count as f64 * (c.layer.attention_parameters(self.hidden) + c.layer.ffn_parameters(self.hidden)))
            .sum();
        layers + embeddings * self.hidden as f64 * self.vocab as f64
    }

    /// Forward operations per token of a layer list at a context of `seq` tokens.
    ///
    /// Matrix products count 2 per multiply-add; attention counts the causal half,
    /// which is what `seq / 2` earlier tokens on average means.
    pub fn forward_flops_per_token(&self, seq: u64) -> f64 {
        let hidden = self.hidden as f64;
        let layers: f64 =
            self.classes().iter().map(|c| c.count as f64 * c.layer.flops_per_token(self.hidden, seq)).sum();
        let last = self.layers.last().map_or(0.0, |l| l.flops_per_token(self.hidden, seq));
        let logits = 2.0 * hidden * self.vocab as f64;
        // A prediction layer also projects two hidden states into one (DeepSeek-V3, section 2.2).
        layers + logits + self.mtp_layers as f64 * (last + 4.0 * hidden * hidden + logits)
    }

    /// Operations of a training step per token: forward plus twice that for backward.
    pub fn training_flops_per_token(&self, seq: u64) -> f64 {
        3.0 * self.forward_flops_per_token(seq)
    }
}

impl Layer {
    /// Routed experts; 0 for a dense layer.
    pub fn experts(&self) -> u64 {
        match self.feed_forward {
            FeedForward::Dense { .. } => 0,
            FeedForward::Moe { experts, .. } => experts,
        }
    }

    /// Experts that a token goes to; 1 for a dense layer.
    pub fn top_k(&self) -> f64 {
        match self.feed_forward {
            FeedForward::Dense { .. } => 1.0,
            FeedForward::Moe { top_k, .. } => top_k as f64,
        }
    }

    /// Parameters of the attention part with its two norms.
    pub fn attention_parameters(&self, hidden: u64) -> f64 {
        let h = hidden as f64;
        let projections = match self.attention {
            Attention::Gqa { heads, kv_heads, head_dim, .. } => {
                h * (head_dim as f64) * (2.0 * heads as f64 + 2.0 * kv_heads as f64)
            }
            Attention::Mla { heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
                let heads = heads as f64;
                let q_head = (qk_nope_head_dim + qk_rope_head_dim) as f64;
                let query = match q_lora_rank {
                    0 => h * heads * q_head,
                    rank => rank as f64 * (h + heads * q_head),
                };
                let rank = kv_lora_rank as f64;
                query
                    + h * (rank + qk_rope_head_dim as f64)
                    + rank * heads * (qk_nope_head_dim + v_head_dim) as f64
                    + heads * v_head_dim as f64 * h
            }
            Attention::Linear { key_heads, value_heads, key_dim, value_dim } => {
                let keys = (key_heads * key_dim) as f64;
                let values = (value_heads * value_dim) as f64;
                // Query, key, value and output gate in, output back.
                h * (2.0 * keys + 3.0 * values)
            }
        };
        projections + 2.0 * h
    }

    /// Parameters of the feed-forward part, routed experts included.
    pub fn ffn_parameters(&self, hidden: u64) -> f64 {
        let h = hidden as f64;
        match self.feed_forward {
            FeedForward::Dense { intermediate, gated } => matrices(gated) * h * intermediate as f64,
            FeedForward::Moe { experts, expert_intermediate, shared_intermediate, gated, .. } => {
                h * experts as f64
                    + matrices(gated) * h * (experts as f64 * expert_intermediate as f64 + shared_intermediate as f64)
            }
        }
    }

    /// Parameters of the routed experts alone.
    pub fn expert_parameters(&self, hidden: u64) -> f64 {
        match self.feed_forward {
            FeedForward::Dense { .. } => 0.0,
            FeedForward::Moe { experts, expert_intermediate, gated, .. } => {
                matrices(gated) * hidden as f64 * experts as f64 * expert_intermediate as f64
            }
        }
    }

    /// Operations of scores and values per token and unit of context length.
    pub(crate) fn core_flops_per_context(&self) -> f64 {
        match self.attention {
            Attention::Gqa { heads, head_dim, .. } => 4.0 * (heads * head_dim) as f64,
            Attention::Mla { heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
                2.0 * heads as f64 * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim) as f64
            }
            Attention::Linear { .. } => 0.0,
        }
    }

    /// Mean width of score and value heads.
    pub(crate) fn head_width(&self) -> f64 {
        match self.attention {
            Attention::Gqa { head_dim, .. } => head_dim as f64,
            Attention::Mla { qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
                (qk_nope_head_dim + qk_rope_head_dim + v_head_dim) as f64 / 2.0
            }
            Attention::Linear { key_dim, .. } => key_dim as f64,
        }
    }

    /// Tokens a query sees on average in a causal sequence of `seq` tokens.
    pub(crate) fn mean_context(&self, seq: f64) -> f64 {
        match self.attention {
            Attention::Gqa { window: Some(window), .. } => {
                let w = (window as f64).min(seq);
                w - w * w / (2.0 * seq)
            }
            Attention::Gqa { window: None, .. } | Attention::Mla { .. } => seq / 2.0,
            Attention::Linear { .. } => 0.0,
        }
    }

    /// Operations per token of the recurrent state update, zero for softmax attention.
    pub(crate) fn state_flops(&self) -> f64 {
        match self.attention {
            Attention::Gqa { .. } | Attention::Mla { .. } => 0.0,
            // Decay, delta update and read-out of a key_dim x value_dim state per value head.
            Attention::Linear { value_heads, key_dim, value_dim, .. } => {
                8.0 * (value_heads * key_dim * value_dim) as f64
            }
        }
    }

    fn flops_per_token(&self, hidden: u64, seq: u64) -> f64 {
        let h = hidden as f64;
        let ffn = match self.feed_forward {
            FeedForward::Dense { intermediate, gated } => matrices(gated) * h * intermediate as f64,
            FeedForward::Moe { experts, top_k, expert_intermediate, shared_intermediate, gated } => {
                h * experts as f64
                    + matrices(gated) * h * (top_k as f64 * expert_intermediate as f64 + shared_intermediate as f64)
            }
        };
        let core = self.core_flops_per_context() * self.mean_context(seq as f64);
        2.0 * (self.attention_parameters(hidden) + ffn) + core + self.state_flops()
    }

    fn check(&self) -> Result<(), PlanError> {
        match self.attention {
            Attention::Gqa { heads, kv_heads, head_dim, window } => {
                size("attention heads", heads)?;
                size("key-value heads", kv_heads)?;
                size("head size", head_dim)?;
                size("sliding window", window.map_or(1, |w| w.min(MAX_SIZE)))?;
                if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
                    return Err(PlanError::model(
                        format!("{heads} query heads cannot share {kv_heads} key-value heads"),
                        format!("num_key_value_heads must divide {heads}"),
                    ));
                }
            }
            Attention::Mla { heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } => {
                size("attention heads", heads)?;
                size("kv_lora_rank", kv_lora_rank)?;
                size("qk_nope_head_dim", qk_nope_head_dim)?;
                size("qk_rope_head_dim", qk_rope_head_dim.saturating_add(1))?;
                size("v_head_dim", v_head_dim)?;
                size("q_lora_rank", q_lora_rank.saturating_add(1))?;
            }
            Attention::Linear { key_heads, value_heads, key_dim, value_dim } => {
                for (name, value) in [
                    ("key heads", key_heads),
                    ("value heads", value_heads),
                    ("key width", key_dim),
                    ("value width", value_dim),
                ] {
                    size(name, value)?;
                }
            }
        }
        match self.feed_forward {
            FeedForward::Dense { intermediate, .. } => size("intermediate size", intermediate),
            FeedForward::Moe { experts, top_k, expert_intermediate, .. } => {
                size("number of experts", experts)?;
                size("experts per token", top_k)?;
                size("expert intermediate size", expert_intermediate)?;
                if top_k > experts {
                    return Err(PlanError::model(
                        format!("{top_k} experts per token of {experts} experts"),
                        format!("set num_experts_per_tok to {experts} or less"),
                    ));
                }
                Ok(())
            }
        }
    }
}

/// Weight matrices of a feed-forward network.
pub(crate) fn matrices(gated: bool) -> f64 {
    if gated { 3.0 } else { 2.0 }
}

fn size(name: &str, value: u64) -> Result<(), PlanError> {
    if value == 0 || value > MAX_SIZE {
        return Err(PlanError::model(
            format!("{name} {value} is outside 1..={MAX_SIZE}"),
            format!("set the {name} of the model"),
        ));
    }
    Ok(())
}
