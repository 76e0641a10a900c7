//! Search over serving instances: how many GPUs one takes, and how it is split.
//!
//! An instance has `tp x dp = etp x ep` GPUs; the job runs as many copies as fit. In
//! a plan the copies appear as data parallelism: `dp` counts attention ranks of all
//! copies, `edp` the copies.

use crate::{
    backend::{ServeCalibration, ServeFile},
    choice::{Objective, Recompute, Request, Schedule, Sharding},
    cluster::{Cluster, Precision},
    error::PlanError,
    explain::Sensitivity,
    mapping::{divisors, list},
    memory::USABLE,
    model::{Attention, FeedForward, ModelShape},
    plan::{AttentionWays, ExpertWays, Plan, PlanReport, local_experts},
    serve::{PART_NAMES, ServeCx, ServeEstimate, ServeLayout, WeightFormat, Workload},
};

/// Largest instance that is tried, in GPUs.
const LARGEST_INSTANCE: u64 = 1024;

/// Throughputs this close to the best are a tie: the median error of predicted times per output token on the points
/// that the fit did not see (`docs/planner.md`).
const TIE: f64 = 0.07;

struct Scored {
    layout: ServeLayout,
    estimate: ServeEstimate,
    concurrency: f64,
    feasible: bool,
}

/// Runs a prefill or decode search.
pub(crate) fn report(model: &ModelShape, cluster: &Cluster, request: &Request) -> Result<PlanReport, PlanError> {
    check(model, request)?;
    let set =
        ServeFile::built_in()?.set(cluster, if request.software == "auto" { "vllm" } else { &request.software })?;
    let mut scored: Vec<Scored> = Vec::new();
    let mut evaluated = 0;
    let mut smallest = f64::INFINITY;
    for layout in layouts(model, request) {
        let cx = ServeCx::new(model, cluster, layout, &request.routing);
        let tokens = request.seq as f64 + request.output as f64;
        let weights = cx.weight_bytes();
        smallest = smallest.min(weights);
        let capacity = cx.capacity(set, tokens).floor();
        if capacity < 1.0 {
            continue;
        }
        let mut scored_at = |concurrency: f64| {
            evaluated += 1;
            let load = Workload { input: request.seq as f64, output: request.output as f64, concurrency };
            let estimate = cx.estimate(set, &load, 1.0);
            Scored { layout, estimate, concurrency, feasible: within_bound(request, &estimate) }
        };
        let tried: Vec<Scored> = batches(request, &layout, capacity).into_iter().map(&mut scored_at).collect();
        let refined = largest_within_bound(&tried, &layout, &mut scored_at);
        let best = tried.into_iter().chain(refined).min_by(|a, b| order(request, a, b));
        scored.extend(best);
    }
    scored.sort_by(|a, b| order(request, a, b));
    if scored.is_empty() {
        let limit = cluster.gpu.hbm_bytes * USABLE / 1_073_741_824.0;
        return Err(PlanError::no_plan(
            format!(
                "the weights need at least {:.1} GiB per GPU of about {limit:.1} GiB usable",
                smallest / 1_073_741_824.0
            ),
            "use more GPUs, a smaller weight format (fp8, fp4), or fewer tokens per request",
        ));
    }
    if let Some(bound) = request.latency_bound_ms.filter(|_| !scored[0].feasible) {
        let e = &scored[0].estimate;
        let reached = match request.objective {
            Objective::Prefill => e.ttft * 1e3,
            Objective::Train | Objective::Decode => e.tpot * 1e3,
        };
        return Err(PlanError::no_plan(
            format!("no instance meets {bound} ms: the fastest reaches {reached:.2} ms"),
            format!("ask for {:.1} ms or more, a shorter context, or a faster GPU", reached * 1.02),
        ));
    }
    let tie = settle_tie(request, &mut scored);
    let sensitivity = sensitivity(model, cluster, request, set, &scored);
    let plans: Vec<Plan> = scored
        .iter()
        .take(request.top)
        .enumerate()
        .map(|(index, s)| Plan {
            why: (index > 0).then(|| why(request, &scored[0], s)),
            ..serving_plan(model, cluster, request, set, s)
        })
        .collect();
    Ok(PlanReport {
        schema: 1,
        model: model.name.clone(),
        cluster: cluster.name.clone(),
        gpus: request.gpus,
        plans,
        tie,
        sensitivity,
        evaluated,
        pruned: 0,
    })
}

