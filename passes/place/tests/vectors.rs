//! The published vectors, record by record: EPLB, least-loaded expert parallelism and the host functions.

use moec_place::host;
use moec_place::metrics;
use moec_place::{Input, Method, Options, place};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::PathBuf;

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn records(kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(data("eplb.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    all[kind].as_array().unwrap().clone()
}

/// Equal values; numbers by value, so that 1 and 1.0 agree.
fn same(a: &Value, b: &Value) -> bool {
    if let (Some(a), Some(b)) = (a.as_array(), b.as_array()) {
        return a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b));
    }
    if let (Some(a), Some(b)) = (a.as_object(), b.as_object()) {
        return a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)));
    }
    if a.is_number() && b.is_number() {
        return a.as_f64() == b.as_f64();
    }
    a == b
}

fn check(kind: &str) -> (usize, usize) {
    let (mut placed, mut refused) = (0, 0);
    for record in records(kind) {
        let (name, expected) = (&record["name"], &record["expected"]);
        let input = Input::from_json(&record["input"].to_string()).unwrap();
        let found = place(&input, &Options::default());
        if expected.get("error").is_some() {
            let error = found.unwrap_err();
            assert!(!error.help.is_empty(), "{name}");
            refused += 1;
            continue;
        }
        let found = serde_json::to_value(found.unwrap()).unwrap();
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&found), keys(expected), "{name}");
        for key in keys(expected) {
            assert!(same(&found[&key], &expected[&key]), "{name}: {key}: {} vs {}", found[&key], expected[&key]);
        }
        placed += 1;
    }
    (placed, refused)
}

#[test]
fn every_eplb_record_comes_out_slot_by_slot() {
    assert_eq!(check("eplb"), (15, 2));
}

#[test]
fn every_least_loaded_record_comes_out_range_by_range() {
    assert_eq!(check("llep"), (5, 0));
}

#[test]
fn a_whole_record_is_read_as_its_input() {
    let record = &records("eplb")[0];
    let whole = Input::from_json(&record.to_string()).unwrap();
    assert_eq!(whole, Input::from_json(&record["input"].to_string()).unwrap());
}

#[test]
fn the_search_is_at_least_as_even_as_eplb_on_its_own_vectors() {
    for record in records("eplb").iter().filter(|r| r["expected"].get("error").is_none()) {
        let input = Input::from_json(&record["input"].to_string()).unwrap();
        let options = Options { method: Some(Method::Balance), ..Options::default() };
        let found = place(&input, &options).unwrap();
        let found = &found.replicated().unwrap().max_over_mean;
        for (layer, peak) in record["expected"]["max_over_mean"].as_array().unwrap().iter().enumerate() {
            assert!(found[layer] <= peak.as_f64().unwrap() + 1e-6, "{}: {} vs {peak}", record["name"], found[layer]);
        }
    }
}

struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Self {
        Golden(std::fs::read(data(&format!("{name}.safetensors"))).unwrap())
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let view = tensors.tensor(name).unwrap();
        let bytes = view.data();
        let four = |read: fn([u8; 4]) -> f64| bytes.chunks_exact(4).map(|b| read(b.try_into().unwrap())).collect();
        let dtype = view.dtype();
        if dtype == Dtype::F64 {
            return bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
        }
        if dtype == Dtype::F32 {
            return four(|b| f64::from(f32::from_le_bytes(b)));
        }
        assert_eq!(dtype, Dtype::I32, "{name}");
        four(|b| f64::from(i32::from_le_bytes(b)))
    }

    fn ids(&self, name: &str) -> Vec<i64> {
        self.f64(name).into_iter().map(|v| v as i64).collect()
    }
}

fn assert_close(found: &[f64], wanted: &[f64]) {
    assert_eq!(found.len(), wanted.len());
    let scale = wanted.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() <= 1e-12 * scale, "{a} vs {b}");
    }
}

#[test]
fn load_balance_loss_agrees_per_micro_batch_and_globally() {
    let golden = Golden::open("load_balance_loss");
    let probs = host::softmax(&golden.f64("inputs.router_logits"), 8);
    let ids = host::top_k(&probs, 8, 2);
    assert_eq!(ids, golden.ids("expected.topk_indices"));
    let loss = host::load_balance_loss(&probs, 8, &ids, 2, &host::micro_batches(24, 3)).unwrap();
    assert_close(&[loss.micro, loss.global], &golden.f64("expected.output_ref"));
}

