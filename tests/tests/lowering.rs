//! What compositions must not cost: one test for each lowering requirement, by kernels, memory or counts.

use moec::{Target, runtime::Sim};
use moec_abi::{BufferKind, Program};
use moec_ir::{Graph, Op, ops::KernelKind};
use moec_sim::{Counts, Tally};
use moec_tests::{
    forms::{Form, networks},
    gallery::{Compiled, Data, Numbers, data, files, graph, run, stem},
};
use serde_json::{Value, json};
use std::sync::Arc;

/// The graph of kernels.
fn kernels(graph: &Graph) -> Graph {
    let mut kernels = graph.clone();
    moec_passes::run(&mut kernels, false).unwrap_or_else(|e| panic!("{e}"));
    kernels
}

/// Kernels of a graph: kind and operations inside.
fn bodies(graph: &Graph) -> Vec<(KernelKind, Vec<&'static str>)> {
    let kernel = |id| {
        let Op::Kernel(kernel) = &graph.node(id).op else { return None };
        let ops = kernel.body.order().into_iter().map(|n| kernel.body.node(n).op.name());
        Some((kernel.kind, ops.filter(|op| *op != "input").collect()))
    };
    graph.order().into_iter().filter_map(kernel).collect()
}

/// A form for the simulator, with data.
fn compiled(form: &Form, tokens: u64) -> (Arc<Sim>, Compiled, Data) {
    let graph = form.graph();
    let sim = Arc::new(Sim::new(moec_sim::Options::default()));
    let compiled = Compiled::new(&graph, Target::Sm80, Arc::clone(&sim) as _).unwrap_or_else(|e| panic!("{e}"));
    (sim, compiled, data(&graph, tokens, 1, Numbers::Small))
}

/// Counts of a run.
fn tally((sim, compiled, data): &(Arc<Sim>, Compiled, Data)) -> Tally {
    sim.take_counts();
    run(&compiled.layer(data).expect("binds"), data).expect("runs");
    sim.take_counts()
}

/// Elements of the largest buffer that is no weight.
fn largest(program: &Program, tokens: u64) -> u64 {
    let values = program.buffers.iter().filter(|b| !matches!(b.kind, BufferKind::Weight { .. }));
    let elements = |shape: &[moec_abi::Expr]| shape.iter().map(|n| n.eval(tokens).unwrap_or(u64::MAX)).product();
    values.map(|b| elements(&b.shape)).max().unwrap_or(0)
}

/// A layer whose route is data: ids `[T, slots]`, weight 1.
fn given(width: u64, experts: u64, slots: u64, bank: Value) -> Form {
    Form::new(width)
        .input("ids", "i32", &json!(["T", slots]))
        .networks(width, json!(width))
        .node("q", "select", &["ids"], json!({"rule": "given", "experts": experts}))
        .node("r", "weigh", &["q"], json!({"const": true}))
        .mixture(bank)
}

/// Counts of a layer with these ids.
fn routed(form: &Form, ids: &[i32], slots: usize) -> Counts {
    let mut run = compiled(form, (ids.len() / slots) as u64);
    run.2.set_ints("ids", ids);
    tally(&run).total
}

