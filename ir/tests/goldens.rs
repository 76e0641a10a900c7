//! Every graph of the reference vectors: the JSON reads, types, verifies and interprets to the expected values.

use indexmap::IndexMap;
use moec_ir::{
    DType, Diagnostic, Dim, Extent, Graph, Severity, TensorType, Type,
    interp::{Array, ArrayData, MapWeights, Options, Value, interpret},
    json::{Signature, TensorShape, read_graph, write_graph},
    parse, print, verify,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::path::{Path, PathBuf};

/// One file of vectors.
struct Case {
    name: String,
    graph: String,
    weights: MapWeights,
    signature: Signature,
    inputs: IndexMap<String, Array>,
    expected: IndexMap<String, Array>,
}

fn folder() -> PathBuf {
    std::env::var_os("MOEC_VECTORS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens-systems"), PathBuf::from)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the vectors have these types only")]
fn array(view: &TensorView<'_>) -> (DType, Array) {
    let shape = view.shape().to_vec();
    let bytes = view.data();
    let (dtype, data) = match view.dtype() {
        Dtype::F64 => {
            let v = bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
            (DType::F64, ArrayData::F64(v))
        }
        Dtype::F32 => {
            let v = bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
            (DType::F32, ArrayData::F64(v))
        }
        Dtype::I32 => {
            let v = bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect();
            (DType::I32, ArrayData::I64(v))
        }
        other => panic!("vectors hold no {other:?}"),
    };
    (dtype, Array { shape, data })
}

fn load(path: &Path) -> Option<Case> {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let graph = metadata["graph"].clone();
    if graph.is_empty() {
        return None;
    }
    let mut case = Case {
        name: metadata["case"].clone(),
        graph,
        weights: MapWeights::default(),
        signature: Signature::default(),
        inputs: IndexMap::new(),
        expected: IndexMap::new(),
    };
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<String> = file.names().into_iter().map(ToOwned::to_owned).collect();
    names.sort();
    for name in names {
        let (dtype, value) = array(&file.tensor(&name).unwrap());
        let sizes = || value.shape.iter().map(|n| *n as u64);
        if let Some(weight) = name.strip_prefix("weights.") {
            let shape = sizes().map(Extent::Fixed).collect();
            case.signature.tensors.insert(weight.to_owned(), TensorShape { dtype, shape });
            case.weights.0.insert(weight.to_owned(), value);
        } else if let Some(input) = name.strip_prefix("inputs.") {
            let shape = sizes().map(Dim::Const).collect();
            case.signature.inputs.insert(input.to_owned(), TensorType { dtype, shape });
            case.inputs.insert(input.to_owned(), value);
        } else if let Some(expected) = name.strip_prefix("expected.") {
            case.expected.insert(expected.to_owned(), value);
        }
    }
    Some(case)
}

fn cases() -> Vec<Case> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder()).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files.iter().filter_map(|f| load(f)).collect()
}

fn read(case: &Case) -> Graph {
    let graph = read_graph(&case.graph, &case.signature).unwrap_or_else(|e| panic!("{}: {e:#?}", case.name));
    let errors: Vec<Diagnostic> = verify(&graph).into_iter().filter(|d| d.severity == Severity::Error).collect();
    assert!(errors.is_empty(), "{}: {errors:#?}", case.name);
    graph
}

/// Largest difference, relative to the largest value; slots beyond the expected ones must be empty.
fn compare(case: &str, name: &str, actual: &Array, expected: &Array, tolerance: f64) {
    let (mut a, e) = (actual.clone(), expected.clone());
    if name.starts_with("topk") || name.ends_with("indices") {
        a = narrow(case, name, &a, e.shape[1]);
    }
    assert_eq!(a.shape, e.shape, "{case}: shape of {name}");
    if let (Some(a), Some(e)) = (a.ints(), e.ints()) {
        assert_eq!(a, e, "{case}: {name}");
        return;
    }
    let (a, e) = (a.floats(), e.floats());
    let scale = e.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    for (i, (x, y)) in a.iter().zip(&e).enumerate() {
        assert!((x - y).abs() <= tolerance * scale, "{case}: {name}[{i}] is {x}, expected {y}");
    }
}

