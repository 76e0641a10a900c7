//! Graph JSON to graph.

use super::{About, FORMAT, Signature, TensorShape, beyond, named_operands, strict::Strict};
use crate::{
    DType, Diagnostic, Graph, NodeId, Op, Part, TensorType, Type, WeightSpec, codes,
    infer::{OpError, OpResult},
    nearest::nearest,
    ops::{BankPart, Input, PartKind},
};
use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// Nodes after unrolling; more is taken for a mistake in a loop count.
const MAX_NODES: usize = 2_000_000;
/// Nested loops.
const MAX_DEPTH: usize = 64;

/// Reads graph JSON. Types of all values are set; [`crate::verify`] checks the rest.
///
/// # Errors
/// What is wrong, with the node's id.
pub fn read_graph(text: &str, signature: &Signature) -> Result<Graph, Vec<Diagnostic>> {
    let Strict(value) = serde_json::from_str(text)
        .map_err(|e| vec![Diagnostic::error(codes::JSON, format!("the text is not JSON: {e}"))])?;
    read_value(&value, signature)
}

/// As [`read_graph`], from JSON that is parsed already.
///
/// # Errors
/// As [`read_graph`].
pub fn read_value(value: &Value, signature: &Signature) -> Result<Graph, Vec<Diagnostic>> {
    let file = File::deserialize(value)
        .map_err(|e| vec![Diagnostic::error(codes::JSON, format!("the JSON is no graph: {e}"))])?;
    if file.format != FORMAT {
        let text = format!("the format is `{}`, `{FORMAT}` is needed", file.format);
        return Err(vec![Diagnostic::error(codes::JSON, text)]);
    }
    let mut signature = signature.clone();
    signature.tensors.extend(file.tensors);
    signature.inputs.extend(file.inputs);
    let mut reader = Reader {
        graph: Graph::new(file.name.unwrap_or_else(|| "graph".to_owned())),
        signature: &signature,
        values: IndexMap::new(),
        used: IndexMap::new(),
        passes: 0,
    };
    reader.graph.batch_dependent = file.batch_dependent;
    reader.add_inputs(&file.nodes, &file.outputs);
    reader.nodes(&file.nodes, 0, None)?;
    reader.add_weights()?;
    let mut graph = reader.finish(&file.outputs)?;
    graph.infer()?;
    rounds(&graph)?;
    bare_routes(&mut graph, &file.outputs);
    Ok(graph)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: String,
    #[serde(default)]
    name: Option<String>,
    #[serde(default, rename = "about")]
    _about: Option<About>,
    #[serde(default)]
    batch_dependent: bool,
    nodes: Vec<Map<String, Value>>,
    outputs: IndexMap<String, String>,
    #[serde(default)]
    tensors: IndexMap<String, TensorShape>,
    #[serde(default)]
    inputs: IndexMap<String, TensorType>,
}

/// The graph so far, and what names stand for at this point.
struct Reader<'a> {
    graph: Graph,
    signature: &'a Signature,
    values: IndexMap<String, NodeId>,
    /// Experts or groups that each weight is used for, in order of first use, and the first user.
    used: IndexMap<String, (BTreeSet<u64>, String)>,
    /// Passes of loops so far.
    passes: usize,
}

type Findings<T> = Result<T, Vec<Diagnostic>>;

fn wrong(error: OpError, id: &str, op: &str) -> Vec<Diagnostic> {
    vec![error.at(id, op)]
}

