//! The changes that are tried.

use super::{Expect, Mutant, Step, at, object, read, with, with_spare_weights};
use moec_ir::json::{Signature, read_value};
use serde_json::{Value, json};

/// Attributes of a node that say which node it is.
const NAMES: [&str; 3] = ["id", "op", "in"];
/// At most so many values of an attribute that the graph does not have.
const NEW_VALUES: usize = 3;

/// Every change of an attribute of a graph file.
pub fn mutants(file: &Value) -> Vec<Mutant> {
    let file = with_spare_weights(file);
    let mut walk = Walk { file: &file, values: values(&file), found: Vec::new() };
    walk.nodes(&[Step::Key("nodes".into())]);
    walk.flags();
    walk.found
}

/// Inputs and nodes by name.
fn values(file: &Value) -> Vec<String> {
    fn nodes(list: Option<&Value>, names: &mut Vec<String>) {
        for node in list.and_then(Value::as_array).into_iter().flatten() {
            names.extend(node.get("id").and_then(Value::as_str).map(str::to_owned));
            nodes(node.get("body"), names);
        }
    }
    let mut names: Vec<String> = object(file, &[Step::Key("inputs".into())]).keys().cloned().collect();
    nodes(file.get("nodes"), &mut names);
    names
}

struct Walk<'a> {
    file: &'a Value,
    values: Vec<String>,
    found: Vec<Mutant>,
}

fn key(path: &[Step], name: &str) -> Vec<Step> {
    [path, &[Step::Key(name.to_owned())]].concat()
}

fn place(path: &[Step], i: usize) -> Vec<Step> {
    [path, &[Step::Place(i)]].concat()
}

