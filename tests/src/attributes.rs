//! Every attribute of a graph, changed: the change is refused, or it shows in the results as the interpreter says.
//!
//! Attributes and their values are not listed here: they are what the graph has, and what the reader names when it
//! is given something unknown. So an attribute that somebody adds is changed as well.

use crate::gallery::{Compiled, Numbers, Results, agree, data, limit, tokens_of};
use moec::{Error, Target, runtime::Device};
use moec_ir::{
    Diagnostic, Graph, Op, Severity, Type,
    json::{Signature, read_value, write_graph},
    verify,
};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

mod candidates;
pub(crate) mod sensitive;
mod unseen;

pub use candidates::mutants;
pub use sensitive::Cause;
pub use unseen::Reason;

/// A graph with one change.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// Node, attribute, old and new value.
    pub change: String,
    /// Id of the node; empty for attributes of the graph.
    pub node: String,
    /// Name of the attribute.
    pub attribute: String,
    /// The part of the bank that has it.
    pub part: Option<usize>,
    /// The changed graph file.
    pub graph: Value,
    /// What must happen.
    pub expect: Expect,
    /// Operation, its kind, and the attribute.
    pub place: String,
    /// Changes with the same key reach the same code: the place and the kind of change.
    pub key: String,
}

/// What must happen to a mutant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Refused, or another result.
    Seen,
    /// Refused: the value is of no kind that the attribute has.
    Refused,
    /// No panic; such sizes are not run.
    Read,
}

/// What happened to a mutant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The reader or the verifier refuses it, with this code.
    Refused(&'static str),
    /// It cannot be computed with these data, and the interpreter says why.
    NoValue(String),
    /// The compiler says that it has no kernel for it.
    Unsupported(String),
    /// Results change, and the compiled layer agrees with the interpreter.
    Changed,
    /// Results differ from the interpreter's with all data that were tried, for a reason that lies in the numbers.
    Numbers(Cause),
    /// Results cannot change.
    Unseen(Reason),
    /// Read; not run.
    Read,
}

/// A graph file and the results that its mutants are held against.
pub struct Subject {
    file: Value,
    graph: Graph,
    tokens: u64,
    results: Vec<(Numbers, u64, Option<Results>)>,
}

/// The finding about a change that shows in no result.
pub const UNSEEN: &str = "changes nothing";

/// Data that are tried one after another until a change shows.
const TRIALS: [(Numbers, u64); 5] =
    [(Numbers::Small, 1), (Numbers::Large, 2), (Numbers::Zero, 3), (Numbers::Small, 4), (Numbers::Large, 5)];

/// Reads and verifies.
fn read(file: &Value) -> Result<Graph, Vec<Diagnostic>> {
    let graph = read_value(file, &Signature::default())?;
    let found: Vec<Diagnostic> = verify(&graph).into_iter().filter(|d| d.severity == Severity::Error).collect();
    if found.is_empty() { Ok(graph) } else { Err(found) }
}

impl Subject {
    /// The subject of a graph file, with so many tokens where it takes any number.
    ///
    /// # Panics
    /// When the file is no valid graph.
    pub fn new(file: Value, tokens: u64) -> Self {
        let graph = read(&file).unwrap_or_else(|e| panic!("{e:?}"));
        let tokens = tokens_of(&graph, tokens);
        let results = TRIALS
            .iter()
            .map(|(numbers, seed)| (*numbers, *seed, data(&graph, tokens, *seed, *numbers).expected(&graph).ok()))
            .collect();
        Self { file, graph, tokens, results }
    }

    /// The graph file.
    pub fn file(&self) -> &Value {
        &self.file
    }

    /// How long it takes to compile, in kernels and parts of banks.
    ///
    /// # Panics
    /// When the passes refuse it.
    pub fn cost(&self) -> usize {
        let mut kernels = self.graph.clone();
        moec_passes::run(&mut kernels, false).unwrap_or_else(|e| panic!("{e}"));
        let parts = |graph: &Graph| -> usize {
            let bank = |id| if let Op::Experts(op) = &graph.node(id).op { op.bank.len() } else { 0 };
            graph.ids().into_iter().map(bank).sum()
        };
        let kernel = |id| if let Op::Kernel(kernel) = &kernels.node(id).op { 1 + parts(&kernel.body) } else { 1 };
        kernels.order().into_iter().map(kernel).sum()
    }

