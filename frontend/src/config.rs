//! A `config.json` to a checked model.

use crate::{
    check,
    family::{Draft, FAMILIES, Family},
    json::{Kind, Member, Value, cut, parse_object},
    keys::{Keys, Refused},
    limits,
    model::{Facts, Form, LatentAttention, Layer, LayerKind, Model},
    outline::outline,
    quantization::quantization,
};
use moec_ir::{Code, DType, Diagnostic, NodeId, Span, nearest};

/// Reads the text of a `config.json`; `file` is its name in messages, and names the model.
///
/// # Errors
/// All independent errors of the config, at most [`limits::ERRORS`].
pub fn read_config(text: &str, file: &str) -> Result<Model, Vec<Diagnostic>> {
    let named = |mut diagnostic: Diagnostic| {
        diagnostic.file = Some(file.to_owned());
        diagnostic
    };
    let root = parse_object(text).map_err(|error| vec![named(error)])?;
    let members = root.object().unwrap_or(&[]);
    let (family, model_type) = family_of(members).map_err(|error| vec![named(error)])?;

    let mut keys = Keys::new(members, &model_type);
    not_finite(&mut keys, &root);
    let draft = read_family(&mut keys, family, members);
    // A model without mixture is refused for that alone; its readers stop early.
    if !keys.errors.iter().any(|e| e.code.0 == "E0215") {
        check::unused(&mut keys);
    }
    let Keys { mut errors, warnings, dtype, .. } = keys;
    let (draft, facts) = match draft {
        Ok(read) if errors.is_empty() => read,
        Ok(_) | Err(Refused) => {
            for error in errors.iter_mut().filter(|e| e.labels.is_empty()) {
                *error = error.clone().primary(type_span(members), format!("in this {model_type} config"));
            }
            errors.sort_by_key(|e| e.labels.first().map_or(0, |l| l.span.start));
            errors.truncate(limits::ERRORS);
            return Err(errors.into_iter().map(named).collect());
        }
    };
    let name = model_name(file, &model_type);
    let Draft { hidden, layers: blocks } = draft;
    let (layers, mut forms) = share(blocks, &model_type);
    for form in &mut forms {
        form.graph.infer().map_err(|errors| errors.into_iter().map(named).collect::<Vec<_>>())?;
    }
    if forms.is_empty() {
        let error = Diagnostic::error(Code("E0215"), "nothing to compile: every layer is dense")
            .primary(type_span(members), format!("{model_type} without a mixture layer"));
        return Err(vec![named(error)]);
    }
    let outline = outline(&name, dtype, hidden, &layers, &forms, &facts);
    let warnings = warnings.into_iter().map(named).collect();
    Ok(Model { name, family: model_type, dtype, hidden, layers, forms, outline, facts, warnings })
}

/// All model types that are known, sorted.
pub fn families() -> Vec<&'static str> {
    let mut all: Vec<&str> = FAMILIES.iter().flat_map(|f| f.types.iter().copied()).collect();
    all.sort_unstable();
    all
}

fn read_family(keys: &mut Keys<'_>, family: &Family, root: &[Member]) -> Result<(Draft, Facts), Refused> {
    keys.ignore(&["model_type", "architectures"]);
    if keys.model_type == "qwen3_omni_moe" {
        keys.enter("thinker_config");
    }
    keys.enter("text_config");
    keys.ignore(&["model_type", "architectures", "text_config", "thinker_config", "talker_config"]);
    architectures(keys, family, root);
    keys.dtype = dtype(keys);
    keys.quant = quantization(keys);
    let draft = (family.read)(keys);
    let facts = facts(keys, draft.as_ref().map_or(0, |d| d.hidden));
    Ok((draft?, facts))
}

