//! Measures what a launch costs on the CPU beside its kernel.

#[cfg(not(unix))]
fn main() {}

#[cfg(unix)]
#[path = "../tests/support/mod.rs"]
mod support;

#[cfg(unix)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use moec_abi::{CpuGrid, Grid};
    use moec_runtime::{Artefact, Cpu, InMemory, Model};
    use std::{collections::BTreeMap, ffi::c_void, sync::Arc, time::Instant};

    unsafe extern "C" fn nothing(_: *const u64, _: u64, _: u64, _: *mut c_void) {}

    const LAUNCHES: usize = 200;
    for threads in [1, 2] {
        for items in [1u64, 2, 64] {
            let mut program = support::program(if cfg!(target_arch = "x86_64") { "x86-64" } else { "aarch64" });
            let mut launch = program.launches[0].clone();
            launch.grid = Grid::Cpu(CpuGrid { items: items.into(), grain: 1, scratch: 0 });
            program.launches = vec![launch; LAUNCHES];
            let artefact = Arc::new(Artefact::in_memory(support::manifest(vec![program]), BTreeMap::new())?);
            let cpu = Arc::new(Cpu::new(threads));
            // SAFETY: a kernel that does nothing fits any launch.
            let module =
                unsafe { cpu.module(artefact.program(0)?, vec![nothing as moec_launch::CpuKernel; LAUNCHES]) }?;
            let mut tensors = InMemory::new();
            let w = vec![0; (support::IN * support::OUT * 4) as usize];
            tensors.insert("l3.w", moec_abi::DType::F32, vec![support::OUT, support::IN], w)?;
            // SAFETY: the module was made from this program.
            let layer = unsafe { Model::new(artefact, cpu).layer_with(3, module, &tensors) }?;
            let (x, mut y) = (vec![0u8; support::IN as usize * 4], vec![0u8; support::OUT as usize * 4]);
            let mut best = f64::MAX;
            for _ in 0..200 {
                let start = Instant::now();
                layer.launch(1, &[&x], &mut [&mut y])?;
                best = best.min(start.elapsed().as_secs_f64());
            }
            println!("{threads} threads, {items:2} items: {:.0} ns a launch", best * 1e9 / LAUNCHES as f64);
        }
    }
    Ok(())
}
