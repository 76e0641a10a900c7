//! Layers put together in tests: graph files from parts.

use moec_ir::{
    Graph,
    json::{Signature, read_value},
};
use serde_json::{Map, Value, json};

/// A graph file under construction.
#[derive(Clone, Debug, Default)]
pub struct Form {
    inputs: Map<String, Value>,
    tensors: Map<String, Value>,
    nodes: Vec<Value>,
    outputs: Map<String, Value>,
    batch_dependent: bool,
}

/// Hidden width of the standard layer.
pub const WIDTH: u64 = 128;
/// Inner width of its experts.
pub const INNER: u64 = 96;
/// Its experts.
pub const EXPERTS: u64 = 8;
/// Experts per token.
pub const TOP_K: u64 = 2;

impl Form {
    /// A form with the input `x` of this width.
    pub fn new(width: u64) -> Self {
        Self::default().input("x", "f32", &json!(["T", width]))
    }

    /// Declares an input.
    #[must_use]
    pub fn input(mut self, name: &str, dtype: &str, shape: &Value) -> Self {
        self.inputs.insert(name.into(), json!({"dtype": dtype, "shape": shape}));
        self
    }

    /// Declares a weight; a size may be a list with one entry per expert.
    #[must_use]
    pub fn tensor(self, name: &str, shape: Value) -> Self {
        self.typed(name, "f32", shape)
    }

    /// Declares a weight of another type.
    #[must_use]
    pub fn typed(mut self, name: &str, dtype: &str, shape: Value) -> Self {
        self.tensors.insert(name.into(), json!({"dtype": dtype, "shape": shape}));
        self
    }

    /// Adds an operation: id, name, operands, attributes.
    #[must_use]
    pub fn node(mut self, id: &str, op: &str, operands: &[&str], attributes: Value) -> Self {
        let mut node = json!({"id": id, "op": op});
        if !operands.is_empty() {
            node["in"] = json!(operands);
        }
        if let (Some(node), Value::Object(more)) = (node.as_object_mut(), attributes) {
            node.extend(more);
        }
        self.nodes.push(node);
        self
    }

    /// Names a result.
    #[must_use]
    pub fn output(mut self, name: &str, source: &str) -> Self {
        self.outputs.insert(name.into(), json!(source));
        self
    }

    /// Number of nodes so far.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Makes the nodes from `first` on the body of a loop.
    #[must_use]
    pub fn looped(mut self, first: usize, id: &str, [carry, next]: [&str; 2], passes: u64) -> Self {
        let body = self.nodes.split_off(first);
        self.node(id, "loop", &[], json!({"n": passes, "carry": carry, "next": next, "body": body}))
    }

    /// Results may depend on the batch.
    #[must_use]
    pub fn batch(mut self) -> Self {
        self.batch_dependent = true;
        self
    }

    /// A router `linear > softmax > select topk > weigh norm sum`: the route is `r`, the scores are `s`.
    #[must_use]
    pub fn router(self, experts: u64, top_k: u64, width: u64) -> Self {
        self.tensor("router", json!([experts, width]))
            .node("l", "linear", &["x"], json!({"w": "router"}))
            .node("s", "softmax", &["l"], json!({}))
            .node("q", "select", &["s"], json!({"rule": "topk", "k": top_k}))
            .node("r", "weigh", &["q", "s"], json!({"norm": "sum"}))
    }

    /// `dispatch > experts > combine` of `x` by `r`; the result is `y`, an output.
    #[must_use]
    pub fn mixture(self, bank: Value) -> Self {
        self.node("d", "dispatch", &["x", "r"], json!({}))
            .node("e", "experts", &["d"], json!({"bank": bank}))
            .node("y", "combine", &["e", "r"], json!({}))
            .output("output", "y")
    }

    /// Weights of gated experts of these sizes.
    #[must_use]
    pub fn networks(self, width: u64, inner: Value) -> Self {
        self.tensor("gate.{e}", json!([inner, width]))
            .tensor("up.{e}", json!([inner, width]))
            .tensor("down.{e}", json!([width, inner]))
    }

    /// The graph file.
    pub fn json(&self) -> Value {
        let mut file = json!({"format": "moec-graph-1", "name": "form", "inputs": self.inputs, "tensors": self.tensors,
            "nodes": self.nodes, "outputs": self.outputs});
        if self.batch_dependent {
            file["batch_dependent"] = json!(true);
        }
        file
    }

    /// The graph.
    ///
    /// # Panics
    /// When the parts do not make one.
    pub fn graph(&self) -> Graph {
        let graph = read_value(&self.json(), &Signature::default());
        let graph = graph.unwrap_or_else(|e| panic!("{:?}", e.iter().map(|d| &d.message).collect::<Vec<_>>()));
        let found: Vec<String> = moec_ir::verify(&graph)
            .into_iter()
            .filter(|d| d.severity == moec_ir::Severity::Error)
            .map(|d| d.message)
            .collect();
        assert!(found.is_empty(), "{found:?}");
        graph
    }
}

/// Gated experts `ids`.
pub fn networks(ids: [u64; 2]) -> Value {
    json!({"ids": ids, "kind": "ffn", "act": "silu", "gate": "gate.{e}", "up": "up.{e}", "down": "down.{e}"})
}

/// The plain layer: a router and gated experts.
pub fn plain() -> Form {
    Form::new(WIDTH)
        .router(EXPERTS, TOP_K, WIDTH)
        .networks(WIDTH, json!(INNER))
        .mixture(json!([networks([0, EXPERTS])]))
}