/// Finds the family by `model_type`.
fn family_of(root: &[Member]) -> Result<(&'static Family, String), Diagnostic> {
    let Some(member) = root.iter().find(|m| m.key == "model_type") else {
        let error = Diagnostic::error(Code("E0204"), "model_type is missing")
            .help("it names the family, as in \"model_type\": \"mixtral\"");
        return Err(match root.first() {
            Some(first) => error.primary(first.key_span, "not in this object"),
            None => error,
        });
    };
    let Value { span, kind } = &member.value;
    let name = match kind {
        Kind::String(name) => name,
        Kind::Null => {
            return Err(Diagnostic::error(Code("E0204"), "model_type is null").primary(*span, "a value is needed"));
        }
        Kind::Bool(_) | Kind::Number(_) | Kind::NotFinite(_) | Kind::Array(_) | Kind::Object(_) => {
            return Err(Diagnostic::error(Code("E0201"), format!("model_type is {}, expected a string", member.value))
                .primary(*span, "wrong kind"));
        }
    };
    let found = FAMILIES.iter().find(|f| f.types.contains(&name.as_str()));
    found.map(|f| (f, name.clone())).ok_or_else(|| {
        if !speaks_of_experts(root) {
            return Diagnostic::error(Code("E0215"), "nothing to compile: the model has no experts")
                .primary(*span, "a dense model: no key counts experts")
                .help("moec compiles mixture-of-experts layers");
        }
        let known = families();
        let near = nearest(name, known.iter().copied()).map_or(String::new(), |n| format!("did you mean {n}? "));
        Diagnostic::error(Code("E0205"), format!("unknown model_type \"{}\"", cut(name)))
            .primary(*span, "no such family")
            .help(format!("{near}known families: {}", known.join(", ")))
    })
}

/// Whether a key, here or in a nested object, is about a mixture.
fn speaks_of_experts(members: &[Member]) -> bool {
    members
        .iter()
        .any(|m| m.key.contains("expert") || m.key.contains("moe") || m.value.object().is_some_and(speaks_of_experts))
}

/// `E0206`: the class belongs to another family.
fn architectures(keys: &mut Keys<'_>, family: &Family, root: &[Member]) {
    let classes = root.iter().find(|m| m.key == "architectures").and_then(|m| m.value.array());
    for class in classes.unwrap_or(&[]) {
        let Some(stem) = class.string().and_then(|c| c.split_once("For")).map(|(stem, _)| stem) else { continue };
        let other = FAMILIES.iter().find(|f| f.classes.contains(&stem));
        if let Some(other) = other.filter(|_| !family.classes.contains(&stem)) {
            keys.errors.push(
                Diagnostic::error(
                    Code("E0206"),
                    format!("model_type is {}, but architectures names {}", keys.model_type, other.types[0]),
                )
                .primary(type_span(root), format!("says {}", keys.model_type))
                .secondary(class.span, format!("the class of {}", other.types[0]))
                .help("one of the two is wrong; they must name the same family"),
            );
        }
    }
}

fn type_span(root: &[Member]) -> Span {
    root.iter().find(|m| m.key == "model_type").map_or(Span::default(), |m| m.value.span)
}

/// Type of the model.
fn dtype(keys: &mut Keys<'_>) -> DType {
    let known = [
        ("bfloat16", Some(DType::Bf16)),
        ("torch.bfloat16", Some(DType::Bf16)),
        ("float16", Some(DType::F16)),
        ("torch.float16", Some(DType::F16)),
        ("float32", Some(DType::F32)),
        ("torch.float32", Some(DType::F32)),
        ("auto", None),
    ];
    keys.choice(&["torch_dtype", "dtype"], None, &known).unwrap_or_else(|| {
        keys.warnings.push(
            Diagnostic::warning(Code("W0203"), "no torch_dtype; assuming bfloat16")
                .help("set \"torch_dtype\" to the type of the weights"),
        );
        DType::Bf16
    })
}

/// `E0111`: `NaN` and `Infinity`, except where releases are known to hold them.
fn not_finite(keys: &mut Keys<'_>, root: &Value) {
    // Mamba mixtures are released with an unbounded limit; the mixture does not use it.
    const KNOWN: &[&str] = &["time_step_limit"];
    let mut open: Vec<&Value> = vec![root];
    while let Some(value) = open.pop() {
        match &value.kind {
            Kind::Object(members) => {
                open.extend(members.iter().filter(|m| !KNOWN.contains(&m.key.as_str())).map(|m| &m.value))
            }
            Kind::Array(items) => open.extend(items),
            Kind::NotFinite(text) => keys.errors.push(
                Diagnostic::error(Code("E0111"), format!("{text} is not JSON"))
                    .primary(value.span, "JSON has no such number")
                    .help("Python writes NaN and Infinity; write a finite number, or null"),
            ),
            Kind::Null | Kind::Bool(_) | Kind::Number(_) | Kind::String(_) => {}
        }
    }
}

