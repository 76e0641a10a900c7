//! Verifies case files: `verify DEVICE TARGET FILE..`, with `sim` or `cpu` as the device.

use moec::{
    Target,
    runtime::{Cpu, Device, Sim},
    verify::{Bench, Status, case},
};
use std::{path::Path, process::ExitCode, sync::Arc};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [device, target, files @ ..] = args.as_slice() else { return ExitCode::from(2) };
    let Some(target) = Target::from_name(target) else { return ExitCode::from(2) };
    let device: Arc<dyn Device> =
        if device == "sim" { Arc::new(Sim::new(moec_sim::Options::default())) } else { Arc::new(Cpu::new(2)) };
    let bench = Bench { device, target };
    let mut failed = 0;
    for file in files {
        let start = std::time::Instant::now();
        let result = case(Path::new(file), &bench);
        failed += u64::from(result.status != Status::Pass);
        let seconds = start.elapsed().as_secs_f64();
        println!("{:?} {} {:?} {:?} {seconds:.2} s", result.status, result.name, result.out_max_rel, result.reason);
    }
    println!("{failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
