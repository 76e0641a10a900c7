//! What a config says: the checked model, ready to compile and to plan.

use crate::block::MoeLayer;
use moec_ir::{
    DType, Diagnostic, Extent, Graph, Op, Type, WeightName, WeightSpec,
    ops::{BankPart, PartKind},
};

/// A model as its config describes it.
#[derive(Clone, Debug)]
pub struct Model {
    /// Name for symbols and files; a C identifier.
    pub name: String,
    /// The model type, as the config spells it; `graph` for a graph file.
    pub family: String,
    /// Type of activations and weights.
    pub dtype: DType,
    /// Width of the residual stream.
    pub hidden: u64,
    /// All layers, in order; for encoder-decoder models the encoder's first.
    pub layers: Vec<Layer>,
    /// The distinct mixture blocks.
    pub forms: Vec<Form>,
    /// The whole model as described parts.
    pub outline: Graph,
    /// Shapes outside the mixture, for planning.
    pub facts: Facts,
    /// Findings that do not refuse the model.
    pub warnings: Vec<Diagnostic>,
}

/// A layer of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Whether it is a mixture.
    pub kind: LayerKind,
}

/// Kinds of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// No mixture.
    Dense,
    /// A mixture block.
    Moe {
        /// Index into [`Model::forms`].
        form: usize,
    },
}

/// A mixture block that several layers share.
#[derive(Clone, Debug)]
pub struct Form {
    /// What the block computes.
    pub graph: Graph,
    /// Layers that use it.
    pub layers: Vec<u64>,
    /// Prefix of their tensors, one for each layer.
    pub prefixes: Vec<String>,
}

/// Shapes outside the mixture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Attention heads.
    pub heads: Option<u64>,
    /// Key-value heads; the same as heads when the config is silent.
    pub kv_heads: Option<u64>,
    /// Width of a head.
    pub head_dim: Option<u64>,
    /// Latent attention, where the model has it.
    pub latent: Option<LatentAttention>,
    /// Rows of the embedding.
    pub vocab: Option<u64>,
    /// Inner width of dense layers.
    pub dense_intermediate: Option<u64>,
    /// Whether embedding and head share their weights.
    pub tied_embeddings: bool,
}

/// Ranks and widths of latent attention (MLA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentAttention {
    /// Rank of the query projection; absent when it is a full matrix.
    pub query_rank: Option<u64>,
    /// Rank of keys and values, which is what the cache holds.
    pub kv_rank: u64,
    /// Head width without position.
    pub nope: u64,
    /// Head width with position.
    pub rope: u64,
    /// Head width of values.
    pub value: u64,
}

/// Sizes of a mixture block, read off its graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormFacts {
    /// Experts of the route.
    pub experts: u64,
    /// Slots of a token.
    pub top_k: u64,
    /// Input width of the experts.
    pub expert_input: u64,
    /// Inner width of the widest expert.
    pub expert_inner: u64,
    /// Inner widths of shared experts, summed.
    pub shared_inner: u64,
    /// Weights of one expert (of the widest).
    pub expert_parameters: u64,
    /// All weights of the block.
    pub parameters: u64,
    /// Multiply-adds per token, times two.
    pub flops_per_token: u64,
}

impl Model {
    /// The form and layer whose prefix this is, as in the `layer_prefix` of a reference case.
    pub fn block_of(&self, prefix: &str) -> Option<(usize, u64)> {
        self.forms
            .iter()
            .enumerate()
            .find_map(|(f, form)| form.prefixes.iter().position(|p| p == prefix).map(|at| (f, form.layers[at])))
    }
}

impl Form {
    /// Prefix of the tensors of a layer of this form.
    pub fn prefix(&self, layer: u64) -> Option<&str> {
        let at = self.layers.iter().position(|l| *l == layer)?;
        self.prefixes.get(at).map(String::as_str)
    }

