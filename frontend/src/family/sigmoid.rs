//! The maths of sigmoid routers without groups: selection with a bias, weights without it.
//!
//! MiniMax-M2 and M3, Step-3, Hunyuan 3, AFMoE, Laguna and LFM2 differ in a handful of choices,
//! which [`Sigmoid`] names.

use crate::{
    block::{Block, MoeLayer, RAW, Shape2, bank},
    layout::Glu,
};
use moec_ir::{
    NodeId,
    ops::{BinaryFn, Ffn, UnaryFn, Weigh, WeighNorm},
};

/// A sigmoid router with its experts.
pub(crate) struct Sigmoid<'a> {
    /// Routed experts.
    pub(crate) experts: u64,
    /// Experts of a token.
    pub(crate) top_k: u64,
    /// Inner width and activation of the experts.
    pub(crate) shape: Shape2,
    /// Router weight, under the prefix.
    pub(crate) router: &'a str,
    /// Selection bias, under the prefix.
    pub(crate) bias: Option<&'a str>,
    /// Logits are computed in 32 bits, instead of being rounded to the model's type.
    pub(crate) logits_f32: bool,
    /// Scores are rounded to the model's type.
    pub(crate) scores_rounded: bool,
    /// `c tanh(L / c)` before the sigmoid.
    pub(crate) softcap: Option<f64>,
    /// Epsilon of the renormalisation; none without.
    pub(crate) renormalise: Option<f64>,
    /// Factor of the weights.
    pub(crate) scale: f64,
    /// Weights are cast to the model's type.
    pub(crate) weights_rounded: bool,
    /// Factor of the routed output.
    pub(crate) output_scale: Option<f64>,
    /// Routed and shared outputs are added in 32 bits.
    pub(crate) add_f32: bool,
    /// Where the experts are stored.
    pub(crate) glu: Glu,
    /// The shared network.
    pub(crate) shared: Option<Shared>,
}

/// A shared network beside the experts.
pub(crate) struct Shared {
    /// Name of its weights in the graph.
    pub(crate) name: &'static str,
    /// Where it is stored.
    pub(crate) glu: Glu,
    /// Inner width.
    pub(crate) inner: u64,
}

impl Sigmoid<'_> {
    /// The block; `routed` and `shared` adjust the networks of the experts.
    pub(crate) fn block(&self, mut b: Block, routed: impl Fn(Ffn) -> Ffn, shared: impl Fn(Ffn) -> Ffn) -> MoeLayer {
        let mut logits = b.logits_f32(self.router, self.experts);
        if !self.logits_f32 {
            b.rounded(logits);
        }
        if let Some(c) = self.softcap {
            let small = b.constant("capped", BinaryFn::Div, logits, c);
            let bent = b.unary("capped", UnaryFn::Tanh, small);
            logits = b.constant("capped", BinaryFn::Mul, bent, c);
        }
        let route = self.route(&mut b, logits);
        let ffn = b.glu("experts.{e}", self.glu.clone(), self.shape);
        let mut out = b.routed(b.x, route, bank(self.experts, routed(ffn)));
        if let Some(scale) = self.output_scale {
            out = b.constant("scaled", BinaryFn::Mul, out, scale);
            b.rounded(out);
        }
        if let Some(network) = &self.shared {
            let shape = Shape2 { inner: network.inner, ..self.shape };
            let ffn = b.glu(network.name, network.glu.clone(), shape);
            let added = b.ffn("shared", b.x, shared(ffn));
            if self.add_f32 {
                b.graph.node_mut(out).round = None;
            }
            out = b.add(out, added);
        }
        b.finish(out, route, Some(logits))
    }

    fn route(&self, b: &mut Block, logits: NodeId) -> NodeId {
        let scores = b.unary("scores", UnaryFn::Sigmoid, logits);
        if self.scores_rounded {
            b.rounded(scores);
        }
        let choice = match self.bias {
            Some(bias) => b.biased(scores, bias, self.experts),
            None => scores,
        };
        let chosen = b.topk(choice, self.top_k);
        let norm = self.renormalise.map(|_| WeighNorm::Sum);
        let eps = self.renormalise.unwrap_or(0.0);
        let route = b.weigh(chosen, scores, Weigh { norm, eps, scale: self.scale, ..RAW });
        if self.weights_rounded { b.rounded(route) } else { route }
    }
}
