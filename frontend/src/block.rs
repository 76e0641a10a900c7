//! Building the graph of one mixture block.
//!
//! A family writes its composition with these; each method adds one op, and weights are declared
//! where they are used.

use crate::{
    keys::{Keys, Quant},
    layout::Glu,
};
use moec_ir::{
    DType, Dim, Extent, Graph, NodeId, Op, Packing, Part, Source, TensorType, View, Weight, WeightSpec,
    ops::{
        Adjust, BankPart, Binary, BinaryFn, Combine, Dispatch, Experts, Ffn, Input, LimitOn, Linear, Norm, NormKind,
        PartKind, Reduce, ReduceFn, Select, SelectRule, Shape, Softmax, Unary, UnaryFn, Weigh, WeighFn,
    },
};

/// Weights of the slots as they are selected; families change single fields.
pub(crate) const RAW: Weigh = Weigh {
    constant: false,
    function: WeighFn::None,
    real: None,
    drop_below: None,
    drop_rows: false,
    keep_rows: false,
    norm: None,
    eps: 0.0,
    floor: 0.0,
    expert_scale: None,
    scale: 1.0,
};

/// A block under construction.
pub(crate) struct Block {
    /// The graph so far.
    pub(crate) graph: Graph,
    /// The block's input, `[T, hidden]`.
    pub(crate) x: NodeId,
    /// Type of the model.
    pub(crate) dtype: DType,
    /// Width of the input.
    pub(crate) hidden: u64,
    /// Prefix of the layer in the checkpoint.
    pub(crate) prefix: String,
    quant: Option<Quant>,
}

/// Widths and activation of gated experts.
#[derive(Clone, Copy)]
pub(crate) struct Shape2 {
    /// Width of the input.
    pub(crate) input: u64,
    /// Inner width.
    pub(crate) inner: u64,
    /// Activation of the gate.
    pub(crate) act: UnaryFn,
}

impl Block {
    /// A block with its input.
    pub(crate) fn new(keys: &Keys<'_>, hidden: u64, prefix: String) -> Self {
        let mut graph = Graph::new("moe");
        let ty = TensorType { dtype: keys.dtype, shape: vec![Dim::Tokens, Dim::Const(hidden)] };
        let name = "hidden_states".to_owned();
        let x = graph.add("hidden_states", Op::Input(Input { name, ty }), &[]);
        Self { graph, x, dtype: keys.dtype, hidden, prefix, quant: keys.quant.clone() }
    }

    /// A further input.
    pub(crate) fn input(&mut self, name: &str, dtype: DType, shape: Vec<Dim>) -> NodeId {
        let ty = TensorType { dtype, shape };
        self.graph.add(name, Op::Input(Input { name: name.to_owned(), ty }), &[])
    }

    /// Any op.
    pub(crate) fn op(&mut self, name: &str, op: Op, operands: &[NodeId]) -> NodeId {
        self.graph.add(name, op, operands)
    }

    /// Says that the value is rounded to the model's type.
    pub(crate) fn rounded(&mut self, node: NodeId) -> NodeId {
        self.rounded_to(node, self.dtype)
    }

    /// Says that the value is rounded to a type.
    pub(crate) fn rounded_to(&mut self, node: NodeId, dtype: DType) -> NodeId {
        if dtype != DType::F32 {
            self.graph.node_mut(node).round = Some(dtype);
        }
        node
    }

    /// Declares a weight.
    pub(crate) fn weight(&mut self, name: &str, dtype: DType, shape: &[u64], source: Source) {
        let shape = shape.iter().map(|n| Extent::Fixed(*n)).collect();
        self.graph.weights.insert(name.to_owned(), Weight { dtype, shape, source });
    }

    /// Declares a weight of the model's type that stands under `{p}NAME`.
    pub(crate) fn plain(&mut self, name: &str, shape: &[u64]) {
        self.weight(name, self.dtype, shape, Source::plain(format!("{{p}}{name}")));
    }

    /// A weight that the model may store quantised.
    pub(crate) fn quantised(&mut self, name: &str, shape: &[u64], mut source: Source) {
        if let Some(Quant::Fp8 { block, scale, keep }) = &self.quant
            && source.packing == Packing::Plain
            && !keep.iter().any(|modules| modules.hold(&source.tensor.replace("{p}", &self.prefix)))
        {
            // Tiles count in the stored tensor, whose outputs may be its last axis.
            let [outputs, inputs] = *block;
            let block = if source.view.contains(&View::Transpose) { [inputs, outputs] } else { *block };
            source.packing = Packing::Fp8Block { scale: format!("{}{scale}", source.tensor), block };
        }
        self.weight(name, self.dtype, shape, source);
    }