fn check(model: &ModelShape, request: &Request) -> Result<(), PlanError> {
    for (name, value) in [("prompt length", request.seq), ("output length", request.output)] {
        if value == 0 || value > 1 << 32 {
            return Err(PlanError::mapping(format!("{name} {value} is outside 1..=2^32"), "for example 1024"));
        }
    }
    let f = &request.fixed;
    if f.pp.is_some_and(|n| n != 1) || f.cp.is_some_and(|n| n != 1) {
        return Err(PlanError::mapping(
            "serving plans use pp=1 and cp=1",
            "leave pp and cp out; tp, etp and ep can be fixed",
        ));
    }
    for (name, size) in [("tp", f.tp), ("ep", f.ep), ("etp", f.etp)] {
        if let Some(size) = size.filter(|n| !request.gpus.is_multiple_of(*n)) {
            let fits = |n: &u64| match name {
                "tp" => heads_divide(model, *n),
                "ep" => divides(model, *n, 1),
                _ => divides(model, 1, *n),
            };
            let workable: Vec<u64> = divisors(request.gpus).into_iter().filter(fits).collect();
            return Err(PlanError::mapping(
                format!("{name} = {size} does not divide {} GPUs", request.gpus),
                format!("{name} can be {}", list(&workable)),
            ));
        }
    }
    f.check_products(request.gpus)?;
    if let Some(ep) = f.ep.filter(|&ep| !divides(model, ep, 1)) {
        let workable: Vec<u64> = divisors(request.gpus).into_iter().filter(|&n| divides(model, n, 1)).collect();
        return Err(PlanError::mapping(
            format!("ep = {ep} does not divide the {} experts", model.experts()),
            format!("ep can be {}", list(&workable)),
        ));
    }
    Ok(())
}

fn divides(model: &ModelShape, ep: u64, etp: u64) -> bool {
    model.layers.iter().all(|l| match l.feed_forward {
        FeedForward::Dense { .. } => true,
        FeedForward::Moe { experts, expert_intermediate, .. } => {
            experts.is_multiple_of(ep) && expert_intermediate.is_multiple_of(etp)
        }
    })
}

fn heads_divide(model: &ModelShape, tp: u64) -> bool {
    model.layers.iter().all(|l| match l.attention {
        Attention::Gqa { heads, .. } | Attention::Mla { heads, .. } => heads.is_multiple_of(tp),
        Attention::Linear { value_heads, .. } => value_heads.is_multiple_of(tp),
    })
}

/// All instances that divide the job and the model, in a fixed order.
fn layouts(model: &ModelShape, request: &Request) -> Vec<ServeLayout> {
    let format = match request.precision {
        Precision::Bf16 => WeightFormat::Bf16,
        Precision::Fp8 => WeightFormat::Fp8,
        Precision::Fp4 => WeightFormat::Fp4,
    };
    // TensorRT-LLM gives a rank of an instance either whole requests or slices of heads (`enable_attention_dp`).
    let mixes = request.software != "trtllm";
    let mut all = Vec::new();
    for gpus in divisors(request.gpus).into_iter().filter(|&n| n <= LARGEST_INSTANCE) {
        for tp in divisors(gpus).into_iter().filter(|&n| heads_divide(model, n)) {
            for ep in divisors(gpus) {
                let (dp, etp) = (gpus / tp, gpus / ep);
                let pinned = |fixed: Option<u64>, n: u64| fixed.is_none_or(|f| f == n);
                let f = &request.fixed;
                let wanted = pinned(f.tp, tp)
                    && pinned(f.ep, ep)
                    && pinned(f.etp, etp)
                    && pinned(f.dp, request.gpus / tp)
                    && pinned(f.edp, request.gpus / gpus);
                if wanted && divides(model, ep, etp) && (mixes || tp == 1 || dp == 1) {
                    all.push(ServeLayout { tp, dp, ep, etp, dense: format, experts: format });
                }
            }
        }
    }
    all
}

/// Open requests per instance to try, ascending: what was asked, or powers of two up to the memory and what fills it.
fn batches(request: &Request, layout: &ServeLayout, capacity: f64) -> Vec<f64> {
    let copies = request.gpus as f64 / layout.gpus() as f64;
    if request.global_batch > 0 {
        return vec![(request.global_batch as f64 / copies).max(1.0)];
    }
    if request.objective == Objective::Prefill {
        return vec![layout.dp as f64];
    }
    let mut all = Vec::new();
    let mut batch = 1.0;
    while batch <= capacity.min(4096.0) {
        all.push(batch * layout.dp as f64);
        batch *= 2.0;
    }
    if let Some(&last) = all.last() {
        let full = capacity.min(4096.0) * layout.dp as f64;
        all.extend((full > last).then_some(full));
    }
    all
}