    /// Whether a mutant is another graph that can be compiled and run.
    pub fn runs(&self, mutant: &Mutant) -> bool {
        mutant.expect == Expect::Seen && read(&mutant.graph).is_ok_and(|graph| !same_graph(&self.graph, &graph))
    }

    /// Holds a mutant against the subject: by the interpreter, and compiled for a device if there is one.
    ///
    /// # Errors
    /// What is ignored, wrong, or refused without saying where.
    pub fn judge(&self, mutant: &Mutant, on: Option<(Target, &Arc<dyn Device>)>) -> Result<Verdict, String> {
        catch_unwind(AssertUnwindSafe(|| self.judged(mutant, on))).unwrap_or_else(|_| Err("panics".into()))
    }

    fn judged(&self, mutant: &Mutant, on: Option<(Target, &Arc<dyn Device>)>) -> Result<Verdict, String> {
        let graph = match read(&mutant.graph) {
            Ok(graph) => graph,
            Err(found) => return refusal(&found, mutant),
        };
        match mutant.expect {
            Expect::Refused => return Err("is taken".into()),
            Expect::Read => return Ok(Verdict::Read),
            Expect::Seen => {}
        }
        let (mut compiled, mut apart) = (None, None);
        let other_types = types(&self.graph) != types(&graph);
        for (numbers, seed, base) in &self.results {
            let data = data(&graph, self.tokens, *seed, *numbers);
            let expected = match (data.expected(&graph), base) {
                (Ok(expected), Some(_)) => expected,
                (Ok(_), None) => return Ok(Verdict::Changed),
                (Err(_), None) => continue,
                // What has no value for these data may have none in kernels either.
                (Err(error), Some(_)) => return Ok(Verdict::NoValue(error.to_string())),
            };
            let shows = other_types || base.as_ref().is_some_and(|base| differ(base, &expected));
            if let Some((target, device)) = on {
                let layer = match compiled.take() {
                    Some(layer) => layer,
                    None => match Compiled::new(&graph, target, Arc::clone(device)) {
                        Ok(layer) => layer,
                        Err(Error::Unsupported { node, what }) => {
                            return Ok(Verdict::Unsupported(format!("{node}: {what}")));
                        }
                        Err(Error::Input(found)) => return refusal(&found, mutant),
                        Err(error) => return Err(format!("compiler: {error}")),
                    },
                };
                let found = layer.run(&data).map_err(|e| format!("run: {e}"))?;
                compiled = Some(layer);
                if let Err(why) = agree(&graph, &found, &expected) {
                    let why = || format!("compiled: {why} ({numbers:?})");
                    let of = |name: &str, wanted: &[f64]| limit(&graph, name, wanted);
                    apart = Some(sensitive::cause(&graph, &data, (&expected, &found), of).ok_or_else(why)?);
                    // Other data may tell more.
                    continue;
                }
            }
            if shows {
                return Ok(Verdict::Changed);
            }
        }
        match (apart, unseen::reason(&self.graph, &graph, mutant)) {
            (Some(cause), _) => Ok(Verdict::Numbers(cause)),
            (None, Some(reason)) => Ok(Verdict::Unseen(reason)),
            (None, None) => Err(UNSEEN.into()),
        }
    }
}

/// Settles changes that show in no result: they are taken where another change of the same attribute of the same
/// operation shows, in this graph or in another. Then the attribute is read, and here it makes no difference (a bound
/// that is not reached, a norm of weights that are 1). `round` belongs to nodes of every operation.
pub fn settle(judged: &mut [(Mutant, Result<Verdict, String>)]) {
    let place = |m: &Mutant| if m.attribute == "round" { m.attribute.clone() } else { m.place.clone() };
    let shown: BTreeSet<String> =
        judged.iter().filter(|(_, v)| *v == Ok(Verdict::Changed)).map(|(m, _)| place(m)).collect();
    for (mutant, verdict) in judged {
        if *verdict == Err(UNSEEN.to_owned()) && shown.contains(&place(mutant)) {
            *verdict = Ok(Verdict::Unseen(Reason::Inactive));
        }
    }
}