    /// `x W^T` with a weight that stands under `{p}NAME`.
    pub(crate) fn linear(&mut self, id: &str, x: NodeId, name: &str, out: u64, input: u64) -> NodeId {
        self.plain(name, &[out, input]);
        self.graph.add(id, Op::Linear(Linear { w: name.to_owned(), b: None }), &[x])
    }

    /// `x W^T + b`, both of the model's type.
    pub(crate) fn linear_biased(&mut self, id: &str, x: NodeId, [w, b]: [&str; 2], out: u64, input: u64) -> NodeId {
        self.plain(w, &[out, input]);
        self.plain(b, &[out]);
        self.graph.add(id, Op::Linear(Linear { w: w.to_owned(), b: Some(b.to_owned()) }), &[x])
    }

    /// Router logits of the block's input, computed in 32 bits (`L:f32`).
    pub(crate) fn logits_f32(&mut self, name: &str, experts: u64) -> NodeId {
        self.linear("logits", self.x, name, experts, self.hidden)
    }

    /// Router logits of the block's input, rounded to the model's type (`L:dt`).
    pub(crate) fn logits(&mut self, name: &str, experts: u64) -> NodeId {
        let logits = self.logits_f32(name, experts);
        self.rounded(logits)
    }

    /// Softmax over the last axis.
    pub(crate) fn softmax(&mut self, x: NodeId) -> NodeId {
        self.graph.add("scores", Op::Softmax(Softmax { temp: 1.0 }), &[x])
    }

    /// A function of one value.
    pub(crate) fn unary(&mut self, name: &str, function: UnaryFn, x: NodeId) -> NodeId {
        self.graph.add(name, Op::Unary(Unary { function }), &[x])
    }

    /// A function of two values.
    pub(crate) fn binary(&mut self, name: &str, function: BinaryFn, a: NodeId, b: NodeId) -> NodeId {
        self.graph.add(name, Op::Binary(Binary { function, w: None, c: None }), &[a, b])
    }

    /// A function of a value and a constant.
    pub(crate) fn constant(&mut self, name: &str, function: BinaryFn, a: NodeId, c: f64) -> NodeId {
        self.graph.add(name, Op::Binary(Binary { function, w: None, c: Some(c) }), &[a])
    }

    /// A function of a value and a declared weight.
    pub(crate) fn with_weight(&mut self, name: &str, function: BinaryFn, a: NodeId, w: &str) -> NodeId {
        self.graph.add(name, Op::Binary(Binary { function, w: Some(w.to_owned()), c: None }), &[a])
    }

    /// Root-mean-square norm, with a weight of the model's type if named.
    pub(crate) fn rms(&mut self, name: &str, x: NodeId, eps: f64, w: Option<(&str, u64)>) -> NodeId {
        if let Some((w, n)) = w {
            self.plain(w, &[n]);
        }
        let w = w.map(|(w, _)| w.to_owned());
        self.graph.add(
            name,
            Op::Norm(Norm { kind: NormKind::Rms, eps: Some(eps), w, b: None, mean: None, var: None }),
            &[x],
        )
    }

    /// A reduction of the last axis that keeps it.
    pub(crate) fn reduce(&mut self, name: &str, function: ReduceFn, x: NodeId) -> NodeId {
        self.graph.add(name, Op::Reduce(Reduce { function, axis: -1, keep: true }), &[x])
    }

    /// A rearrangement.
    pub(crate) fn shape(&mut self, name: &str, shape: Shape, operands: &[NodeId]) -> NodeId {
        self.graph.add(name, Op::Shape(shape), operands)
    }

    /// Scores plus a selection bias in 32 bits that stands under `{p}NAME`.
    pub(crate) fn biased(&mut self, scores: NodeId, name: &str, experts: u64) -> NodeId {
        self.weight(name, DType::F32, &[experts], Source::plain(format!("{{p}}{name}")));
        self.adjust("choice", Adjust { add: Some(name.to_owned()), ..no_change() }, &[scores])
    }

    /// Changed scores.
    pub(crate) fn adjust(&mut self, name: &str, adjust: Adjust, operands: &[NodeId]) -> NodeId {
        self.graph.add(name, Op::Adjust(adjust), operands)
    }

    /// A choice of experts.
    pub(crate) fn select(&mut self, scores: NodeId, rule: SelectRule) -> NodeId {
        self.graph.add("chosen", Op::Select(Select::from(rule)), &[scores])
    }

    /// The `k` best.
    pub(crate) fn topk(&mut self, scores: NodeId, k: u64) -> NodeId {
        self.select(scores, SelectRule::Topk { k })
    }

    /// Weights of the chosen slots.
    pub(crate) fn weigh(&mut self, route: NodeId, scores: NodeId, weigh: Weigh) -> NodeId {
        self.graph.add("route", Op::Weigh(weigh), &[route, scores])
    }

