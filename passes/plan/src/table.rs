//! What a table of plans shows: one list of columns for every form of the report.

use crate::{
    choice::{Objective, Recompute},
    memory::MemoryGib,
    plan::Plan,
};

/// One column.
pub(crate) struct Column {
    /// Its head.
    pub(crate) head: &'static str,
    /// What it says of a plan.
    pub(crate) cell: fn(&Plan) -> String,
}

const TRAINING: [Column; 9] = [
    Column { head: "tp cp dp pp", cell: |p| joined(&[p.attention.tp, p.attention.cp, p.attention.dp, p.attention.pp]) },
    Column { head: "etp ep edp", cell: |p| joined(&[p.experts.etp, p.experts.ep, p.experts.edp]) },
    Column { head: "batch", cell: |p| format!("{}x{}", p.micro_batch, p.micro_batches) },
    Column { head: "vpp", cell: |p| p.vpp.to_string() },
    Column { head: "recompute", cell: |p| recompute(p).to_owned() },
    Column { head: "step ms", cell: |p| format!("{:.1}", p.step_ms) },
    Column { head: "MFU %", cell: |p| p.mfu.map_or("-".to_owned(), |m| format!("{:.1}", 100.0 * m)) },
    Column { head: "tokens/s", cell: |p| format!("{:.0}", p.tokens_per_s_per_gpu) },
    Column { head: "GiB", cell: |p| format!("{:.1}", p.memory_gib.total) },
];

const SERVING: [Column; 8] = [
    Column { head: "tp dp", cell: |p| joined(&[p.attention.tp, p.attention.dp / p.experts.edp.max(1)]) },
    Column { head: "etp ep", cell: |p| joined(&[p.experts.etp, p.experts.ep]) },
    Column { head: "copies", cell: |p| p.experts.edp.to_string() },
    Column { head: "requests", cell: |p| p.micro_batch.to_string() },
    Column { head: "first ms", cell: |p| p.ttft_ms.map_or("-".to_owned(), |t| format!("{t:.1}")) },
    Column { head: "token ms", cell: |p| p.tpot_ms.map_or("-".to_owned(), |t| format!("{t:.2}")) },
    Column { head: "tokens/s", cell: |p| format!("{:.0}", p.tokens_per_s_per_gpu) },
    Column { head: "GiB", cell: |p| format!("{:.1}", p.memory_gib.total) },
];

/// The columns of plans for an objective.
pub(crate) fn columns(objective: Objective) -> &'static [Column] {
    match objective {
        Objective::Train => &TRAINING,
        Objective::Prefill | Objective::Decode => &SERVING,
    }
}

/// What the columns count, in one sentence.
pub(crate) fn legend(objective: Objective) -> &'static str {
    match objective {
        Objective::Train => {
            "Ways of attention and of experts; batch is sequences of a micro-batch x micro-batches; tokens/s and GiB are of one GPU."
        }
        Objective::Prefill | Objective::Decode => {
            "Ways of attention and of experts in one copy; requests are those in flight on one attention rank; tokens/s and GiB are of one GPU."
        }
    }
}

/// Why a plan is not the winner, or that it is.
pub(crate) fn verdict(plan: &Plan) -> &str {
    plan.why.as_deref().unwrap_or(if plan.feasible { "best" } else { "does not fit" })
}

/// Kinds of memory in the order in which they are stacked.
pub(crate) fn memory_kinds(m: &MemoryGib) -> [(&'static str, f64); 7] {
    [
        ("weights", m.weights),
        ("gradients", m.gradients),
        ("optimizer", m.optimizer),
        ("activations", m.activations),
        ("kv cache", m.kv_cache),
        ("buffers", m.buffers),
        ("fragmentation", m.fragmentation),
    ]
}

fn joined(sizes: &[u64]) -> String {
    sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")
}

fn recompute(plan: &Plan) -> &'static str {
    match plan.recompute {
        Recompute::None => "none",
        Recompute::Selective => "selective",
        Recompute::Full if plan.recompute_share < 1.0 => "partly",
        Recompute::Full => "full",
    }
}
