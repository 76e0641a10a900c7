//! Prints the best plans of a preset job as JSON: `plan_text MODEL CLUSTER GPUS OBJECTIVE [BATCH]`.
#[path = "published/mod.rs"]
mod published;
use moec_plan::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let models = published::models();
    let gpus = a[3].parse().unwrap();
    let mut r = match a[4].as_str() {
        "train" => Request::train(gpus, 4096, a.get(5).map_or(gpus * 8, |b| b.parse().unwrap())),
        "decode" => Request {
            precision: Precision::Fp8,
            latency_bound_ms: Some(30.0),
            ..Request::serve(Objective::Decode, gpus, 1024, 1024)
        },
        _ => Request { precision: Precision::Fp8, ..Request::serve(Objective::Prefill, gpus, 8192, 1024) },
    };
    r.top = 3;
    let start = std::time::Instant::now();
    match plan_report(&models[&a[1]], &Cluster::preset(&a[2]).unwrap(), &r) {
        Ok(report) => println!("{}", serde_json::to_string_pretty(&report).unwrap()),
        Err(e) => println!("{e}\n  {}", e.help),
    }
    println!("{:?}", start.elapsed());
}
