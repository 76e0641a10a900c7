//! Text to graph.

use super::lex::{Lexer, Parsed};
use crate::{
    Diagnostic, Graph, NodeId, Op, Packing, Part, Source, Type, View, Weight, WeightName, codes,
    nearest::nearest,
    ops::{Input, Kernel, KernelKind},
    outline::no_tensor,
    verify::MAX_DEPTH,
};
use indexmap::IndexMap;
use serde_json::{Map, Value};

/// Reads the text form. Stated types are taken over as they are; [`crate::verify`] compares them.
///
/// # Errors
/// The first thing that is wrong, with its place in the text.
#[expect(clippy::result_large_err, reason = "a text is read once")]
pub fn parse(text: &str) -> Result<Graph, Diagnostic> {
    let mut lexer = Lexer::new(text);
    graph(&mut lexer).map_err(|found| *found)
}

fn graph(lexer: &mut Lexer<'_>) -> Parsed<Graph> {
    lexer.want_word("moe.graph")?;
    let mut graph = Graph::new(at_name(lexer)?);
    graph.batch_dependent = lexer.eat_word("batch_dependent");
    body(lexer, &mut graph, None, 0)?;
    if lexer.at_end() { Ok(graph) } else { Err(lexer.expected("the end of the text")) }
}

fn at_name(lexer: &mut Lexer<'_>) -> Parsed<String> {
    lexer.want('@')?;
    lexer.name("a name")
}

type Names = IndexMap<String, NodeId>;
type Around<'a> = Option<&'a IndexMap<WeightName, Weight>>;

fn body(lexer: &mut Lexer<'_>, graph: &mut Graph, around: Around<'_>, depth: usize) -> Parsed<()> {
    let start = lexer.place();
    if depth > MAX_DEPTH {
        let text = format!("more than {MAX_DEPTH} kernels inside each other");
        return Err(lexer.error_at(start, codes::DEPTH, text));
    }
    lexer.want('{')?;
    let mut names = Names::new();
    while !lexer.eat('}') {
        let start = lexer.place();
        if lexer.peek() == Some('%') {
            node(lexer, graph, &mut names, depth)?;
            continue;
        }
        match lexer.word() {
            "use" => shared_weights(lexer, graph, around)?,
            "weights" => weights(lexer, graph)?,
            "return" => outputs(lexer, graph, &names)?,
            word => {
                let text = format!("expected a node, `weights`, `use`, `return` or `}}`, found `{word}`");
                return Err(if word.is_empty() {
                    lexer.expected("a node, `weights`, `use`, `return` or `}`")
                } else {
                    lexer.error_at(start, codes::SYNTAX, text)
                });
            }
        }
    }
    Ok(())
}

/// `use "gate.weight", "gate.bias"`: weights of the graph around a kernel.
fn shared_weights(lexer: &mut Lexer<'_>, graph: &mut Graph, around: Around<'_>) -> Parsed<()> {
    loop {
        let start = lexer.place();
        let name = lexer.string()?;
        let Some(weight) = around.and_then(|w| w.get(&name)) else {
            return Err(lexer.error_at(start, codes::NAME, format!("the graph around has no weight `{name}`")));
        };
        declare(lexer, graph, start, name, weight.clone())?;
        if !lexer.eat(',') {
            return Ok(());
        }
    }
}

fn declare(lexer: &Lexer<'_>, graph: &mut Graph, start: usize, name: String, weight: Weight) -> Parsed<()> {
    if graph.weights.contains_key(&name) {
        return Err(lexer.error_at(start, codes::NAME, format!("weight `{name}` is declared twice")));
    }
    graph.weights.insert(name, weight);
    Ok(())
}

fn weights(lexer: &mut Lexer<'_>, graph: &mut Graph) -> Parsed<()> {
    lexer.want('{')?;
    while !lexer.eat('}') {
        let start = lexer.place();
        let name = lexer.name("a weight or `}`")?;
        lexer.want(':')?;
        let dtype = lexer.dtype()?;
        let shape = lexer.extents()?;
        let mut source = Source::plain(name.clone());
        if lexer.eat_word("from") {
            source.tensor = lexer.string()?;
            if lexer.peek() == Some('{') {
                stored(lexer, &mut source)?;
            }
        }
        declare(lexer, graph, start, name, Weight { dtype, shape, source })?;
    }
    Ok(())
}

/// `{packing = .., view = ..}`.
fn stored(lexer: &mut Lexer<'_>, source: &mut Source) -> Parsed<()> {
    let start = lexer.place();
    for (key, value) in lexer.attributes()? {
        let result = match key.as_str() {
            "packing" => serde_json::from_value::<Packing>(value).map(|p| source.packing = p),
            "view" => serde_json::from_value::<Vec<View>>(value).map(|v| source.view = v),
            _ => Err(serde::de::Error::custom(format!("unknown attribute `{key}`, known are `packing` and `view`"))),
        };
        result.map_err(|e| lexer.error_at(start, codes::ATTRIBUTE, e.to_string()))?;
    }
    Ok(())
}

