//! Layers drawn at random from the whole op set, against the interpreter; `cargo run --example any` draws more.

use moec::{
    Target, host_target,
    runtime::{Cpu, Sim},
};
use moec_tests::{any::check, gallery::on_all_cores};
use std::sync::Arc;

#[test]
fn drawn_layers_agree_on_this_processor() {
    let numbers: Vec<u64> = (0..16).collect();
    let failures = on_all_cores(&numbers, |number| {
        check(*number, host_target(), Arc::new(Cpu::new(1))).map_err(|e| format!("layer {number}: {e}"))
    });
    assert!(failures.is_empty(), "{} of {}\n{}", failures.len(), numbers.len(), failures.join("\n"));
}

#[test]
fn drawn_layers_agree_as_ptx() {
    let numbers: Vec<(u64, Target)> = (100..104).map(|n| (n, [Target::Sm80, Target::Sm90a][n as usize % 2])).collect();
    let failures = on_all_cores(&numbers, |(number, target)| {
        let device = Arc::new(Sim::new(moec_sim::Options::default()));
        check(*number, *target, device).map_err(|e| format!("layer {number}: {e}"))
    });
    assert!(failures.is_empty(), "{} of {}\n{}", failures.len(), numbers.len(), failures.join("\n"));
}
