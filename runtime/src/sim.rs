//! The simulator as a device: runs a program's PTX on the CPU and checks it.

use crate::{
    device::{Bound, Device, Files, Module, Value, grid, overflow, values, zeroed},
    error::{Code, Result, RuntimeError},
    target::{gpu_number, gpu_rank},
};
use moec_abi::{DType, GpuGrid, Grid, Program, TensorMap};
use moec_sim::{Arg, Finding, Launch, MapType, Memory, Options, Swizzle, Tally, TensorMapDesc};
use std::{
    any::Any,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The simulator: no GPU needed, every access checked.
pub struct Sim {
    options: Options,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    memory: Memory,
    tally: Tally,
    findings: Vec<Finding>,
    busy: Duration,
}

struct SimModule {
    module: moec_sim::Module,
    about: String,
}

impl Module for SimModule {
    fn describe(&self) -> String {
        self.about.clone()
    }
}

fn fault(error: &moec_sim::Error) -> RuntimeError {
    let code = match error {
        moec_sim::Error::Parse { .. } | moec_sim::Error::Unsupported { .. } | moec_sim::Error::NoEntry(_) => {
            Code::CodeObject
        }
        moec_sim::Error::Memory(_) => Code::Argument,
        moec_sim::Error::Args { .. }
        | moec_sim::Error::Launch { .. }
        | moec_sim::Error::Limit { .. }
        | moec_sim::Error::TensorMap(_)
        | moec_sim::Error::Case(_) => Code::Simulation,
        // The enum may grow.
        _ => Code::Simulation,
    };
    RuntimeError::new(code, error.to_string())
}

impl Sim {
    /// A simulator with its own memory.
    pub fn new(options: Options) -> Self {
        Self { options, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts of all launches since the last call.
    pub fn take_counts(&self) -> Tally {
        std::mem::take(&mut self.state().tally)
    }

    /// Time that launches have taken since the last call.
    pub fn take_busy(&self) -> Duration {
        std::mem::take(&mut self.state().busy)
    }

    /// Findings of all launches since the last call; a launch with findings has also failed.
    pub fn take_findings(&self) -> Vec<Finding> {
        std::mem::take(&mut self.state().findings)
    }
}

fn tensor_map(map: &TensorMap, base: u64, tokens: u64) -> Result<TensorMapDesc> {
    let eval = |e: &moec_abi::Expr| e.eval(tokens).ok_or_else(|| overflow("a tensor map"));
    let dtype = match map.dtype {
        DType::F64 => MapType::F64,
        DType::F32 => MapType::F32,
        DType::Bf16 => MapType::Bf16,
        DType::F16 => MapType::F16,
        DType::F8e4m3 | DType::F8e5m2 | DType::U8 | DType::I8 => MapType::U8,
        DType::I32 => MapType::S32,
        DType::I64 => MapType::S64,
    };
    let swizzle = match map.swizzle {
        0 => Swizzle::None,
        32 => Swizzle::B32,
        64 => Swizzle::B64,
        128 => Swizzle::B128,
        other => {
            return Err(RuntimeError::new(Code::Artefact, format!("a tensor map with a swizzle of {other} bytes")));
        }
    };
    Ok(TensorMapDesc {
        dtype,
        base,
        dims: map.dims.iter().map(eval).collect::<Result<_>>()?,
        strides: map.strides.iter().map(eval).collect::<Result<_>>()?,
        box_dims: map.box_dims.clone(),
        element_strides: Vec::new(),
        swizzle,
    })
}

impl Device for Sim {
    fn name(&self) -> String {
        "sim".into()
    }

    fn runs(&self, target: &str) -> Result<(), String> {
        match gpu_number(target) {
            Some((80 | 86 | 87 | 89 | 90, _)) => Ok(()),
            Some(_) => Err("the simulator runs code up to sm_90a".into()),
            None => Err("the simulator runs PTX".into()),
        }
    }

    fn rank(&self, target: &str) -> u32 {
        gpu_rank(target)
    }

    fn load(&self, program: &Program, files: &dyn Files) -> Result<Arc<dyn Module>> {
        let bytes = files.read(&program.code)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| RuntimeError::new(Code::CodeObject, format!("{} is not text", program.code)))?;
        let module = moec_sim::Module::parse(&text).map_err(|e| fault(&e))?;
        let entries = module.entries();
        if let Some(launch) = program.launches.iter().find(|l| entries.iter().all(|e| e.name != l.symbol)) {
            let message = format!("{} does not define {}, the kernel of {}", program.code, launch.symbol, launch.name);
            return Err(RuntimeError::new(Code::CodeObject, message));
        }
        let about = format!("{} kernels of {}", entries.len(), module.target());
        Ok(Arc::new(SimModule { module, about }))
    }

    fn allocate(&self, bytes: u64) -> Result<u64> {
        Ok(self.state().memory.alloc(bytes, 256))
    }

    unsafe fn free(&self, address: u64, _bytes: u64) {
        let freed = self.state().memory.free(address);
        debug_assert!(freed.is_ok(), "blocks are freed once");
    }

    unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.state().memory.write(address, bytes).map_err(|e| fault(&e))
    }

    unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let data = self.state().memory.read(address, bytes.len() as u64).map_err(|e| fault(&e))?;
        bytes.copy_from_slice(&data);
        Ok(())
    }

    unsafe fn launch(&self, module: &dyn Module, bound: &Bound<'_>, mut times: Option<&mut Vec<u64>>) -> Result<()> {
        let module = (module as &dyn Any)
            .downcast_ref::<SimModule>()
            .ok_or_else(|| RuntimeError::new(Code::Argument, "the module was loaded on another device"))?;
        let mut state = self.state();
        let State { memory, tally, findings, busy } = &mut *state;
        for (address, bytes) in zeroed(bound)? {
            let zeros = vec![0; usize::try_from(bytes).map_err(|_| overflow("a buffer"))?];
            memory.write(address, &zeros).map_err(|e| fault(&e))?;
        }
        for launch in &bound.program.launches {
            let start = Instant::now();
            let shape: &GpuGrid = match &launch.grid {
                Grid::Gpu(grid) => grid,
                Grid::Cpu(_) => {
                    return Err(RuntimeError::new(Code::Artefact, format!("launch {} is for a CPU", launch.name)));
                }
            };
            let blocks = grid(shape, bound.tokens, &launch.name)?;
            if blocks.iter().all(|&n| n > 0) {
                let args = values(bound, launch)?
                    .into_iter()
                    .map(|value| match value {
                        Value::Word(word) => Ok(Arg::U64(word)),
                        Value::Map { map, address } => Ok(Arg::TensorMap(tensor_map(map, address, bound.tokens)?)),
                    })
                    .collect::<Result<_>>()?;
                let call = Launch {
                    entry: &launch.symbol,
                    grid: blocks,
                    block: shape.threads,
                    cluster: shape.cluster,
                    dynamic_shared: shape.shared,
                    args,
                    dependent: shape.dependent,
                };
                let report = moec_sim::launch(&module.module, memory, &call, &self.options).map_err(|e| fault(&e))?;
                tally.add(&launch.symbol, &report);
                *busy += start.elapsed();
                if let Some(first) = report.findings.first() {
                    let more = report.findings.len() - 1;
                    let message = format!("launch {}: {first}", launch.name);
                    let message = if more > 0 { format!("{message}; and {more} more") } else { message };
                    findings.extend(report.findings.iter().cloned());
                    return Err(RuntimeError::new(Code::Simulation, message)
                        .with_help("this is a fault of the generated kernel; please report it"));
                }
            }
            if let Some(times) = times.as_deref_mut() {
                times.push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
            }
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
