//! Layers `FIRST..END` of the random ones on the CPU (or on the simulator for TARGET), against the interpreter:
//! `any FIRST END [TARGET]`. `any NUMBER` prints the graph.

use moec::{
    Target, host_target,
    runtime::{Cpu, Device, Sim},
};
use moec_tests::{
    any::layer,
    gallery::{check, on_all_cores},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| arguments.get(i).and_then(|a| a.parse::<u64>().ok());
    let (Some(first), Some(end)) = (number(0), number(1)) else {
        println!("{}", layer(number(0).unwrap_or(0)).0.json());
        return;
    };
    let target = arguments.get(2).and_then(|name| Target::from_name(name)).unwrap_or_else(host_target);
    let numbers: Vec<u64> = (first..end).collect();
    let failures = on_all_cores(&numbers, |n| {
        let judge = || {
            let (form, tokens) = layer(*n);
            let device: Arc<dyn Device> =
                if target.is_gpu() { Arc::new(Sim::new(moec_sim::Options::default())) } else { Arc::new(Cpu::new(1)) };
            check(&form.graph(), target, device, tokens)
        };
        let outcome = catch_unwind(AssertUnwindSafe(judge)).unwrap_or_else(|_| Err("panics".into()));
        outcome.map_err(|e| {
            let text = format!("layer {n}: {e}");
            eprintln!("{text}");
            text
        })
    });
    println!("{} of {} fail on {}", failures.len(), numbers.len(), target.name());
    std::process::exit(i32::from(!failures.is_empty()));
}