#[test]
fn one_the_gate_is_one_kernel() {
    let score = [("softmax", json!({})), ("unary", json!({"fn": "sigmoid"}))];
    let select = [
        json!({"rule": "topk", "k": 2}),
        json!({"rule": "rank", "ranks": [1, 0]}),
        json!({"rule": "all"}),
        json!({"rule": "topp", "p": 0.6}),
        json!({"rule": "threshold", "tau": 0.1, "max_k": 3, "min_k": 1}),
        json!({"rule": "threshold", "quantile": 0.5}),
        json!({"rule": "group_topk", "groups": 4, "k": 1}),
        json!({"rule": "group_limited", "groups": 4, "group_top": 2, "keep_groups": 2, "k": 3}),
    ];
    let adjust = [None, Some(json!({"add": "bias"})), Some(json!({"off": [3], "on": [1]}))];
    let weigh = [json!({"norm": "sum"}), json!({"fn": "softmax", "scale": 2.0}), json!({"expert_scale": "bias"})];
    for (op, attributes) in &score {
        for (i, rule) in select.iter().enumerate() {
            for adjust in &adjust {
                let mut form = Form::new(32)
                    .tensor("router", json!([8, 32]))
                    .tensor("bias", json!([8]))
                    .networks(32, json!(16))
                    .node("l", "linear", &["x"], json!({"w": "router"}))
                    .node("s", op, &["l"], attributes.clone());
                let scores = if let Some(adjust) = adjust {
                    form = form.node("a", "adjust", &["s"], adjust.clone());
                    "a"
                } else {
                    "s"
                };
                let form = form
                    .node("q", "select", &[scores], rule.clone())
                    .node("r", "weigh", &["q", "s"], weigh[i % weigh.len()].clone())
                    .mixture(json!([networks([0, 8])]));
                let kernels = kernels(&form.graph());
                let bodies = bodies(&kernels);
                let gates: Vec<_> = bodies.iter().filter(|(kind, _)| *kind == KernelKind::Gate).collect();
                let chain = 4 + usize::from(adjust.is_some());
                assert_eq!(gates.len(), 1, "{op} {rule} {adjust:?}: {bodies:?}");
                assert_eq!(gates[0].1.len(), chain, "{op} {rule} {adjust:?}: {bodies:?}");
                // Gate, plan, two products, combine.
                assert_eq!(bodies.len(), 5, "{bodies:?}");
            }
        }
    }
    // No value of a token has a number for each expert. (Logits of larger routers have a kernel of their own on GPUs.)
    let form = Form::new(16).router(128, 2, 16).networks(16, json!(8)).mixture(json!([networks([0, 128])]));
    let (_, compiled, _) = compiled(&form, 4);
    assert!(largest(compiled.program(), 1000) < 1000 * 128, "scores are written");
}

#[test]
fn two_rows_are_not_padded_and_empty_experts_are_free() {
    let width = 64u64;
    let few = given(width, 4, 1, json!([networks([0, 4])]));
    let many = given(width, 64, 1, json!([networks([0, 64])]));
    let even: Vec<i32> = (0..128).map(|i| i % 4).collect();
    let (used, skewed) = (routed(&few, &even, 1), routed(&few, &[2; 128], 1));
    let flops = |c: &Counts| c.tensor_flops + c.float_flops;
    assert!(flops(&skewed) <= flops(&used), "all rows to one expert: {} {}", flops(&skewed), flops(&used));
    let empty = routed(&many, &even, 1);
    assert_eq!(flops(&used), flops(&empty), "experts without rows compute nothing");
    // Their places in the sort are read by every thread of a block, but no matrix of theirs: not half of one.
    let more = (empty.global_bytes_read - used.global_bytes_read) / 60;
    assert!(more < width * width * 2, "{more} bytes for each empty expert");
}

#[test]
fn two_null_experts_are_free_and_identity_is_folded() {
    let with = |kind: &str| given(32, 8, 2, json!([networks([0, 4]), {"ids": [4, 8], "kind": kind}]));
    let real: Vec<i32> = (0..64).map(|i| i % 4).collect();
    let half: Vec<i32> = (0..64).map(|i| if i % 2 == 0 { i % 4 } else { 4 + i % 4 }).collect();
    let none: Vec<i32> = (0..64).map(|i| 4 + i % 4).collect();
    for kind in ["zero", "identity"] {
        let form = with(kind);
        let flops = |ids: &[i32]| {
            let counts = routed(&form, ids, 2);
            counts.tensor_flops + counts.float_flops
        };
        let (all, half, none) = (flops(&real), flops(&half), flops(&none));
        assert!(half as f64 <= 0.6 * all as f64, "{kind}: {half} of {all}");
        assert!(none as f64 <= 0.05 * all as f64, "{kind}: {none} of {all}");
        // Neither takes a product, nor memory for rows of its own.
        let kinds: Vec<KernelKind> = bodies(&kernels(&form.graph())).into_iter().map(|(kind, _)| kind).collect();
        let plain = given(32, 8, 2, json!([networks([0, 8])]));
        let without: Vec<KernelKind> = bodies(&kernels(&plain.graph())).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, without, "{kind}");
    }
}

