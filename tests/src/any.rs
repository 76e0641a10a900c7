//! Layers drawn at random from every operation, rule, bank kind and weight form, with odd sizes.

use crate::{
    attributes::sensitive,
    draw::Draw,
    forms::Form,
    gallery::{Compiled, Numbers, Results, agree, agree_within, data, limit, limit_within},
};
use moec::{Target, runtime::Device};
use serde_json::{Map, Value, json};
use std::sync::Arc;

mod before;
mod routes;

/// A drawn layer.
pub struct Layer {
    /// Its graph.
    pub form: Form,
    /// How far results may be off, as a share of the largest; that of the graph if nothing is said.
    pub share: Option<f64>,
    /// How many tokens suit it.
    pub tokens: u64,
    /// Inputs of integers that are not 0 and 1.
    pub ints: Vec<(String, Vec<i32>)>,
}

/// A layer under construction.
struct Any {
    draw: Draw,
    form: Form,
    width: u64,
    /// Width of what experts give.
    out: u64,
    experts: u64,
    /// Rows of the route: as a size, and their number.
    rows: (Value, u64),
    /// Type of what is given as floats: inputs and weights.
    dtype: &'static str,
    /// Passes of the loop that is under construction.
    passes: Option<u64>,
    ints: Vec<(String, Vec<i32>)>,
    /// Names are counted.
    count: usize,
}

/// Compiles the layer of a number, runs it and compares every result with the interpreter.
///
/// # Errors
/// What differs.
pub fn check(number: u64, target: Target, device: Arc<dyn Device>) -> Result<(), String> {
    let Layer { form, share, tokens, ints } = layer(number);
    let graph = form.graph();
    let mut data = data(&graph, tokens, tokens, Numbers::Small);
    for (name, values) in ints {
        data.set_ints(&name, &values);
    }
    let mut expected = data.expected(&graph).map_err(|e| e.to_string())?;
    let compiled = Compiled::new(&graph, target, device).map_err(|e| e.to_string())?;
    let found = compiled.run(&data).map_err(|e| e.to_string())?;
    // Sums of numbers near 1 that cancel (the elements of a normed row) leave no digits to compare, only f32's errors.
    let most = |results: &Results| results["output"].iter().fold(0f64, |m, v| m.max(v.abs()));
    if most(&expected) < 1e-6 {
        if found["output"].iter().any(|v| v.is_nan() || v.abs() >= 1e-4) {
            return Err(format!("`output` reaches {:e}, nothing is expected ({tokens} tokens)", most(&found)));
        }
        expected.remove("output");
    }
    let agreed = match share {
        Some(share) => agree_within(&graph, &found, &expected, share),
        None => agree(&graph, &found, &expected),
    };
    let limit = |name: &str, wanted: &[f64]| match share {
        Some(share) => limit_within(&graph, name, wanted, share),
        None => limit(&graph, name, wanted),
    };
    agreed.map_err(|e| match sensitive::cause(&graph, &data, (&expected, &found), limit) {
        Some(cause) => format!("{e} ({tokens} tokens), which the numbers explain: {cause:?}"),
        None => format!("{e} ({tokens} tokens)"),
    })
}

/// Functions of one number that are defined and tame everywhere.
const ACTS: [&str; 12] =
    ["relu", "relu2", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "neg", "square", "softplus", "abs", "identity"];