    /// Weights of the chosen slots, cast to the model's type (`w:dt`).
    pub(crate) fn weigh_rounded(&mut self, route: NodeId, scores: NodeId, weigh: Weigh) -> NodeId {
        let route = self.weigh(route, scores, weigh);
        self.rounded(route)
    }

    /// Declares the matrices of gated experts as `NAME.gate_proj` and so on, and composes them.
    pub(crate) fn glu(&mut self, name: &str, glu: Glu, shape: Shape2) -> Ffn {
        let Shape2 { input, inner, act } = shape;
        self.quantised(&format!("{name}.gate_proj"), &[inner, input], glu.gate);
        self.quantised(&format!("{name}.up_proj"), &[inner, input], glu.up);
        self.quantised(&format!("{name}.down_proj"), &[input, inner], glu.down);
        Ffn {
            gate: Some(WeightSpec::Plain(format!("{name}.gate_proj"))),
            down: Some(WeightSpec::Plain(format!("{name}.down_proj"))),
            act: Some(act),
            ..ungated(&format!("{name}.up_proj"))
        }
    }

    /// All experts of a route as one bank of gated experts.
    pub(crate) fn glu_bank(&mut self, experts: u64, glu: Glu, shape: Shape2) -> Vec<BankPart> {
        let ffn = self.glu("experts.{e}", glu, shape);
        bank(experts, ffn)
    }

    /// Rows of `x` through their experts and back, weighted.
    pub(crate) fn routed(&mut self, x: NodeId, route: NodeId, bank: Vec<BankPart>) -> NodeId {
        let rows = self.graph.add("rows", Op::Dispatch(Dispatch { repeat: 1, weighted: false }), &[x, route]);
        let done = self.graph.add("done", Op::Experts(Experts { bank }), &[rows]);
        self.rounded(done);
        let out = self.graph.add("routed", Op::Combine(Combine { repeat: 1, weighted: true }), &[done, route]);
        self.rounded(out)
    }

    /// A dense network on a value: shared experts.
    pub(crate) fn ffn(&mut self, name: &str, x: NodeId, ffn: Ffn) -> NodeId {
        let out = self.graph.add(name, Op::Ffn(Box::new(ffn)), &[x]);
        self.rounded(out)
    }

    /// A gated shared expert with weights under `{p}DIR.gate_proj.weight` and so on.
    pub(crate) fn shared(&mut self, dir: &str, inner: u64, act: UnaryFn) -> NodeId {
        let shape = Shape2 { input: self.hidden, inner, act };
        let ffn = self.glu(dir, crate::layout::proj(&format!("{{p}}{dir}")), shape);
        self.ffn("shared", self.x, ffn)
    }

    /// The sum of two values, rounded to the model's type.
    pub(crate) fn add(&mut self, a: NodeId, b: NodeId) -> NodeId {
        let sum = self.binary("sum", BinaryFn::Add, a, b);
        self.rounded(sum)
    }

    /// Declares the results of a block.
    pub(crate) fn finish(mut self, output: NodeId, route: NodeId, logits: Option<NodeId>) -> MoeLayer {
        self.graph.output("output", output, Part::Whole);
        self.graph.output("topk_indices", route, Part::Idx);
        self.graph.output("topk_weights", route, Part::Weights);
        if let Some(logits) = logits {
            self.graph.output("router_logits", logits, Part::Whole);
        }
        MoeLayer { graph: self.graph, prefix: self.prefix }
    }
}

/// A finished block of one layer.
pub(crate) struct MoeLayer {
    /// What it computes.
    pub(crate) graph: Graph,
    /// Where its weights stand.
    pub(crate) prefix: String,
}

/// A network without gate, to be completed.
pub(crate) fn ungated(up: &str) -> Ffn {
    Ffn {
        gate: None,
        gate_bias: None,
        up: WeightSpec::Plain(up.to_owned()),
        up_bias: None,
        down: None,
        down_bias: None,
        act: None,
        packed: false,
        a8: false,
        limit: None,
        limit_on: LimitOn::Gate,
        alpha: None,
        up_add: 0.0,
    }
}

/// One part for all experts.
pub(crate) fn bank(experts: u64, ffn: Ffn) -> Vec<BankPart> {
    vec![BankPart { ids: [0, experts], base_id: 0, numbers: Vec::new(), kind: PartKind::Ffn(Box::new(ffn)) }]
}

/// Scores as they are; families change single fields.
pub(crate) const fn no_change() -> Adjust {
    Adjust {
        add: None,
        class_experts: None,
        mask: false,
        off: Vec::new(),
        on: Vec::new(),
        causal_block: None,
        tokens: None,
    }
}
