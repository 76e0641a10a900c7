//! Search over training choices: exhaustive with a bound that skips hopeless branches.
//!
//! Layer times depend on `(tp, cp, ep, etp, micro-batch)` only, so those sizes are
//! the outer loops and pipeline, virtual stages and recomputation the inner ones. A
//! branch whose compute alone exceeds the worst kept candidate is skipped. The
//! order of the loops and of ties is fixed, so equal input gives equal output.

use crate::{
    choice::{Recompute, Request, Sharding, Strategy},
    error::PlanError,
    mapping::{Mapping, divisors, list},
    memory::MemoryGib,
    model::{Attention, FeedForward, ModelShape},
    stages::{LayerSet, StagePlan},
    train::{TrainChoice, TrainCx, TrainEstimate},
};
use std::collections::BTreeMap;

/// Sequences per micro-batch that the search tries.
const MICRO_BATCHES: [u64; 5] = [1, 2, 4, 8, 16];

/// A choice with its cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The choice.
    pub choice: TrainChoice,
    /// Its cost.
    pub estimate: TrainEstimate,
}

impl Candidate {
    pub(crate) fn seconds(&self) -> f64 {
        self.estimate.times.total()
    }

    /// Fastest first; equal times by memory, then by the choice itself.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        self.seconds()
            .total_cmp(&other.seconds())
            .then(self.estimate.memory.total().total_cmp(&other.estimate.memory.total()))
            .then(self.choice.cmp(&other.choice))
    }
}

/// What a search looked at and found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Feasible candidates, fastest first; at most one per mapping, sharding and micro-batch.
    pub best: Vec<Candidate>,
    /// The infeasible candidate that needs the least memory, when nothing fits.
    pub smallest: Option<Candidate>,
    /// Choices whose cost was computed.
    pub evaluated: u64,
    /// Branches skipped by the bound.
    pub pruned: u64,
}

/// Largest tensor-parallel ways that divide the heads and widths of every layer.
fn tp_divides(model: &ModelShape, tp: u64) -> bool {
    model.classes().iter().all(|c| {
        let attention = match c.layer.attention {
            Attention::Gqa { heads, .. } | Attention::Mla { heads, .. } => heads.is_multiple_of(tp),
            Attention::Linear { value_heads, .. } => value_heads.is_multiple_of(tp),
        };
        let ffn = match c.layer.feed_forward {
            FeedForward::Dense { intermediate, .. } => intermediate.is_multiple_of(tp),
            FeedForward::Moe { shared_intermediate, .. } => shared_intermediate.is_multiple_of(tp),
        };
        attention && ffn
    })
}

/// Expert sizes of all routed layers: whether `ep` divides the experts and `etp` their width.
fn experts_divide(model: &ModelShape, ep: u64, etp: u64) -> bool {
    model.classes().iter().all(|c| match c.layer.feed_forward {
        FeedForward::Dense { .. } => true,
        FeedForward::Moe { experts, expert_intermediate, .. } => {
            experts.is_multiple_of(ep) && expert_intermediate.is_multiple_of(etp)
        }
    })
}

/// Sizes to try for one axis.
fn axis(fixed: Option<u64>, all: &[u64], keep: impl Fn(u64) -> bool) -> Vec<u64> {
    match fixed {
        Some(size) => vec![size],
        None => all.iter().copied().filter(|&n| keep(n)).collect(),
    }
}

/// Virtual stages worth trying: one per number of layers in a chunk. Chunks are equal where stages are, unless the
/// software takes layouts written by hand (Megatron-Core asks that `pp x vpp` divides the layers).
fn virtual_stages(cx: &TrainCx<'_>, pp: u64, micro_batches: u64) -> Vec<u64> {
    if let Some(vpp) = cx.request.fixed.vpp {
        return vec![vpp];
    }
    let depth = cx.depth();
    let mut all = vec![1];
    // Interleaving needs micro-batches in multiples of the stages (arXiv 2104.04473, section 2.2).
    if pp > 1 && micro_batches.is_multiple_of(pp) {
        let equal = depth.is_multiple_of(pp) && !cx.software.free_layouts;
        let mut chunk = depth.div_ceil(pp);
        while chunk > 1 {
            chunk = if chunk > 8 { chunk.div_ceil(2) } else { chunk - 1 };
            let vpp = depth.div_ceil(pp * chunk);
            let divides = !equal || (depth / pp).is_multiple_of(chunk);
            if vpp > 1 && vpp * pp <= depth && divides && !all.contains(&vpp) {
                all.push(vpp);
            }
        }
    }
    all
}