/// Floating-point operations of the kernels whose names say so.
fn flops_of(tally: &Tally, wanted: impl Fn(&str) -> bool) -> u64 {
    let mine = tally.kernels.iter().filter(|(name, _)| wanted(name));
    mine.map(|(_, c)| c.tensor_flops + c.float_flops).sum()
}

/// Ids of 64 tokens: the first `slots` of four experts, from another one on for each token.
fn neighbours(slots: i32) -> Vec<i32> {
    (0..64).flat_map(|t| (0..slots).map(move |s| (t + s) % 4)).collect()
}

#[test]
fn three_the_base_product_runs_once_per_token() {
    let (width, rank) = (128u64, 16u64);
    let form = |slots: i32| {
        let mut form = Form::new(width)
            .input("ids", "i32", &json!(["T", slots]))
            .node("q", "select", &["ids"], json!({"rule": "given", "experts": 4}))
            .node("r", "weigh", &["q"], json!({"const": true}));
        let mut part = json!({"ids": [0, 4], "kind": "ffn", "act": "silu"});
        for name in ["gate", "up", "down"] {
            let [base, a, b] = [format!("{name}.w"), format!("{name}.a.{{e}}"), format!("{name}.b.{{e}}")];
            form = form
                .tensor(&base, json!([width, width]))
                .tensor(&a, json!([rank, width]))
                .tensor(&b, json!([width, rank]));
            part[name] = json!({"base": base, "a": a, "b": b, "scale": 2.0});
        }
        form.mixture(json!([part]))
    };
    // The shared matrices of gate and up are kernels of their own; that of down multiplies the sum over slots.
    let is_base = |name: &str| name.contains("_base") || name.contains("dense");
    let flops = |slots: i32| {
        let mut run = compiled(&form(slots), 64);
        run.2.set_ints("ids", &neighbours(slots));
        let tally = tally(&run);
        (flops_of(&tally, is_base), flops_of(&tally, |_| true))
    };
    let ((one, _), (base, composed)) = (flops(1), flops(4));
    assert_eq!(one, base, "the base depends on the slots");
    let each = 2 * 64 * width * width;
    assert!((3 * each..=3 * each + each / 8).contains(&base), "{base} for three products of {each}");
    // Twelve products of a plain layer against three, and factors of which half a tile is empty.
    assert!(composed < 12 * each * 4 / 5, "{composed} of {}", 12 * each);
}

#[test]
fn four_shared_factors_run_once_per_token_and_group() {
    let (width, rank) = (128u64, 32u64);
    let run = |groups: [u64; 4]| {
        let mut form = Form::new(width)
            .input("ids", "i32", &json!(["T", 4]))
            .tensor("down.{e}", json!([width, width]))
            .node("q", "select", &["ids"], json!({"rule": "given", "experts": 4}))
            .node("r", "weigh", &["q"], json!({"const": true}));
        let mut part = json!({"ids": [0, 4], "kind": "ffn", "act": "silu", "down": "down.{e}"});
        for name in ["gate", "up"] {
            let [a, b] = [format!("{name}.a.{{e}}"), format!("{name}.b.{{g}}")];
            form = form.tensor(&a, json!([width, rank])).tensor(&b, json!([rank, width]));
            part[name] = json!({"mul": [a, b], "group": groups});
        }
        let mut run = compiled(&form.mixture(json!([part])), 64);
        run.2.set_ints("ids", &neighbours(4));
        run
    };
    let is_shared = |name: &str| name.contains("_inner");
    let flops = |groups| flops_of(&tally(&run(groups)), is_shared);
    let (own, pairs, all) = (flops([0, 1, 2, 3]), flops([0, 1, 0, 1]), flops([2, 2, 2, 2]));
    assert_eq!((pairs * 2, all * 4), (own, own), "{all} with one group, {pairs} with two, {own} with four");
    // The factors alone are packed: no matrix of the full size but those of down.
    let (_, compiled, _) = run([0, 1, 0, 1]);
    let packed: u64 = compiled.program().slots.iter().map(|s| s.bytes).sum();
    let factors = 2 * (4 + 2) * rank * width * 4;
    let needed = factors + 4 * width * width * 4;
    assert!((needed..=needed + needed / 20).contains(&packed), "{packed} bytes for {needed}");
}

