//! What a user may call a model: a config, its folder, a graph file, IR text.

use crate::{
    config::{identifier, model_name, read_config},
    json::{Value, decode, parse},
    model::{Facts, Form, Layer, LayerKind, Model},
    outline::outline,
    weights::small_file,
};
use moec_ir::{Code, DType, Diagnostic, Graph, Op, Severity, Span, json::Signature};
use std::path::Path;

/// Reads a model from a `config.json`, a folder that holds one, a graph file (`moec-graph-1`), or
/// IR text (`.moe`).
///
/// # Errors
/// All independent errors of the file.
pub fn read_model(path: &Path) -> Result<Model, Vec<Diagnostic>> {
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let file = path.to_string_lossy().into_owned();
    let one = |mut error: Diagnostic| {
        error.file.get_or_insert_with(|| file.clone());
        vec![error]
    };
    let bytes = small_file(&path).map_err(|mut error| {
        // The codes of weights files do not fit a model that is not there.
        error.code = Code("E0112");
        one(error.help("expected a config.json, a folder with one, a graph file or IR text"))
    })?;
    read_model_bytes(&bytes, &file)
}

/// As [`read_model`], from the bytes of a file; `file` names it in findings. Bytes without a file name (`-`)
/// are IR text when they start like one.
///
/// # Errors
/// As [`read_model`].
pub fn read_model_bytes(bytes: &[u8], file: &str) -> Result<Model, Vec<Diagnostic>> {
    let one = |mut error: Diagnostic| {
        error.file.get_or_insert_with(|| file.to_owned());
        vec![error]
    };
    let text = decode(bytes).map_err(one)?;
    let is_ir = Path::new(file).extension().is_some_and(|e| e == "moe")
        || (file == "-" && ["moe.graph", "//"].iter().any(|start| text.trim_start().starts_with(start)));
    if is_ir {
        let graph = moec_ir::parse(text).map_err(one)?;
        return read_graph(graph, file).map_err(|found| placed(found, |node| in_ir(text, node)));
    }
    let root = parse(text).map_err(one)?;
    if root.get("format").is_some() && root.get("nodes").is_some() {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let graph = moec_ir::json::read_graph(text, &Signature::default())
            .map_err(|errors| errors.into_iter().flat_map(one).collect::<Vec<_>>())
            .and_then(|graph| read_graph(graph, file));
        return graph.map_err(|found| placed(found, |node| in_json(&root, node)));
    }
    read_config(text, file)
}

/// Findings about a node, with the place of the node.
fn placed(mut found: Vec<Diagnostic>, place: impl Fn(&str) -> Option<Span>) -> Vec<Diagnostic> {
    for finding in found.iter_mut().filter(|f| f.labels.is_empty()) {
        if let Some(span) = finding.node.as_deref().and_then(&place) {
            *finding = finding.clone().primary(span, "this node");
        }
    }
    found
}

/// Where IR text defines a node: `%name` at the start of a line.
fn in_ir(text: &str, node: &str) -> Option<Span> {
    let mut at = 0;
    text.split_inclusive('\n').find_map(|line| {
        let start = at + (line.len() - line.trim_start().len());
        at += line.len();
        let (name, _) = line.split_once('=')?;
        let name = name.trim();
        (name.strip_prefix('%')?.trim_matches('"') == node).then_some(Span { start, end: start + name.len() })
    })
}

/// Where graph JSON names a node.
fn in_json(root: &Value, node: &str) -> Option<Span> {
    let ids = root.get("nodes")?.array()?.iter().filter_map(|n| n.get("id"));
    ids.into_iter().find(|id| id.string() == Some(node)).map(|id| id.span)
}

/// A model of one block: a graph that was read, checked; `file` names the model.
///
/// # Errors
/// What [`moec_ir::verify`] finds.
pub fn read_graph(mut graph: Graph, file: &str) -> Result<Model, Vec<Diagnostic>> {
    let named = |mut diagnostic: Diagnostic| {
        diagnostic.file.get_or_insert_with(|| file.to_owned());
        diagnostic
    };
    let found: Vec<Diagnostic> = moec_ir::verify(&graph).into_iter().map(named).collect();
    let (errors, warnings): (Vec<_>, Vec<_>) = found.into_iter().partition(|d| d.severity == Severity::Error);
    if !errors.is_empty() {
        return Err(errors);
    }
    graph.infer().map_err(|errors| errors.into_iter().map(named).collect::<Vec<_>>())?;
    let name = match model_name(file, "graph") {
        name if graph.name.is_empty() || graph.name == "graph" => name,
        _ => identifier(&graph.name),
    };
    graph.name.clone_from(&name);
    // The first input of floats is the stream; a graph without one has no width.
    let stream = graph.inputs().into_iter().find_map(|id| {
        if let Op::Input(input) = &graph.node(id).op {
            Some(input.ty.clone()).filter(|ty| ty.dtype.is_float())
        } else {
            None
        }
    });
    let dtype = stream.as_ref().map_or(DType::F32, |ty| ty.dtype);
    let hidden = stream.as_ref().and_then(|ty| ty.shape.last()?.known()).unwrap_or(0);
    let layers = vec![Layer { kind: LayerKind::Moe { form: 0 } }];
    let forms = vec![Form { graph, layers: vec![0], prefixes: vec![String::new()] }];
    let facts = Facts::default();
    let outline = outline(&name, dtype, hidden, &layers, &forms, &facts);
    Ok(Model { name, family: "graph".to_owned(), dtype, hidden, layers, forms, outline, facts, warnings })
}
