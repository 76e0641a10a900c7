//! Times expert layers of real models on the CPU, against the machine's streaming reads and arithmetic peak.
//!
//! `cargo run --release -p moec-codegen --example cpu_layer -- [layers=qwen,olmoe,mixtral] [tokens=1,4,16]
//! [targets=x86-64-v4,x86-64-v4-amx] [rounds=7] [threads=2] [weights=bf16]`
//!
//! `set` lists variants of the schedules, which are compared with each other.
//!
//! A round runs everything once, one after the other, so that all figures see the same machine. Every run
//! routes its tokens anew over weights that no cache holds. Times are processor times of the threads,
//! which other work on the machine changes least. `read` and `peak` are the shares of streaming reads
//! (bytes of the weights of experts with rows) and of the arithmetic peak of the target in the same round.

#[path = "../../tests/cpu_grouped/harness.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod harness;
mod layer;
mod limits;

use harness::{Random, runs};
use layer::{Layer, SHAPES, Shape, Variant};
use limits::Limits;
use moec_abi::DType;
use moec_codegen::Target;
use std::collections::BTreeMap;

struct Options(BTreeMap<String, String>);

impl Options {
    fn list(&self, name: &str, default: &str) -> Vec<String> {
        self.0.get(name).map_or(default, String::as_str).split(',').map(str::to_owned).collect()
    }

    fn number(&self, name: &str, default: usize) -> usize {
        self.0.get(name).and_then(|v| v.parse().ok()).unwrap_or(default)
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let options = Options(
        std::env::args().skip(1).filter_map(|a| a.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))).collect(),
    );
    let threads = options.number("threads", 2);
    let rounds = options.number("rounds", 7);
    let weights = if options.list("weights", "bf16") == ["f32"] { DType::F32 } else { DType::Bf16 };
    let changes = options.0.get("set").map_or("", String::as_str).split('/').map(|variant| {
        let change =
            |c: &str| c.split_once(':').and_then(|(field, value)| Some((field.to_owned(), value.parse().ok()?)));
        variant.split(',').filter_map(change).collect::<Vec<(String, u64)>>()
    });
    let targets = options.list("targets", "x86-64-v4,x86-64-v4-amx");
    let targets: Vec<_> = targets.iter().filter_map(|name| Target::from_name(name)).filter(|t| runs(*t)).collect();
    let variants: Vec<_> = changes
        .flat_map(|changes| targets.iter().map(move |&target| Variant { target, changes: changes.clone() }))
        .collect();
    let tokens: Vec<u64> = options.list("tokens", "1,4,16,64,512").iter().filter_map(|t| t.parse().ok()).collect();
    for name in options.list("layers", "qwen,olmoe,mixtral") {
        let Some(shape) = SHAPES.iter().find(|s| s.name == name) else {
            println!("no layer {name}");
            continue;
        };
        measure(shape, weights, &variants, &tokens, [threads, rounds]);
    }
}

fn measure(shape: &Shape, weights: DType, variants: &[Variant], tokens: &[u64], [threads, rounds]: [usize; 2]) {
    let layer = Layer::new(shape, weights, variants, tokens.iter().copied().max().unwrap_or(1), threads);
    let limits = Limits::new(&variants.iter().map(|v| v.target).collect::<Vec<_>>());
    let mut random = Random(1);
    let mut rows: BTreeMap<(usize, u64), Vec<[f64; 8]>> = BTreeMap::new();
    for _ in 0..rounds {
        for &tokens in tokens {
            for (i, variant) in variants.iter().enumerate() {
                let routing = layer.route(tokens, &mut random);
                let read = limits.read(layer.weights(), threads);
                let peak = limits.peak(variant.target, threads);
                let run = layer.run(i, tokens, &routing, threads);
                let seconds: f64 = run.seconds.iter().sum();
                let bandwidth = run.bytes / seconds;
                let speed = run.operations / seconds;
                let share = [bandwidth / read, speed / peak];
                rows.entry((i, tokens)).or_default().push([
                    seconds * 1e3,
                    run.seconds[0] * 1e3,
                    run.seconds[1] * 1e3,
                    run.wall * 1e3,
                    bandwidth / 1e9,
                    speed / 1e9,
                    share[0],
                    share[1],
                ]);
            }
        }
    }
    for ((i, tokens), rows) in rows {
        let [ms, up, down, wall, bandwidth, speed, read, peak] =
            std::array::from_fn(|c| median(rows.iter().map(|r| r[c])));
        let Variant { target, changes } = &variants[i];
        println!(
            "{:8} {:14} T={tokens:<5} {ms:9.3} ms (up {up:.3}, down {down:.3}, wall {wall:.3})  {bandwidth:6.1} GB/s  {speed:7.1} GFLOP/s  \
             read {read:4.2}  peak {peak:4.2}  {changes:?}",
            shape.name,
            target.name(),
        );
    }
}
