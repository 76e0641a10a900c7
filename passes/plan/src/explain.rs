//! Why a plan lost, and what changing one size of the winner would do.

use crate::{
    choice::{Recompute, Request, Sharding},
    layer::Kind,
    mapping::Fixed,
    plan::time_ms,
    search::{Candidate, memory_limit, search},
    train::TrainCx,
};
use serde::Serialize;

const GIB: f64 = 1_073_741_824.0;

/// Effect of changing one size of the winner, the others kept.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sensitivity {
    /// What is changed, such as `ep=16`.
    pub change: String,
    /// Relative change of the step time, in serving of the time of a token on a GPU; positive is slower.
    pub time: f64,
    /// Change of memory on the fullest GPU, GiB.
    pub memory_gib: f64,
    /// Whether the changed plan fits.
    pub feasible: bool,
    /// One sentence.
    pub text: String,
}

impl Sensitivity {
    /// A change that fits, or one that misses the latency bound.
    pub(crate) fn new(change: String, time: f64, memory_gib: f64, feasible: bool) -> Self {
        let speed =
            if time >= 0.0 { format!("{:.1}% slower", 100.0 * time) } else { format!("{:.1}% faster", -100.0 * time) };
        let memory = if memory_gib >= 0.0 {
            format!("{memory_gib:.1} GiB more")
        } else {
            format!("{:.1} GiB less", -memory_gib)
        };
        let joint = if (time >= 0.0) == (memory_gib < 0.0) { "but" } else { "and" };
        let bound = if feasible { "" } else { "; misses the latency bound" };
        let text = format!("{speed} with {change}, {joint} {memory}{bound}");
        Self { change, time, memory_gib, feasible, text }
    }
}

/// Picks one size of a pinned mapping.
type Slot = fn(&mut Fixed) -> &mut Option<u64>;

/// Names of causes as readers know them.
fn cause(name: &str) -> &str {
    Kind::ALL.iter().find(|k| k.name() == name).map_or(
        match name {
            "bubble" => "pipeline bubble",
            "pipeline_comm" => "pipeline transfers",
            "data_comm" => "gradient and parameter traffic",
            other => other,
        },
        |kind| match kind {
            Kind::Gemm => "dense products",
            Kind::Attention => "attention",
            Kind::Experts => "expert products",
            Kind::Elementwise => "memory-bound kernels",
            Kind::TensorComm => "tensor-parallel traffic",
            Kind::ContextComm => "context-parallel traffic",
            Kind::ExpertComm => "expert traffic",
            Kind::Host => "host time",
        },
    )
}

/// One sentence: how much slower, the two largest causes, and the memory difference.
pub(crate) fn why_slower(cx: &TrainCx<'_>, winner: &Candidate, other: &Candidate) -> String {
    let total = winner.seconds();
    let slower = other.seconds() / total - 1.0;
    let best = time_ms(winner);
    let mut causes: Vec<(&str, f64)> = time_ms(other)
        .into_iter()
        .map(|(name, ms)| (name, (ms - best.get(name).copied().unwrap_or(0.0)) / (1e3 * total)))
        .collect();
    causes.sort_by(|a, b| b.1.total_cmp(&a.1));
    let causes: Vec<String> = causes
        .iter()
        .take(2)
        .filter(|(_, d)| *d > 5e-4)
        .map(|(name, d)| format!("{} +{:.1}%", cause(name), 100.0 * d))
        .collect();
    let why = if causes.is_empty() { String::new() } else { format!(": {}", causes.join(", ")) };
    let memory = (other.estimate.memory.total() - winner.estimate.memory.total()) / GIB;
    let same = if slower < 5e-5 { "as fast".to_owned() } else { format!("{:.1}% slower", 100.0 * slower) };
    let fits = if other.estimate.memory.total() > memory_limit(cx) { ", does not fit" } else { "" };
    format!("{same}{why}{}{fits}", memory_text(memory))
}