/// A refusal names the node that was changed, or another that follows from it, or the file.
fn refusal(found: &[Diagnostic], mutant: &Mutant) -> Result<Verdict, String> {
    let Some(first) = found.first() else { return Err("is refused without a finding".into()) };
    let placed = found.iter().any(|d| d.message.contains("node `") || d.message.contains("output `"));
    let of_file = mutant.node.is_empty() || found.iter().any(|d| d.message.contains("input `"));
    if placed || of_file {
        return Ok(Verdict::Refused(first.code.0));
    }
    Err(format!("is refused without a place: {} {}", first.code.0, first.message))
}

/// Types of the results: another shape of the same numbers is a change, too.
fn types(graph: &Graph) -> Vec<Option<Type>> {
    let graph = unseen::typed(graph);
    graph.outputs.iter().map(|o| graph.node(o.node).ty.clone()).collect()
}

/// Whether results differ by more than the rounding of f64.
fn differ(a: &Results, b: &Results) -> bool {
    if !a.keys().eq(b.keys()) {
        return true;
    }
    a.values().zip(b.values()).any(|(a, b)| {
        a.len() != b.len()
            || a.iter().zip(b).any(|(x, y)| x != y && (x.is_nan() != y.is_nan() || (x - y).abs() > 1e-12 * x.abs()))
    })
}

/// The graphs of both, written out, so that defaults and order of attributes do not count.
fn same_graph(a: &Graph, b: &Graph) -> bool {
    write_graph(a) == write_graph(b)
}

/// The object at a path of keys and positions.
fn at<'a>(value: &'a Value, path: &[Step]) -> Option<&'a Value> {
    path.iter().try_fold(value, |v, step| match step {
        Step::Key(key) => v.get(key),
        Step::Place(i) => v.get(i),
    })
}

fn at_mut<'a>(value: &'a mut Value, path: &[Step]) -> Option<&'a mut Value> {
    path.iter().try_fold(value, |v, step| match step {
        Step::Key(key) => v.get_mut(key),
        Step::Place(i) => v.get_mut(i),
    })
}

/// One step into JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Key(String),
    Place(usize),
}

/// The file with the value at the path changed; `None` removes it.
fn with(file: &Value, path: &[Step], new: Option<Value>) -> Value {
    let mut file = file.clone();
    let Some((last, parent)) = path.split_last() else { return file };
    match (at_mut(&mut file, parent), last, new) {
        (Some(Value::Object(map)), Step::Key(key), Some(new)) => {
            map.insert(key.clone(), new);
        }
        (Some(Value::Object(map)), Step::Key(key), None) => {
            map.shift_remove(key);
        }
        (Some(Value::Array(items)), Step::Place(i), Some(new)) => items[*i] = new,
        (Some(Value::Array(items)), Step::Place(i), None) => {
            items.remove(*i);
        }
        (Some(_) | None, _, _) => {}
    }
    file
}

/// An object of the file.
fn object<'a>(file: &'a Value, path: &[Step]) -> &'a Map<String, Value> {
    static EMPTY: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    at(file, path).and_then(Value::as_object).unwrap_or(&EMPTY)
}

/// A vector of each size that the graph has: weights for attributes that a graph does not use yet.
fn with_spare_weights(file: &Value) -> Value {
    let mut file = file.clone();
    let mut sizes: Vec<u64> = Vec::new();
    if let Some(tensors) = file.get("tensors").and_then(Value::as_object) {
        let all = tensors.values().filter_map(|t| t.get("shape")?.as_array()).flatten();
        sizes.extend(all.filter_map(Value::as_u64));
    }
    sizes.sort_unstable();
    sizes.dedup();
    if let Some(tensors) = file.as_object_mut().map(|f| f.entry("tensors").or_insert_with(|| json!({}))) {
        for size in sizes {
            tensors[format!("spare_{size}")] = json!({"dtype": "f32", "shape": [size]});
        }
    }
    file
}