    /// Sizes of the block.
    pub fn facts(&self) -> FormFacts {
        let mut facts = FormFacts::default();
        let mut in_bank: Vec<&WeightName> = Vec::new();
        for id in self.graph.ids() {
            let node = self.graph.node(id);
            if let Op::Ffn(ffn) = &node.op {
                let [inner, _] = self.sides(&ffn.up, 0);
                facts.shared_inner = facts.shared_inner.saturating_add(inner);
            }
            let Op::Experts(experts) = &node.op else { continue };
            if let Some(Type::Ragged(rows)) = &node.ty {
                facts.experts = facts.experts.max(rows.route.experts);
                facts.top_k = facts.top_k.max(rows.route.slots);
            }
            for part in &experts.bank {
                let each = self.part(part, &mut facts);
                facts.expert_parameters = facts.expert_parameters.max(each);
                let count = part.ids[1].saturating_sub(part.ids[0]);
                facts.parameters = facts.parameters.saturating_add(each.saturating_mul(count));
                in_bank.extend(part_names(&part.kind));
            }
        }
        let rest = self.graph.weights.keys().filter(|n| !in_bank.contains(n));
        let rest = rest.map(|n| self.size(n)).fold(0, u64::saturating_add);
        facts.parameters = facts.parameters.saturating_add(rest);
        let active = facts.top_k.saturating_mul(facts.expert_parameters);
        facts.flops_per_token = rest.saturating_add(active).saturating_mul(2);
        facts
    }

    /// Weights of one expert of a part; its widths go into `facts`.
    fn part(&self, part: &BankPart, facts: &mut FormFacts) -> u64 {
        match &part.kind {
            PartKind::Neuron(n) => {
                facts.expert_input = self.side(Some(&n.u), 1);
                facts.expert_inner = facts.expert_inner.max(1);
                return self.side(Some(&n.u), 1).saturating_add(self.side(Some(&n.v), 1));
            }
            PartKind::Ffn(ffn) => {
                for id in part.ids[0]..part.ids[1] {
                    let [inner, input] = self.sides(&ffn.up, part.number(id));
                    facts.expert_inner = facts.expert_inner.max(inner);
                    facts.expert_input = input;
                }
            }
            PartKind::Linear(_)
            | PartKind::Film(_)
            | PartKind::Const { .. }
            | PartKind::Identity {}
            | PartKind::Zero {} => {}
        }
        part_names(&part.kind).iter().map(|n| self.size(n)).fold(0, u64::saturating_add)
    }

    /// Elements of a weight; of one expert's, if it depends on the expert.
    fn size(&self, name: &WeightName) -> u64 {
        let shape = self.graph.weights.get(name).map_or(&[] as &[Extent], |w| &w.shape);
        shape.iter().fold(1u64, |n, e| n.saturating_mul(e.max()))
    }

    /// Rows and columns of a matrix of expert `e` of its part.
    fn sides(&self, spec: &WeightSpec, e: u64) -> [u64; 2] {
        let shape = spec.shape_in(&self.graph.weights, e);
        shape.and_then(|s| <[u64; 2]>::try_from(s).ok()).unwrap_or_default()
    }

    /// A side of a weight.
    fn side(&self, name: Option<&WeightName>, axis: usize) -> u64 {
        name.and_then(|n| self.graph.weights.get(n)).and_then(|w| w.shape.get(axis)).map_or(0, Extent::max)
    }

    /// A form of a single layer.
    pub(crate) fn of(layer: u64, block: MoeLayer) -> Self {
        Self { graph: block.graph, layers: vec![layer], prefixes: vec![block.prefix] }
    }
}

/// Names of all weights of a bank part.
pub(crate) fn part_names(kind: &PartKind) -> Vec<&WeightName> {
    match kind {
        PartKind::Ffn(ffn) => {
            let specs = [&ffn.gate, &ffn.gate_bias, &ffn.up_bias, &ffn.down, &ffn.down_bias];
            std::iter::once(&ffn.up).chain(specs.into_iter().flatten()).flat_map(|s| s.names()).collect()
        }
        PartKind::Linear(l) => std::iter::once(&l.w).chain(&l.bias).flat_map(|s| s.names()).collect(),
        PartKind::Film(f) => [Some(&f.mul), f.mul_bias.as_ref(), Some(&f.add), f.add_bias.as_ref()]
            .into_iter()
            .flatten()
            .flat_map(|s| s.names())
            .collect(),
        PartKind::Const { value } => vec![value],
        PartKind::Neuron(n) => vec![&n.u, &n.v],
        PartKind::Identity {} | PartKind::Zero {} => Vec::new(),
    }
}