fn memory_text(gib: f64) -> String {
    match gib {
        g if g > 0.05 => format!("; {g:.1} GiB more"),
        g if g < -0.05 => format!("; {:.1} GiB less", -g),
        _ => String::new(),
    }
}

/// Neighbours of the winner in every size that is not pinned.
pub(crate) fn sensitivity_training(cx: &TrainCx<'_>, winner: &Candidate) -> Vec<Sensitivity> {
    let c = &winner.choice;
    let m = &c.mapping;
    let pinned = &cx.request.fixed;
    let at = Fixed {
        tp: Some(m.tp),
        cp: Some(m.cp),
        pp: Some(m.pp),
        ep: Some(m.ep),
        etp: Some(m.etp),
        mbs: Some(c.mbs),
        ..Fixed::default()
    };
    let mut changes: Vec<(String, Fixed, Option<Recompute>, Option<Sharding>)> = Vec::new();
    let axes: [(&str, u64, bool, Slot); 6] = [
        ("tp", m.tp, pinned.tp.is_some(), |f| &mut f.tp),
        ("cp", m.cp, pinned.cp.is_some(), |f| &mut f.cp),
        ("pp", m.pp, pinned.pp.is_some(), |f| &mut f.pp),
        ("ep", m.ep, pinned.ep.is_some(), |f| &mut f.ep),
        ("etp", m.etp, pinned.etp.is_some(), |f| &mut f.etp),
        ("micro_batch", c.mbs, pinned.mbs.is_some(), |f| &mut f.mbs),
    ];
    for (name, size, pinned, slot) in axes {
        if pinned {
            continue;
        }
        let halved = size.is_multiple_of(2).then_some(size / 2);
        for other in [halved, Some(2 * size)].into_iter().flatten() {
            let mut fixed = at;
            *slot(&mut fixed) = Some(other);
            changes.push((format!("{name}={other}"), fixed, None, Some(c.sharding)));
        }
    }
    let vpp = Fixed { vpp: Some(c.vpp), ..at };
    for recompute in Recompute::ALL.into_iter().filter(|r| *r != c.recompute && cx.request.recompute.is_none()) {
        changes.push((format!("recompute={recompute:?}").to_lowercase(), vpp, Some(recompute), Some(c.sharding)));
    }
    if m.pp > 1 && c.vpp > 1 && pinned.vpp.is_none() {
        changes.push(("vpp=1".to_owned(), Fixed { vpp: Some(1), ..at }, Some(c.recompute), Some(c.sharding)));
    }
    changes
        .into_iter()
        .filter_map(|(change, fixed, recompute, sharding)| evaluate(cx, winner, change, fixed, recompute, sharding))
        .collect()
}

fn evaluate(
    cx: &TrainCx<'_>,
    winner: &Candidate,
    change: String,
    fixed: Fixed,
    recompute: Option<Recompute>,
    sharding: Option<Sharding>,
) -> Option<Sensitivity> {
    let request = Request { fixed, recompute: recompute.or(cx.request.recompute), sharding, ..cx.request.clone() };
    let changed = TrainCx::new(cx.model, cx.cluster, cx.cal, cx.software, &request);
    let found = search(&changed, 1).ok()?;
    let feasible = !found.best.is_empty();
    let other = found.best.first().copied().or(found.smallest)?;
    if other.choice == winner.choice {
        return None;
    }
    let time = other.seconds() / winner.seconds() - 1.0;
    let memory_gib = (other.estimate.memory.total() - winner.estimate.memory.total()) / GIB;
    if feasible {
        return Some(Sensitivity::new(change, time, memory_gib, true));
    }
    let text = format!(
        "{change} does not fit: {:.1} GiB of {:.1} GiB",
        other.estimate.memory.total() / GIB,
        memory_limit(&changed) / GIB
    );
    Some(Sensitivity { change, time, memory_gib, feasible, text })
}
