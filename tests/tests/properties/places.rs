//! Rules that fill places, scores that are closed or forced, and masks of every shape.

use super::*;
use serde_json::Value;

/// Six experts with scores from 6 down to 1, `change`d, chosen from by `rule`: the ids that row 0 has.
fn ids(change: &Value, rule: &Value) -> Vec<i64> {
    let form = Form::new(6)
        .batch()
        .node("a", "adjust", &["x"], change.clone())
        .node("q", "select", &["a"], rule.clone())
        .output("ids", "q.idx");
    let (graph, mut data) = with(&form);
    let scores: Vec<f32> = (0..TOKENS).flat_map(|_| (0..6).map(|e| 6.0 - e as f32)).collect();
    data.set("x", &scores);
    let found = results(&graph, &data);
    let expected = data.expected(&graph).expect("the interpreter runs it");
    assert_eq!(found["ids"], expected["ids"], "{rule}");
    chosen(&found["ids"], TOKENS).swap_remove(0)
}

#[test]
fn what_is_closed_comes_last_where_places_are_filled() {
    let closed = json!({"off": [0, 1, 4]});
    let of = |rule: Value| ids(&closed, &rule);
    // The best ones, and no others.
    assert_eq!(of(json!({"rule": "topk", "k": 5})), [2, 3, 5]);
    assert_eq!(of(json!({"rule": "all"})), [2, 3, 5]);
    assert_eq!(of(json!({"rule": "threshold", "tau": -1.0})), [2, 3, 5]);
    // Places of an order.
    assert_eq!(of(json!({"rule": "rank", "ranks": [4, 0, 3]})), [1, 2, 0]);
    assert_eq!(of(json!({"rule": "topp", "p": 100.0})), [2, 3, 5, 0, 1, 4]);
    assert_eq!(of(json!({"rule": "topp", "p": 100.0, "max_k": 4})), [2, 3, 5, 0]);
    assert_eq!(of(json!({"rule": "group_topk", "groups": 3, "k": 1})), [0, 2, 5]);
    assert_eq!(of(json!({"rule": "group_limited", "groups": 3, "group_top": 1, "keep_groups": 1, "k": 2})), [2, 3]);
    assert_eq!(of(json!({"rule": "group_limited", "groups": 2, "group_top": 1, "keep_groups": 1, "k": 2})), [2, 0]);
    let none = json!({"off": [0, 1, 2, 3, 4, 5]});
    assert_eq!(ids(&none, &json!({"rule": "threshold", "tau": 0.0, "min_k": 1})), [0]);
    assert_eq!(ids(&none, &json!({"rule": "topk", "k": 2})), [0i64; 0]);
}

#[test]
fn what_is_forced_competes_for_no_row() {
    let rule = json!({"rule": "expert_choice", "capacity": 100});
    assert_eq!(ids(&json!({"on": [1]}), &rule), [0, 2, 3, 4, 5]);
    assert_eq!(ids(&json!({"on": [1]}), &json!({"rule": "topk", "k": 2})), [1, 0]);
}

#[test]
fn a_mask_has_any_shape_that_fits() {
    let rows = usize::try_from(TOKENS).unwrap();
    let shapes: [(&str, Value, fn(usize, usize) -> bool); 4] = [
        ("f32", json!(["T", 6]), |e, t| (t + e).is_multiple_of(3)),
        ("f32", json!(["T", 1]), |_, t| t.is_multiple_of(3)),
        ("i32", json!(["T", 1]), |_, t| t.is_multiple_of(3)),
        ("i32", json!(["T", 6]), |e, t| (t + e).is_multiple_of(3)),
    ];
    for (dtype, shape, open) in shapes {
        let form = Form::new(6)
            .input("mask", dtype, &shape)
            .node("a", "adjust", &["x"], json!({"mask": "mask"}))
            .node("q", "select", &["a"], json!({"rule": "all"}))
            .output("ids", "q.idx");
        let (graph, mut data) = with(&form);
        let columns = if shape[1] == 1 { 1 } else { 6 };
        let bits = || (0..rows).flat_map(|t| (0..columns).map(move |e| open(e, t)));
        if dtype == "i32" {
            data.set_ints("mask", &bits().map(i32::from).collect::<Vec<_>>());
        } else {
            data.set("mask", &bits().map(|b| f32::from(u8::from(b))).collect::<Vec<_>>());
        }
        for (t, row) in chosen(&results(&graph, &data)["ids"], TOKENS).into_iter().enumerate() {
            let wanted: Vec<i64> = (0..6).filter(|e| open(*e as usize, t)).collect();
            assert_eq!(row, wanted, "row {t} of {dtype} {shape}");
        }
    }
}
