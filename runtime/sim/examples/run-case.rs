//! Runs case files: `run-case [--seed N] [--no-check] FILE..`; prints what went wrong and what was counted.

use moec_sim::Options;
use moec_sim::case::Case;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let mut options = Options::default();
    let mut files = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        match a.as_str() {
            "--seed" => options.seed = args.next().and_then(|s| s.parse().ok()).unwrap_or(0),
            "--no-check" => options.check = false,
            _ => files.push(a),
        }
    }
    let mut bad = 0;
    for file in files {
        let start = Instant::now();
        let outcome = std::fs::read(&file)
            .map_err(|e| e.to_string())
            .and_then(|b| Case::read(&b).and_then(|c| c.run(&options)).map_err(|e| e.to_string()));
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(o) => {
                let c = &o.report.counts;
                let rate = c.lane_instructions as f64 / seconds / 1e6;
                println!(
                    "{}: {} ({:.3} s, {} lane instructions, {rate:.1} M/s, {} registers, {} shared bytes)",
                    o.case,
                    o.failure.as_deref().unwrap_or("pass"),
                    seconds,
                    c.lane_instructions,
                    c.registers,
                    c.shared_bytes
                );
                bad += u32::from(!o.passed());
                if o.expect != "ok" || !o.passed() {
                    o.report.findings.iter().for_each(|f| println!("  {f}"));
                }
            }
            Err(e) => {
                println!("{file}: {e}");
                bad += 1;
            }
        }
    }
    ExitCode::from(u8::from(bad > 0))
}
