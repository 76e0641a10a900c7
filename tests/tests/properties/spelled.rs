//! Two ways to write the same.

use super::*;
use serde_json::Value;

/// Both forms have the same result, by the interpreter and compiled for the processor and for a GPU.
fn same(form: &Form, one: (&str, &str, &[&str], Value), other: (&str, &str, &[&str], Value)) {
    let with = |(id, op, operands, attributes): (&str, &str, &[&str], Value)| {
        with(&form.clone().node(id, op, operands, attributes).output("output", "y"))
    };
    let ((one, data), (other, _)) = (with(one), with(other));
    let expected = data.expected(&one).unwrap();
    assert_eq!(data.expected(&other).unwrap(), expected);
    assert!(expected["output"].iter().any(|v| *v != 0.0));
    for target in [host_target(), Target::Sm80] {
        let found =
            [&one, &other].map(|graph| Compiled::new(graph, target, device(target)).unwrap().run(&data).unwrap());
        assert_eq!(found[0], found[1], "{}", target.name());
        close(&found[0]["output"], &expected["output"], target.name());
    }
}

fn cube() -> Form {
    Form::new(12).node("c", "shape", &["x"], json!({"fn": "reshape", "to": [-1, 3, 4]}))
}

#[test]
fn axes_of_an_equation_that_have_no_letter() {
    let form = cube().tensor("m", json!([5, 4])).node("p", "param", &[], json!({"w": "m"}));
    let einsum = |eq: &str| json!({"eq": eq});
    for (eq, plain) in
        [("...d,ed->...e", "tad,ed->tae"), ("...d,ed", "tad,ed->tae"), ("t...d,ed->td...e", "tad,ed->tdae")]
    {
        same(&form, ("y", "einsum", &["c", "p"], einsum(eq)), ("y", "einsum", &["c", "p"], einsum(plain)));
    }
    // Of two operands, the axes that both have are the last.
    let form = cube().tensor("m", json!([3, 4])).node("p", "param", &[], json!({"w": "m"}));
    for (eq, plain) in [("...d,...d->...", "tad,ad->ta"), ("...,...->...", "tad,ad->tad"), ("...a,...a", "tba,ba->tb")]
    {
        same(&form, ("y", "einsum", &["c", "p"], einsum(eq)), ("y", "einsum", &["c", "p"], einsum(plain)));
    }
}

#[test]
fn axes_and_entries_counted_from_the_end() {
    let slice = |axis: i64, range: &[i64]| json!({"fn": "slice", "axis": axis, "range": range});
    for (axis, range, from) in [
        (2, vec![-3, -1], vec![1, 3]),
        (-1, vec![-1, -4, -2], vec![3, 0, -2]),
        (-2, vec![-1, -4, -1], vec![2, -1, -1]),
        (-2, vec![-3, -1, 1], vec![0, 2]),
    ] {
        let plain = if axis < 0 { axis + 3 } else { axis };
        same(&cube(), ("y", "shape", &["c"], slice(axis, &range)), ("y", "shape", &["c"], slice(plain, &from)));
    }
    let order = |perm: [i64; 3]| json!({"fn": "transpose", "perm": perm});
    same(&cube(), ("y", "shape", &["c"], order([0, -1, 1])), ("y", "shape", &["c"], order([0, 2, 1])));
    same(&cube(), ("y", "shape", &["c"], order([-1, 0, -2])), ("y", "shape", &["c"], order([2, 0, 1])));
}

#[test]
fn entries_some_way_apart_are_those_of_a_reshape() {
    let every = json!({"fn": "slice", "axis": 1, "range": [1, 12, 4]});
    let form = cube().node("h", "shape", &["c"], json!({"fn": "slice", "axis": 2, "range": [1, 2]}));
    same(&form, ("y", "shape", &["x"], every), ("y", "shape", &["h"], json!({"fn": "reshape", "to": [-1, 3]})));
    // Along the rows: a kernel of the whole batch.
    let rows = |range: &[i64]| json!({"fn": "slice", "axis": 0, "range": range});
    let form = Form::new(12).node("f", "shape", &["x"], rows(&[2, 7]));
    same(&form, ("y", "shape", &["x"], rows(&[2, 7, 3])), ("y", "shape", &["f"], rows(&[0, 4, 3])));
}