#[test]
fn load_balance_losses_are_equal_when_micro_batches_choose_alike() {
    let probs = [0.6, 0.4, 0.3, 0.7, 0.9, 0.1, 0.2, 0.8];
    let loss = host::load_balance_loss(&probs, 2, &[0, 1, 0, 1], 1, &host::micro_batches(4, 2)).unwrap();
    assert!((loss.micro - loss.global).abs() < 1e-15);
}

#[test]
fn lsh_compression_agrees() {
    let golden = Golden::open("lsh_moe");
    let x = golden.f64("inputs.x");
    let rotations = [golden.f64("weights.rotation.0"), golden.f64("weights.rotation.1")];
    let [gate, up, down] = ["gate", "up", "down"].map(|n| golden.f64(&format!("weights.experts.0.{n}")));
    let expert = host::glu(16, &gate, &up, &down).unwrap();
    let found = host::lsh_moe(&x, 16, &[&rotations[0], &rotations[1]], &expert).unwrap();
    assert_eq!(found.buckets.iter().map(|&b| b as i64).collect::<Vec<_>>(), golden.ids("expected.buckets"));
    assert_close(&found.output, &golden.f64("expected.output_ref"));
    let wanted = golden.f64("expected.centroids");
    assert_eq!(found.centroids.len(), wanted.len());
    for (a, b) in found.centroids.iter().zip(&wanted) {
        assert!((a - b).abs() < 1e-6);
    }
}

#[test]
fn lsh_compression_is_exact_when_tokens_of_a_bucket_are_equal() {
    let row = [0.3, -1.2, 0.7];
    let x: Vec<f64> = row.iter().chain(&row).chain(&[2.0, 0.1, 0.4]).copied().collect();
    let turn = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let square = |row: &[f64]| row.iter().map(|v| v * v).collect::<Vec<f64>>();
    let found = host::lsh_moe(&x, 3, &[&turn], square).unwrap();
    assert_eq!(found.centroids.len(), 2 * 3);
    assert_close(&found.output, &x.iter().map(|v| v * v).collect::<Vec<_>>());
}

#[test]
fn self_contrast_agrees_and_is_greedy_without_beta() {
    let golden = Golden::open("scmoe_contrast");
    let (strong, weak) = (golden.f64("inputs.logits_strong"), golden.f64("inputs.logits_weak"));
    let found = host::self_contrast(&strong, &weak, 32, 0.1, 0.5).unwrap();
    assert_eq!(found.kept.iter().map(|&k| i64::from(k)).collect::<Vec<_>>(), golden.ids("expected.mask"));
    assert_eq!(found.next_token.iter().map(|&t| t as i64).collect::<Vec<_>>(), golden.ids("expected.next_token"));
    let finite: Vec<f64> = found.scores.iter().map(|&z| if z.is_finite() { z } else { 0.0 }).collect();
    assert_close(&finite, &golden.f64("expected.output_ref"));

    let greedy = host::self_contrast(&strong, &weak, 32, 0.1, 0.0).unwrap();
    assert_eq!(greedy.next_token, host::top_k(&strong, 32, 1).iter().map(|&t| t as usize).collect::<Vec<_>>());
}

#[test]
fn routing_consistency_agrees() {
    let golden = Golden::open("analysis_srp_sch");
    let ids = golden.ids("inputs.topk_indices_in");
    let found = [
        metrics::srp(&ids, 2, 8, 8).unwrap(),
        metrics::sch(&ids, 2, 8, 8, 2).unwrap(),
        metrics::sch(&ids, 2, 8, 8, 4).unwrap(),
    ];
    assert_close(&found, &golden.f64("expected.output_ref"));
}

#[test]
fn affinity_agrees() {
    let golden = Golden::open("analysis_affinity");
    let [first, second] = [0, 1].map(|l| golden.ids(&format!("inputs.topk_indices_{l}_in")));
    let found = metrics::affinity((&first, 2), (&second, 2), 8).unwrap();
    assert_close(&found, &golden.f64("expected.output_ref"));
}