impl Reader<'_> {
    /// Inputs of the signature that the graph names, in the order of the signature.
    fn add_inputs(&mut self, nodes: &[Map<String, Value>], outputs: &IndexMap<String, String>) {
        let mut named = BTreeSet::new();
        for node in nodes {
            strings(&Value::Object(node.clone()), &mut named);
        }
        named.extend(outputs.values().cloned());
        for (name, ty) in &self.signature.inputs {
            if named.contains(name) {
                let op = Op::Input(Input { name: name.clone(), ty: ty.clone() });
                let id = self.graph.add(name.clone(), op, &[]);
                self.values.insert(name.clone(), id);
            }
        }
    }

    /// Nodes in order; `pass` is the loop iteration, which marks the names.
    fn nodes(&mut self, nodes: &[Map<String, Value>], depth: usize, pass: Option<&str>) -> Findings<()> {
        let mut seen = BTreeSet::new();
        for node in nodes {
            let id = text(node, "id").map_err(|m| wrong(OpError::new(codes::JSON, m), "?", "?"))?;
            let op = text(node, "op").map_err(|m| wrong(OpError::new(codes::JSON, m), id, "?"))?;
            let twice = pass.is_none() && self.values.contains_key(id);
            if !seen.insert(id) || twice {
                return Err(wrong(OpError::new(codes::NAME, "the name is taken"), id, op));
            }
            if self.graph.len() >= MAX_NODES {
                let text = format!("loops unroll to more than {MAX_NODES} nodes");
                return Err(wrong(OpError::new(codes::VALUE, text), id, op));
            }
            let value = if op == "loop" {
                self.unroll(node, id, depth, pass)?
            } else {
                self.node(node, id, op, pass).map_err(|e| wrong(e, id, op))?
            };
            self.values.insert(id.to_owned(), value);
        }
        Ok(())
    }

    /// The body n times; after every pass `carry` is `next`.
    fn unroll(&mut self, node: &Map<String, Value>, id: &str, depth: usize, pass: Option<&str>) -> Findings<NodeId> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Loop {
            #[serde(rename = "id")]
            _id: String,
            #[serde(rename = "op")]
            _op: String,
            n: u64,
            carry: String,
            next: String,
            body: Vec<Map<String, Value>>,
        }
        let fail = |code, message: String| wrong(OpError::new(code, message), id, "loop");
        if depth >= MAX_DEPTH {
            return Err(fail(codes::DEPTH, format!("more than {MAX_DEPTH} nested loops")));
        }
        let it = Loop::deserialize(&Value::Object(node.clone())).map_err(|e| fail(codes::ATTRIBUTE, e.to_string()))?;
        self.lookup(&it.carry).map_err(|e| wrong(e, id, "loop"))?;
        for i in 0..it.n {
            self.passes += 1;
            if self.passes > MAX_NODES {
                return Err(fail(codes::VALUE, format!("loops have more than {MAX_NODES} passes")));
            }
            let i = i.to_string();
            let body: Vec<Map<String, Value>> = it.body.iter().map(|m| numbered(m, &i)).collect();
            let mark = pass.map_or_else(|| i.clone(), |outer| format!("{outer}_{i}"));
            self.nodes(&body, depth + 1, Some(&mark))?;
            let next = self.lookup(&it.next).map_err(|e| wrong(e, id, "loop"))?;
            self.values.insert(it.carry.clone(), next);
        }
        self.lookup(&it.carry).map_err(|e| wrong(e, id, "loop"))
    }

    fn lookup(&self, name: &str) -> OpResult<NodeId> {
        if let Some(id) = self.values.get(name) {
            return Ok(*id);
        }
        let error = OpError::new(codes::NAME, format!("`{name}` is no earlier node and no input"));
        Err(match nearest(name, self.values.keys().map(String::as_str)) {
            Some(near) => error.help(format!("the nearest name is `{near}`")),
            None => error.help("inputs need a type in `inputs`"),
        })
    }

    fn node(&mut self, node: &Map<String, Value>, id: &str, op: &str, pass: Option<&str>) -> OpResult<NodeId> {
        if op == "input" || !Op::NAMES.contains(&op) {
            let error = OpError::new(codes::UNKNOWN_OP, format!("there is no operation `{op}`"));
            if let Some((why, instead)) = beyond::operation(op) {
                return Err(OpError::new(codes::BEYOND, format!("{}: {why}", error.message)).help(instead));
            }
            return Err(match nearest(op, Op::NAMES.iter().copied().chain(["loop"])) {
                Some(near) => error.help(format!("the nearest name is `{near}`")),
                None => error,
            });
        }
        for (key, value) in node {
            if let Some((key, why, instead)) = beyond::attribute(op, key, value) {
                return Err(OpError::new(codes::BEYOND, format!("`{key}`: {why}")).help(instead));
            }
            if has_null(value) {
                return Err(attribute(format!("`{key}` is null or holds a null, leave it out instead")));
            }
        }
        let mut attributes = node.clone();
        attributes.retain(|key, _| !matches!(key.as_str(), "id" | "op" | "in" | "round"));
        let mut operands = self.operands(node)?;
        if op == "limit" && attributes.get("priority").and_then(Value::as_str) != Some("score") {
            // Scores that no priority looks at have no effect.
            operands.truncate(1);
        }
        let tucker = attributes.get("kind").and_then(Value::as_str) == Some("tucker");
        for named in named_operands(op, tucker) {
            let Some(value) = attributes.shift_remove(named.key) else { continue };
            let name = value.as_str().ok_or_else(|| attribute(format!("`{}` must name a value", named.key)))?;
            operands.push(self.lookup(name)?);
            if let Some(flag) = named.flag {
                attributes.insert(flag.to_owned(), Value::Bool(true));
            }
        }
        check_pairs(op, node)?;
        let mut parsed = Op::from_attributes(op, Value::Object(attributes))
            .ok_or_else(|| OpError::new(codes::UNKNOWN_OP, format!("there is no operation `{op}`")))?
            .map_err(|e| attribute(e.to_string()))?;
        if let Op::Experts(experts) = &mut parsed {
            // A file may list parts in any order.
            experts.bank.sort_by_key(|part| part.ids);
        }
        self.use_weights(&parsed, id)?;
        let name = pass.map_or_else(|| id.to_owned(), |pass| format!("{id}_{pass}"));
        let new = self.graph.add(name, parsed, &operands);
        if let Some(round) = node.get("round") {
            let dtype = DType::deserialize(round).map_err(|e| attribute(format!("`round`: {e}")))?;
            self.graph.set_round(new, Some(dtype));
        }
        Ok(new)
    }

    fn operands(&self, node: &Map<String, Value>) -> OpResult<Vec<NodeId>> {
        let Some(names) = node.get("in") else { return Ok(Vec::new()) };
        let names = names.as_array().ok_or_else(|| attribute("`in` must be a list of names".to_owned()))?;
        names
            .iter()
            .map(|name| {
                let name = name.as_str().ok_or_else(|| attribute("`in` must be a list of names".to_owned()))?;
                self.lookup(name)
            })
            .collect()
    }

    /// Notes which weights an operation uses, and for which experts.
    fn use_weights(&mut self, op: &Op, id: &str) -> OpResult<()> {
        match op {
            Op::Experts(experts) => {
                for part in &experts.bank {
                    self.use_part(part, id)?;
                }
            }
            Op::Ffn(ffn) => {
                for (_, spec) in ffn.specs() {
                    self.use_spec(spec, &[0], id)?;
                }
            }
            Op::Input(_)
            | Op::Param(_)
            | Op::Linear(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Norm(_)
            | Op::Softmax(_)
            | Op::Einsum(_)
            | Op::Reduce(_)
            | Op::Shape(_)
            | Op::Gather(_)
            | Op::Attention(_)
            | Op::Adjust(_)
            | Op::Transport(_)
            | Op::Select(_)
            | Op::ProductKey(_)
            | Op::Limit(_)
            | Op::Weigh(_)
            | Op::Override(_)
            | Op::Count(_)
            | Op::Dispatch(_)
            | Op::Combine(_)
            | Op::Plan(_)
            | Op::Described(_)
            | Op::Collective(_)
            | Op::Kernel(_) => {
                for name in op.weights() {
                    self.use_weight(name, [], id);
                }
            }
        }
        Ok(())
    }

    fn use_weight(&mut self, name: &str, entries: impl IntoIterator<Item = u64>, id: &str) {
        let entry = self.used.entry(name.to_owned()).or_insert_with(|| (BTreeSet::new(), id.to_owned()));
        entry.0.extend(entries);
    }

    fn use_part(&mut self, part: &BankPart, id: &str) -> OpResult<()> {
        let [start, end] = part.ids;
        if (part.numbers.is_empty() && part.base_id > start) || end.saturating_sub(start) > MAX_NODES as u64 {
            let text = format!("a part has the experts {start}..{end} and `base_id` {}", part.base_id);
            return Err(OpError::new(codes::BANK_COVER, text));
        }
        match &part.kind {
            PartKind::Const { .. } | PartKind::Neuron(_) => {
                for name in part.weights() {
                    self.use_weight(name, [], id);
                }
            }
            PartKind::Ffn(_) | PartKind::Linear(_) | PartKind::Film(_) | PartKind::Identity {} | PartKind::Zero {} => {
                for (_, spec) in part.specs() {
                    self.use_spec(spec, &part.all_numbers().collect::<Vec<_>>(), id)?;
                }
            }
        }
        Ok(())
    }

    fn use_spec(&mut self, spec: &WeightSpec, experts: &[u64], id: &str) -> OpResult<()> {
        if let WeightSpec::Mul { mul: [a, b], group } = spec {
            if experts.iter().any(|e| *e >= group.len() as u64) {
                let text = format!("`group` has {} entries, experts {experts:?} need one each", group.len());
                return Err(OpError::new(codes::EXTENT, text));
            }
            let group_of = |e: u64| usize::try_from(e).ok().and_then(|e| group.get(e)).copied().unwrap_or_default();
            for name in [a, b] {
                self.use_weight(name, experts.iter().map(|e| WeightSpec::entry(name, *e, group_of(*e))), id);
            }
            return Ok(());
        }
        for name in spec.names() {
            self.use_weight(name, experts.iter().copied(), id);
        }
        Ok(())
    }

    fn add_weights(&mut self) -> Findings<()> {
        let mut found = Vec::new();
        for (name, (entries, user)) in &self.used {
            match self.signature.weight(name, entries) {
                Ok(weight) => {
                    self.graph.weights.insert(name.clone(), weight);
                }
                Err(error) => found.push(error.at(user, "weights")),
            }
        }
        found.truncate(20);
        if found.is_empty() { Ok(()) } else { Err(found) }
    }

    fn finish(mut self, outputs: &IndexMap<String, String>) -> Findings<Graph> {
        for (name, source) in outputs {
            let (node, part) = split(source);
            let id = self.lookup(node).map_err(|error| {
                let text = format!("output `{name}`: {}", error.message);
                vec![Diagnostic::error(codes::OUTPUT, text)]
            })?;
            self.graph.output(name.clone(), id, part.unwrap_or(Part::Whole));
        }
        Ok(self.graph)
    }
}

