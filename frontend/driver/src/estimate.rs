//! How long a kernel takes at least, from what it did on the simulator: cycles of each unit, and which one binds.
//!
//! The rates are those of the larger devices of a target: H200 (memory as measured, 4.3 of 4.8 TB/s), A100 with
//! 80 GB, L40S. The estimate takes work to be spread evenly over the multiprocessors that have a block, and knows no
//! latency: it is a lower limit, for finding out what to improve.

use moec_abi::{Arg, BufferKind, Launch, Program};
use moec_codegen::Target;
use moec_sim::Counts;
use serde::Serialize;

/// A unit of the device that a kernel can be bound by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Device memory.
    Memory,
    /// Traffic to the second-level cache.
    Cache,
    /// Tensor cores.
    Tensor,
    /// Shared memory.
    Shared,
    /// Issue of instructions.
    Issue,
}

impl Limit {
    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cache => "cache",
            Self::Tensor => "tensor",
            Self::Shared => "shared",
            Self::Issue => "issue",
        }
    }
}

/// Cycles that each unit needs for a kernel.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Cycles by unit.
    pub cycles: [(Limit, f64); 5],
    /// Microseconds that the slowest unit takes.
    pub microseconds: f64,
}

impl Estimate {
    /// The unit that takes longest, and its cycles.
    pub fn limit(&self) -> (Limit, f64) {
        self.cycles.into_iter().fold((Limit::Issue, 0.0), |most, one| if one.1 > most.1 { one } else { most })
    }
}

/// What a device does in a cycle.
struct Rates {
    multiprocessors: f64,
    hertz: f64,
    /// Bytes of the whole device.
    memory: f64,
    cache: f64,
    /// Operations of one multiprocessor's tensor cores on bf16.
    tensor: f64,
}

/// Bytes of shared memory and instructions of one multiprocessor in a cycle.
const SHARED: f64 = 128.0;
const ISSUE: f64 = 4.0;

const fn rates(target: Target) -> Option<Rates> {
    match target {
        Target::Sm90a => {
            Some(Rates { multiprocessors: 132.0, hertz: 1.755e9, memory: 2450.0, cache: 3130.0, tensor: 4096.0 })
        }
        Target::Sm80 => {
            Some(Rates { multiprocessors: 108.0, hertz: 1.41e9, memory: 1380.0, cache: 3100.0, tensor: 2048.0 })
        }
        Target::Sm89 => {
            Some(Rates { multiprocessors: 142.0, hertz: 2.52e9, memory: 340.0, cache: 2000.0, tensor: 1024.0 })
        }
        Target::X86V3 | Target::X86V4 | Target::X86V4Bf16 | Target::X86V4Amx | Target::Aarch64 => None,
    }
}

/// The estimate for a kernel that did `counts`; `footprint` are the bytes of memory that it can touch.
/// `None` for targets that are no GPUs.
pub fn estimate(counts: &Counts, footprint: u64, target: Target) -> Option<Estimate> {
    let rates = rates(target)?;
    let used = rates.multiprocessors.min(counts.blocks.max(1) as f64);
    let bytes = (counts.global_bytes_read + counts.global_bytes_written) as f64;
    let shared = (counts.shared_bytes_read + counts.shared_bytes_written) as f64 / SHARED;
    let cycles = [
        (Limit::Memory, bytes.min(footprint as f64) / rates.memory),
        (Limit::Cache, bytes / rates.cache),
        (Limit::Tensor, counts.tensor_flops as f64 / rates.tensor / used),
        (Limit::Shared, shared.max(counts.shared_wavefronts as f64) / used),
        (Limit::Issue, counts.warp_instructions as f64 / ISSUE / used),
    ];
    let mut estimate = Estimate { cycles, microseconds: 0.0 };
    estimate.microseconds = estimate.limit().1 / rates.hertz * 1e6;
    Some(estimate)
}

/// Bytes of memory that a launch can touch for `tokens`, when a share of the experts has rows.
pub fn footprint(program: &Program, launch: &Launch, tokens: u64, share: f64) -> u64 {
    let buffers = launch.args.iter().filter_map(|arg| match arg {
        Arg::Buffer(buffer) | Arg::Offset { buffer, .. } => program.buffers.get(*buffer),
        Arg::TensorMap(map) => program.buffers.get(map.buffer),
        Arg::Value(_) => None,
    });
    let bytes = buffers.map(|buffer| match buffer.kind {
        BufferKind::Weight { slot } => program.slots.get(slot).map_or(0, |slot| {
            let share = if slot.experts > 1 { share.min(1.0) } else { 1.0 };
            (slot.bytes as f64 * share) as u64
        }),
        BufferKind::Input { .. } | BufferKind::Output { .. } | BufferKind::Workspace => {
            let size = buffer.shape.iter().try_fold(buffer.dtype.bytes(), |n, d| n.checked_mul(d.eval(tokens)?));
            size.unwrap_or(u64::MAX)
        }
    });
    bytes.fold(0, u64::saturating_add)
}
