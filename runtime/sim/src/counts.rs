//! Sums of counts, registers by liveness, and occupancy.

#![allow(clippy::wildcard_enum_match_arm, reason = "only operations that end straight code matter here")]

use crate::exec::Cluster;
use crate::launch::Launch;
use crate::op::{Class, Code, NONE, Op, Slot};
use crate::report::Counts;
use crate::syntax::Ty;
use std::collections::BTreeSet;

/// Registers, shared memory, warps and blocks of a multiprocessor (sm_80 to sm_90 differ in shared memory alone).
const REGISTERS: u32 = 65536;
const WARPS: u32 = 64;
const BLOCKS: u32 = 32;
/// Registers that the assembler needs beside the live values.
const RESERVED: u32 = 8;

/// Name of a kind of instruction in [`Counts::by_kind`].
fn name(c: Class) -> Option<&'static str> {
    Some(match c {
        Class::Hidden => return None,
        Class::Integer => "integer",
        Class::Float => "float",
        Class::Convert => "convert",
        Class::Special => "special",
        Class::Move => "move",
        Class::Control => "control",
        Class::Load => "load",
        Class::Store => "store",
        Class::Atomic => "atomic",
        Class::Warp => "warp",
        Class::Barrier => "barrier",
        Class::Tensor => "tensor",
        Class::AsyncCopy => "async_copy",
        Class::Other => "other",
    })
}

/// Turns the executions of a cluster's instructions into counts.
pub(crate) fn summarise(c: &mut Cluster<'_>) {
    let code = c.code();
    for (i, (warps, lanes)) in c.executed.iter().enumerate() {
        if *warps == 0 {
            continue;
        }
        let inst = &code.insts[i];
        let Some(kind) = name(inst.class) else { continue };
        c.counts.warp_instructions += warps;
        c.counts.lane_instructions += lanes;
        *c.counts.by_kind.entry(kind).or_default() += warps;
        if inst.class == Class::Float {
            let fused = matches!(&inst.op, Op::Alu { c, .. } if *c != 0) && code.uses[i].len() > 2;
            c.counts.float_flops += lanes * if fused { 2 } else { 1 };
        }
    }
}

/// Fills in registers, shared memory and how many blocks fit on a multiprocessor.
pub(crate) fn occupancy(
    counts: &mut Counts,
    code: &Code,
    entry: usize,
    reachable: &BTreeSet<usize>,
    launch: &Launch<'_>,
    shared: u32,
) {
    let threads: u32 = launch.block.iter().product();
    let warps = threads.div_ceil(32);
    let cap = code.funcs[entry].max_regs.unwrap_or(255).min(255);
    let live = reachable.iter().map(|f| registers(code, *f)).max().unwrap_or(0);
    let registers = (live + RESERVED).next_multiple_of(8).clamp(16, cap.max(16));
    let per_sm = if code.target.starts_with("sm_9") {
        228 * 1024
    } else if code.target == "sm_80" {
        164 * 1024
    } else {
        100 * 1024
    };
    let by_regs = REGISTERS / (registers * 32).next_multiple_of(256) / warps;
    let by_shared = per_sm / (shared + 1024);
    let blocks = by_regs.min(by_shared).min(WARPS / warps).min(BLOCKS);
    counts.registers = registers;
    counts.shared_bytes = shared;
    counts.blocks_per_multiprocessor = blocks;
    counts.occupancy_permille = blocks * warps * 1000 / WARPS;
}

/// Most 32-bit registers that are live at once in a function.
pub(crate) fn registers(code: &Code, func: usize) -> u32 {
    let f = &code.funcs[func];
    let (start, end) = (f.start as usize, f.end as usize);
    let n = end - start;
    if n == 0 {
        return 0;
    }
    let weight: Vec<u32> = f
        .slots
        .iter()
        .map(|s| match s {
            Slot::Register(Ty::Pred) => 0,
            Slot::Register(t) => t.bytes().div_ceil(4),
            Slot::Const(_) | Slot::Special(_) | Slot::Variable(..) | Slot::Local(_) => 0,
        })
        .collect();
    let words = f.slots.len().div_ceil(64);
    // Blocks of straight code.
    let mut leader = vec![false; n + 1];
    leader[0] = true;
    for i in 0..n {
        match &code.insts[start + i].op {
            Op::Bra { target } => {
                mark(&mut leader, *target as usize, start, n);
                leader[i + 1] = true;
            }
            Op::Brx { targets, .. } => {
                targets.iter().for_each(|t| mark(&mut leader, *t as usize, start, n));
                leader[i + 1] = true;
            }
            Op::Ret | Op::Exit | Op::Trap => leader[i + 1] = true,
            _ => {}
        }
    }
    let starts: Vec<usize> = (0..n).filter(|i| leader[*i]).collect();
    let block_of = |i: usize| starts.partition_point(|s| *s <= i) - 1;
    let mut live_in = vec![vec![0u64; words]; starts.len()];
    let mut most = 0;
    let mut changed = true;
    while changed {
        changed = false;
        most = 0;
        for b in (0..starts.len()).rev() {
            let (from, to) = (starts[b], starts.get(b + 1).copied().unwrap_or(n));
            let mut live = vec![0u64; words];
            let last = &code.insts[start + to - 1];
            let mut join = |i: usize| {
                if i < n {
                    let other = &live_in[block_of(i)];
                    live.iter_mut().zip(other).for_each(|(a, b)| *a |= b);
                }
            };
            match &last.op {
                Op::Bra { target } => {
                    join((*target as usize).wrapping_sub(start));
                    if last.guard != NONE {
                        join(to);
                    }
                }
                Op::Brx { targets, .. } => targets.iter().for_each(|t| join((*t as usize).wrapping_sub(start))),
                Op::Ret | Op::Exit | Op::Trap if last.guard == NONE => {}
                _ => join(to),
            }
            let mut pressure: i64 =
                (0..f.slots.len()).filter(|r| live[r / 64] >> (r % 64) & 1 == 1).map(|r| i64::from(weight[r])).sum();
            for i in (from..to).rev() {
                let inst = &code.insts[start + i];
                most = most.max(pressure);
                // A guarded write keeps the old value for some lanes.
                if inst.guard == NONE {
                    for r in code.defs[start + i].iter().filter(|r| !code.uses[start + i].contains(r)) {
                        clear(&mut live, *r as usize, &weight, &mut pressure);
                    }
                }
                for r in code.uses[start + i].iter().chain((inst.guard != NONE).then_some(&inst.guard)) {
                    let (w, bit) = (*r as usize / 64, *r as usize % 64);
                    if live[w] >> bit & 1 == 0 {
                        live[w] |= 1 << bit;
                        pressure += i64::from(weight[*r as usize]);
                    }
                }
            }
            most = most.max(pressure);
            if live != live_in[b] {
                live_in[b] = live;
                changed = true;
            }
        }
    }
    most as u32
}

fn mark(leader: &mut [bool], target: usize, start: usize, n: usize) {
    if let Some(i) = target.checked_sub(start).filter(|i| *i <= n) {
        leader[i] = true;
    }
}

fn clear(live: &mut [u64], r: usize, weight: &[u32], pressure: &mut i64) {
    if live[r / 64] >> (r % 64) & 1 == 1 {
        live[r / 64] &= !(1 << (r % 64));
        *pressure -= i64::from(weight[r]);
    }
}
