//! Runs case files: `run-case [--seed N] [--no-check] FILE..`; prints what went wrong and what was counted.
//! Of a `.ptx` file it tells whether every instruction is known, and which kernels there are.

use moec_sim::case::Case;
use moec_sim::{Error, Module, Options};
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
        if file.ends_with(".ptx") {
            bad += parse(&file);
            continue;
        }
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
                println!(
                    "  {} warp instructions, {} and {} bytes of global memory read and written, {} passes over shared \
                     memory and {} conflicts, {} tensor operations, {} blocks",
                    c.warp_instructions,
                    c.global_bytes_read,
                    c.global_bytes_written,
                    c.shared_wavefronts,
                    c.bank_conflicts(),
                    c.tensor_flops,
                    c.blocks
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

/// Parses a module; every instruction that is not known is told, by taking its line out and trying again.
fn parse(file: &str) -> u32 {
    let mut lines: Vec<String> = match std::fs::read_to_string(file) {
        Ok(t) => t.lines().map(str::to_owned).collect(),
        Err(e) => {
            println!("{file}: {e}");
            return 1;
        }
    };
    let mut unknown = 0;
    loop {
        match Module::parse(&lines.join("\n")) {
            Ok(m) => {
                m.entries().iter().for_each(|e| {
                    println!(
                        "{file}: {} for {}, parameters of {:?} bytes, {} registers",
                        e.name,
                        m.target(),
                        e.params,
                        e.registers
                    )
                });
                return unknown;
            }
            Err(e @ (Error::Unsupported { line, .. } | Error::Parse { line, .. })) if unknown < 100 => {
                println!("{file}: {e}: {}", lines.get(line as usize - 1).map_or("", |l| l.trim()));
                unknown += 1;
                match lines.get_mut(line as usize - 1) {
                    Some(l) if !l.is_empty() => l.clear(),
                    _ => return unknown,
                }
            }
            Err(e) => {
                println!("{file}: {e}");
                return unknown + 1;
            }
        }
    }
}