#[test]
fn thirteen_codes_are_decoded_in_the_kernel() {
    let (width, inner, group) = (128u64, 128u64, 64u64);
    let form = |bits: Option<u64>| {
        let mut form = Form::new(width).input("ids", "i32", &json!(["T", 1]));
        let mut part = json!({"ids": [0, 2], "kind": "ffn", "act": "silu"});
        for (name, out, input) in [("gate", inner, width), ("up", inner, width), ("down", width, inner)] {
            let Some(bits) = bits else { continue };
            let [codes, scale, zero] = ["codes", "scale", "zero"].map(|of| format!("{name}.{{e}}.{of}"));
            form = form
                .typed(&codes, "i32", json!([out, input]))
                .tensor(&scale, json!([out, input / group]))
                .tensor(&zero, json!([out, input / group]));
            part[name] =
                json!({"codes": codes, "scale": scale, "zero": zero, "group_size": group, "bits": [bits, bits]});
        }
        let form = if bits.is_some() { form } else { form.networks(width, json!(inner)) };
        form.node("q", "select", &["ids"], json!({"rule": "given", "experts": 2}))
            .node("r", "weigh", &["q"], json!({"const": true}))
            .mixture(if bits.is_some() { json!([part]) } else { json!([networks([0, 2])]) })
    };
    let read = |bits| {
        let mut run = compiled(&form(bits), 16);
        run.2.set_ints("ids", &[0; 16]);
        let packed: u64 = run.1.program().slots.iter().map(|s| s.bytes).sum();
        (tally(&run).total.global_sectors * 32, packed)
    };
    let values = 3 * width * inner;
    let (plain, _) = read(None);
    // What moves besides the f32 weights is the same for all.
    let rest = plain - 4 * values;
    for bits in [2u64, 4, 8] {
        let (bytes, packed) = read(Some(bits));
        let (codes, scales) = (values * bits / 8, 2 * 4 * values / group);
        assert_eq!(packed, 2 * (codes + scales), "{bits} bits: packed bytes of two experts");
        let weights = bytes - rest;
        let share = weights as f64 / (codes + scales) as f64;
        assert!((0.99..=1.1).contains(&share), "{bits} bits: {weights} bytes move for {codes} and {scales}");
    }
}

/// Products of experts have a kernel for few tokens, and two with `wgmma`, which take a tensor map: for few and for many
/// rows of an expert; all read the same codes.
fn check_hopper_kernels(name: &str, program: &moec_abi::Program) {
    let of_product = |product: &str| {
        let kernels = program.launches.iter().filter(|l| l.symbol.contains(product));
        let kinds = kernels.map(|l| {
            let map = l.args.iter().find_map(|a| if let moec_abi::Arg::TensorMap(map) = a { Some(map) } else { None });
            let moec_abi::Grid::Gpu(grid) = &l.grid else { panic!("{name}: {} runs on no GPU", l.name) };
            let weights = match (map, &l.args[1]) {
                (Some(map), _) => map.buffer,
                (None, moec_abi::Arg::Buffer(buffer)) => *buffer,
                (None, other) => panic!("{name}: {} reads {other:?}", l.name),
            };
            (grid.tokens[0] == 0, map.is_some(), weights)
        });
        kinds.collect::<Vec<_>>()
    };
    for product in ["_up", "_down"] {
        let kinds = of_product(product);
        let weights = kinds.first().map(|k| k.2).unwrap_or_default();
        let expected = [(true, false, weights), (false, true, weights), (false, true, weights)];
        assert_eq!(kinds, expected, "{name}: kernels of {product}");
    }
}

