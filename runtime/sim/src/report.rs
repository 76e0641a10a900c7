//! What a launch reports: findings of the checker and counts.

use std::collections::BTreeMap;
use std::fmt;

/// What is wrong with a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// An access outside every buffer, or outside the shared memory of the launch.
    OutOfBounds,
    /// An address that is not a multiple of the size of the access.
    Misaligned,
    /// A read of memory that nothing has written.
    Uninitialized,
    /// Two accesses to the same bytes, one a write, that nothing orders.
    Race,
    /// Data of an asynchronous operation is used before the wait that completes it.
    MissingWait,
    /// Ordinary writes are used by the async proxy without a proxy fence.
    MissingFence,
    /// Threads of a warp at different aligned barriers, or some at none.
    BarrierDivergence,
    /// Every thread that is left waits for something nobody will do.
    Deadlock,
    /// An mbarrier that is not initialised, or whose counts leave their range.
    Mbarrier,
    /// A tensor map that is not one, or a copy that breaks its rules.
    TensorMap,
    /// A matrix descriptor or an instruction used against its rules.
    Misuse,
    /// `trap`, or a failed assertion of the kernel.
    Trap,
}

impl FindingKind {
    /// The name in reports and case files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::OutOfBounds => "out_of_bounds",
            FindingKind::Misaligned => "misaligned",
            FindingKind::Uninitialized => "uninitialized",
            FindingKind::Race => "race",
            FindingKind::MissingWait => "missing_wait",
            FindingKind::MissingFence => "missing_fence",
            FindingKind::BarrierDivergence => "barrier_divergence",
            FindingKind::Deadlock => "deadlock",
            FindingKind::Mbarrier => "mbarrier",
            FindingKind::TensorMap => "tensor_map",
            FindingKind::Misuse => "misuse",
            FindingKind::Trap => "trap",
        }
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One finding. Findings of the same kind at the same line are one; the first thread that showed it is named.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What is wrong.
    pub kind: FindingKind,
    /// The entry that was launched.
    pub kernel: String,
    /// Line of the PTX, from 1.
    pub line: u32,
    /// The other instruction of a conflict.
    pub other_line: Option<u32>,
    /// Block of the thread.
    pub block: [u32; 3],
    /// Thread in its block.
    pub thread: [u32; 3],
    /// Generic address of the access.
    pub address: Option<u64>,
    /// A sentence about it.
    pub message: String,
    /// How often it was seen.
    pub times: u64,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(
            f,
            "{}: {} at line {}, block ({bx},{by},{bz}), thread ({tx},{ty},{tz})",
            self.kernel, self.kind, self.line
        )?;
        if let Some(a) = self.address {
            write!(f, ", address {a:#x}")?;
        }
        write!(f, ": {}", self.message)?;
        if let Some(o) = self.other_line {
            write!(f, " (with line {o})")?;
        }
        if self.times > 1 {
            write!(f, ", {} times", self.times)?;
        }
        Ok(())
    }
}

/// What a launch did, summed over its threads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Instructions executed by warps.
    pub warp_instructions: u64,
    /// Instructions executed by threads.
    pub lane_instructions: u64,
    /// Warp instructions by kind: `integer`, `float`, `load`, ..
    pub by_kind: BTreeMap<&'static str, u64>,
    /// Bytes that threads and copies read from global memory.
    pub global_bytes_read: u64,
    /// Bytes that threads and copies wrote to global memory.
    pub global_bytes_written: u64,
    /// Bytes that threads, copies and matrix operands read from shared memory.
    pub shared_bytes_read: u64,
    /// Bytes that threads and copies wrote to shared memory.
    pub shared_bytes_written: u64,
    /// Global accesses of warps (loads, stores and atomics of threads).
    pub global_requests: u64,
    /// 32-byte sectors those accesses touch.
    pub global_sectors: u64,
    /// Sectors they would touch if the same bytes lay side by side.
    pub global_sectors_ideal: u64,
    /// Shared accesses of warps.
    pub shared_requests: u64,
    /// Passes over the shared banks those accesses take.
    pub shared_wavefronts: u64,
    /// Passes they would take without bank conflicts.
    pub shared_wavefronts_ideal: u64,
    /// Multiply-adds of the tensor cores, counted as two operations each.
    pub tensor_flops: u64,
    /// Floating-point operations of threads; a fused multiply-add is two.
    pub float_flops: u64,
    /// Blocks that ran.
    pub blocks: u64,
    /// Registers a thread needs, estimated by liveness (32-bit registers).
    pub registers: u32,
    /// Static and dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// Blocks that fit on a multiprocessor by registers, shared memory and threads.
    pub blocks_per_multiprocessor: u32,
    /// Resident warps over the most a multiprocessor takes, in thousandths.
    pub occupancy_permille: u32,
}

impl Counts {
    /// Wavefronts that bank conflicts cost.
    #[must_use]
    pub fn bank_conflicts(&self) -> u64 {
        self.shared_wavefronts.saturating_sub(self.shared_wavefronts_ideal)
    }

    /// Adds another launch or block. Sizes that are no sums take the larger value.
    pub fn add(&mut self, o: &Counts) {
        for (k, v) in &o.by_kind {
            *self.by_kind.entry(k).or_default() += v;
        }
        for (a, b) in [
            (&mut self.warp_instructions, o.warp_instructions),
            (&mut self.lane_instructions, o.lane_instructions),
            (&mut self.global_bytes_read, o.global_bytes_read),
            (&mut self.global_bytes_written, o.global_bytes_written),
            (&mut self.shared_bytes_read, o.shared_bytes_read),
            (&mut self.shared_bytes_written, o.shared_bytes_written),
            (&mut self.global_requests, o.global_requests),
            (&mut self.global_sectors, o.global_sectors),
            (&mut self.global_sectors_ideal, o.global_sectors_ideal),
            (&mut self.shared_requests, o.shared_requests),
            (&mut self.shared_wavefronts, o.shared_wavefronts),
            (&mut self.shared_wavefronts_ideal, o.shared_wavefronts_ideal),
            (&mut self.tensor_flops, o.tensor_flops),
            (&mut self.float_flops, o.float_flops),
            (&mut self.blocks, o.blocks),
        ] {
            *a += b;
        }
        self.registers = self.registers.max(o.registers);
        self.shared_bytes = self.shared_bytes.max(o.shared_bytes);
        self.blocks_per_multiprocessor = self.blocks_per_multiprocessor.max(o.blocks_per_multiprocessor);
        self.occupancy_permille = self.occupancy_permille.max(o.occupancy_permille);
    }
}

/// Counts in total and by kernel, over several launches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// All launches.
    pub total: Counts,
    /// By entry.
    pub kernels: BTreeMap<String, Counts>,
}

impl Tally {
    /// Adds the report of one launch of `entry`.
    pub fn add(&mut self, entry: &str, report: &Report) {
        self.total.add(&report.counts);
        self.kernels.entry(entry.to_owned()).or_default().add(&report.counts);
    }
}

/// The outcome of a launch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// What the checker found, sorted by line.
    pub findings: Vec<Finding>,
    /// What the launch did.
    pub counts: Counts,
}

/// Findings under construction: one for each kind and instruction.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) map: BTreeMap<(u32, FindingKind), Finding>,
}

impl Findings {
    pub(crate) fn add(&mut self, f: Finding) {
        self.map.entry((f.line, f.kind)).and_modify(|e| e.times += f.times).or_insert(f);
    }

    pub(crate) fn merge(&mut self, other: Findings) {
        for f in other.map.into_values() {
            self.add(f);
        }
    }
}