/// Shapes outside the mixture.
fn facts(keys: &mut Keys<'_>, hidden: u64) -> Facts {
    let mut fact = |names: &[&str]| -> Option<u64> {
        let found = keys.quiet(names)?;
        matches!(found.value.kind, Kind::Number(_) | Kind::String(_) | Kind::Bool(_) | Kind::NotFinite(_))
            .then(|| keys.whole(found.key, found.value, 0, limits::SIZE).value)
    };
    let heads = fact(&["num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads"]);
    let kv_heads = fact(&["num_key_value_heads", "kv_n_heads"]);
    let head_dim = fact(&["head_dim", "attention_head_dim", "kv_channels", "d_kv"]);
    let vocab = fact(&["vocab_size"]);
    let dense_intermediate = fact(&[
        "dense_intermediate_size",
        "intermediate_size_mlp",
        "intermediate_size",
        "ffn_hidden_size",
        "d_ff",
        "encoder_ffn_dim",
    ]);
    let latent =
        (fact(&["kv_lora_rank"]), fact(&["qk_nope_head_dim"]), fact(&["qk_rope_head_dim"]), fact(&["v_head_dim"]));
    let query_rank = fact(&["q_lora_rank"]);
    let latent = match latent {
        (Some(kv_rank), Some(nope), Some(rope), Some(value)) => {
            Some(LatentAttention { query_rank, kv_rank, nope, rope, value })
        }
        _ => None,
    };
    let tied = keys.quiet(&["tie_word_embeddings"]).is_some_and(|f| f.value.kind == Kind::Bool(true));
    Facts {
        heads,
        kv_heads: kv_heads.or(heads),
        head_dim: head_dim.or_else(|| heads.filter(|h| *h > 0).map(|h| hidden / h)),
        latent,
        vocab,
        dense_intermediate,
        tied_embeddings: tied,
    }
}

/// Layers with equal blocks share a form.
fn share(blocks: Vec<Option<crate::block::MoeLayer>>, family: &str) -> (Vec<Layer>, Vec<Form>) {
    let mut forms: Vec<Form> = Vec::new();
    let mut layers = Vec::with_capacity(blocks.len());
    for (block, i) in blocks.into_iter().zip(0u64..) {
        let kind = match block {
            None => LayerKind::Dense,
            Some(block) => match forms.iter_mut().enumerate().find(|(_, f)| same_block(&f.graph, &block.graph)) {
                Some((form, shared)) => {
                    shared.layers.push(i);
                    shared.prefixes.push(block.prefix);
                    LayerKind::Moe { form }
                }
                None => {
                    forms.push(Form::of(i, block));
                    LayerKind::Moe { form: forms.len() - 1 }
                }
            },
        };
        layers.push(Layer { kind });
    }
    let stem = identifier(family);
    for (i, form) in forms.iter_mut().enumerate() {
        form.graph.name = if i == 0 { stem.clone() } else { format!("{stem}_{i}") };
    }
    (layers, forms)
}

/// Whether two blocks are the same; both were built node by node in the same order.
fn same_block(a: &moec_ir::Graph, b: &moec_ir::Graph) -> bool {
    let nodes = |g: &moec_ir::Graph| -> Vec<NodeId> { g.ids() };
    a.weights == b.weights
        && a.outputs == b.outputs
        && a.batch_dependent == b.batch_dependent
        && nodes(a) == nodes(b)
        && nodes(a).iter().all(|n| a.node(*n) == b.node(*n) && a.operands(*n) == b.operands(*n))
}

/// Name of the model: its folder, or the file.
pub(crate) fn model_name(file: &str, family: &str) -> String {
    let mut parts = file.rsplit(['/', '\\']).filter(|p| !p.is_empty());
    let last = parts.next().unwrap_or("");
    let stem = last.strip_suffix(".json").unwrap_or(last);
    let name = if stem == "config" { parts.next().unwrap_or(family) } else { stem };
    let name = if matches!(name, "." | ".." | "-" | "") { family } else { name };
    identifier(name)
}

/// A C identifier that resembles the text.
pub fn identifier(text: &str) -> String {
    let mut name: String =
        text.chars().take(64).map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect();
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        name.insert(0, 'm');
    }
    name
}