/// The layer of a number.
pub fn layer(number: u64) -> Layer {
    let mut draw = Draw(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for _ in 0..4 {
        draw.below(2);
    }
    let width = draw.of(&[3, 5, 8, 16, 17, 24, 33, 40, 64, 65]);
    let experts = draw.of(&[1, 2, 3, 4, 6, 8, 9, 12]);
    let repeat = draw.of(&[1, 1, 1, 2, 3]);
    let dtype = draw.of(&["f32", "f32", "bf16"]);
    // Blocks of keys need a number of tokens that is known.
    let block = if repeat == 1 && draw.one_in(12) { Some(draw.of(&[1, 3, 4])) } else { None };
    let rows = match block {
        Some(block) => block * draw.of(&[1, 2, 5]),
        None => draw.of(&[1, 2, 5, 9, 17, 33, 70]),
    };
    let form = match (repeat, block) {
        (1, None) => Form::default().input("x", dtype, &json!(["T", width])),
        (1, Some(_)) => Form::default().input("x", dtype, &json!([rows, width])),
        _ => Form::default().input("x", dtype, &json!([rows * repeat, width])).input("c", dtype, &json!([rows, width])),
    };
    let out = if draw.one_in(5) { draw.of(&[1, 4, 7, 16, 20]) } else { width };
    let size = if repeat == 1 && block.is_none() { json!("T") } else { json!(rows) };
    let rows_of = (size, rows);
    let mut any =
        Any { draw, form, width, out, experts, rows: rows_of, dtype, passes: None, ints: Vec::new(), count: 0 };
    let source = if repeat == 1 { "x" } else { "c" };
    let source = block.map_or_else(|| source.to_owned(), |block| any.blocked(source, block));
    any.build(&source, repeat);
    // Products of bf16 keep their inner values in bf16.
    Layer { form: any.form, share: (dtype == "bf16").then_some(3e-2), tokens: rows * repeat, ints: any.ints }
}

impl Any {
    fn name(&mut self, what: &str) -> String {
        self.count += 1;
        format!("{what}_{}", self.count)
    }

    fn add(&mut self, op: &str, operands: &[&str], attributes: Value) -> String {
        let id = self.name("n");
        let form = std::mem::take(&mut self.form);
        self.form = form.node(&id, op, operands, attributes);
        id
    }

    fn weight(&mut self, what: &str, shape: Value) -> String {
        self.typed(what, self.dtype, shape)
    }

    fn typed(&mut self, what: &str, dtype: &str, shape: Value) -> String {
        let name = self.name(what);
        let form = std::mem::take(&mut self.form);
        self.form = form.typed(&name, dtype, shape);
        name
    }

    /// A weight per expert, or per group.
    fn each(&mut self, what: &str, mark: &str, dtype: &str, shape: Value) -> String {
        let name = format!("{}.{{{mark}}}", self.name(what));
        let dtype = if dtype == "f32" { self.dtype } else { dtype };
        let form = std::mem::take(&mut self.form);
        self.form = form.typed(&name, dtype, shape);
        name
    }

    fn act(&mut self) -> &'static str {
        self.draw.of(&ACTS)
    }

    fn build(&mut self, source: &str, repeat: u64) {
        let mut value = source.to_owned();
        if self.rows.0 == "T" && self.draw.one_in(3) {
            value = self.before(&value);
        }
        if self.draw.one_in(2) {
            value = self.normed(&value);
        }
        if repeat == 1 && self.draw.one_in(6) {
            let y = self.in_a_loop(&value);
            self.output("output", &y);
            return;
        }
        let route = self.route(&value);
        let moved = if repeat == 1 && self.draw.one_in(2) { value } else { "x".to_owned() };
        let mut y = self.mixture(&moved, &route, repeat);
        // Another layer behind it.
        if repeat == 1 && self.draw.one_in(6) {
            let sum = self.add("binary", &[&y, &moved], json!({"fn": "add"}));
            let normed = self.add("norm", &[&sum], json!({"kind": "layer", "eps": 0.01}));
            let second = self.token_choice(&normed);
            y = self.mixture(&normed, &second, 1);
        }
        for _ in 0..self.draw.below(3) {
            y = self.after(&y, &moved);
        }
        self.output("output", &y);
        self.output("ids", &format!("{route}.idx"));
        self.output("w", &format!("{route}.w"));
    }

    /// `dispatch > experts > combine`, with the width of the layer again.
    fn mixture(&mut self, moved: &str, route: &str, repeat: u64) -> String {
        let weighted = self.draw.one_in(5);
        let dispatched = self.add("dispatch", &[moved, route], json!({"repeat": repeat, "weighted": weighted}));
        let rows = match self.draw.below(8) {
            0 => self.heads(moved, &dispatched),
            1 if repeat == 1 => {
                let out = std::mem::replace(&mut self.out, self.width);
                let rows = self.experts(&dispatched);
                self.out = out;
                self.experts(&rows)
            }
            _ => self.experts(&dispatched),
        };
        let y = self.add("combine", &[&rows, route], json!({"repeat": repeat, "weighted": !weighted}));
        if self.out == self.width {
            return y;
        }
        let back = self.weight("back", json!([self.width, self.out]));
        self.add("linear", &[&y], json!({"w": back}))
    }

    /// Rows through a bank.
    fn experts(&mut self, rows: &str) -> String {
        let bank = self.bank();
        // A bank that gives nothing gives as much of it as it takes.
        if bank.as_array().is_some_and(|parts| parts.iter().all(|p| p["kind"] == "zero")) {
            self.out = self.width;
        }
        self.add("experts", &[rows], json!({"bank": bank}))
    }

    /// Several passes through one bank, each with a router of its own.
    fn in_a_loop(&mut self, x: &str) -> String {
        let passes = 1 + self.draw.below(3);
        let carry = self.add("unary", &[x], json!({"fn": "identity"}));
        let first = self.form.count();
        self.passes = Some(passes);
        let route = self.token_choice(&carry);
        let mut y = self.mixture(&carry, &route, 1);
        if self.draw.one_in(2) {
            y = self.after(&y, &carry);
        }
        let sum = self.add("binary", &[&carry, &y], json!({"fn": "add"}));
        // Values stay small.
        let next = self.add("norm", &[&sum], json!({"kind": "rms", "eps": 0.01}));
        self.passes = None;
        let id = self.name("n");
        let form = std::mem::take(&mut self.form);
        self.form = form.looped(first, &id, [&carry, &next], passes);
        id
    }

    /// Query heads as experts, over keys and values that they share.
    fn heads(&mut self, x: &str, dispatched: &str) -> String {
        let (experts, width, out) = (self.experts, self.width, self.out);
        let size = self.draw.of(&[4, 8, 12]);
        let part = |w: String| json!({"bank": [{"ids": [0, experts], "kind": "linear", "w": w}]});
        let (key, value) = (self.weight("k", json!([size, width])), self.weight("v", json!([size, width])));
        let [key, value] = [key, value].map(|w| self.add("linear", &[x], json!({"w": w})));
        let query = self.each("q", "e", "f32", json!([size, width]));
        let query = self.add("experts", &[dispatched], part(query));
        let read = self.add("attention", &[&query, &key, &value], json!({}));
        let back = self.each("o", "e", "f32", json!([out, size]));
        self.add("experts", &[&read], part(back))
    }

    fn output(&mut self, name: &str, source: &str) {
        let form = std::mem::take(&mut self.form);
        self.form = form.output(name, source);
    }

    fn input(&mut self, what: &str, dtype: &str, shape: &Value) -> String {
        let name = self.name(what);
        let form = std::mem::take(&mut self.form);
        self.form = form.input(&name, dtype, shape);
        name
    }

    /// An input of integers below `end`, from `start` on.
    fn integers(&mut self, what: &str, shape: &Value, count: u64, [start, end]: [i32; 2]) -> String {
        let name = self.input(what, "i32", shape);
        let span = u64::from(end.abs_diff(start)).max(1);
        let values = (0..count).map(|_| start + i32::try_from(self.draw.below(span)).expect("small")).collect();
        self.ints.push((name.clone(), values));
        name
    }

    fn batch(&mut self) {
        let form = std::mem::take(&mut self.form);
        self.form = form.batch();
    }

    fn normed(&mut self, x: &str) -> String {
        let width = self.width;
        let kind = self.draw.of(&["rms", "layer", "l2"]);
        let mut attributes = json!({"kind": kind});
        if kind != "l2" {
            attributes["eps"] = json!(0.01);
            if self.draw.one_in(2) {
                attributes["w"] = json!(self.weight("nw", json!([width])));
            }
        }
        if kind == "layer" && self.draw.one_in(2) {
            attributes["b"] = json!(self.weight("nb", json!([width])));
        }
        self.add("norm", &[x], attributes)
    }

    /// Something after the mixture that keeps the shape.
    fn after(&mut self, y: &str, x: &str) -> String {
        let width = self.width;
        match self.draw.below(8) {
            0 => {
                let function = self.draw.of(&["add", "mul", "max", "min", "sub"]);
                self.add("binary", &[y, x], json!({"fn": function}))
            }
            1 => {
                let act = self.act();
                self.add("unary", &[y], json!({"fn": act}))
            }
            2 => self.normed(y),
            3 => {
                let w = self.weight("aw", json!([width, width]));
                self.add("linear", &[y], json!({"w": w}))
            }
            4 => {
                let mut part = self.ffn(None);
                part.remove("ids");
                part.remove("kind");
                let shared = self.add("ffn", &[x], Value::Object(part));
                self.add("binary", &[y, &shared], json!({"fn": "add"}))
            }
            5 => {
                let function = self.draw.of(&["sum", "mean", "max", "min"]);
                let one = self.add("reduce", &[x], json!({"fn": function, "axis": -1, "keep": true}));
                self.add("binary", &[y, &one], json!({"fn": "mul"}))
            }
            6 => {
                let wide = self.add("shape", &[y, x], json!({"fn": "concat", "axis": 1}));
                let from = self.draw.below(width + 1);
                self.add("shape", &[&wide], json!({"fn": "slice", "axis": 1, "range": [from, from + width]}))
            }
            _ => {
                let c = self.draw.of(&[0.5, -0.25, 2.0]);
                self.add("binary", &[y], json!({"fn": "add", "c": c}))
            }
        }
    }

    fn bank(&mut self) -> Value {
        let experts = self.experts;
        let mut parts = Vec::new();
        let mut first = 0;
        while first < experts {
            let last = if self.draw.one_in(2) { experts } else { first + 1 + self.draw.below(experts - first) };
            let part = self.part([first, last]);
            parts.push(Value::Object(part));
            first = last;
        }
        json!(parts)
    }

    fn part(&mut self, ids: [u64; 2]) -> Map<String, Value> {
        let (width, out) = (self.width, self.out);
        let mut part = Map::new();
        // What keeps the width cannot change it.
        let mut kind = self.draw.below(13);
        if out != width && matches!(kind, 8 | 12) {
            kind = 11;
        }
        match kind {
            0..=6 => part = self.ffn(Some(ids)),
            7 => {
                part.insert("kind".into(), json!("linear"));
                let w = self.matrix(Some(ids), out, width);
                part.insert("w".into(), w);
                if self.draw.one_in(2) {
                    let bias = self.each("lb", "e", "f32", json!([out]));
                    part.insert("bias".into(), json!(bias));
                }
            }
            8 => {
                part.insert("kind".into(), json!("film"));
                for name in ["mul", "add"] {
                    let w = self.matrix(Some(ids), width, width);
                    part.insert(name.into(), w);
                    if self.draw.one_in(2) {
                        let bias = self.each("fb", "e", "f32", json!([width]));
                        part.insert(format!("{name}_bias"), json!(bias));
                    }
                }
            }
            9 => {
                part.insert("kind".into(), json!("neuron"));
                let act = self.act();
                part.insert("act".into(), json!(act));
                for (name, size) in [("u", width), ("v", out)] {
                    let table = self.weight("nt", json!([ids[1] - ids[0], size]));
                    part.insert(name.into(), json!(table));
                }
                part.insert("base_id".into(), json!(ids[0]));
            }
            10 => {
                part.insert("kind".into(), json!("const"));
                let table = self.weight("ct", json!([self.experts, out]));
                part.insert("value".into(), json!(table));
            }
            11 => {
                part.insert("kind".into(), json!("zero"));
            }
            _ => {
                part.insert("kind".into(), json!("identity"));
            }
        }
        part.insert("ids".into(), json!(ids));
        part
    }

    /// A network, of experts or dense.
    fn ffn(&mut self, ids: Option<[u64; 2]>) -> Map<String, Value> {
        let (width, out) = (self.width, if ids.is_some() { self.out } else { self.width });
        let mut part = Map::new();
        part.insert("kind".into(), json!("ffn"));
        let act = self.act();
        part.insert("act".into(), json!(act));
        // Widths of their own, for plain matrices only.
        if let (Some(ids), true) = (ids, self.draw.one_in(6)) {
            let inner: Vec<u64> = (0..ids[1]).map(|_| self.draw.of(&[0, 1, 4, 7, 16, 20])).collect();
            for name in ["gate", "up"] {
                let w = self.each(name, "e", "f32", json!([inner, width]));
                part.insert(name.into(), json!(w));
            }
            let down = self.each("down", "e", "f32", json!([out, inner]));
            part.insert("down".into(), json!(down));
            return part;
        }
        let inner = self.draw.of(&[1, 4, 6, 12, 16, 20, 33, 48]);
        let gated = self.draw.of(&[0, 1, 1, 2]);
        let up = if gated == 2 { 2 * inner } else { inner };
        if gated == 1 {
            let gate = self.matrix(ids, inner, width);
            part.insert("gate".into(), gate);
        }
        let (up, down) = (self.matrix(ids, up, width), self.matrix(ids, out, inner));
        part.insert("up".into(), up);
        part.insert("down".into(), down);
        if gated == 2 {
            part.insert("packed".into(), json!(true));
        }
        let rows = |name: &str| match name {
            "down_bias" => out,
            "up_bias" if gated == 2 => 2 * inner,
            _ => inner,
        };
        for name in ["gate_bias", "up_bias", "down_bias"] {
            if self.draw.one_in(4) && (name != "gate_bias" || gated == 1) {
                let shape = json!([rows(name)]);
                let bias = match ids {
                    Some(_) => self.each("bias", "e", "f32", shape),
                    None => self.weight("bias", shape),
                };
                part.insert(name.into(), json!(bias));
            }
        }
        let biased = part.keys().any(|k| k.ends_with("bias"));
        if gated > 0 && self.draw.one_in(3) {
            part.insert("limit".into(), json!(0.75));
            part.insert("up_add".into(), json!(1.0));
            if self.draw.one_in(2) {
                part.insert("act".into(), json!("silu"));
                part.insert("alpha".into(), json!(1.702));
            }
        } else if !biased && gated < 2 && self.draw.one_in(6) {
            part.insert("a8".into(), json!(true));
        }
        part
    }

    /// A matrix of any form.
    fn matrix(&mut self, ids: Option<[u64; 2]>, out: u64, input: u64) -> Value {
        let experts = ids.map_or(1, |ids| ids[1]);
        // A dense network has the names of expert 0.
        let each = |any: &mut Self, what: &str, mark: &str, dtype: &str, shape: Value| match ids {
            Some(_) => any.each(what, mark, dtype, shape),
            None if dtype == "f32" => any.weight(what, shape),
            None => any.typed(what, dtype, shape),
        };
        let rank = 1 + self.draw.below(4);
        match self.draw.below(9) {
            0 => {
                let a = each(self, "a", "e", "f32", json!([out, rank]));
                let b = each(self, "b", "g", "f32", json!([rank, input]));
                let groups: Vec<u64> = (0..experts).map(|_| self.draw.below(3)).collect();
                json!({"mul": [a, b], "group": groups})
            }
            1 => {
                let base = self.weight("base", json!([out, input]));
                let a = each(self, "a", "e", "f32", json!([rank, input]));
                let b = each(self, "b", "e", "f32", json!([out, rank]));
                json!({"base": base, "a": a, "b": b, "scale": self.draw.of(&[1.0, 2.0, 0.3])})
            }
            2 | 3 => {
                let sizes: Vec<u64> = (1..=input).filter(|g| input.is_multiple_of(*g)).collect();
                let group = self.draw.of(&sizes);
                let codes = each(self, "codes", "e", "i32", json!([out, input]));
                let scale = each(self, "scale", "e", "f32", json!([out, input / group]));
                let zero = each(self, "zero", "e", "f32", json!([out, input / group]));
                let mut spec = json!({"codes": codes, "scale": scale, "zero": zero, "group_size": group});
                if !self.draw.one_in(4) {
                    let bits: Vec<u64> = (0..experts).map(|_| self.draw.of(&[2, 3, 4, 4, 8])).collect();
                    let all = self.draw.of(&[1, 2, 4, 7]);
                    spec["bits"] = if self.draw.one_in(2) { json!(bits) } else { json!(vec![all; bits.len()]) };
                }
                spec
            }
            4 => {
                let codes = each(self, "ternary", "e", "f32", json!([out, input]));
                let shape = self.draw.of(&[json!([1]), json!([1, 1]), json!([out, 1]), json!([input])]);
                let scale = each(self, "scale", "e", "f32", shape);
                json!({"codes": codes, "scale": scale})
            }
            5 => {
                let axis = self.draw.below(2);
                let shape = if axis == 0 { json!([out * experts, input]) } else { json!([out, input * experts]) };
                json!({"slice": self.weight("dense", shape), "axis": axis, "n": experts})
            }
            6 => {
                let axis = self.draw.below(2);
                let shape = if axis == 0 { json!([out + 2, input]) } else { json!([out, input + 2]) };
                let take = self.weight("pool", shape);
                let ids = each(self, "ids", "e", "i32", json!([if axis == 0 { out } else { input }]));
                json!({"take": take, "ids": ids, "axis": axis})
            }
            _ => json!(each(self, "m", "e", "f32", json!([out, input]))),
        }
    }
}