/// Checks pinned sizes against the model and the job before anything is searched.
fn check(cx: &TrainCx<'_>) -> Result<(), PlanError> {
    let (request, model) = (cx.request, cx.model);
    let fixed = &request.fixed;
    if request.seq == 0 || request.seq > 1 << 32 {
        return Err(PlanError::mapping(
            format!("sequence length {} is outside 1..=2^32", request.seq),
            "for example --seq 4096",
        ));
    }
    if request.global_batch == 0 || request.global_batch > 1 << 32 {
        return Err(PlanError::mapping(
            format!("global batch {} is outside 1..=2^32 sequences", request.global_batch),
            "for example --global-batch 1024",
        ));
    }
    // What divides the model, so that a suggestion works.
    type Keep<'a> = &'a dyn Fn(u64) -> bool;
    let axes: [(&str, Option<u64>, Keep<'_>); 7] = [
        ("tp", fixed.tp, &|n| tp_divides(model, n)),
        ("cp", fixed.cp, &|_| true),
        ("dp", fixed.dp, &|_| true),
        ("pp", fixed.pp, &|n| n <= cx.depth()),
        ("etp", fixed.etp, &|n| experts_divide(model, 1, n)),
        ("ep", fixed.ep, &|n| experts_divide(model, n, 1)),
        ("edp", fixed.edp, &|_| true),
    ];
    let workable = |keep: Keep<'_>| list(&divisors(request.gpus).into_iter().filter(|&n| keep(n)).collect::<Vec<_>>());
    for (name, size, keep) in axes {
        if let Some(size) = size.filter(|&n| n == 0 || !request.gpus.is_multiple_of(n)) {
            return Err(PlanError::mapping(
                format!("{name} = {size} does not divide {} GPUs", request.gpus),
                format!("{name} can be {}", workable(keep)),
            ));
        }
    }
    if let Some(ep) = fixed.ep.filter(|&ep| !experts_divide(model, ep, 1)) {
        return Err(PlanError::mapping(
            format!("ep = {ep} does not divide the {} experts", model.experts()),
            format!("ep can be {}", workable(&|n| experts_divide(model, n, 1))),
        ));
    }
    if let Some(etp) = fixed.etp.filter(|&etp| !experts_divide(model, 1, etp)) {
        return Err(PlanError::mapping(
            format!("etp = {etp} does not divide the width of an expert"),
            format!("etp can be {}", workable(&|n| experts_divide(model, 1, n))),
        ));
    }
    if let Some(tp) = fixed.tp.filter(|&tp| !tp_divides(model, tp)) {
        return Err(PlanError::mapping(
            format!("tp = {tp} does not divide the attention heads and widths"),
            format!("tp can be {}", workable(&|n| tp_divides(model, n))),
        ));
    }
    if let Some(pp) = fixed.pp.filter(|&pp| pp > cx.depth()) {
        return Err(PlanError::mapping(
            format!("pp = {pp} is more than the {} layers", cx.depth()),
            format!("pp can be {}", workable(&|n| n <= cx.depth())),
        ));
    }
    if let Some(vpp) = fixed.vpp.filter(|&vpp| vpp == 0 || vpp > cx.depth() / fixed.pp.unwrap_or(1)) {
        return Err(PlanError::mapping(
            format!("vpp = {vpp} makes more chunks than the {} layers", cx.depth()),
            format!("vpp can be 1 to {}", (cx.depth() / fixed.pp.unwrap_or(1)).max(1)),
        ));
    }
    if let Some(mbs) = fixed.mbs.filter(|&mbs| mbs == 0 || !request.global_batch.is_multiple_of(mbs)) {
        return Err(PlanError::mapping(
            format!("mbs = {mbs} does not divide the global batch of {}", request.global_batch),
            format!("mbs can be {}", list(&divisors(request.global_batch))),
        ));
    }
    if fixed.tp.is_some() || fixed.pp.is_some() {
        // A fully pinned mapping gets the precise refusal of the rank groups.
        let all =
            fixed.tp.is_some() && fixed.cp.is_some() && fixed.pp.is_some() && fixed.ep.is_some() && fixed.etp.is_some();
        if all {
            crate::groups::generators(request.gpus, &fixed.mapping(), &request.order)?;
        }
    }
    fixed.check_products(request.gpus)
}

/// Finds the best `keep` choices.
///
/// # Errors
/// `E0402` when a pinned size cannot be; an empty result is not an error here.
pub(crate) fn search(cx: &TrainCx<'_>, keep: usize) -> Result<Found, PlanError> {
    check(cx)?;
    let (request, model) = (cx.request, cx.model);
    let fixed = &request.fixed;
    let all = divisors(request.gpus);
    let context = |cp: u64| cp == 1 || (request.seq.is_multiple_of(2 * cp) && request.seq / cp >= 256);
    let micro_batches = fixed.mbs.map_or(MICRO_BATCHES.to_vec(), |m| vec![m]);
    let mut search = Search::new(cx, keep.max(1), &all);
    for tp in axis(fixed.tp, &all, |tp| tp_divides(model, tp)) {
        for cp in axis(fixed.cp, &all, context) {
            for ep in axis(fixed.ep, &all, |ep| experts_divide(model, ep, 1)) {
                for etp in axis(fixed.etp, &all, |etp| etp <= tp.max(8) && experts_divide(model, 1, etp)) {
                    for &mbs in &micro_batches {
                        search.pipelines(Mapping { tp, cp, pp: 1, ep, etp }, mbs);
                    }
                }
            }
        }
    }
    Ok(search.found)
}

/// State of a running search.
struct Search<'a> {
    cx: &'a TrainCx<'a>,
    keep: usize,
    limit: f64,
    stages: Vec<u64>,
    recomputes: Vec<Recompute>,
    plans: BTreeMap<(u64, u64), StagePlan>,
    found: Found,
}

