//! The matrix of [`moec_tests::matrix`] on one target, GPUs on the simulator: `matrix TARGET [TOKENS] [MODEL..]`, where
//! `TOKENS` are the most of a launch (large ones take the simulator hours).

use moec::{
    Target,
    runtime::{Cpu, Device, Sim},
};
use moec_tests::matrix::{self, MODELS, Rows, TOKENS};
use std::{process::ExitCode, sync::Arc, time::Instant};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let Some(target) = Target::ALL.into_iter().find(|t| t.name() == name) else {
        eprintln!("matrix TARGET [TOKENS] [MODEL..]; targets: {}", Target::ALL.map(Target::name).join(", "));
        return ExitCode::FAILURE;
    };
    let mut models: Vec<String> = arguments.collect();
    let most = models.first().and_then(|word| word.parse().ok());
    if most.is_some() {
        models.remove(0);
    }
    if models.is_empty() {
        models = MODELS.map(str::to_owned).to_vec();
    }
    let tokens = TOKENS.into_iter().filter(|t| most.is_none_or(|most: u64| *t <= most));
    let launches: Vec<_> = tokens.flat_map(|t| Rows::ALL.map(|rows| (t, rows))).collect();
    let mut failed = false;
    for model in models {
        let device: Arc<dyn Device> =
            if target.is_gpu() { Arc::new(Sim::new(moec_sim::Options::default())) } else { Arc::new(Cpu::new(2)) };
        let start = Instant::now();
        match matrix::check(&model, target, device, &launches, 3) {
            Ok(found) => println!("PASS {model}: {found:?}, {:.0} s", start.elapsed().as_secs_f64()),
            Err(why) => {
                failed = true;
                println!("FAIL {why}");
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
