//! A part of the matrix of layers, tokens and rows on every kind of target; the example `matrix` runs all of it.

use moec::{
    Target,
    runtime::{Cpu, Device, Sim},
};
use moec_tests::matrix::{self, Found, MODELS, Rows, TOKENS};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

/// Launches of a model: on CPUs every kind of rows, with numbers of tokens that change from kind to kind and model to
/// model; on GPUs some of them, where 17 tokens are the most.
fn launches(model: usize, target: Target) -> Vec<(u64, Rows)> {
    let (most, every) = if target.is_gpu() { (17, 4) } else { (1000, 1) };
    let tokens: Vec<u64> = TOKENS.into_iter().filter(|t| *t <= most).collect();
    let all = (0..Rows::ALL.len()).filter(|i| (i + model).is_multiple_of(every));
    all.map(|i| (tokens[(5 * i + 3 * model) % tokens.len()], Rows::ALL[i])).collect()
}

/// Every model on the usual CPUs, one in four on each GPU and on products of pairs, but one that the interpreter takes long for.
fn chosen(model: usize, target: Target) -> bool {
    let turn = match target {
        Target::Sm80 => model.is_multiple_of(4),
        Target::Sm90a => model % 4 == 1,
        Target::X86V4Bf16 => model % 4 == 1,
        Target::X86V3 | Target::X86V4 | Target::X86V4Amx | Target::Aarch64 | Target::Sm89 => true,
    };
    turn && MODELS[model] != "dbrx"
}

#[test]
fn real_layers_hold_on_rows_of_every_kind() {
    let targets = [Target::X86V3, Target::X86V4, Target::X86V4Bf16, Target::Sm80, Target::Sm90a];
    let usable = |target: &Target| target.is_gpu() || Cpu::new(1).runs(target.name()).is_ok();
    let of = |t: Target| (0..MODELS.len()).filter(move |m| chosen(*m, t)).map(move |m| (m, t));
    let jobs: Vec<(usize, Target)> = targets.into_iter().filter(usable).flat_map(of).collect();
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((model, target)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    let device: Arc<dyn Device> = if target.is_gpu() {
                        Arc::new(Sim::new(moec_sim::Options::default()))
                    } else {
                        Arc::new(Cpu::new(1))
                    };
                    let result = matrix::check(MODELS[model], target, device, &launches(model, target), 3);
                    results.lock().expect("no thread panics").push(result);
                }
            });
        }
    });
    let (mut all, mut failures) = (Found::default(), Vec::new());
    for result in results.into_inner().expect("no thread panics") {
        match result {
            Ok(found) => {
                all.launches += found.launches;
                all.compared += found.compared;
                all.unsteady += found.unsteady;
            }
            Err(why) => failures.push(why),
        }
    }
    assert!(failures.is_empty(), "{} of {} layers\n{}", failures.len(), jobs.len(), failures.join("\n"));
    println!("{all:?}");
    assert!(all.launches >= 5 * jobs.len() as u64 && all.compared > all.launches, "{all:?}");
}
