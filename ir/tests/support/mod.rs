//! Random graphs that type, verify and run, and weights for them.
#![allow(dead_code, reason = "each test uses a part")]

use indexmap::IndexMap;
use moec_ir::{
    DType, Dim, Extent, Graph, NodeId, Op, Part, Source, TensorType, Type, Weight, WeightName,
    interp::{Array, InterpError, WeightIndex, Weights},
};
use serde_json::{Value, json};

/// A small generator; the seed decides everything.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ (self.0 >> 33);
        x.wrapping_mul(0xff51_afd7_ed55_8ccd) >> 11
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(crate) fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[usize::try_from(self.below(items.len() as u64)).unwrap()].clone()
    }

    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() % 2_000_001) as f64 / 1e6 - 1.0
    }
}

/// Weights that follow from their name.
pub(crate) struct Invented;

impl Weights for Invented {
    fn get(&self, name: &WeightName, weight: &Weight, index: WeightIndex) -> Result<Array, InterpError> {
        let key = index.apply(name);
        let mut random = Random(key.bytes().fold(7, |h, b| h * 31 + u64::from(b)));
        let entry = usize::try_from(index.expert.unwrap_or(0)).unwrap();
        let shape: Vec<usize> = weight.shape.iter().map(|x| usize::try_from(x.of(entry).unwrap()).unwrap()).collect();
        let data = (0..shape.iter().product()).map(|_| random.unit()).collect();
        Ok(Array::f64(shape, data))
    }
}

pub(crate) struct Builder {
    pub(crate) graph: Graph,
    pub(crate) random: Random,
    values: Vec<(NodeId, u64)>,
    count: u64,
}

impl Builder {
    fn weight(&mut self, stem: &str, shape: Vec<Extent>) -> String {
        self.count += 1;
        let name = format!("{stem}{}", self.count);
        let mut source = Source::plain(name.clone());
        if self.random.below(4) == 0 {
            source = Source {
                tensor: format!("{{p}}{name}"),
                packing: self.random.pick(&[
                    moec_ir::Packing::Plain,
                    moec_ir::Packing::Fp8Block { scale: "s \"q\"".into(), block: [128, 128] },
                ]),
                view: self.random.pick(&[vec![], vec![moec_ir::View::Expert, moec_ir::View::Transpose]]),
            };
        }
        self.graph.weights.insert(name.clone(), Weight { dtype: DType::Bf16, shape, source });
        name
    }

    fn matrix(&mut self, out: u64, input: u64) -> String {
        self.weight("w.", vec![Extent::Fixed(out), Extent::Fixed(input)])
    }

    pub(crate) fn add(&mut self, name: &str, op: &str, attributes: Value, operands: &[NodeId]) -> NodeId {
        let op = Op::from_attributes(op, attributes).unwrap().unwrap();
        let numbers = op.name() != "select";
        let id = self.graph.add(name, op, operands);
        if self.random.below(4) == 0 && numbers {
            self.graph.set_round(id, Some(DType::Bf16));
        }
        id
    }

    fn value(&mut self) -> (NodeId, u64) {
        let values = self.values.clone();
        self.random.pick(&values)
    }

    fn step(&mut self) {
        let (x, width) = self.value();
        let (id, width) = match self.random.below(9) {
            0 => {
                let out = 1 + self.random.below(6);
                let w = self.matrix(out, width);
                (self.add("l", "linear", json!({"w": w}), &[x]), out)
            }
            1 => {
                let f = self.random.pick(&["relu", "silu", "gelu", "sigmoid", "tanh", "square", "abs"]);
                (self.add("u", "unary", json!({"fn": f}), &[x]), width)
            }
            2 => {
                let c = self.random.unit();
                (self.add("c", "binary", json!({"fn": "mul", "c": c}), &[x]), width)
            }
            3 => (self.add("sum with \"quotes\"", "binary", json!({"fn": "add"}), &[x, x]), width),
            4 => (self.add("s", "softmax", json!({"temp": 0.5}), &[x]), width),
            5 => (self.add("n.1", "norm", json!({"kind": "rms", "eps": 1e-20}), &[x]), width),
            6 => {
                let (y, other) = self.value();
                (self.add("cat.idx", "shape", json!({"fn": "concat", "axis": -1}), &[x, y]), width + other)
            }
            7 => {
                let from = self.random.below(width);
                let range = json!({"fn": "slice", "axis": 1, "range": [from, width]});
                (self.add("cut", "shape", range, &[x]), width - from)
            }
            _ => self.mixture(x, width),
        };
        if width <= 16 {
            self.values.push((id, width));
        }
    }

    fn mixture(&mut self, x: NodeId, width: u64) -> (NodeId, u64) {
        let experts = 2 + self.random.below(4);
        let k = 1 + self.random.below(experts);
        let gate = self.matrix(experts, width);
        let l = self.add("logits", "linear", json!({"w": gate}), &[x]);
        let s = self.add("", "softmax", json!({}), &[l]);
        let q = self.add("q", "select", json!({"rule": "topk", "k": k}), &[s]);
        let r = self.add("r", "weigh", json!({"norm": "sum", "eps": 1e-9}), &[q, s]);
        let d = self.add("d", "dispatch", json!({}), &[x, r]);
        let inner = Extent::PerExpert((0..experts).map(|_| self.random.below(5)).collect());
        let (out, last) = (1 + self.random.below(5), experts - 1);
        let up = self.weight("e.{e}.up", vec![inner.clone(), Extent::Fixed(width)]);
        let down = self.weight("e.{e}.down", vec![Extent::Fixed(out), inner]);
        let bank = json!([
            {"ids": [0, last], "kind": "ffn", "act": "silu", "up": up, "down": down},
            {"ids": [last, experts], "kind": "zero"},
        ]);
        let e = self.add("e", "experts", json!({"bank": bank}), &[d]);
        (self.add("y", "combine", json!({}), &[e, r]), out)
    }
}

/// A graph of about `steps` nodes, and inputs for it.
pub(crate) fn random_graph(seed: u64, steps: u64) -> (Graph, IndexMap<String, Array>) {
    let mut builder = Builder { graph: Graph::new("random"), random: Random(seed), values: Vec::new(), count: 0 };
    let width = 1 + builder.random.below(5);
    let ty = TensorType { dtype: DType::F32, shape: vec![Dim::Tokens, Dim::Const(width)] };
    let x = builder.graph.add("x", Op::Input(moec_ir::ops::Input { name: "x".into(), ty }), &[]);
    builder.values.push((x, width));
    for _ in 0..steps {
        builder.step();
    }
    let last = builder.values[builder.values.len() - 1].0;
    builder.graph.output("output", last, Part::Whole);
    let all: Vec<NodeId> = builder.graph.ids();
    for _ in 0..2 {
        let extra = builder.random.pick(&all);
        builder.graph.infer().unwrap();
        let part = match builder.graph.node(extra).ty {
            Some(Type::Tensor(_)) => Part::Whole,
            Some(Type::Route(_)) => Part::Idx,
            _ => continue,
        };
        let name = format!("more {}", builder.graph.outputs.len());
        builder.graph.output(name, extra, part);
    }
    builder.graph.infer().unwrap();
    let tokens = usize::try_from(builder.random.below(4)).unwrap();
    let columns = usize::try_from(width).unwrap();
    let data = (0..tokens * columns).map(|_| builder.random.unit()).collect();
    let inputs = IndexMap::from([("x".to_owned(), Array::f64(vec![tokens, columns], data))]);
    (builder.graph, inputs)
}
