//! NLLB-MoE: two experts in 32 bits with a capacity; results depend on the whole batch.

use super::{Draft, act_or, layer_count, layers};
use crate::{
    block::{Block, MoeLayer, RAW, bank, ungated},
    check,
    keys::{Keys, Num, Refused},
    limits,
};
use moec_ir::{
    DType, Op, Source, WeightSpec,
    ops::{BinaryFn, Ffn, Limit, Linear, Priority, UnaryFn, Weigh, WeighNorm},
};

/// How an expert limits its tokens.
struct Capacity {
    capacity: Option<u64>,
    fraction: Option<f64>,
    priority: Priority,
}

pub(crate) fn read(keys: &mut Keys<'_>) -> Result<Draft, Refused> {
    let hidden = keys.size(&["d_model"], 1, limits::SIZE);
    let experts = keys.size(&["num_experts"], 2, limits::SIZE);
    check::limit(keys, &experts, limits::EXPERTS, "experts");
    let widths = [keys.size(&["encoder_ffn_dim"], 1, limits::SIZE), keys.size(&["decoder_ffn_dim"], 1, limits::SIZE)];
    check::volume(keys, &experts, &widths[0], &hidden);
    let counts = [layer_count(keys, &["encoder_layers"]), layer_count(keys, &["decoder_layers"])];
    keys.ignore(&["num_hidden_layers"]);
    let sparse = [sparse(keys, &counts[0], "encoder_sparse_step"), sparse(keys, &counts[1], "decoder_sparse_step")];
    let act = act_or(keys, &["activation_function"], UnaryFn::Relu);
    let biased = keys.flag(&["router_bias"], false);
    let router = keys.choice(
        &["router_dtype"],
        DType::F32,
        &[("float32", DType::F32), ("bfloat16", DType::Bf16), ("float16", DType::F16)],
    );
    keys.choice(&["second_expert_policy"], (), &[("all", ())]);
    let before = keys.flag(&["normalize_router_prob_before_dropping"], false);
    let dropout = keys.real_or(&["moe_token_dropout"], 0.2).0;
    let capacity = capacity(keys);
    keys.checked()?;
    let (hidden, experts) = (hidden.value, experts.value);

    let block = |prefix: String, inner: u64| -> MoeLayer {
        let mut b = Block::new(keys, hidden, prefix);
        let name = "router.classifier.weight";
        b.weight(name, router, &[experts, hidden], Source::plain(format!("{{p}}{name}")));
        let bias = biased.then(|| {
            b.weight("router.classifier.bias", router, &[experts], Source::plain("{p}router.classifier.bias"));
            "router.classifier.bias".to_owned()
        });
        let logits = b.op("logits", Op::Linear(Linear { w: name.to_owned(), b: bias }), &[b.x]);
        b.rounded_to(logits, router);
        let scores = b.softmax(logits);
        let chosen = b.topk(scores, 2);
        let weigh = Weigh { norm: Some(WeighNorm::Sum), floor: f64::from(f32::EPSILON), ..RAW };
        let limit =
            Op::Limit(Limit { capacity: capacity.capacity, fraction: capacity.fraction, priority: capacity.priority });
        let operands = |route| match capacity.priority {
            Priority::Score => vec![route, scores],
            Priority::Position => vec![route],
        };
        let route = if before {
            let route = b.weigh(chosen, scores, weigh);
            b.op("limited", limit, &operands(route))
        } else {
            let limited = b.op("limited", limit, &operands(chosen));
            b.weigh(limited, scores, weigh)
        };
        let dtype = b.dtype;
        let mut tensor = |name: &str, shape: &[u64]| {
            let short = format!("experts.{{e}}.{name}");
            b.weight(&short, dtype, shape, Source::plain(format!("{{p}}experts.expert_{{e}}.{name}")));
            WeightSpec::Plain(short)
        };
        let up = tensor("fc1.weight", &[inner, hidden]);
        let ffn = Ffn {
            up,
            up_bias: Some(tensor("fc1.bias", &[inner])),
            down: Some(tensor("fc2.weight", &[hidden, inner])),
            down_bias: Some(tensor("fc2.bias", &[hidden])),
            act: Some(act),
            ..ungated("")
        };
        let out = b.routed(b.x, route, bank(experts, ffn));
        // The reference scales by the kept share in inference too.
        let out = b.constant("scaled", BinaryFn::Mul, out, 1.0 - dropout);
        b.rounded(out);
        b.graph.batch_dependent = true;
        b.finish(out, route, Some(logits))
    };
    let side = |name: &'static str, at: usize| {
        let (block, inner) = (&block, widths[at].value);
        sparse[at]
            .iter()
            .enumerate()
            .map(move |(i, sparse)| sparse.then(|| block(format!("model.{name}.layers.{i}.ffn."), inner)))
    };
    let layers = side("encoder", 0).chain(side("decoder", 1)).collect();
    Ok(Draft { hidden, layers })
}

fn capacity(keys: &mut Keys<'_>) -> Capacity {
    let fraction = keys.real_or(&["moe_eval_capacity_token_fraction"], 1.0).0;
    let score = keys.flag(&["batch_prioritized_routing"], false);
    let priority = if score { Priority::Score } else { Priority::Position };
    if fraction > 0.0 {
        keys.ignore(&["expert_capacity"]);
        return Capacity { capacity: None, fraction: Some(fraction), priority };
    }
    let capacity = keys.size(&["expert_capacity"], 1, limits::SIZE).value;
    Capacity { capacity: Some(capacity), fraction: None, priority }
}

/// Every `step`-th layer; 0 means none.
fn sparse(keys: &mut Keys<'_>, layers: &Num, name: &str) -> Vec<bool> {
    let step = keys.size_or(&[name], 4, 0, limits::SIZE).value;
    (0..layers::count(layers) as u64).map(|i| step > 0 && (i + 1).is_multiple_of(step)).collect()
}