#[test]
fn thirteen_codes_of_checkpoints_stay_codes() {
    // One block of 128 x 128 codes, or 32 codes, shares a scale; kernels keep one for each row of a block.
    let fp8 = |values: u64| (values, values / 128 * 4);
    let mxfp4 = |values: u64| (values / 2, values / 32);
    for (name, bytes) in [("minimax-m2", fp8 as fn(u64) -> (u64, u64)), ("gpt-oss-120b", mxfp4)] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("models/{name}/config.json"));
        let text = std::fs::read_to_string(path).expect("the file is part of the repository");
        let model = moec_frontend::read_config(&text, name).expect("the config is one");
        for target in [Target::X86V4Amx, Target::Sm90a] {
            let compiler = moec::Compiler { targets: vec![target], ..moec::Compiler::default() };
            let artefact = compiler.compile(&model).expect("compiles");
            let program = &artefact.manifest.programs[0];
            let of = |rows: fn(&moec_abi::Slot) -> bool| -> Vec<&moec_abi::Slot> {
                program.slots.iter().filter(|s| s.experts > 1 && rows(s)).collect()
            };
            if target == Target::Sm90a {
                check_hopper_kernels(name, program);
            }
            let coded = |packing: &moec_abi::Packing| {
                matches!(packing, moec_abi::Packing::Fp8Codes | moec_abi::Packing::Mxfp4Codes)
            };
            let codes: u64 = program
                .slots
                .iter()
                .filter(|s| s.matrices.iter().all(|m| coded(&m.source.packing)))
                .map(|s| s.bytes)
                .sum();
            let values: u64 = 3 * {
                let slot = of(|s| s.matrices.len() == 2).first().copied().expect("gate and up are packed together");
                let (rows, _) = slot.size_of(0).expect("sizes are equal");
                let down = of(|s| s.matrices.len() == 1).first().copied().expect("down is packed");
                let (width, _) = down.size_of(0).expect("sizes are equal");
                slot.experts * rows * width
            };
            let (all, scales) = bytes(values);
            // Rows and columns are padded to whole tiles.
            assert!((all..=all + all / 20).contains(&codes), "{name} on {}: {codes} bytes for {all}", target.name());
            let whole: u64 = of(|s| s.layout != moec_abi::Layout::Rows { columns: 1 }).iter().map(|s| s.bytes).sum();
            assert!(whole <= (all + scales) * 21 / 20, "{name} on {}: {whole} for {all} and {scales}", target.name());
        }
    }
}

#[test]
fn five_work_follows_the_widths() {
    let of = |widths: Value| {
        Form::new(64)
            .input("ids", "i32", &json!(["T", 1]))
            .networks(64, widths)
            .node("q", "select", &["ids"], json!({"rule": "given", "experts": 4}))
            .node("r", "weigh", &["q"], json!({"const": true}))
            .mixture(json!([networks([0, 4])]))
    };
    let ids: Vec<i32> = (0..64).map(|i| i % 4).collect();
    let flops = |form: &Form| {
        let counts = routed(form, &ids, 1);
        (counts.tensor_flops + counts.float_flops) as f64
    };
    let full = flops(&of(json!([64, 64, 64, 64])));
    let half = flops(&of(json!([128, 0, 0, 0])));
    let quarter = flops(&of(json!([0, 0, 64, 0])));
    assert!((0.45..=0.55).contains(&(half / full)), "{}", half / full);
    assert!((0.2..=0.3).contains(&(quarter / full)), "{}", quarter / full);
    // Memory of the inner activation too: it is as wide as the widest, not the sum.
    let (_, wide, _) = compiled(&of(json!([128, 0, 0, 0])), 64);
    assert!(largest(wide.program(), 1000) <= 1000 * 128);
}

