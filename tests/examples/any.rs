//! Layers `FIRST..END` of the random ones on the CPU (or on the simulator for TARGET), against the interpreter:
//! `any FIRST END [TARGET]`. `any NUMBER` prints the graph, and `any FILE TOKENS [TARGET]` checks that of a file.

use moec::{
    Target, host_target,
    runtime::{Cpu, Device, Sim},
};
use moec_tests::{
    any::{check, layer},
    gallery::{self, graph, on_all_cores},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let target = arguments.get(2).and_then(|name| Target::from_name(name)).unwrap_or_else(host_target);
    let device = || -> Arc<dyn Device> {
        if target.is_gpu() { Arc::new(Sim::new(moec_sim::Options::default())) } else { Arc::new(Cpu::new(1)) }
    };
    let number = |i: usize| arguments.get(i).and_then(|a| a.parse::<u64>().ok());
    if let (Some(file), None, Some(tokens)) = (arguments.first(), number(0), number(1)) {
        println!("{:?}", gallery::check(&graph(Path::new(file)), target, device(), &[tokens]));
        return;
    }
    let (Some(first), Some(end)) = (number(0), number(1)) else {
        println!("{}", layer(number(0).unwrap_or(0)).form.json());
        return;
    };
    let numbers: Vec<u64> = (first..end).collect();
    let failures = on_all_cores(&numbers, |n| {
        let judge = || check(*n, target, device());
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
