//! What this processor reaches: streaming reads and arithmetic, measured by compiled kernels.

use crate::{Error, Target};
use moec_abi::{Arg, Buffer, BufferKind, CpuGrid, DType, Expr, Grid, Launch, Manifest, Program, SCHEMA};
use moec_codegen::{
    limits::{PIECE, emit_peak, emit_read, operations},
    mlir::{Builder, Keep, Session},
};
use moec_runtime::{Artefact, Device, InMemory, Layer, Model};
use serde::Serialize;
use std::{collections::BTreeMap, sync::Arc};

/// Pieces of memory that are read: larger than caches.
const PIECES: u64 = 512;
/// Steps of arithmetic of one item.
const STEPS: u64 = 1 << 14;
/// Measurements, of which the best counts.
const ROUNDS: usize = 5;

/// Limits of a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Bytes per second that all threads read from memory.
    pub read: f64,
    /// Operations per second of all threads.
    pub peak: f64,
}

/// Measures the limits of the CPU `device` for code of `target`.
///
/// # Errors
/// The device does not run such code.
pub fn measure(device: &Arc<dyn Device>, target: Target) -> Result<Limits, Error> {
    let memory = vec![1u8; (PIECES * PIECE) as usize];
    let read = layer(device, target, "read", true, |b| emit_read(b, target))?;
    let seconds = best(&read, PIECES, &[&memory])?;
    let read = (PIECES * PIECE) as f64 / seconds;
    let items = 256 * STEPS;
    let peak = layer(device, target, "peak", false, |b| emit_peak(b, target))?;
    let seconds = best(&peak, items, &[])?;
    Ok(Limits { read, peak: items as f64 * operations(target) / seconds })
}

/// A program of one kernel.
fn layer(
    device: &Arc<dyn Device>,
    target: Target,
    name: &str,
    reads: bool,
    emit: impl FnOnce(&Builder<'_>),
) -> Result<Layer, Error> {
    let code = Session::new().compile(&target, Keep::default(), emit)?.code;
    let memory = Buffer {
        name: "memory".to_owned(),
        kind: BufferKind::Input { name: "memory".to_owned() },
        dtype: DType::U8,
        shape: vec![Expr::Tokens, Expr::Const(PIECE)],
        offset: Expr::Const(0),
        zeroed: false,
    };
    let value = |v: u64| Arg::Value(Expr::Const(v));
    let (args, grain) = if reads {
        (vec![Arg::Buffer(0), Arg::Value(Expr::Tokens)], 1)
    } else {
        (vec![value(f32::to_bits(1.0).into()), value(f32::to_bits(0.5).into())], STEPS)
    };
    let program = Program {
        name: name.to_owned(),
        target: target.name().to_owned(),
        buffers: if reads { vec![memory] } else { Vec::new() },
        slots: Vec::new(),
        launches: vec![Launch {
            name: name.to_owned(),
            symbol: name.to_owned(),
            args,
            grid: Grid::Cpu(CpuGrid { items: Expr::Tokens, grain, scratch: 8192 }),
        }],
        workspace: Expr::Const(0),
        max_tokens: 1 << 32,
        fits: Vec::new(),
        layers: vec![0],
        prefixes: vec![String::new()],
        code: format!("{name}.o"),
        binary: None,
        domains: Vec::new(),
    };
    let manifest = Manifest {
        schema: SCHEMA,
        producer: String::new(),
        model: name.to_owned(),
        inputs: Vec::new(),
        programs: vec![program],
        chains: Vec::new(),
        notes: Vec::new(),
    };
    let files = BTreeMap::from([(format!("{name}.o"), code)]);
    let artefact = Arc::new(Artefact::in_memory(manifest, files)?);
    Ok(Model::new(artefact, Arc::clone(device)).layer(0, &InMemory::new())?)
}

/// Seconds of the fastest of some runs.
fn best(layer: &Layer, items: u64, inputs: &[&[u8]]) -> Result<f64, Error> {
    let mut nanoseconds = u64::MAX;
    for _ in 0..ROUNDS {
        let times = layer.launch_timed(items, inputs, &mut [])?;
        nanoseconds = nanoseconds.min(times.iter().map(|t| t.nanoseconds).sum());
    }
    Ok(nanoseconds.max(1) as f64 * 1e-9)
}

#[cfg(test)]
mod tests {
    use super::measure;
    use crate::host_target;
    use moec_runtime::{Cpu, Device};
    use std::sync::Arc;

    /// Loops that do not run, or are optimised away, take no time at all.
    #[test]
    fn limits_are_those_of_a_machine() {
        let device: Arc<dyn Device> = Arc::new(Cpu::new(2));
        let limits = measure(&device, host_target()).unwrap();
        assert!((1e6..1e13).contains(&limits.read), "{limits:?}");
        assert!((1e6..1e13).contains(&limits.peak), "{limits:?}");
    }
}
