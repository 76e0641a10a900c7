//! DeepSeek-V4: `sqrt(softplus(L))` scores with a bias; the first layers choose by token id.

use super::{Draft, TOP_K, act, build, inner, layers, sizes};
use crate::{
    block::{Block, RAW, Shape2, bank},
    keys::{Keys, Refused},
    layout, limits,
};
use moec_ir::{
    DType, Dim, NodeId, Op, Source,
    ops::{Gather, SelectRule, UnaryFn, Weigh, WeighNorm},
};

/// How logits become scores.
#[derive(Clone, Copy)]
enum Scoring {
    SqrtSoftplus,
    Sigmoid,
    Softmax,
}

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let sizes = sizes(keys, &["n_routed_experts", "num_local_experts", "num_experts"], TOP_K);
    let inner = inner(keys, &["moe_intermediate_size"], &sizes).value;
    let act = act(keys, &["hidden_act"]);
    let scoring = keys.choice(
        &["scoring_func"],
        Scoring::SqrtSoftplus,
        &[("sqrtsoftplus", Scoring::SqrtSoftplus), ("sigmoid", Scoring::Sigmoid), ("softmax", Scoring::Softmax)],
    );
    let scale = keys.factor(&["routed_scaling_factor"], 1.0);
    let limit = keys.real(&["swiglu_limit"]).filter(|c| *c > 0.0);
    let shared = keys.size_or(&["n_shared_experts"], 1, 0, limits::EXPERTS).value.saturating_mul(inner);
    let vocab = keys.size(&["vocab_size"], 1, limits::SIZE).value;
    // The class always renormalises.
    keys.ignore(&["norm_topk_prob", "topk_method"]);
    let hashed = keys.size_or(&["num_hash_layers"], 0, 0, limits::SIZE).value;
    let kinds = layers::listed(keys, &sizes.layers);
    keys.checked()?;
    let (hidden, experts, k) = (sizes.hidden.value, sizes.experts.value, sizes.top_k.value);
    let kind = |i: u64| -> &str {
        let listed = kinds.as_ref().and_then(|k| k.get(usize::try_from(i).unwrap_or(usize::MAX)));
        listed.map_or(if i < hashed { "hash_moe" } else { "moe" }, String::as_str)
    };
    let sparse: Vec<bool> = (0..layers::count(&sizes.layers) as u64).map(|i| kind(i) != "dense").collect();

    Ok(build(hidden, &sparse, "model.layers.{i}.ffn.", |i, prefix| {
        let mut b = Block::new(keys, hidden, prefix);
        let logits = b.logits("gate.weight", experts);
        let scores = scores(&mut b, scoring, logits);
        let weigh = Weigh { norm: Some(WeighNorm::Sum), eps: 1e-20, scale, ..RAW };
        let route = if kind(i) == "hash_moe" {
            let ids = b.input("input_ids", DType::I32, vec![Dim::Tokens]);
            b.weight("gate.tid2eid", DType::I64, &[vocab, k], Source::plain("{p}gate.tid2eid"));
            let chosen = b.op("experts_of_token", Op::Gather(Gather { w: "gate.tid2eid".to_owned() }), &[ids]);
            let chosen = b.select(chosen, SelectRule::Given { experts });
            b.weigh_rounded(chosen, scores, weigh)
        } else {
            let choice = b.biased(scores, "gate.bias", experts);
            let chosen = b.topk(choice, k);
            b.weigh(chosen, scores, weigh)
        };
        let shape = Shape2 { input: hidden, inner, act };
        let mut ffn = b.glu("experts.{e}", layout::w123("{p}experts.{e}"), shape);
        ffn.limit = limit;
        let mut out = b.routed(b.x, route, bank(experts, ffn));
        if shared > 0 {
            let mut ffn = b.glu("shared_experts", layout::w123("{p}shared_experts"), Shape2 { inner: shared, ..shape });
            ffn.limit = limit;
            let shared = b.ffn("shared", b.x, ffn);
            out = b.add(out, shared);
        }
        b.finish(out, route, Some(logits))
    }))
}

/// Scores in the type of the logits.
fn scores(b: &mut Block, scoring: Scoring, logits: NodeId) -> NodeId {
    let scores = match scoring {
        Scoring::SqrtSoftplus => {
            let soft = b.unary("softplus", UnaryFn::Softplus, logits);
            b.rounded(soft);
            b.unary("scores", UnaryFn::Sqrt, soft)
        }
        Scoring::Sigmoid => b.unary("scores", UnaryFn::Sigmoid, logits),
        Scoring::Softmax => b.softmax(logits),
    };
    b.rounded(scores)
}
