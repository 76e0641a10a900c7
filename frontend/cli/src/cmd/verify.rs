//! `moec verify`: reference cases through compiled kernels.

use crate::{args::Verify, context::Context, failure::Failure, wanted};
use moec::verify::{self, Bench, CaseResult, Status};
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// Runs all cases and prints a line for each.
pub(crate) fn run(cx: &Context, args: &Verify) -> Result<(), Failure> {
    let cases = cases(&args.cases)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if args.device.starts_with("cuda") { 1 } else { threads.min(cases.len()).max(1) };
    let benches: Result<Vec<Bench>, Failure> = (0..threads)
        .map(|_| {
            // Cases run side by side, so that each has one thread.
            let (device, target) = wanted::device(&args.device, 1, args.target.as_deref())?;
            Ok(Bench { device, target })
        })
        .collect();
    let benches = match benches {
        Ok(benches) => benches,
        Err(Failure::Machine(finding)) if args.device.starts_with("cuda") => {
            let skipped = cases.iter().map(|path| CaseResult {
                name: name(path),
                status: Status::Skip,
                out_max_rel: None,
                out_rms_rel: None,
                selection_mismatches: None,
                reason: Some(finding.message.clone()),
            });
            return report(cx, skipped.map(|r| (r, Duration::ZERO)));
        }
        Err(failure) => return Err(failure),
    };
    let (next, stop) = (AtomicUsize::new(0), Mutex::new(false));
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        for bench in &benches {
            let (send, cases, next, stop) = (send.clone(), &cases, &next, &stop);
            scope.spawn(move || {
                while let Some((at, path)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, cases.get(i)?)))
                {
                    if *stop.lock().unwrap_or_else(PoisonError::into_inner) {
                        break;
                    }
                    let start = Instant::now();
                    let result = verify::case(path, bench);
                    if send.send((at, result, start.elapsed())).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        let result = report(cx, InOrder { receive, waiting: Vec::new(), next: 0 });
        *stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        result
    })
}

/// Results in the order of the cases, as soon as they are there.
struct InOrder {
    receive: mpsc::Receiver<(usize, CaseResult, Duration)>,
    waiting: Vec<(usize, CaseResult, Duration)>,
    next: usize,
}

impl Iterator for InOrder {
    type Item = (CaseResult, Duration);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(at) = self.waiting.iter().position(|w| w.0 == self.next) {
                let (_, result, time) = self.waiting.swap_remove(at);
                self.next += 1;
                return Some((result, time));
            }
            self.waiting.push(self.receive.recv().ok()?);
        }
    }
}

fn name(path: &Path) -> String {
    path.file_stem().map_or_else(|| "case".to_owned(), |s| s.to_string_lossy().into_owned())
}

/// Case files of the arguments; folders give all of theirs.
fn cases(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut cases = Vec::new();
    for path in paths {
        if !path.is_dir() {
            if !path.is_file() {
                let help = "name a .safetensors case, or a folder of them";
                return Err(Failure::refused("E0314", format!("{} is no file", path.display()), help));
            }
            cases.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|e| {
            Failure::machine("E0601", format!("cannot read {}: {e}", path.display()), "check the permissions")
        })?;
        let mut inside: Vec<PathBuf> =
            entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
        inside.sort();
        if inside.is_empty() {
            let message = format!("{} holds no case", path.display());
            return Err(Failure::refused("E0314", message, "cases are .safetensors files"));
        }
        cases.extend(inside);
    }
    Ok(cases)
}

/// Prints results as they come, and the sum.
fn report(cx: &Context, results: impl Iterator<Item = (CaseResult, Duration)>) -> Result<(), Failure> {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (result, time) in results {
        match result.status {
            Status::Pass => passed += 1,
            Status::Fail => failed += 1,
            Status::Skip => skipped += 1,
        }
        if cx.is_json() {
            cx.json(&object(&result, time))?;
        } else if !(cx.quiet && result.status == Status::Pass) {
            cx.result(line(&result, time))?;
        }
    }
    if !cx.is_json() {
        cx.result(format!("{passed} passed, {failed} failed, {skipped} skipped\n"))?;
    }
    if failed > 0 { Err(Failure::Different) } else { Ok(()) }
}

fn line(result: &CaseResult, time: Duration) -> String {
    let status = match result.status {
        Status::Pass => "PASS",
        Status::Fail => "FAIL",
        Status::Skip => "SKIP",
    };
    let mut out = format!("{status} {}", result.name);
    if let Some(error) = result.out_max_rel {
        out.push_str(&format!("  out_rel={error:.1e}"));
    }
    match result.selection_mismatches {
        Some(0) => out.push_str("  sel=exact"),
        Some(n) => out.push_str(&format!("  sel={n} differ")),
        None => {}
    }
    if result.status != Status::Skip {
        out.push_str(&format!("  time={:.0}ms", time.as_secs_f64() * 1e3));
    }
    if let Some(reason) = &result.reason {
        out.push_str(&format!("  {reason}"));
    }
    out.push('\n');
    out
}

fn object(result: &CaseResult, time: Duration) -> serde_json::Value {
    json!({
        "schema": 1,
        "name": result.name,
        "status": result.status,
        "out_max_rel": result.out_max_rel,
        "out_rms_rel": result.out_rms_rel,
        "selection_mismatches": result.selection_mismatches,
        "time_ms": time.as_secs_f64() * 1e3,
        "reason": result.reason,
    })
}
