//! Layers that are spread over ranks: the results of all ranks together are those of one device.
//!
//! Forty mappings are drawn from a seed, over layers of six families with small sizes. For each, the graph of every
//! rank is interpreted (all ranks in step) and compiled and run (ranks as threads, collectives in memory). Tokens
//! start where the attention mapping leaves them.

use moec::{
    Compiler, host_target, ir,
    plan::{Mapping, ranks::Layout},
    ranks::{Spread, interpret_spread, run_ranks},
    run::{Input, Weights, prepare},
    runtime::{Cpu, Device},
};
use moec_tests::draw::Draw;
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

const MAPPINGS: u64 = 40;

/// Configs of real models with other sizes: gate and up apart, shared experts, biases and interleaved halves,
/// weighted inputs, packed halves, identity experts.
const FAMILIES: [&str; 6] =
    ["qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "llama4-maverick", "granite-3.0-3b-a800m", "longcat-flash"];

/// A config with `experts` experts.
fn config(family: &str, experts: u64) -> Value {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/models")).join(family).join("config.json");
    let text = std::fs::read_to_string(path).expect("the model is there");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    let sizes = match family {
        "qwen3-30b-a3b" => json!({"hidden_size": 24, "moe_intermediate_size": 12, "num_experts": experts,
            "num_experts_per_tok": 3, "num_hidden_layers": 1}),
        "deepseek-v3" => json!({"hidden_size": 32, "moe_intermediate_size": 16, "n_routed_experts": experts,
            "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_hidden_layers": 2,
            "first_k_dense_replace": 1, "quantization_config": null}),
        "gpt-oss-120b" => json!({"hidden_size": 32, "intermediate_size": 24, "num_local_experts": experts,
            "num_experts_per_tok": 2, "experts_per_token": 2, "num_hidden_layers": 1, "quantization_config": null}),
        "llama4-maverick" => json!({"hidden_size": 24, "intermediate_size": 16, "intermediate_size_mlp": 32,
            "num_local_experts": experts, "num_hidden_layers": 2, "moe_layers": [1]}),
        "granite-3.0-3b-a800m" => json!({"hidden_size": 16, "intermediate_size": 20, "num_local_experts": experts,
            "num_experts_per_tok": 3, "num_hidden_layers": 1}),
        _ => json!({"hidden_size": 24, "expert_ffn_hidden_size": 16, "n_routed_experts": experts,
            "zero_expert_num": 3, "moe_topk": 3, "num_layers": 1}),
    };
    config["torch_dtype"] = json!("float32");
    let inner = if family == "llama4-maverick" { &mut config["text_config"] } else { &mut config };
    inner["torch_dtype"] = json!("float32");
    for (key, value) in sizes.as_object().expect("an object") {
        if value.is_null() {
            inner.as_object_mut().expect("an object").remove(key);
        } else {
            inner[key] = value.clone();
        }
    }
    config
}

/// A mapping, a placement, and a number of tokens.
struct Case {
    family: &'static str,
    experts: u64,
    spread: Spread,
    tokens: u64,
}

fn case(number: u64) -> Case {
    let mut draw = Draw(number * 7919 + 3);
    let family = FAMILIES[(number % 6) as usize];
    let gpus = draw.of(&[2, 4, 4, 8]);
    let ways = |draw: &mut Draw, left: u64| {
        let choices: Vec<u64> = [1, 2, 4, 8].into_iter().filter(|n| left.is_multiple_of(*n)).collect();
        draw.of(&choices)
    };
    let pp = if draw.below(5) == 0 { 2 } else { 1 };
    let tp = ways(&mut draw, gpus / pp);
    let cp = ways(&mut draw, gpus / pp / tp);
    let etp = draw.of(&[1, 1, 2]).min(gpus / pp);
    let one_each = number % 5 == 4;
    let ep = if one_each { gpus / pp / etp } else { ways(&mut draw, gpus / pp / etp) };
    let experts = if one_each { (ep * draw.of(&[1, 1, 2])).max(4) } else { draw.of(&[4, 6, 8]).max(ep) };
    let layout = Layout::new(gpus, &Mapping { tp, cp, pp, ep, etp }).expect("the mapping fits");
    // Every third mapping has replicas, in slots that are drawn; each expert has at least one.
    let placement = (number % 3 == 1).then(|| {
        let mut slots: Vec<u64> = (0..experts).collect();
        while !(slots.len() as u64).is_multiple_of(ep) || (slots.len() as u64) < experts + ep {
            slots.push(draw.below(experts));
        }
        for i in (1..slots.len()).rev() {
            slots.swap(i, draw.below(i as u64 + 1) as usize);
        }
        vec![slots]
    });
    // A rank may hold nothing but copies of one expert; it must hold something that moves.
    let tokens = draw.of(&[1, 3, 13, 24]);
    Case { family, experts, spread: Spread { layout, placement }, tokens }
}

/// Largest difference, relative to the largest expected value.
fn difference(got: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let top = wanted.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    got.iter()
        .zip(wanted)
        .map(|(g, w)| if g.is_nan() { f64::INFINITY } else { (g - w).abs() / top })
        .fold(0.0, f64::max)
}

/// Interprets, compiles and runs one case.
fn check(number: u64) -> Result<(), String> {
    let Case { family, experts, spread, tokens } = case(number);
    let about = format!("{number}: {family}, {experts} experts, {:?}, {tokens} tokens", spread);
    let failed = |e: moec::Error| format!("{about}: {e}");
    let text = config(family, experts).to_string();
    let source = moec::read::bytes(text.as_bytes(), "config.json").map_err(|d| format!("{about}: {d:?}"))?;
    let compiler = Compiler { targets: vec![host_target()], ..Compiler::default() };
    let compiled = compiler.compile_forms(&source.model.name, &source.model.forms[..1]).map_err(failed)?;
    let artefact = Arc::new(compiled.load().map_err(failed)?);
    let device: Arc<dyn Device> = Arc::new(Cpu::new(1));
    let whole = prepare(&artefact, &device, None, &Weights::Random(number)).map_err(failed)?;
    let (_, inputs) = whole.inputs(&Input::Random(tokens)).map_err(failed)?;
    let outputs = whole.launch(tokens, &inputs).map_err(failed)?.outputs;
    let graph = &compiled.forms[0].graph;

    let ranks = spread.ranks().map_err(failed)?;
    let slots = spread.placement.as_ref().map(|p| p[0].as_slice());
    let mut graphs = Vec::new();
    for rank in &ranks {
        graphs.push((*rank, spread.fold(graph, slots, *rank).map_err(failed)?));
    }
    for (rank, folded) in &graphs {
        let text = ir::print(folded);
        let again = ir::parse(&text).map_err(|d| format!("{about}: the graph of rank {rank} reads back as {d:?}"))?;
        if again != *folded {
            return Err(format!("{about}: the text of rank {rank} reads back as another graph\n{text}"));
        }
    }
    let one = Layout::new(1, &Mapping::ONE).expect("one rank");
    let alone = Spread { layout: one, placement: None };
    let at = (whole.tensors(), whole.prefix());
    let expected = interpret_spread(&alone, &[(0, graph.clone())], at, (tokens, &inputs)).map_err(failed)?;
    let folded = interpret_spread(&spread, &graphs, at, (tokens, &inputs)).map_err(failed)?;
    let off = difference(&folded["output"], &expected["output"]);
    if off > 1e-12 {
        return Err(format!("{about}: the folded graphs mean something else: {off:.1e}"));
    }

    let mut artefacts = Vec::new();
    for (rank, artefact) in ranks.iter().zip(compiler.compile_ranks(&source.model, &spread, &ranks).map_err(failed)?) {
        artefacts.push((*rank, artefact.load().map_err(failed)?));
    }
    let make = || -> Arc<dyn Device> { Arc::new(Cpu::new(1)) };
    let layer = whole.layer().number();
    let found = run_ranks(&spread, &artefacts, &make, layer, whole.tensors(), (tokens, &inputs)).map_err(failed)?;
    let output = found.iter().find(|t| t.name == "output").ok_or("no output")?;
    let against_one = difference(&output.numbers(), &outputs[0].numbers());
    let against_reference = difference(&output.numbers(), &expected["output"]);
    if against_one > 1e-5 || against_reference > 2e-5 {
        return Err(format!("{about}: off by {against_one:.1e}, {against_reference:.1e} from the reference"));
    }
    Ok(())
}

#[test]
fn folded_layers_equal_unfolded_ones() {
    let cases: Vec<Case> = (0..MAPPINGS).map(case).collect();
    let count = |what: &dyn Fn(&Case) -> bool| cases.iter().filter(|c| what(c)).count();
    let empty = |c: &Case| (0..c.spread.layout.gpus).any(|r| c.spread.layout.tokens(r, c.tokens).unwrap().is_empty());
    let kinds = [
        ("cut experts", count(&|c| c.spread.layout.mapping().etp > 1)),
        ("context parallel", count(&|c| c.spread.layout.mapping().cp > 1)),
        ("replicas", count(&|c| c.spread.placement.is_some())),
        ("one expert per rank", count(&|c| c.spread.placement.is_none() && c.spread.layout.mapping().ep == c.experts)),
        ("a rank without tokens", count(&empty)),
        ("pipeline", count(&|c| c.spread.layout.mapping().pp > 1)),
    ];
    for (what, n) in kinds {
        assert!(n >= 3, "{what}: {n} of {MAPPINGS} mappings");
    }
    let (next, failures) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= MAPPINGS {
                        break;
                    }
                    if let Err(failure) = check(number) {
                        failures.lock().expect("no thread panics").push(failure);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no thread panics");
    assert!(failures.is_empty(), "{} of {MAPPINGS} differ\n{}", failures.len(), failures.join("\n"));
}

/// The spread for a small mapping of a small layer, and the graph of a layer.
fn small(family: &str) -> (Spread, ir::Graph) {
    let text = config(family, 4).to_string();
    let source = moec::read::bytes(text.as_bytes(), "config.json").expect("a config");
    let layout = Layout::new(4, &Mapping { tp: 2, cp: 1, pp: 1, ep: 2, etp: 2 }).expect("fits");
    (Spread { layout, placement: None }, source.model.forms[0].graph.clone())
}

#[test]
fn what_cannot_be_spread_is_refused() {
    let (spread, graph) = small("qwen3-30b-a3b");
    let none = Spread { placement: Some(vec![vec![0, 1, 2, 2]]), ..spread.clone() };
    let error = none.fold(&graph, Some(&[0, 1, 2, 2]), 0).expect_err("expert 3 is nowhere");
    assert!(error.to_string().contains("expert 3 is on no rank"), "{error}");
    let many = Layout::new(8, &Mapping { tp: 1, cp: 1, pp: 1, ep: 8, etp: 1 }).expect("fits");
    let error = Spread { layout: many, placement: None }.fold(&graph, None, 0).expect_err("4 experts, 8 ranks");
    assert!(error.to_string().contains("holds no expert"), "{error}");
    let wide = Layout::new(16, &Mapping { tp: 1, cp: 1, pp: 1, ep: 1, etp: 16 }).expect("fits");
    let error = Spread { layout: wide, placement: None }.fold(&graph, None, 0).expect_err("12 into 16");
    assert!(error.to_string().contains("cannot be cut into 16"), "{error}");
}

#[test]
fn the_graph_of_a_rank_reads_like_this() {
    let (spread, graph) = small("gpt-oss-120b");
    let folded = spread.fold(&graph, None, 3).expect("folds");
    insta::assert_snapshot!("rank_3_of_4", ir::print(&folded));
    let chain = moec::passes::stages(&folded).expect("cuts");
    let steps: Vec<String> = chain
        .iter()
        .map(|stage| match stage {
            moec::passes::Stage::Run(part) => ir::print(part),
            moec::passes::Stage::Move(op) => {
                let kind = op.op.group();
                format!("{:?} -> {:?} over {} {:?}\n", op.from, op.to, kind.name, kind.ranks)
            }
        })
        .collect();
    insta::assert_snapshot!("chain_of_rank_3", steps.join("\n"));
}
