//! Properties of random graphs: text reads back, kernels mean what they replaced.

mod support;

use indexmap::IndexMap;
use moec_ir::{
    DType, Graph, NodeId, Op, Type,
    interp::{Array, Options, Rounding, interpret},
    json::{Signature, read_value, write_graph},
    ops::KernelKind,
    parse, print, verify,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use support::{Invented, Random, random_graph};

fn run(graph: &Graph, inputs: &IndexMap<String, Array>) -> IndexMap<String, Array> {
    let options = Options { rounding: Rounding::Model, ..Options::default() };
    interpret(graph, inputs, &Invented, options).unwrap()
}

/// Equal, where NaN equals NaN.
fn same(a: &IndexMap<String, Array>, b: &IndexMap<String, Array>) -> bool {
    let bits = |m: &IndexMap<String, Array>| -> Vec<_> {
        m.iter()
            .map(|(n, a)| (n.clone(), a.shape.clone(), a.floats().iter().map(|v| v.to_bits()).collect::<Vec<_>>()))
            .collect()
    };
    bits(a) == bits(b)
}

fn round_trip(graph: &Graph) {
    let text = print(graph);
    let again = parse(&text).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
    assert!(again == *graph, "{text}\n{}", print(&again));
    assert_eq!(print(&again), text);
}

/// A node with the operands that only it needs, at random.
fn region(graph: &Graph, random: &mut Random) -> Vec<NodeId> {
    let usable = |n: &NodeId| !matches!(graph.node(*n).op, Op::Input(_));
    let candidates: Vec<NodeId> = graph.ids().into_iter().filter(usable).collect();
    if candidates.is_empty() {
        return Vec::new();
    }
    let mut inside = BTreeSet::from([random.pick(&candidates)]);
    loop {
        let open: Vec<NodeId> = inside
            .iter()
            .flat_map(|n| graph.operands(*n))
            .filter(|n| {
                usable(n)
                    && !inside.contains(n)
                    && !graph.is_output(*n)
                    && graph.users(*n).iter().all(|u| inside.contains(u))
            })
            .collect();
        if open.is_empty() || random.below(5) == 0 {
            return inside.into_iter().collect();
        }
        inside.insert(random.pick(&open));
    }
}

type Flat = BTreeMap<String, (Op, Option<DType>, Option<Type>, Vec<String>)>;

/// Nodes by name, so that the order of creation does not count.
fn flat(graph: &Graph) -> Flat {
    graph
        .ids()
        .into_iter()
        .map(|id| {
            let node = graph.node(id).clone();
            let operands = graph.operands(id).into_iter().map(|o| graph.node(o).name.clone()).collect();
            (node.name, (node.op, node.round, node.ty, operands))
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn printed_graphs_read_back(seed: u64, steps in 0u64..24) {
        let (graph, _) = random_graph(seed, steps);
        round_trip(&graph);
        assert_eq!(verify(&graph), vec![]);
    }

    #[test]
    fn graphs_with_kernels_mean_the_same_and_read_back(seed: u64, steps in 1u64..20) {
        let (mut graph, inputs) = random_graph(seed, steps);
        let (expected, before) = (run(&graph, &inputs), graph.clone());
        let mut random = Random(seed ^ 1);
        let mut kernels = Vec::new();
        for i in 0..3 {
            let nodes = region(&graph, &mut random);
            if nodes.is_empty() {
                continue;
            }
            // The chosen node may have no user when it is dead; then it has no result.
            if let Ok(kernel) = graph.outline(&nodes, random.pick(&KernelKind::ALL), format!("k{i}")) {
                kernels.push(kernel);
            }
        }
        assert_eq!(verify(&graph), vec![]);
        graph.infer().unwrap();
        assert!(same(&run(&graph, &inputs), &expected));
        round_trip(&graph);
        assert!(moec_ir::dot(&graph).starts_with("digraph"));
        let again = read_value(&write_graph(&graph), &Signature::default()).unwrap();
        assert!(same(&run(&again, &inputs), &expected));
        graph.inline_all();
        assert!(same(&run(&graph, &inputs), &expected));
        assert_eq!(flat(&graph), flat(&before));
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[%@a-z0-9{}\\[\\]=:,\". ]{0,80}", seed: u64, cut: u16, byte: u8) {
        let _ = parse(&text);
        let (graph, _) = random_graph(seed, 6);
        let mut printed = print(&graph).into_bytes();
        let at = usize::from(cut) % printed.len();
        printed[at] = byte;
        if let Ok(text) = String::from_utf8(printed)
            && let Ok(mut graph) = parse(&text)
        {
            let _ = graph.infer();
            let _ = verify(&graph);
            let _ = print(&graph);
        }
    }
}
