//! The whole model as described parts: what planning sees.

use crate::model::{Facts, Form, Layer, LayerKind};
use moec_ir::{
    DType, Dim, Graph, NodeId, Op, Part, TensorType,
    ops::{Described, DescribedKind, Input},
};

/// The chain embedding, layers, head; residual additions are part of what is described.
pub(crate) fn outline(name: &str, dtype: DType, hidden: u64, layers: &[Layer], forms: &[Form], facts: &Facts) -> Graph {
    let mut graph = Graph::new(name);
    let ty = TensorType { dtype: DType::I32, shape: vec![Dim::Tokens] };
    let ids = graph.add("input_ids", Op::Input(Input { name: "input_ids".to_owned(), ty }), &[]);
    let vocab = facts.vocab.unwrap_or(0).saturating_mul(hidden);
    let plain = |kind, layer, parameters: u64| Described {
        kind,
        layer,
        width: hidden,
        parameters,
        flops_per_token: 0,
        cache_bytes_per_token: 0,
        form: None,
    };
    let mut at = push(&mut graph, "embedding", plain(DescribedKind::Embedding, None, vocab), ids);
    let attention = attention_parameters(hidden, facts);
    let sizes: Vec<_> = forms.iter().map(Form::facts).collect();
    for (i, layer) in layers.iter().enumerate() {
        let i = i as u64;
        at = push(&mut graph, &format!("norm_{i}_a"), plain(DescribedKind::Norm, Some(i), hidden), at);
        let mixer = Described {
            flops_per_token: attention.saturating_mul(2),
            cache_bytes_per_token: cache(facts).saturating_mul(dtype.bytes()),
            ..plain(DescribedKind::Attention, Some(i), attention)
        };
        at = push(&mut graph, &format!("attention_{i}"), mixer, at);
        at = push(&mut graph, &format!("norm_{i}_b"), plain(DescribedKind::Norm, Some(i), hidden), at);
        at = match layer.kind {
            LayerKind::Dense => {
                let parameters = facts.dense_intermediate.unwrap_or(0).saturating_mul(hidden).saturating_mul(3);
                let ffn = Described {
                    flops_per_token: parameters.saturating_mul(2),
                    ..plain(DescribedKind::DenseFfn, Some(i), parameters)
                };
                push(&mut graph, &format!("ffn_{i}"), ffn, at)
            }
            LayerKind::Moe { form } => {
                let sizes = sizes.get(form).cloned().unwrap_or_default();
                let moe = Described {
                    flops_per_token: sizes.flops_per_token,
                    form: Some(form as u64),
                    ..plain(DescribedKind::Moe, Some(i), sizes.parameters)
                };
                push(&mut graph, &format!("moe_{i}"), moe, at)
            }
        };
    }
    at = push(&mut graph, "norm", plain(DescribedKind::Norm, None, hidden), at);
    let head = Described {
        width: facts.vocab.unwrap_or(hidden),
        flops_per_token: vocab.saturating_mul(2),
        ..plain(DescribedKind::Head, None, if facts.tied_embeddings { 0 } else { vocab })
    };
    at = push(&mut graph, "head", head, at);
    graph.output("logits", at, Part::Whole);
    graph
}

fn push(graph: &mut Graph, name: &str, described: Described, x: NodeId) -> NodeId {
    graph.add(name, Op::Described(described), &[x])
}

/// Weights of the projections around attention.
fn attention_parameters(hidden: u64, facts: &Facts) -> u64 {
    let heads = facts.heads.unwrap_or(0);
    let product = |terms: &[u64]| terms.iter().fold(1u64, |a, b| a.saturating_mul(*b));
    if let Some(mla) = facts.latent {
        let query = mla.nope.saturating_add(mla.rope).saturating_mul(heads);
        let query = match mla.query_rank {
            Some(rank) => product(&[hidden, rank]).saturating_add(product(&[rank, query])),
            None => product(&[hidden, query]),
        };
        let down = product(&[hidden, mla.kv_rank.saturating_add(mla.rope)]);
        let up = product(&[mla.kv_rank, heads, mla.nope.saturating_add(mla.value)]);
        let out = product(&[heads, mla.value, hidden]);
        return query.saturating_add(down).saturating_add(up).saturating_add(out);
    }
    let dim = facts.head_dim.unwrap_or(0);
    let kv = facts.kv_heads.unwrap_or(heads);
    product(&[2, hidden, dim, heads.saturating_add(kv)])
}

/// Elements of the key-value cache of a token.
fn cache(facts: &Facts) -> u64 {
    match facts.latent {
        Some(mla) => mla.kv_rank.saturating_add(mla.rope),
        None => facts.kv_heads.unwrap_or(0).saturating_mul(facts.head_dim.unwrap_or(0)).saturating_mul(2),
    }
}