#[test]
fn six_product_keys_form_nothing_of_the_square() {
    let n = 64;
    let form = Form::new(16)
        .tensor("query", json!([16, 16]))
        .tensor("k1", json!([n, 8]))
        .tensor("k2", json!([n, 8]))
        .tensor("u", json!([n * n, 16]))
        .tensor("v", json!([n * n, 16]))
        .node("p", "linear", &["x"], json!({"w": "query"}))
        .node("q", "product_key", &["p"], json!({"kind": "sum", "k1": "k1", "k2": "k2", "k": 4}))
        .node("r", "weigh", &["q"], json!({"fn": "softmax"}))
        .mixture(json!([{"ids": [0, n * n], "kind": "neuron", "u": "u", "v": "v", "act": "gelu"}]));
    let run = compiled(&form, 8);
    assert!(largest(run.1.program(), 1) < n * n, "a value has an entry for each pair");
    let shared = run.1.program().launches.iter().map(|l| match &l.grid {
        moec_abi::Grid::Gpu(grid) => u64::from(grid.shared),
        moec_abi::Grid::Cpu(_) => 0,
    });
    assert!(shared.max().unwrap_or(0) < 4 * 8 * n * n, "a block has an entry for each pair");
    // A token reads the neurons that it uses, four of 4096, not the tables.
    let read = tally(&run).total.global_bytes_read;
    assert!(read < 4 * 16 * n * n, "{read} bytes are read");
}

#[test]
fn seven_monet_forms_nothing_of_the_square() {
    let (n, heads, m) = (24u64, 2u64, 2u64);
    let mut form = Form::new(16).tensor("up", json!([n * m, 16])).tensor("down", json!([16, n * m]));
    for gate in ["1", "2"] {
        let [weight, flat, row, softmax] = ["w", "f", "z", "g"].map(|part| format!("{part}{gate}"));
        form = form
            .tensor(&weight, json!([heads * n, 16]))
            .node(&flat, "linear", &["x"], json!({"w": weight}))
            .node(&row, "shape", &[&flat], json!({"fn": "reshape", "to": [-1, heads, n]}))
            .node(&softmax, "softmax", &[&row], json!({}));
    }
    let form = form
        .node("h0", "linear", &["x"], json!({"w": "up"}))
        .node("h1", "unary", &["h0"], json!({"fn": "relu2"}))
        .node("h2", "shape", &["h1"], json!({"fn": "reshape", "to": [-1, n, m]}))
        .node("e0", "einsum", &["h2", "g1", "g2"], json!({"eq": "tim,thi,thj->tjm"}))
        .node("e1", "shape", &["e0"], json!({"fn": "reshape", "to": [-1, n * m]}))
        .node("y", "linear", &["e1"], json!({"w": "down"}))
        .output("output", "y");
    let run = compiled(&form, 8);
    assert!(largest(run.1.program(), 1000) < 1000 * n * n, "a token has an entry for each pair");
    tally(&run);
    // First over i, then over j and heads: two products of two operands, none with both axes of the gates.
    let kernels = kernels(&form.graph());
    let products = bodies(&kernels).iter().flat_map(|(_, ops)| ops.clone()).filter(|op| *op == "einsum").count();
    assert_eq!(products, 2);
    for id in kernels.order() {
        let Some(moec_ir::Type::Tensor(ty)) = &kernels.node(id).ty else { continue };
        let each: u64 = ty.shape.iter().skip(1).filter_map(moec_ir::Dim::known).product();
        assert!(each < n * n, "{} has {each} numbers a token", kernels.node(id).name);
    }
}

#[test]
fn eight_blocks_that_are_not_chosen_are_not_read() {
    let (tokens, block, blocks) = (64u64, 8u64, 8u64);
    let form = |k: u64| {
        Form::default()
            .input("q", "f32", &json!([tokens, 1, 16]))
            .input("k", "f32", &json!([tokens, 1, 16]))
            .input("v", "f32", &json!([tokens, 1, 16]))
            .input("scores", "f32", &json!([tokens, blocks]))
            .node("a", "adjust", &["scores"], json!({"causal_block": block, "tokens": tokens}))
            .node("r", "select", &["a"], json!({"rule": "topk", "k": k}))
            .node("y", "attention", &["q", "k", "v"], json!({"blocks": "r", "block": block}))
            .output("output", "y")
    };
    let attention = |k: u64| {
        let tally = tally(&compiled(&form(k), tokens));
        let found = tally.kernels.iter().find(|(name, _)| !name.contains("gate"));
        found.map(|(_, counts)| counts.global_bytes_read).expect("there is an attention kernel")
    };
    let (one, all) = (attention(1), attention(blocks));
    assert!(one * 3 < all, "one block of eight reads {one} bytes, all read {all}");
}

