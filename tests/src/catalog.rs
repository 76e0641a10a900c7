//! The page `docs/systems.md`: each graph of the gallery, its works, its composition, and the kernels that it became.

use crate::gallery::{files, graph};
use moec_ir::{Graph, NodeId, Op, json::About, ops::BankPart};
use serde_json::Value;
use std::fmt::Write as _;

/// The page, from the graph files alone.
///
/// # Panics
/// When a file says nothing about itself, or a pass fails.
pub fn page() -> String {
    let mut page = String::from(
        "# Research architectures\n\n\
         Made by `MOEC_BLESS=1 cargo test -p moec-tests --test docs` from the graphs of `tests/models/systems/`. Each \
         is compiled and run in the tests, on the CPU and on the simulator. *Composition* is the graph as written; \
         *kernels* are the launches that it became, each with the operations inside it. `moec list families \
         --systems` prints the list; `moec compile tests/models/systems/NAME.json -o DIR` compiles one.\n",
    );
    for path in files("models/systems", "json") {
        let text = std::fs::read_to_string(&path).expect("the file can be read");
        let about = About::of(&text).unwrap_or_else(|| panic!("{} has no `about`", path.display()));
        let graph = graph(&path);
        let mut kernels = graph.clone();
        moec_passes::run(&mut kernels, false).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let _ = write!(page, "\n## {}\n\n{}.{}\n", graph.name, capital(&about.special), works(&about));
        let _ = writeln!(page, "\n- composition: {}", composition(&graph));
        let _ = writeln!(page, "- kernels: {}", launches(&kernels));
    }
    page
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn works(about: &About) -> String {
    let each = |work: &moec_ir::json::Work| {
        let links: Vec<String> = work.arxiv.iter().map(|id| format!("[{id}](https://arxiv.org/abs/{id})")).collect();
        if links.is_empty() { work.name.clone() } else { format!("{} ({})", work.name, links.join(", ")) }
    };
    let names: Vec<String> = about.works.iter().map(each).collect();
    if names.is_empty() { String::new() } else { format!(" {}.", names.join("; ")) }
}

/// The operations of a graph in order.
fn composition(graph: &Graph) -> String {
    let steps: Vec<String> = graph
        .order()
        .into_iter()
        .filter(|id| !matches!(graph.node(*id).op, Op::Input(_)))
        .map(|id| step(graph, id))
        .collect();
    runs(&steps).join(" → ")
}

/// The kernels of a graph in order, each with its operations.
fn launches(graph: &Graph) -> String {
    let mut steps = Vec::new();
    for id in graph.order() {
        let Op::Kernel(kernel) = &graph.node(id).op else { continue };
        let body = &kernel.body;
        let inner: Vec<String> = body
            .order()
            .into_iter()
            .filter(|n| !matches!(body.node(*n).op, Op::Input(_)))
            .map(|n| body.node(n).op.name().to_owned())
            .collect();
        steps.push(format!("**{}** ({})", kernel.kind.name(), runs(&inner).join(", ")));
    }
    runs(&steps).join(" → ")
}

/// Neighbours that are equal, counted.
fn runs(steps: &[String]) -> Vec<String> {
    let equal = steps.chunk_by(|a, b| a == b);
    equal.map(|run| if run.len() == 1 { run[0].clone() } else { format!("{} × {}", run.len(), run[0]) }).collect()
}

/// An operation with the attributes that say what it does.
fn step(graph: &Graph, id: NodeId) -> String {
    let op = &graph.node(id).op;
    let mut text = format!("`{}", op.name());
    if let Op::Experts(experts) = op {
        let kinds: Vec<String> = experts.bank.iter().map(part).collect();
        let _ = write!(text, " {}", kinds.join(", "));
    } else if let Ok(Value::Object(attributes)) = op.attributes() {
        for (key, value) in &attributes {
            match (key.as_str(), value) {
                ("fn" | "kind" | "rule" | "act" | "eq" | "priority", Value::String(name)) => {
                    let _ = write!(text, " {name}");
                }
                ("norm", Value::String(name)) => {
                    let _ = write!(text, " norm {name}");
                }
                (_, Value::Number(n)) => {
                    let _ = write!(text, " {key} {n}");
                }
                (_, Value::Bool(true)) => {
                    let _ = write!(text, " {key}");
                }
                ("axis" | "range" | "to" | "perm" | "ranks" | "on" | "off", list) => {
                    let _ = write!(text, " {key} {list}");
                }
                _ => {}
            }
        }
    }
    text + "`"
}

/// Experts of a part, their kind and storage.
fn part(part: &BankPart) -> String {
    let kind = serde_json::to_value(&part.kind).ok().and_then(|v| v.get("kind")?.as_str().map(str::to_owned));
    let forms: Vec<&str> = part
        .specs()
        .into_iter()
        .filter_map(|(_, spec)| match spec {
            moec_ir::WeightSpec::Plain(_) => None,
            moec_ir::WeightSpec::Mul { .. } => Some("factors"),
            moec_ir::WeightSpec::Base { .. } => Some("base and low rank"),
            moec_ir::WeightSpec::Grouped { .. } => Some("codes"),
            moec_ir::WeightSpec::Ternary { .. } => Some("ternary codes"),
            moec_ir::WeightSpec::Slice { .. } => Some("slices"),
            moec_ir::WeightSpec::Take { .. } => Some("index sets"),
        })
        .collect();
    let form = forms.first().map_or_else(String::new, |form| format!(" of {form}"));
    format!("{}..{} {}{form}", part.ids[0], part.ids[1], kind.unwrap_or_default())
}
