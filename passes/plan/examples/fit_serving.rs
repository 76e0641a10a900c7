//! Fits `data/serve-calibration.json` on one half of the measured serving points and reports both halves.
//!
//! `cargo run --release -p moec-plan --example fit_serving -- OUTPUT.json [ROUNDS] [rows]`; 0 rounds only reports.

#[path = "published/mod.rs"]
mod published;
#[path = "silicon/mod.rs"]
mod silicon;

use moec_plan::{
    backend::{ServeCalibration, ServeFile},
    fit::{Parameter, minimise, round},
};
use serde_json::Value;
use silicon::Point;

/// Weight of the pull towards where a fit started: the prior for all sets together, these for each set. Few
/// measurements of a set tell attention ranks or slices of experts apart, so that sets keep close to each other.
const PULL: f64 = 0.03;

/// Parameters of a set that are fitted, with their bounds.
const FITTED: [(&str, f64, f64); 24] = [
    ("dense_memory", 0.2, 0.95),
    ("expert_memory", 0.1, 0.95),
    ("cache_memory", 0.05, 0.95),
    ("dense_flops", 0.1, 0.95),
    ("expert_flops", 0.05, 0.9),
    ("expert_half_rows", 1.0, 400.0),
    ("attention_flops", 0.05, 0.8),
    ("spread", 0.6, 1.0),
    ("slicing", 0.0, 0.5),
    ("layer_us", 0.0, 120.0),
    ("moe_layer_us", 0.0, 120.0),
    ("special_attention_us", 0.0, 100.0),
    ("step_us", 0.0, 6000.0),
    ("request_us", 0.0, 120.0),
    ("collective_us", 0.0, 40.0),
    ("collective_rank_us", 0.0, 15.0),
    ("agree_us", 0.0, 20000.0),
    ("interference", 0.3, 2.0),
    ("prefill_ms", 0.0, 200.0),
    ("first_token_ms", 0.0, 300.0),
    ("queue", 0.0, 1.0),
    ("wait_steps", 0.0, 4.0),
    ("cache_bytes", 1.0, 2.0),
    ("memory_share", 0.75, 0.95),
];

fn parameters(set: &Value) -> Vec<Parameter> {
    let mut all: Vec<Parameter> = FITTED.map(|(name, low, high)| Parameter::new(format!("/{name}"), low, high)).into();
    for version in set["speculation"].as_object().into_iter().flatten().map(|(v, _)| v) {
        all.push(Parameter::new(format!("/speculation/{version}"), 1.0, 2.5));
    }
    all
}

fn loss(points: &[&Point], set: &Value) -> f64 {
    let Ok(p) = serde_json::from_value::<ServeCalibration>(set.clone()) else { return f64::INFINITY };
    let mut sum = 0.0;
    for point in points {
        let e = silicon::predict(point, &p);
        let d = 0.08;
        let smooth = |x: f64| if x < d { x * x / (2.0 * d) } else { x - d / 2.0 };
        sum += smooth((e.tpot * 1e3 / point.tpot_ms).ln().abs().min(1.0));
        sum += 0.25 * smooth((e.ttft * 1e3 / point.ttft_ms).ln().abs().min(2.0));
    }
    sum / points.len().max(1) as f64
}

/// Fits the parameters of a set, starting from and pulled towards what it holds.
fn fit(set: &mut Value, points: &[&Point], rounds: usize) {
    let start = set.clone();
    let parameters = parameters(set);
    let at = |v: &Value, p: &str| v.pointer(p).and_then(Value::as_f64).unwrap_or(0.0);
    let pull = |v: &Value| {
        parameters
            .iter()
            .map(|p| ((at(v, &p.pointer) - at(&start, &p.pointer)) / (p.high - p.low)).powi(2))
            .sum::<f64>()
    };
    minimise(set, &parameters, rounds, |v| loss(points, v) + PULL * pull(v));
    round(set, &parameters);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rounds = arguments.get(1).and_then(|r| r.parse().ok()).unwrap_or(200);
    let models = published::models();
    let points = silicon::points(&models);
    let prior: Value = serde_json::from_str(include_str!("../data/serve-prior.json")).expect("prior");
    let mut file = if rounds > 0 {
        prior.clone()
    } else {
        serde_json::to_value(ServeFile::built_in().expect("built in")).expect("json")
    };
    let keys: Vec<String> = prior["sets"].as_object().expect("sets").keys().cloned().collect();
    let fitted = |wanted: Option<&str>| -> Vec<&Point> {
        points.iter().filter(|p| p.fit && wanted.is_none_or(|key| p.set == key)).collect()
    };
    if rounds > 0 {
        // What a set has few measurements of, it takes from all sets together.
        let mut common = prior["sets"][keys[0].as_str()].clone();
        let speculation = |key: &String| prior["sets"][key.as_str()]["speculation"].as_object().expect("map").clone();
        common["speculation"] = Value::Object(keys.iter().flat_map(speculation).collect());
        fit(&mut common, &fitted(None), rounds);
        for key in &keys {
            // What was measured elsewhere, such as the rate of links, is not fitted.
            let mut set = prior["sets"][key.as_str()].clone();
            for name in FITTED.map(|(name, ..)| name) {
                set[name] = common[name].clone();
            }
            fit(&mut set, &fitted(Some(key)), rounds);
            file["sets"][key.as_str()] = set;
        }
    }
    report(&keys, &file, &points, arguments.iter().any(|a| a == "rows"));
    if let Some(output) = arguments.first().filter(|_| rounds > 0) {
        std::fs::write(output, serde_json::to_string_pretty(&file).expect("json") + "\n").expect("write");
    }
}

fn report(keys: &[String], file: &Value, points: &[Point], rows: bool) {
    println!("{}", silicon::HEAD);
    let mut all = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    for key in keys {
        let p: ServeCalibration = serde_json::from_value(file["sets"][key.as_str()].clone()).expect("set");
        for (part, fit) in [("fit", true), ("held out", false)] {
            let (mut tpot, mut ttft) = (Vec::new(), Vec::new());
            for point in points.iter().filter(|p| p.set == *key && p.fit == fit) {
                let e = silicon::predict(point, &p);
                tpot.push(e.tpot * 1e3 / point.tpot_ms - 1.0);
                ttft.push(e.ttft * 1e3 / point.ttft_ms - 1.0);
                if rows {
                    println!(
                        "row {} {part} {} {} {:?} tpot {:.2} / {:.2} {:+.0}% ttft {:.0} / {:.0} {:+.0}% batch {:.0} parts {:?} prefill {:.1}",
                        point.line,
                        point.label,
                        point.version,
                        point.layout.dense,
                        e.tpot * 1e3,
                        point.tpot_ms,
                        100.0 * (e.tpot * 1e3 / point.tpot_ms - 1.0),
                        e.ttft * 1e3,
                        point.ttft_ms,
                        100.0 * (e.ttft * 1e3 / point.ttft_ms - 1.0),
                        e.batch,
                        e.parts.map(|x| (x * 1e4).round() / 10.0),
                        e.prefill * 1e3
                    );
                }
            }
            println!("{}", silicon::line(key, part, &tpot, &ttft));
            all[usize::from(!fit)][0].extend(tpot);
            all[usize::from(!fit)][1].extend(ttft);
        }
    }
    println!("{}", silicon::line("all", "fit", &all[0][0], &all[0][1]));
    println!("{}", silicon::line("all", "held out", &all[1][0], &all[1][1]));
}