/// `r.idx` and `r.w` are parts of a route.
fn split(source: &str) -> (&str, Option<Part>) {
    match source.rsplit_once('.') {
        Some((node, "idx")) => (node, Some(Part::Idx)),
        Some((node, "w")) => (node, Some(Part::Weights)),
        Some(_) | None => (source, None),
    }
}

/// `round` stands on values that hold numbers, with a type that they can be rounded to.
fn rounds(graph: &Graph) -> Findings<()> {
    let mut found = Vec::new();
    for id in graph.order() {
        let node = graph.node(id);
        let Some(dtype) = node.round else { continue };
        let numbers = match &node.ty {
            Some(Type::Tensor(ty)) => ty.dtype.is_float(),
            Some(Type::Route(route)) => route.weighted,
            Some(Type::Ragged(_)) | None => true,
            Some(Type::Plan(_)) => false,
        };
        if !numbers {
            found.push(
                attribute("`round`: the value holds no numbers to round".to_owned()).at(&node.name, node.op.name()),
            );
        }
        if !matches!(dtype, DType::F32 | DType::Bf16 | DType::F16) {
            let text =
                format!("`round`: {} is no type that values are rounded to; f32, bf16 and f16 are", dtype.name());
            found.push(attribute(text).at(&node.name, node.op.name()));
        }
    }
    if found.is_empty() { Ok(()) } else { Err(found) }
}

