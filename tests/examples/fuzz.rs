//! Readers on bytes that are nearly right: `fuzz [SECONDS [FIRST_SEED [READER]]]`.

use moec_tests::fuzz::{TARGETS, run};
use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

fn main() -> ExitCode {
    let number = |i| std::env::args().nth(i).and_then(|a| a.parse().ok());
    let (seconds, first) = (number(1).unwrap_or(60), number(2).unwrap_or(1));
    let reader = std::env::args().nth(3);
    let targets = || TARGETS.iter().filter(|t| reader.as_deref().is_none_or(|r| r == t.name));
    let (start, mut seed) = (Instant::now(), first);
    while start.elapsed() < Duration::from_secs(seconds) {
        for target in targets() {
            if let Err(failure) = run(target, seed, 500) {
                println!("{failure}");
                return ExitCode::FAILURE;
            }
        }
        seed += 1;
    }
    println!("{} inputs for each of {} readers", (seed - first) * 500, targets().count());
    ExitCode::SUCCESS
}