/// Numbers of tokens that an op has no meaning for: the interpreter and every target refuse the same ones.
#[test]
fn sizes_that_do_not_come_out_are_refused() {
    let causal = json!({"causal_block": 2, "tokens": 40});
    let cases = [
        ("shape", json!({"fn": "slice", "axis": 0, "range": [2, 7, 3]}), vec![0, 5]),
        ("shape", json!({"fn": "slice", "axis": 0, "range": [5, 1, -2]}), vec![0, 5]),
        ("shape", json!({"fn": "slice", "axis": 0, "range": [3, 3]}), vec![0, 2]),
        ("shape", json!({"fn": "reshape", "to": [-1, 5]}), vec![1, 2, 3, 4, 6, 13]),
        ("shape", json!({"fn": "reshape", "to": [3, -1, 8]}), vec![1, 3, 5, 13]),
        ("shape", json!({"fn": "reshape", "to": [-1, 6]}), vec![]),
        ("reduce", json!({"fn": "max", "axis": 0}), vec![0]),
        ("reduce", json!({"fn": "min", "axis": 1}), vec![]),
        ("reduce", json!({"fn": "sum", "axis": 0}), vec![]),
        ("adjust", causal, vec![25, 30]),
    ];
    for (op, attributes, unfit) in cases {
        let graph = Form::new(12).node("y", op, &["x"], attributes.clone()).output("output", "y").graph();
        for target in [host_target(), Target::Sm80, Target::Sm90a] {
            let compiled = Compiled::new(&graph, target, device(target)).unwrap();
            for tokens in [0, 1, 2, 3, 4, 5, 6, 10, 13, 20, 24, 25, 30] {
                let data = data(&graph, tokens, 5, Numbers::Small);
                let (expected, found) = (data.expected(&graph), compiled.run(&data));
                let place = format!("{op} {attributes} on {} at {tokens}: {expected:?}, {found:?}", target.name());
                match (expected, found) {
                    (Ok(expected), Ok(found)) => moec_tests::gallery::agree(&graph, &found, &expected).expect(&place),
                    (Err(_), Err(error)) => {
                        assert!(error.to_string().contains("tokens do not fit node `y`"), "{place}")
                    }
                    (Ok(_), Err(_)) | (Err(_), Ok(_)) => panic!("{place}"),
                }
                if unfit.contains(&tokens) {
                    assert!(data.expected(&graph).is_err(), "{place}");
                }
            }
        }
    }
}

#[test]
fn ids_of_several_axes_are_slots_row_by_row() {
    let ids = Form::new(12)
        .input("class", "i32", &json!(["T", 2]))
        .typed("table", "i32", json!([3, 2]))
        .networks(12, json!(8))
        .node("i", "gather", &["class"], json!({"w": "table"}))
        .node("f", "shape", &["i"], json!({"fn": "reshape", "to": [-1, 4]}));
    let layer = |from: &str| {
        let form = ids.clone().node("q", "select", &[from], json!({"rule": "given", "experts": 4}));
        let form = form.node("r", "weigh", &["q"], json!({"const": true, "norm": "sum"}));
        let (graph, mut data) = with(&form.mixture(json!([networks([0, 4])])).output("topk_indices", "r.idx"));
        data.set_ints("class", &(0..2 * TOKENS).map(|i| (i * i % 3) as i32).collect::<Vec<_>>());
        data.set_weight_ints("table", &[0, 3, 2, -1, 1, 2]);
        (graph, data)
    };
    let ((three, data), (two, _)) = (layer("i"), layer("f"));
    let expected = data.expected(&two).unwrap();
    assert_eq!(data.expected(&three).unwrap(), expected);
    for target in [host_target(), Target::Sm80] {
        let found =
            [&three, &two].map(|graph| Compiled::new(graph, target, device(target)).unwrap().run(&data).unwrap());
        assert_eq!(found[0], found[1], "{}", target.name());
        close(&found[0]["output"], &expected["output"], target.name());
    }
}