impl<'a> Search<'a> {
    fn new(cx: &'a TrainCx<'a>, keep: usize, divisors: &[u64]) -> Self {
        // Recomputing the attention core alone frees nothing where the kernel keeps no scores.
        let selective = cx.software.fine_recompute || !cx.software.flash_attention;
        let offered = Recompute::ALL.into_iter().filter(|r| selective || *r != Recompute::Selective).collect();
        Self {
            cx,
            keep,
            limit: memory_limit(cx),
            stages: axis(cx.request.fixed.pp, divisors, |pp| pp <= cx.depth()),
            recomputes: cx.request.recompute.map_or(offered, |r| vec![r]),
            plans: BTreeMap::new(),
            found: Found::default(),
        }
    }

    /// Tries every number of stages for one set of layer times.
    fn pipelines(&mut self, sizes: Mapping, mbs: u64) {
        let (cx, request) = (self.cx, self.cx.request);
        let mut set = None;
        for index in 0..self.stages.len() {
            let mapping = Mapping { pp: self.stages[index], ..sizes };
            let Some((dp, edp)) = fits(request, cx.depth(), &mapping, mbs) else { continue };
            if !cx.default_order() {
                if crate::groups::generators(request.gpus, &mapping, &request.order).is_err() {
                    continue;
                }
                set = None;
            }
            let set = set.get_or_insert_with(|| cx.layer_set(&mapping, mbs));
            let micro_batches = request.global_batch / (dp * mbs);
            let worst = self.found.best.get(self.keep - 1).map_or(f64::INFINITY, Candidate::seconds);
            if cx.lower_bound(set, mapping.pp, micro_batches) > worst {
                self.found.pruned += 1;
                continue;
            }
            for vpp in virtual_stages(cx, mapping.pp, micro_batches) {
                let choice = TrainChoice {
                    mapping,
                    dp,
                    edp,
                    mbs,
                    vpp,
                    recompute: Recompute::None,
                    recompute_eighths: 8,
                    sharding: Sharding::None,
                };
                self.variants(set, &choice);
            }
        }
    }

    /// Tries recomputation and sharding for one pipeline.
    fn variants(&mut self, set: &LayerSet, choice: &TrainChoice) {
        let (cx, request) = (self.cx, self.cx.request);
        let (pp, vpp) = (choice.mapping.pp, choice.vpp);
        let plan = self.plans.entry((pp, vpp)).or_insert_with(|| cx.stage_plan(pp, vpp));
        for &recompute in &self.recomputes {
            for sharding in shardings(request, choice.dp, pp) {
                for recompute_eighths in eighths(recompute, request.recompute.is_some()) {
                    let choice = TrainChoice { recompute, recompute_eighths, sharding, ..*choice };
                    let estimate = cx.estimate(set, plan, &choice);
                    self.found.evaluated += 1;
                    keep_candidate(&mut self.found, Candidate { choice, estimate }, self.limit, self.keep);
                    // Recomputing more layers costs more time and is needed only for memory.
                    if estimate.memory.total() <= self.limit {
                        break;
                    }
                }
            }
        }
    }
}

