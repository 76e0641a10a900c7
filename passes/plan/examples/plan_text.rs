//! Prints the best plans of a preset job: `plan_text MODEL CLUSTER GPUS OBJECTIVE [BATCH]`, as a page where the
//! environment has `FORM=html`, as JSON for `FORM=json`, else as text; and for
//! `serve [BOUND_MS PROMPT OUTPUT PRECISION BACKEND]` one line per plan.
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
        "serve" => {
            let float = |i: usize, d: f64| a.get(i).map_or(d, |x| x.parse().unwrap());
            let precision = if a.get(8).is_some_and(|p| p == "bf16") { Precision::Bf16 } else { Precision::Fp8 };
            Request {
                precision,
                latency_bound_ms: Some(float(5, 30.0)),
                software: a.get(9).cloned().unwrap_or("trtllm".into()),
                ..Request::serve(Objective::Decode, gpus, float(6, 4000.0) as u64, float(7, 1000.0) as u64)
            }
        }
        _ => Request { precision: Precision::Fp8, ..Request::serve(Objective::Prefill, gpus, 8192, 1024) },
    };
    r.top = 5;
    if a[4] == "serve" {
        r.top = 40;
    }
    let start = std::time::Instant::now();
    match plan_report(&models[&a[1]], &Cluster::preset(&a[2]).unwrap(), &r) {
        Ok(report) if a[4] == "serve" => {
            for p in &report.plans {
                println!(
                    "tp {} dp {} etp {} ep {} copies {} batch {} ttft {:.0} tpot {:.2} tokens/s/gpu {:.0} {:?}",
                    p.attention.tp,
                    p.attention.dp / p.experts.edp,
                    p.experts.etp,
                    p.experts.ep,
                    p.experts.edp,
                    p.micro_batch,
                    p.ttft_ms.unwrap_or(0.0),
                    p.tpot_ms.unwrap_or(0.0),
                    p.tokens_per_s_per_gpu,
                    p.time_ms.values().map(|t| (10.0 * t).round() / 10.0).collect::<Vec<_>>()
                );
            }
        }
        Ok(report) => match std::env::var("FORM").as_deref() {
            Ok("json") => println!("{}", serde_json::to_string_pretty(&report).unwrap()),
            Ok("html") => {
                let cluster = Cluster::preset(&a[2]).unwrap();
                print!("{}", html::html(&report, &models[&a[1]], &cluster, &r).unwrap());
                return;
            }
            _ => print!("{}", text::text(&report)),
        },
        Err(e) => println!("{e}\n  {}", e.help),
    }
    println!("{:?}", start.elapsed());
}