/// An output that names a route alone means its weights.
fn bare_routes(graph: &mut Graph, outputs: &IndexMap<String, String>) {
    for at in 0..graph.outputs.len() {
        let output = &graph.outputs[at];
        let bare = outputs.get(&output.name).is_some_and(|source| split(source).1.is_none());
        if bare && matches!(graph.node(output.node).ty, Some(Type::Route(_))) {
            graph.outputs[at].part = Part::Weights;
        }
    }
}

fn attribute(message: String) -> OpError {
    OpError::new(codes::ATTRIBUTE, message)
}

fn text<'a>(node: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    node.get(key).and_then(Value::as_str).ok_or_else(|| format!("`{key}` is missing or no text"))
}

/// Attributes that make sense only together.
fn check_pairs(op: &str, node: &Map<String, Value>) -> OpResult<()> {
    let pairs: &[(&str, &str)] = match op {
        "adjust" => &[("class", "class_experts"), ("class_experts", "class")],
        "attention" => &[("blocks", "block"), ("block", "blocks")],
        "override" => &[("expert", "when")],
        _ => &[],
    };
    match pairs.iter().find(|(a, b)| node.contains_key(*a) && !node.contains_key(*b)) {
        Some((a, b)) => Err(attribute(format!("`{a}` needs `{b}`"))),
        None => Ok(()),
    }
}

/// Whether a value is null or has one inside.
fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.iter().any(has_null),
        Value::Object(map) => map.values().any(has_null),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

/// Every text in a JSON value.
fn strings(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::String(s) => {
            found.insert(s.clone());
        }
        Value::Array(items) => items.iter().for_each(|v| strings(v, found)),
        Value::Object(map) => map.values().for_each(|v| strings(v, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The node with `{i}` replaced, but not inside the body of a loop in the body.
fn numbered(node: &Map<String, Value>, i: &str) -> Map<String, Value> {
    fn replace(value: &Value, i: &str) -> Value {
        match value {
            Value::String(s) => Value::String(s.replace("{i}", i)),
            Value::Array(items) => Value::Array(items.iter().map(|v| replace(v, i)).collect()),
            Value::Object(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), replace(v, i))).collect()),
            Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
        }
    }
    node.iter()
        .map(|(key, value)| (key.clone(), if key == "body" { value.clone() } else { replace(value, i) }))
        .collect()
}