/// Numbers of recomputed eighths of the layers to try, fewest first; all when full recomputation is asked for.
fn eighths(recompute: Recompute, pinned: bool) -> std::ops::RangeInclusive<u64> {
    match recompute {
        Recompute::None | Recompute::Selective => 8..=8,
        Recompute::Full if pinned => 8..=8,
        Recompute::Full => 1..=8,
    }
}

/// Data-parallel ways when every size divides and the strategy admits the mapping.
fn fits(request: &Request, depth: u64, m: &Mapping, mbs: u64) -> Option<(u64, u64)> {
    let attention = m.tp.checked_mul(m.cp)?.checked_mul(m.pp)?;
    let experts = m.etp.checked_mul(m.ep)?.checked_mul(m.pp)?;
    if attention > request.gpus || experts > request.gpus {
        return None;
    }
    if !request.gpus.is_multiple_of(attention) || !request.gpus.is_multiple_of(experts) {
        return None;
    }
    let (dp, edp) = (request.gpus / attention, request.gpus / experts);
    let batch = dp.checked_mul(mbs)?;
    // A pinned number of virtual stages needs that many layers on every stage.
    let chunks = request.fixed.vpp.is_none_or(|vpp| vpp.checked_mul(m.pp).is_some_and(|n| n <= depth));
    let pinned = request.fixed.dp.is_none_or(|d| d == dp) && request.fixed.edp.is_none_or(|d| d == edp);
    let admitted = request.strategy.unwrap_or(Strategy::Folded).admits(m, dp);
    let divides = request.global_batch >= batch && request.global_batch.is_multiple_of(batch);
    (pinned && admitted && divides && chunks).then_some((dp, edp))
}

fn shardings(request: &Request, dp: u64, pp: u64) -> Vec<Sharding> {
    match (request.sharding, request.strategy) {
        (Some(sharding), _) => vec![sharding],
        (None, Some(strategy)) => vec![strategy.sharding()],
        // Gathering layers for every micro-batch of a pipeline is not something frameworks offer.
        (None, None) if dp > 1 && pp == 1 => vec![Sharding::Optimizer, Sharding::Full],
        (None, None) => vec![Sharding::Optimizer],
    }
}

/// Bytes a GPU may use.
pub(crate) fn memory_limit(cx: &TrainCx<'_>) -> f64 {
    let all = cx.cluster.gpu.hbm_bytes * crate::memory::USABLE;
    cx.request.memory_limit_gib.map_or(all, |gib| (gib * 1024.0 * 1024.0 * 1024.0).min(all))
}

/// Keeps the fastest candidates, one per mapping, sharding and micro-batch.
fn keep_candidate(found: &mut Found, candidate: Candidate, limit: f64, keep: usize) {
    if candidate.estimate.memory.total() > limit {
        let less = |s: &Candidate| candidate.estimate.memory.total() < s.estimate.memory.total();
        if found.smallest.as_ref().is_none_or(less) {
            found.smallest = Some(candidate);
        }
        return;
    }
    let same = |c: &Candidate| {
        let (a, b) = (&c.choice, &candidate.choice);
        a.mapping == b.mapping && a.sharding == b.sharding && a.mbs == b.mbs
    };
    if let Some(index) = found.best.iter().position(same) {
        if candidate.order(&found.best[index]).is_ge() {
            return;
        }
        found.best.remove(index);
    } else if found.best.len() >= keep && found.best.last().is_some_and(|w| candidate.order(w).is_ge()) {
        return;
    }
    let at = found.best.partition_point(|c| c.order(&candidate).is_lt());
    found.best.insert(at, candidate);
    found.best.truncate(keep);
}

/// Memory of a candidate in GiB.
pub(crate) fn gib(cx: &TrainCx<'_>, candidate: &Candidate) -> MemoryGib {
    candidate.estimate.memory.gib(memory_limit(cx))
}

/// Runs a training search with an explicit calibration; what [`crate::plan()`] and the fit build on.
///
/// # Errors
/// As [`crate::plan()`], except that an empty result is not an error.
pub fn search_training(
    model: &ModelShape,
    cluster: &crate::Cluster,
    calibration: &crate::calibration::TrainCalibration,
    request: &Request,
    keep: usize,
) -> Result<Found, PlanError> {
    model.check()?;
    cluster.check()?;
    crate::mapping::check_gpus(request.gpus)?;
    let software = match request.software_override {
        Some(software) => software,
        None => calibration.software_for(cluster, &request.software)?,
    };
    search(&TrainCx::new(model, cluster, calibration, software, request), keep)
}