/// Names in backticks after `expected`.
fn expected(message: &str) -> Vec<String> {
    let Some((_, list)) = message.split_once("expected") else { return Vec::new() };
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

impl Walk<'_> {
    fn nodes(&mut self, path: &[Step]) {
        let count = at(self.file, path).and_then(Value::as_array).map_or(0, Vec::len);
        for i in 0..count {
            let path = place(path, i);
            let node = object(self.file, &path);
            let id = node.get("id").and_then(Value::as_str).unwrap_or("").to_owned();
            self.object(&path, &id, true);
            if node.contains_key("body") {
                self.nodes(&key(&path, "body"));
            }
            self.operands(&path, &id);
        }
    }

    /// One operand more, and one less.
    fn operands(&mut self, path: &[Step], id: &str) {
        let path = key(path, "in");
        let Some(list) = at(self.file, &path).and_then(Value::as_array) else { return };
        let Some(first) = list.first() else { return };
        let more = list.iter().chain([first]).cloned().collect();
        self.push(&path, id, "one more operand", Some(Value::Array(more)), Expect::Seen);
        let less = list[1..].to_vec();
        self.push(&path, id, "one operand less", Some(Value::Array(less)), Expect::Seen);
        self.push(&path, id, "operands of no kind", Some(json!([1])), Expect::Refused);
    }

    fn flags(&mut self) {
        let flag = self.file.get("batch_dependent").and_then(Value::as_bool).unwrap_or(false);
        let path = [Step::Key("batch_dependent".into())];
        self.push(&path, "", "the flag is turned", Some(json!(!flag)), Expect::Seen);
        self.push(&path, "", "the flag is text", Some(json!("yes")), Expect::Refused);
        self.push(&[Step::Key("zzz".into())], "", "an unknown entry", Some(json!(1)), Expect::Refused);
        self.push(&[Step::Key("format".into())], "", "another format", Some(json!("moec-graph-9")), Expect::Refused);
    }

    fn push(&mut self, path: &[Step], id: &str, what: &str, new: Option<Value>, expect: Expect) {
        let attribute = path.iter().rev().find_map(|s| match s {
            Step::Key(key) => Some(key.clone()),
            Step::Place(_) => None,
        });
        let attribute = attribute.unwrap_or_default();
        let (old, now) = (at(self.file, path), new.as_ref());
        let text = |v: Option<&Value>| v.map_or_else(|| "absent".to_owned(), ToString::to_string);
        let change = format!("node `{id}`: `{attribute}` {} -> {} ({what})", text(old), text(now));
        // Names of functions and kinds select code; names of weights and nodes do not.
        let named = now.and_then(Value::as_str).filter(|_| what.contains("its names"));
        let place = self.place(path);
        let key = format!("{place}: {what} {}", named.unwrap_or(""));
        let graph = with(self.file, path, new);
        let part = path.windows(2).find_map(|steps| match steps {
            [Step::Key(bank), Step::Place(i)] if bank == "bank" => Some(*i),
            _ => None,
        });
        self.found.push(Mutant { change, node: id.to_owned(), attribute, part, graph, expect, place, key });
    }

    /// Operation, its kind, and the attribute.
    fn place(&self, path: &[Step]) -> String {
        let mut names = Vec::new();
        for depth in 1..path.len() {
            let holder = object(self.file, &path[..depth]);
            let kinds = ["op", "rule", "kind", "fn"].into_iter().filter_map(|n| holder.get(n)?.as_str());
            names.extend(kinds.map(str::to_owned));
        }
        for step in path.iter().skip(1) {
            match step {
                // Classes are names that the graph gives.
                Step::Key(name) if name.parse::<i64>().is_err() && name != "body" => names.push(name.clone()),
                Step::Key(_) | Step::Place(_) => {}
            }
        }
        names.join(" ")
    }

    /// The entries of a node, a bank part or a weight specification.
    fn object(&mut self, path: &[Step], id: &str, node: bool) {
        let entries = object(self.file, path).clone();
        for (name, value) in &entries {
            if node && (NAMES.contains(&name.as_str()) || name == "body") {
                continue;
            }
            let path = key(path, name);
            self.value(&path, id, value);
            self.push(&path, id, "without it", None, Expect::Seen);
            self.push(&path, id, "no value", Some(Value::Null), Expect::Refused);
            self.push(&path, id, "of no kind", Some(json!({"zzz": [1]})), Expect::Refused);
        }
        let unknown = key(path, "zzz");
        self.push(&unknown, id, "unknown", Some(json!(1)), Expect::Refused);
        for name in self.absent(path, &entries.keys().map(String::as_str).collect::<Vec<_>>()) {
            self.add(&key(path, &name), id);
        }
    }

    /// Attributes that the reader knows here and the graph does not have.
    fn absent(&self, path: &[Step], present: &[&str]) -> Vec<String> {
        let Err(found) = read_value(&with(self.file, &key(path, "zzz"), Some(json!(1))), &Signature::default()) else {
            return Vec::new();
        };
        let names = found.iter().filter(|d| d.message.contains("`zzz`")).flat_map(|d| expected(&d.message));
        let extra = ["round", "class", "class_experts", "blocks", "base_id"].map(str::to_owned);
        let mut names: Vec<String> = names.chain(extra).filter(|n| !present.contains(&n.as_str())).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Values of an attribute that are names, by what the reader says to an unknown one.
    fn variants(&self, path: &[Step]) -> Vec<String> {
        match read_value(&with(self.file, path, Some(json!("zzz"))), &Signature::default()) {
            Err(found) => {
                let known = found.iter().filter(|d| d.message.contains("variant `zzz`"));
                known.flat_map(|d| expected(&d.message)).collect()
            }
            Ok(_) => Vec::new(),
        }
    }

    /// An attribute that is new here: the first values of each kind that the verifier takes.
    fn add(&mut self, path: &[Step], id: &str) {
        let mut all: Vec<Value> = self.variants(path).into_iter().map(Value::String).collect();
        all.extend([json!(true), json!(false), json!(0.625), json!(3), json!(1), json!(2), json!(0), json!([0])]);
        all.push(json!({"0": [0, 1], "1": [1]}));
        let tensors = object(self.file, &[Step::Key("tensors".into())]);
        all.extend(tensors.keys().filter(|name| name.starts_with("spare_")).map(|name| json!(name)));
        all.extend(self.values.iter().map(|name| json!(name)));
        let mut taken = 0;
        for value in all {
            if taken == NEW_VALUES {
                break;
            }
            if read(&with(self.file, path, Some(value.clone()))).is_ok() {
                taken += 1;
                self.push(path, id, "added", Some(value), Expect::Seen);
            }
        }
        self.push(path, id, "added, of no kind", Some(json!({"zzz": [1]})), Expect::Refused);
    }

    fn value(&mut self, path: &[Step], id: &str, value: &Value) {
        match value {
            Value::Null => {}
            Value::Bool(b) => self.push(path, id, "turned", Some(json!(!b)), Expect::Seen),
            Value::Number(n) => self.number(path, id, n),
            Value::String(text) => self.text(path, id, text),
            Value::Array(items) => self.list(path, id, items),
            Value::Object(_) => self.object(path, id, false),
        }
    }

    fn number(&mut self, path: &[Step], id: &str, n: &serde_json::Number) {
        if let Some(n) = n.as_i64() {
            for new in [n + 1, n - 1, 0, 2 * n + 1, -n - 2] {
                if new != n {
                    self.push(path, id, "another number", Some(json!(new)), Expect::Seen);
                }
            }
            for huge in [json!(1u64 << 40), json!(u64::MAX), json!(i64::MIN), json!(1e300)] {
                self.push(path, id, "a huge number", Some(huge), Expect::Read);
            }
        } else if let Some(n) = n.as_f64() {
            for new in [n + 0.375, n * 3.0, 0.0, -n] {
                #[expect(clippy::float_cmp, reason = "the same number is no change")]
                if new != n {
                    self.push(path, id, "another number", Some(json!(new)), Expect::Seen);
                }
            }
            self.push(path, id, "a huge number", Some(json!(1e300)), Expect::Read);
        }
        self.push(path, id, "text for a number", Some(json!("zzz")), Expect::Refused);
    }

    fn text(&mut self, path: &[Step], id: &str, text: &str) {
        let last = path.last();
        if last == Some(&Step::Key("eq".into())) {
            self.equation(path, id, text);
            return;
        }
        let variants = self.variants(path);
        for other in variants.iter().filter(|v| *v != text) {
            self.push(path, id, "another of its names", Some(json!(other)), Expect::Seen);
        }
        if variants.is_empty() {
            let tensors = object(self.file, &[Step::Key("tensors".into())]);
            let shape = tensors.get(text);
            let others = tensors.iter().filter(|(name, t)| *name != text && Some(*t) == shape).map(|(name, _)| name);
            let others: Vec<String> = others.cloned().collect();
            let values: Vec<String> = self.values.iter().filter(|n| *n != text).cloned().collect();
            let pool = if self.values.iter().any(|v| v == text) { values } else { others };
            for other in pool.into_iter().take(2) {
                self.push(path, id, "another name", Some(json!(other)), Expect::Seen);
            }
        }
        self.push(path, id, "an unknown name", Some(json!("no such name")), Expect::Refused);
        self.push(path, id, "a number for text", Some(json!(1)), Expect::Refused);
    }

    /// Axes swapped, left out, or doubled.
    fn equation(&mut self, path: &[Step], id: &str, text: &str) {
        let Some((left, right)) = text.split_once("->") else { return };
        let back: String = right.chars().rev().collect();
        let short: String = right.chars().skip(1).collect();
        let axes: String =
            left.chars().map(|c| if c == left.chars().next().unwrap_or('a') { 'z' } else { c }).collect();
        for new in [format!("{left}->{back}"), format!("{left}->{short}"), format!("{axes}->{right}"), left.to_owned()]
        {
            if new != text {
                self.push(path, id, "another equation", Some(json!(new)), Expect::Seen);
            }
        }
        self.push(path, id, "no equation", Some(json!("no such name")), Expect::Refused);
    }

    fn list(&mut self, path: &[Step], id: &str, items: &[Value]) {
        for (i, item) in items.iter().enumerate().take(2) {
            self.value(&place(path, i), id, item);
        }
        let mut changed = items.to_vec();
        changed.reverse();
        if changed != items {
            self.push(path, id, "reversed", Some(Value::Array(changed)), Expect::Seen);
        }
        if let Some((last, rest)) = items.split_last() {
            self.push(path, id, "one entry less", Some(json!(rest)), Expect::Seen);
            let more: Vec<&Value> = items.iter().chain([last]).collect();
            self.push(path, id, "one entry more", Some(json!(more)), Expect::Seen);
        }
        self.push(path, id, "text for a list", Some(json!("no such list")), Expect::Refused);
    }
}