/// The largest mean batch that still meets the bound, within a hundredth, between the last one tried that does and the
/// first that does not. How many requests a rank decodes changes from step to step, so that their mean is no whole
/// number; whole ones would favour instances whose steps of a request are small.
fn largest_within_bound(
    tried: &[Scored],
    layout: &ServeLayout,
    scored_at: &mut impl FnMut(f64) -> Scored,
) -> Option<Scored> {
    let ranks = layout.dp as f64;
    let last = tried.iter().rposition(|s| s.feasible)?;
    let (mut low, mut high) = (tried[last].concurrency / ranks, tried.get(last + 1)?.concurrency / ranks);
    let mut best = None;
    while high - low > 0.01 * low {
        let middle = (low + high) / 2.0;
        let scored = scored_at(middle * ranks);
        if scored.feasible {
            low = middle;
            best = Some(scored);
        } else {
            high = middle;
        }
    }
    best
}

fn within_bound(request: &Request, e: &ServeEstimate) -> bool {
    let reached = match request.objective {
        Objective::Prefill => e.ttft,
        Objective::Train | Objective::Decode => e.tpot,
    };
    request.latency_bound_ms.is_none_or(|bound| reached * 1e3 <= bound)
}

/// Feasible first; prefill by time to the first token, decode by throughput; among instances that
/// miss the bound the fastest first.
fn order(request: &Request, a: &Scored, b: &Scored) -> std::cmp::Ordering {
    // Where the model sees no difference, experts are split whole rather than sliced.
    let by_gpus = |s: &Scored| (s.layout.gpus(), s.layout.tp, s.layout.etp);
    let score = match request.objective {
        Objective::Prefill => a.estimate.ttft.total_cmp(&b.estimate.ttft),
        Objective::Train | Objective::Decode if a.feasible => {
            b.estimate.tokens_per_s_per_gpu.total_cmp(&a.estimate.tokens_per_s_per_gpu)
        }
        Objective::Train | Objective::Decode => a.estimate.tpot.total_cmp(&b.estimate.tpot),
    };
    b.feasible
        .cmp(&a.feasible)
        .then(score)
        .then(by_gpus(a).cmp(&by_gpus(b)))
        .then(a.concurrency.total_cmp(&b.concurrency))
}

/// Moves the simplest of the instances that the model cannot tell from the best to the front: the one of the fewest
/// GPUs, whose faults stop the fewest requests and which needs the fewest links, then one that splits experts in one way
/// rather than two, so that one kind of group exchanges rows, then the one that slices experts least. Says so where that
/// is not the best.
fn settle_tie(request: &Request, scored: &mut [Scored]) -> Option<String> {
    if request.objective != Objective::Decode || !scored[0].feasible {
        return None;
    }
    let rate = |s: &Scored| s.estimate.tokens_per_s_per_gpu;
    let best = rate(&scored[0]);
    let tied = scored.iter().take_while(|s| s.feasible && rate(s) >= (1.0 - TIE) * best).count();
    let complexity = |l: &ServeLayout| (l.gpus(), l.ep > 1 && l.etp > 1, l.etp);
    let simplest = (0..tied).min_by_key(|&i| (complexity(&scored[i].layout), i)).filter(|&i| i > 0)?;
    let less = 100.0 * (1.0 - rate(&scored[simplest]) / best);
    scored[..=simplest].rotate_right(1);
    let (l, was) = (&scored[0].layout, &scored[1].layout);
    let reason = if l.gpus() < was.gpus() {
        let plural = if l.gpus() == 1 { "" } else { "s" };
        format!("{} GPU{plural} a copy instead of {}", l.gpus(), was.gpus())
    } else {
        format!("experts split ep {} x etp {} instead of {} x {}", l.ep, l.etp, was.ep, was.etp)
    };
    Some(format!(
        "{tied} instances are within {:.0}%, the error of the model; the simplest is taken: {reason}, {less:.1}% fewer \
         tokens per second predicted",
        100.0 * TIE
    ))
}

fn why(request: &Request, best: &Scored, other: &Scored) -> String {
    let mut parts: Vec<(&str, f64)> = PART_NAMES
        .iter()
        .zip(other.estimate.parts.iter().zip(&best.estimate.parts))
        .map(|(n, (o, b))| (*n, (o - b) / best.estimate.step))
        .collect();
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let worst = parts
        .first()
        .filter(|(_, d)| *d > 1e-3)
        .map_or(String::new(), |(n, d)| format!(": {n} +{:.1}% of a step", 100.0 * d));
    let bound = if other.feasible { "" } else { ", misses the latency bound" };
    match request.objective {
        Objective::Prefill => {
            format!("first token {:.1}% later{worst}{bound}", 100.0 * (other.estimate.ttft / best.estimate.ttft - 1.0))
        }
        Objective::Train | Objective::Decode => {
            let less = 1.0 - other.estimate.tokens_per_s_per_gpu / best.estimate.tokens_per_s_per_gpu;
            let much = match less {
                l if l < -5e-4 => format!("{:.1}% more", -100.0 * l),
                l if l < 5e-4 => "as many".to_owned(),
                l => format!("{:.1}% fewer", 100.0 * l),
            };
            format!("{much} tokens per second and GPU{worst}{bound}")
        }
    }
}

