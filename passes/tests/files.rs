//! Every pass on graphs for which it has something to do: `files/PASS.WHAT.moe` is the graph before it, the snapshot the
//! graph after it and what it remarks. The interpreter gives both graphs the same results.

use indexmap::IndexMap;
use moec_ir::{
    DType, Graph, Op, Weight, WeightName,
    interp::{Array, InterpError, Options, WeightIndex, Weights, interpret},
};
use moec_passes::{PIPELINE, run_named};
use std::{collections::BTreeSet, fs, path::Path};

const TOKENS: u64 = 6;

/// Numbers between -1 and 1 that follow from a name.
fn numbers(name: &str) -> impl Iterator<Item = f64> {
    let mut state = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}

/// Weights that follow from their names.
struct Invented;

impl Weights for Invented {
    fn get(&self, name: &WeightName, weight: &Weight, index: WeightIndex) -> Result<Array, InterpError> {
        let entry = index.expert.unwrap_or(0) as usize;
        let shape: Vec<usize> = weight.shape.iter().map(|x| x.of(entry).expect("a size") as usize).collect();
        let data = numbers(&index.apply(name)).take(shape.iter().product()).collect();
        Ok(Array::f64(shape, data))
    }
}

fn inputs(graph: &Graph) -> IndexMap<String, Array> {
    let of = |id| {
        let Op::Input(input) = &graph.node(id).op else { unreachable!("inputs are inputs") };
        let shape: Vec<usize> = input.ty.shape.iter().map(|d| d.eval(TOKENS).expect("a size") as usize).collect();
        let count = shape.iter().product();
        let array = match input.ty.dtype {
            DType::U8 | DType::I8 | DType::I32 | DType::I64 => {
                Array::i64(shape, (0..count).map(|i| i as i64 % 2).collect())
            }
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 | DType::F8e4m3 | DType::F8e5m2 => {
                Array::f64(shape, numbers(&input.name).take(count).collect())
            }
        };
        (input.name.clone(), array)
    };
    graph.inputs().into_iter().map(of).collect()
}

fn results(graph: &Graph) -> IndexMap<String, Vec<f64>> {
    let mut graph = graph.clone();
    graph.infer().expect("types");
    let found = interpret(&graph, &inputs(&graph), &Invented, Options::default()).expect("runs");
    found.into_iter().map(|(name, array)| (name, array.floats())).collect()
}

#[test]
fn passes_do_what_their_files_show() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    let mut files: Vec<_> = fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    let mut shown = BTreeSet::new();
    for file in files {
        let stem = file.file_stem().expect("a name").to_string_lossy().into_owned();
        let (name, _) = stem.split_once('.').expect("PASS.WHAT.moe");
        let pass = PIPELINE.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("there is no pass {name}"));
        shown.insert(pass.name);
        let before = moec_ir::parse(&fs::read_to_string(&file).expect("readable")).expect("IR text");
        let mut after = before.clone();
        let outcome = run_named(&mut after, &[name], false).expect("verifies").expect("the pass exists");
        let text = moec_ir::print(&after);
        assert_ne!(text, moec_ir::print(&before), "{stem}: the pass does nothing");
        let remarks: String = outcome.remarks.iter().map(|r| format!("// {}: {}\n", r.node, r.text)).collect();
        insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(stem.clone(), remarks + &text);
        });
        for ((output, was), (_, is)) in results(&before).iter().zip(&results(&after)) {
            assert_eq!(was.len(), is.len(), "{stem}: {output}");
            let largest = was.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
            let off = was.iter().zip(is).map(|(a, b)| (a - b).abs() / largest).fold(0.0, f64::max);
            assert!(off < 1e-12, "{stem}: {output} is off by {off:e}");
        }
    }
    let all: BTreeSet<_> = PIPELINE.iter().map(|p| p.name).collect();
    assert_eq!(shown, all, "every pass has a file");
}
