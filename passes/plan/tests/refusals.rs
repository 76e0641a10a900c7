//! Bad input, one thing wrong at a time: no panic, and each refusal names what would work.

use moec_plan::{Cluster, Mapping, ModelShape, Objective, PlanError, Request, choice::Routing, plan_report};
use serde_json::{Value, json};

fn model() -> ModelShape {
    let path = format!("{}/tests/data/configs/mixtral-8x7b.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    ModelShape::from_config_json(&serde_json::from_str(&text).unwrap()).unwrap()
}

fn says(error: &PlanError, about: &str, way_out: &str) {
    assert!(error.message.contains(about) || error.help.contains(about), "{about}: {error:?}");
    assert!(error.help.contains(way_out), "{way_out}: {error:?}");
}

/// A cluster file with one member changed; `null` takes it away.
fn cluster_with(pointer: &str, value: Value) -> Result<Cluster, PlanError> {
    let mut file: Value = serde_json::from_str(&Cluster::preset("dgx-h100").unwrap().to_json()).unwrap();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let object = file.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    if value.is_null() {
        object.remove(name);
    } else {
        object.insert(name.to_owned(), value);
    }
    Cluster::from_json(&file.to_string())
}

#[test]
fn cluster_files_with_one_wrong_member() {
    let numbers =
        ["/gpu/bf16_tflops", "/gpu/hbm_bytes", "/gpu/hbm_gbps", "/gpu/nvlink_gbps", "/gpus_per_domain", "/nic_gbps"];
    for pointer in numbers {
        let name = pointer.rsplit('/').next().unwrap();
        for value in [json!(0), json!(-1), json!("450"), json!([]), json!({}), json!(true), Value::Null] {
            let error = cluster_with(pointer, value.clone()).unwrap_err();
            assert_eq!(error.code, "E0404", "{pointer} {value}");
            assert!(error.message.contains(name), "{pointer} {value}: {error:?}");
            assert_eq!(error.at, Some(pointer[1..].replace('/', ".")), "{value}");
            assert!(!error.help.is_empty(), "{pointer} {value}");
        }
        // Too large for any machine: refused, or planned without a panic.
        if let Ok(cluster) = cluster_with(pointer, json!(1e300)) {
            let _ = plan_report(&model(), &cluster, &Request::train(64, 4096, 256));
        }
    }
    for (pointer, value, about) in [
        ("/max_gpus", json!(0), "max_gpus"),
        ("/gpu/generation", json!("hooper"), "hopper"),
        ("/gpu/fp8_tflops", json!(-5), "fp8_tflops"),
        ("/latency_us/network", json!(-1), "network"),
        ("/collectives/0/size_bytes", json!([8, 4]), "ascend"),
        ("/collectives/0/latency_us", json!([1e-9]), "curve"),
    ] {
        says(&cluster_with(pointer, value).unwrap_err(), about, "");
    }
    let text = r#"{"gpuz": 3, "gpu": {"hbm_gbp": 1.0, "hbm_gbps": 2.0}, "nic_gbps": 50.0}"#;
    let unread: Vec<String> =
        Cluster::preset("dgx-h100").unwrap().unread(text).into_iter().map(|(path, _)| path).collect();
    assert_eq!(unread, ["gpuz", "gpu.hbm_gbp"]);
    for text in ["", "{", "[]", "null", "17", "\"dgx-h100\"", "{\"gpu\": 1}"] {
        let error = Cluster::from_json(text).unwrap_err();
        assert!(error.code == "E0404" && !error.help.is_empty(), "{text}: {error:?}");
    }
    let curve = cluster_with("/collectives/2/latency_us", json!([1])).unwrap_err();
    assert_eq!(curve.at.as_deref(), Some("collectives.2"));
    says(&Cluster::preset("dgx-h1000").unwrap_err(), "dgx-h1000", "dgx-h100");
}

#[test]
fn contradicting_and_impossible_sizes() {
    let cluster = Cluster::preset("dgx-h100").unwrap();
    let refused = |gpus: u64, fix: &str| {
        let request = Request { fixed: Mapping::parse_fixed(fix).unwrap(), ..Request::train(gpus, 4096, 256) };
        plan_report(&model(), &cluster, &request).unwrap_err()
    };
    for (gpus, fix, about, way_out) in [
        (64, "tp=3", "tp = 3", "1, 2, 4"),
        (64, "ep=16", "8 experts", "1, 2, 4, 8"),
        (64, "pp=64", "32 layers", "32"),
        (64, "tp=8,cp=8,pp=8", "512", "can be 1"),
        (64, "tp=8,dp=16", "tp", "dp"),
        (64, "ep=8,edp=16", "ep", "edp"),
        (64, "ep=8,etp=4,pp=4", "ep", "etp"),
        (64, "mbs=3", "mbs = 3", "1, 2, 4"),
        (64, "pp=4,vpp=9", "vpp = 9", "1 to 8"),
        (64, "dp=64,mbs=8", "batch of 256", "dp x micro-batch"),
        (7, "tp=2", "tp = 2", "tp can be 1"),
    ] {
        let error = refused(gpus, fix);
        assert!(error.code == "E0402" || error.code == "E0406", "{fix}: {error:?}");
        says(&error, about, way_out);
    }
    for text in ["tp", "tp=", "tp=-1", "tp=1e3", "=4", "tp=2;ep=4", "tp=18446744073709551616", "xp=2", "tp=2,tp=4"] {
        let error = Mapping::parse_fixed(text).unwrap_err();
        assert!(error.code == "E0402" && !error.help.is_empty(), "{text}: {error:?}");
    }
}

#[test]
fn jobs_that_cannot_be() {
    let cluster = Cluster::preset("dgx-h100").unwrap();
    let base = Request::train(64, 4096, 256);
    let requests = [
        Request { gpus: 0, ..base.clone() },
        Request { gpus: u64::MAX, ..base.clone() },
        Request { seq: 0, ..base.clone() },
        Request { seq: u64::MAX, ..base.clone() },
        Request { global_batch: 0, ..base.clone() },
        Request { global_batch: u64::MAX, ..base.clone() },
        Request { order: "tp-xp".into(), ..base.clone() },
        Request { software: "megatron-3000".into(), ..base.clone() },
        Request { memory_limit_gib: Some(-1.0), ..base.clone() },
        Request { memory_limit_gib: Some(f64::NAN), ..base.clone() },
        Request { memory_limit_gib: Some(1e-6), ..base.clone() },
        Request { capacity_factor: Some(0.0), ..base.clone() },
        Request { routing: Routing::Zipf(f64::INFINITY), ..base.clone() },
        Request { routing: Routing::Loads(vec![-1.0]), ..base },
        Request::serve(Objective::Decode, 64, 0, 1024),
        Request::serve(Objective::Decode, 64, 1024, 0),
        Request { latency_bound_ms: Some(1e-9), ..Request::serve(Objective::Decode, 64, 1024, 1024) },
        Request { software: "tensorrt".into(), ..Request::serve(Objective::Decode, 64, 1024, 1024) },
        Request::serve(Objective::Prefill, 64, 1 << 32, 1 << 32),
    ];
    for request in requests {
        let error = plan_report(&model(), &cluster, &request).unwrap_err();
        assert!(error.code.starts_with("E04") && !error.help.is_empty(), "{request:?}: {error:?}");
    }
    // One GPU, odd and prime numbers of GPUs, and one sequence are jobs like others, if the model fits.
    let b300 = Cluster::preset("dgx-b300").unwrap();
    for gpus in [11, 13, 17, 97, 100] {
        plan_report(&model(), &b300, &Request::train(gpus, 4096, 4 * gpus)).unwrap();
    }
}