/// What the best plan becomes when one of its sizes is doubled or halved; what is divided follows.
fn sensitivity(
    model: &ModelShape,
    cluster: &Cluster,
    request: &Request,
    set: &ServeCalibration,
    scored: &[Scored],
) -> Vec<Sensitivity> {
    let Some(best) = scored.first().filter(|s| s.feasible) else { return Vec::new() };
    let memory = |s: &Scored| serving_plan(model, cluster, request, set, s).memory_gib.total;
    let time = |s: &Scored| match request.objective {
        Objective::Prefill => s.estimate.ttft / best.estimate.ttft - 1.0,
        Objective::Train | Objective::Decode => {
            best.estimate.tokens_per_s_per_gpu / s.estimate.tokens_per_s_per_gpu - 1.0
        }
    };
    let l = best.layout;
    let same_gpus = |tp: u64, ep: u64| ServeLayout { tp, dp: l.gpus() / tp, ep, etp: l.gpus() / ep, ..l };
    let mut changes = Vec::new();
    for (name, from) in [("tp", l.tp), ("ep", l.ep)] {
        for to in [from / 2, from * 2].into_iter().filter(|&n| n > 0 && l.gpus().is_multiple_of(n)) {
            let other = if name == "tp" { same_gpus(to, l.ep) } else { same_gpus(l.tp, to) };
            changes.push((format!("{name}={to}"), other));
        }
    }
    for (gpus, dp, ep) in [(l.gpus() / 2, l.dp / 2, l.ep / 2), (l.gpus() * 2, l.dp * 2, l.ep * 2)] {
        let plural = if gpus == 1 { "" } else { "s" };
        changes.push((format!("{gpus} GPU{plural} a copy"), ServeLayout { dp, ep, ..l }));
    }
    let changed = |(change, layout): (String, ServeLayout)| {
        let other = scored.iter().find(|s| s.layout == layout)?;
        Some(Sensitivity::new(change, time(other), memory(other) - memory(best), other.feasible))
    };
    changes.into_iter().filter_map(changed).collect()
}

fn serving_plan(model: &ModelShape, cluster: &Cluster, request: &Request, set: &ServeCalibration, s: &Scored) -> Plan {
    let (l, e) = (&s.layout, &s.estimate);
    let memory = ServeCx::new(model, cluster, *l, &request.routing).memory(
        set,
        e.batch,
        request.seq as f64 + 0.5 * request.output as f64,
    );
    let decode = request.objective != Objective::Prefill;
    let mut time_ms: indexmap::IndexMap<&'static str, f64> =
        PART_NAMES.iter().zip(&e.parts).map(|(n, t)| (*n, 1e3 * t)).collect();
    if !decode {
        time_ms = [("prefill", 1e3 * e.prefill), ("queueing", 1e3 * (e.ttft - e.prefill))].into_iter().collect();
    } else {
        time_ms.insert("interrupting_prefills", 1e3 * (e.tpot - e.step));
    }
    let read = request.seq as f64 * l.dp as f64 / e.prefill / l.gpus() as f64;
    Plan {
        objective: request.objective,
        gpus: request.gpus,
        attention: AttentionWays { tp: l.tp, cp: 1, dp: request.gpus / l.tp, pp: 1 },
        experts: ExpertWays { etp: l.etp, ep: l.ep, edp: request.gpus / l.gpus(), pp: 1 },
        order: request.order.clone(),
        micro_batch: e.batch as u64,
        micro_batches: 1,
        vpp: 1,
        recompute: Recompute::None,
        recompute_share: 1.0,
        sharding: Sharding::None,
        schedule: Schedule::OneForwardOneBackward,
        local_experts: local_experts(model, l.ep),
        stage_layers: crate::plan::layer_pairs(model.layers.len(), 1, 1),
        stage_seconds: Vec::new(),
        step_ms: 1e3 * if decode { e.tpot } else { e.ttft },
        mfu: None,
        tokens_per_s_per_gpu: if decode { e.tokens_per_s_per_gpu } else { read },
        ttft_ms: Some(1e3 * e.ttft),
        tpot_ms: Some(1e3 * e.tpot),
        memory_gib: memory.gib(cluster.gpu.hbm_bytes * USABLE),
        feasible: s.feasible,
        time_ms,
        why: None,
    }
}