#[test]
fn nine_a_segment_is_routed_once() {
    let repeat = 4u64;
    let form = Form::default()
        .input("x", "f32", &json!([64, 16]))
        .tensor("router", json!([8, 16 * repeat]))
        .networks(16, json!(16))
        .node("v", "shape", &["x"], json!({"fn": "reshape", "to": [-1, 16 * repeat]}))
        .node("l", "linear", &["v"], json!({"w": "router"}))
        .node("s", "softmax", &["l"], json!({}))
        .node("q", "select", &["s"], json!({"rule": "topk", "k": 2}))
        .node("r", "weigh", &["q", "s"], json!({"norm": "sum"}))
        .node("d", "dispatch", &["x", "r"], json!({"repeat": repeat}))
        .node("e", "experts", &["d"], json!({"bank": [networks([0, 8])]}))
        .node("y", "combine", &["e", "r"], json!({"repeat": repeat}))
        .output("output", "y");
    let (_, compiled, _) = compiled(&form, 64);
    let program = compiled.program();
    let gate = program.launches.iter().find(|l| l.name.contains("gate")).expect("there is a gate");
    // The last argument of a gate is the number of its rows.
    let Some(moec_abi::Arg::Value(rows)) = gate.args.last() else { panic!("a gate knows its rows") };
    assert_eq!(rows.eval(64), Some(16), "64 tokens are 16 segments");
    // Ids and weights are kept once per segment.
    let routes: Vec<u64> = program
        .buffers
        .iter()
        .filter(|b| b.name.contains("idx"))
        .map(|b| b.shape.first().and_then(|n| n.eval(64)).unwrap_or(0))
        .collect();
    assert!(!routes.is_empty() && routes.iter().all(|rows| *rows == 16), "{routes:?}");
}

#[test]
fn ten_a_route_from_an_earlier_value_needs_nothing_of_the_layer() {
    for name in ["pre_gated_2layer", "smallthinker_softmax", "smallthinker_sigmoid"] {
        let Some(path) = files("models/systems", "json").into_iter().find(|p| stem(p) == name) else { continue };
        let kernels = kernels(&graph(&path));
        let is_gate = |id: &moec_ir::NodeId| matches!(&kernels.node(*id).op, Op::Kernel(kernel) if kernel.kind == KernelKind::Gate);
        let gates: Vec<_> = kernels.order().into_iter().filter(is_gate).collect();
        assert!(!gates.is_empty(), "{name} has a gate");
        for gate in gates {
            // Inputs alone: a planner can run the gate, and fetch the experts, before any layer runs.
            let inputs = kernels.operands(gate).into_iter().all(|o| matches!(kernels.node(o).op, Op::Input(_)));
            assert!(inputs, "{name}: `{}` waits for another kernel", kernels.node(gate).name);
        }
        // And they do run first.
        let sim = Arc::new(Sim::new(moec_sim::Options::default()));
        let compiled = Compiled::new(&graph(&path), Target::Sm80, sim as _).unwrap_or_else(|e| panic!("{e}"));
        let launches: Vec<&str> = compiled.program().launches.iter().map(|l| l.name.as_str()).collect();
        let last_gate = launches.iter().rposition(|name| name.contains("gate"));
        let first_other = launches.iter().position(|name| !name.contains("gate"));
        assert!(last_gate < first_other, "{name}: {launches:?}");
    }
}