/// `return output = %y, topk_indices = %r.idx`.
fn outputs(lexer: &mut Lexer<'_>, graph: &mut Graph, names: &Names) -> Parsed<()> {
    loop {
        let name = lexer.name("an output")?;
        lexer.want('=')?;
        let start = lexer.place();
        lexer.want('%')?;
        let quoted = lexer.peek() == Some('"');
        let mut value = lexer.name("a value")?;
        let suffix = if quoted {
            lexer.word().to_owned()
        } else {
            let at = [".idx", ".w"].iter().find_map(|s| value.strip_suffix(s)).map_or(value.len(), str::len);
            value.split_off(at)
        };
        let part = match suffix.as_str() {
            "" => Part::Whole,
            ".idx" => Part::Idx,
            ".w" => Part::Weights,
            _ => return Err(lexer.error_at(start, codes::SYNTAX, format!("a value has no part `{suffix}`"))),
        };
        let node = lookup(lexer, names, &value, start)?;
        graph.output(name, node, part);
        if !lexer.eat(',') {
            return Ok(());
        }
    }
}

fn lookup(lexer: &Lexer<'_>, names: &Names, name: &str, start: usize) -> Parsed<NodeId> {
    names.get(name).copied().ok_or_else(|| {
        let found = lexer.error_at(start, codes::NAME, format!("`%{name}` is used before it is defined"));
        // Distances to all names of a large graph would take long.
        match nearest(name, names.keys().rev().take(1000).map(String::as_str)) {
            Some(near) => Box::new(found.help(format!("the nearest name is `%{near}`"))),
            None => found,
        }
    })
}

/// `%y = op %a, %b {..} : type round dtype`.
fn node(lexer: &mut Lexer<'_>, graph: &mut Graph, names: &mut Names, depth: usize) -> Parsed<()> {
    let start = lexer.place();
    lexer.want('%')?;
    let name = lexer.name("the name of a value")?;
    if names.contains_key(&name) {
        return Err(lexer.error_at(start, codes::NAME, format!("`%{name}` is defined twice")));
    }
    lexer.want('=')?;
    let op_start = lexer.place();
    let op_name = lexer.word();
    let kernel = match op_name.strip_prefix("kernel.") {
        Some(kind) => Some(kernel_head(lexer, kind, op_start)?),
        None => None,
    };
    if kernel.is_none() && !Op::NAMES.contains(&op_name) {
        return Err(unknown_op(lexer, op_name, op_start));
    }
    let mut short = None;
    if op_name == "input" && lexer.peek() == Some('"') {
        short = Some(lexer.string()?);
    }
    let mut operands = Vec::new();
    while lexer.peek() == Some('%') {
        let start = lexer.place();
        lexer.want('%')?;
        let operand = lexer.name("a value")?;
        operands.push(lookup(lexer, names, &operand, start)?);
        if !lexer.eat(',') {
            break;
        }
    }
    let attributes_start = lexer.place();
    // The brace after a kernel's type opens its body.
    let attributes = if kernel.is_none() && lexer.peek() == Some('{') { lexer.attributes()? } else { Map::new() };
    let attributes_span = lexer.span_from(attributes_start);
    let ty = if lexer.eat(':') { Some(lexer.ty()?) } else { None };
    let round = if lexer.eat_word("round") { Some(lexer.dtype()?) } else { None };
    let op = if let Some((kind, mut inner)) = kernel {
        body(lexer, &mut inner, Some(&graph.weights), depth + 1)?;
        Op::Kernel(Kernel { kind, body: Box::new(inner) })
    } else if let Some(name) = short {
        let ty = match &ty {
            Some(Type::Tensor(ty)) => ty.clone(),
            Some(Type::Route(_) | Type::Plan(_) | Type::Ragged(_)) => no_tensor(),
            None => return Err(lexer.expected("`:` and the type of the input")),
        };
        Op::Input(Input { name, ty })
    } else {
        let wrong = |e: String| {
            let message = format!("`%{name}` ({op_name}): {e}");
            Box::new(Diagnostic::error(codes::ATTRIBUTE, message).primary(attributes_span, "these attributes"))
        };
        Op::from_attributes(op_name, Value::Object(attributes))
            .ok_or_else(|| unknown_op(lexer, op_name, op_start))?
            .map_err(|e| wrong(e.to_string()))?
    };
    let id = graph.add(name.clone(), op, &operands);
    graph.set_type(id, ty);
    graph.set_round(id, round);
    names.insert(name, id);
    Ok(())
}

/// The kind, and the body's graph without its nodes.
fn kernel_head(lexer: &mut Lexer<'_>, kind: &str, start: usize) -> Parsed<(KernelKind, Graph)> {
    let Some(kind) = KernelKind::ALL.into_iter().find(|k| k.name() == kind) else {
        return Err(unknown_op(lexer, &format!("kernel.{kind}"), start));
    };
    let mut inner = Graph::new(at_name(lexer)?);
    inner.batch_dependent = lexer.eat_word("batch_dependent");
    Ok((kind, inner))
}

fn unknown_op(lexer: &mut Lexer<'_>, name: &str, start: usize) -> Box<Diagnostic> {
    if name.is_empty() {
        return lexer.expected("an operation");
    }
    let kernels: Vec<String> = KernelKind::ALL.iter().map(|k| format!("kernel.{}", k.name())).collect();
    let known = Op::NAMES.iter().copied().chain(kernels.iter().map(String::as_str));
    let message = format!("there is no operation `{name}`");
    let end = start + name.len();
    let found = Diagnostic::error(codes::UNKNOWN_OP, message).primary(crate::Span { start, end }, "this operation");
    Box::new(match nearest(name, known) {
        Some(near) => found.help(format!("the nearest name is `{near}`")),
        None => found,
    })
}