fn narrow(case: &str, name: &str, array: &Array, slots: usize) -> Array {
    let [rows, have] = array.shape[..] else { panic!("{case}: {name} has shape {:?}", array.shape) };
    let values = array.floats();
    let mut kept = Vec::new();
    for row in 0..rows {
        for slot in 0..have {
            let v = values[row * have + slot];
            if slot < slots {
                kept.push(v);
            } else {
                assert!(v == 0.0 || v == -1.0, "{case}: {name} has {v} in a slot beyond {slots}");
            }
        }
    }
    let data = match array.data {
        ArrayData::F64(_) => ArrayData::F64(kept),
        ArrayData::I64(_) => ArrayData::I64(kept.into_iter().map(|v| v as i64).collect()),
    };
    Array { shape: vec![rows, slots], data }
}

fn check(case: &Case, graph: &Graph) {
    let results = interpret(graph, &case.inputs, &case.weights, Options::default())
        .unwrap_or_else(|e| panic!("{}: {e}", case.name));
    compare(&case.name, "output", &results["output"], &case.expected["output_ref"], 1e-9);
    for (name, value) in &results {
        compare(&case.name, name, value, &case.expected[name], 1e-6);
    }
}

#[test]
fn every_graph_gives_the_expected_values() {
    let cases = cases();
    assert!(cases.len() >= 45, "only {} graphs", cases.len());
    for case in &cases {
        check(case, &read(case));
    }
}

#[test]
fn every_graph_is_the_same_after_writing_and_reading() {
    for case in cases() {
        let graph = read(&case);
        let written = write_graph(&graph);
        let text = serde_json::to_string_pretty(&written).unwrap();
        let again =
            read_graph(&text, &Signature::default()).unwrap_or_else(|e| panic!("{}: {e:#?}\n{text}", case.name));
        assert_eq!(write_graph(&again), written, "{}", case.name);
        check(&case, &again);
    }
}

#[test]
fn every_graph_reads_back_from_text() {
    for case in cases() {
        let graph = read(&case);
        let text = print(&graph);
        let again = parse(&text).unwrap_or_else(|e| panic!("{}: {e:?}\n{text}", case.name));
        assert!(again == graph && print(&again) == text, "{text}");
    }
}

/// Inputs with `T` for axis 0, where no attribute fixes the number of tokens.
fn dynamic(case: &Case) -> Option<Signature> {
    let fixed = ["mode_noise_router", "moba", "t2mir_token_task"];
    if fixed.contains(&case.name.as_str()) {
        return None;
    }
    let mut signature = case.signature.clone();
    let tokens = case.inputs["x"].shape[0] as u64;
    for (name, ty) in &mut signature.inputs {
        for (axis, dim) in ty.shape.iter_mut().enumerate() {
            if *dim == Dim::Const(tokens) && (axis == 0 || name == "attention") {
                *dim = Dim::Tokens;
            }
        }
    }
    Some(signature)
}

#[test]
fn types_with_symbolic_tokens_hold_for_the_values() {
    for case in cases() {
        let Some(signature) = dynamic(&case) else { continue };
        let graph = read_graph(&case.graph, &signature).unwrap_or_else(|e| panic!("{}: {e:#?}", case.name));
        let tokens = case.inputs["x"].shape[0] as u64;
        let mut seen = 0;
        let mut trace = |path: &str, node: &moec_ir::Node, value: &Value| {
            seen += 1;
            let ty = node.ty.clone().unwrap();
            let text = format!("{}: {path} is {ty}", case.name);
            match (&ty, value) {
                (Type::Tensor(ty), Value::Tensor(array)) => {
                    let shape: Vec<Option<u64>> = ty.shape.iter().map(|d| d.eval(tokens)).collect();
                    assert_eq!(shape, array.shape.iter().map(|n| Some(*n as u64)).collect::<Vec<_>>(), "{text}");
                    assert_eq!(ty.dtype.is_float(), array.ints().is_none(), "{text}");
                }
                (Type::Route(ty), Value::Route(route)) => {
                    assert_eq!(ty.rows.eval(tokens), Some(route.rows as u64), "{text}");
                    assert_eq!((ty.slots, ty.experts), (route.slots as u64, route.experts), "{text}");
                    assert_eq!(ty.weighted, route.weights.is_some(), "{text}");
                }
                (Type::Ragged(ty), Value::Ragged(rows)) => {
                    assert_eq!(ty.row, rows.row.iter().map(|n| *n as u64).collect::<Vec<_>>(), "{text}");
                }
                (ty, value) => panic!("{text}: {ty:?} for {value:?}"),
            }
        };
        let options = Options { trace: Some(&mut trace), ..Options::default() };
        let results = interpret(&graph, &case.inputs, &case.weights, options).unwrap();
        compare(&case.name, "output", &results["output"], &case.expected["output_ref"], 1e-9);
        assert_eq!(seen, graph.len());
    }
}