#[test]
fn eleven_a_loop_uses_the_same_weights() {
    let body = |i: &str| {
        json!([{"id": "l", "op": "linear", "in": ["c"], "w": format!("router.{i}")},
            {"id": "s", "op": "softmax", "in": ["l"]},
            {"id": "q", "op": "select", "in": ["s"], "rule": "topk", "k": 2},
            {"id": "r", "op": "weigh", "in": ["q", "s"]},
            {"id": "d", "op": "dispatch", "in": ["c", "r"]},
            {"id": "e", "op": "experts", "in": ["d"], "bank": [networks([0, 8])]},
            {"id": "m", "op": "combine", "in": ["e", "r"]},
            {"id": "n", "op": "binary", "in": ["c", "m"], "fn": "add"}])
    };
    let form = |n: u64| {
        let mut form = Form::new(32).networks(32, json!(16));
        for i in 0..n {
            form = form.tensor(&format!("router.{i}"), json!([8, 32]));
        }
        form.node("c", "unary", &["x"], json!({"fn": "identity"}))
            .node("o", "loop", &[], json!({"n": n, "carry": "c", "next": "n", "body": body("{i}")}))
            .output("output", "o")
    };
    let banks = |n: u64| {
        let (_, compiled, _) = compiled(&form(n), 4);
        let slots: Vec<(String, u64)> =
            compiled.program().slots.iter().filter(|s| s.experts > 1).map(|s| (s.name.clone(), s.bytes)).collect();
        (slots, compiled.program().launches.len())
    };
    let ((once, launches), (thrice, more)) = (banks(1), banks(3));
    assert_eq!(once, thrice, "the bank is packed once");
    assert!(more > launches, "{launches} {more}");
}

#[test]
fn twelve_the_narrow_value_is_dispatched() {
    let (hidden, narrow, inner) = (32u64, 8u64, 24u64);
    let form = Form::new(hidden)
        .router(8, 2, hidden)
        .tensor("descend", json!([narrow, hidden]))
        .tensor("ascend", json!([hidden, narrow]))
        .tensor("up.{e}", json!([inner, narrow]))
        .tensor("down.{e}", json!([narrow, inner]))
        .node("v", "linear", &["x"], json!({"w": "descend"}))
        .node("d", "dispatch", &["v", "r"], json!({}))
        .node(
            "e",
            "experts",
            &["d"],
            json!({"bank": [
            {"ids": [0, 8], "kind": "ffn", "act": "gelu", "up": "up.{e}", "down": "down.{e}"}]}),
        )
        .node("m", "combine", &["e", "r"], json!({}))
        .node("y", "linear", &["m"], json!({"w": "ascend"}))
        .output("output", "y");
    let kernels = kernels(&form.graph());
    let width = |id| match kernels.node(id).ty.as_ref() {
        Some(moec_ir::Type::Tensor(ty)) => ty.shape.last().and_then(moec_ir::Dim::known),
        Some(moec_ir::Type::Ragged(ty)) => Some(ty.row.iter().product()),
        Some(moec_ir::Type::Route(_) | moec_ir::Type::Plan(_)) | None => None,
    };
    let mut seen = 0;
    for id in kernels.order() {
        let Op::Kernel(kernel) = &kernels.node(id).op else { continue };
        // What is gathered for experts, and what they give back, is narrow.
        let crosses = match kernel.kind {
            KernelKind::Up => kernels.operands(id).first().and_then(|o| width(*o)),
            KernelKind::Down => width(id),
            KernelKind::Gate
            | KernelKind::Plan
            | KernelKind::Dense
            | KernelKind::Combine
            | KernelKind::Rows
            | KernelKind::Attention
            | KernelKind::Batch => continue,
        };
        seen += 1;
        assert_eq!(crosses, Some(narrow), "{}", kernels.node(id).name);
    }
    assert_eq!(seen, 2);
    let bodies = bodies(&kernels);
    let experts = bodies.iter().position(|(kind, _)| *kind == KernelKind::Up).expect("there are experts");
    let descend = bodies.iter().position(|(kind, ops)| *kind != KernelKind::Gate && ops.contains(&"linear"));
    assert!(descend.is_some_and(|at| at < experts), "{bodies:?}");
}
