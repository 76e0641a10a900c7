//! Plans: what a search returns, and what later passes and reports read.

use crate::{
    calibration::TrainCalibration,
    choice::{Objective, Recompute, Request, Schedule, Sharding},
    cluster::Cluster,
    error::PlanError,
    explain::{Sensitivity, sensitivity_training, why_slower},
    groups::{Axis, Groups, generators},
    layer::{Kind, Op},
    mapping::{Mapping, check_gpus},
    memory::MemoryGib,
    model::{FeedForward, ModelShape},
    pipeline::{StageTimes, stage_layers},
    search::{Candidate, Found, gib, memory_limit, search},
    serve_search,
    train::TrainCx,
};
use indexmap::IndexMap;
use serde::Serialize;
use std::ops::Range;

/// Ways of attention and dense layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "each field is the axis it names")]
pub struct AttentionWays {
    pub tp: u64,
    pub cp: u64,
    pub dp: u64,
    pub pp: u64,
}

/// Ways of expert layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "each field is the axis it names")]
pub struct ExpertWays {
    pub etp: u64,
    pub ep: u64,
    pub edp: u64,
    pub pp: u64,
}

/// One mapping with its predicted cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// What it was made for.
    pub objective: Objective,
    /// GPUs of the job.
    pub gpus: u64,
    /// Attention mapping.
    pub attention: AttentionWays,
    /// Expert mapping.
    pub experts: ExpertWays,
    /// Rank order, as in Megatron-Core: leftmost varies fastest.
    pub order: String,
    /// Sequences per micro-batch; requests per attention rank when serving.
    pub micro_batch: u64,
    /// Micro-batches per step and data-parallel rank.
    pub micro_batches: u64,
    /// Virtual stages per pipeline rank.
    pub vpp: u64,
    /// What is recomputed.
    pub recompute: Recompute,
    /// Share of the layers that full recomputation covers.
    pub recompute_share: f64,
    /// How training state is sharded.
    pub sharding: Sharding,
    /// Pipeline schedule.
    pub schedule: Schedule,
    /// Experts on one rank.
    pub local_experts: u64,
    /// Layers of each pipeline stage as `[first, end)` pairs, one per virtual stage.
    pub stage_layers: Vec<Vec<(usize, usize)>>,
    /// Times of every pipeline stage for one micro-batch, seconds (training).
    pub stage_seconds: Vec<StageTimes>,
    /// Time of a training step, of a prefill, or of a decode step, milliseconds.
    pub step_ms: f64,
    /// Model operations over the bf16 peak, a fraction (training).
    pub mfu: Option<f64>,
    /// Tokens per second and GPU: trained, read (prefill) or generated (decode).
    pub tokens_per_s_per_gpu: f64,
    /// Time to the first token, milliseconds (serving).
    pub ttft_ms: Option<f64>,
    /// Time per output token, milliseconds (serving).
    pub tpot_ms: Option<f64>,
    /// Memory of the fullest GPU.
    pub memory_gib: MemoryGib,
    /// Whether it fits the memory and the latency bound.
    pub feasible: bool,
    /// Time by cause, milliseconds; the sum is `step_ms`.
    pub time_ms: IndexMap<&'static str, f64>,
    /// Why it lost to the winner; absent for the winner.
    pub why: Option<String>,
}

/// Result of a search, ready for text, JSON and HTML.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanReport {
    /// Version of the JSON form.
    pub schema: u32,
    /// Model name.
    pub model: String,
    /// Cluster name.
    pub cluster: String,
    /// GPUs of the job.
    pub gpus: u64,
    /// Best plans, best first.
    pub plans: Vec<Plan>,
    /// Where the first plan is not the fastest: which rule put it first (decode).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie: Option<String>,
    /// What changing one size of the winner costs or gains.
    pub sensitivity: Vec<Sensitivity>,
    /// Choices whose cost was computed.
    pub evaluated: u64,
    /// Branches skipped because a bound showed that they cannot win.
    pub pruned: u64,
}

/// What one rank does under a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RankPlan {
    /// The rank.
    pub rank: u64,
    /// Position on the attention axes.
    pub attention: AttentionWays,
    /// Position on the expert axes.
    pub experts: ExpertWays,
    /// Expert ids held, a half-open range.
    pub local_experts: Range<u64>,
    /// Layers held, one `[first, end)` pair per virtual stage.
    pub layers: Vec<(usize, usize)>,
}

impl Plan {
    /// The mapping without derived sizes.
    pub fn mapping(&self) -> Mapping {
        Mapping {
            tp: self.attention.tp,
            cp: self.attention.cp,
            pp: self.attention.pp,
            ep: self.experts.ep,
            etp: self.experts.etp,
        }
    }

    /// Rank groups of both layer kinds.
    ///
    /// # Errors
    /// `E0402`, only for plans that were changed by hand.
    pub fn groups(&self) -> Result<Groups, PlanError> {
        crate::groups::groups(self.gpus, &self.mapping(), &self.order)
    }

    /// What a rank does.
    ///
    /// # Errors
    /// `E0402` for a rank that does not exist.
    pub fn rank(&self, rank: u64) -> Result<RankPlan, PlanError> {
        if rank >= self.gpus {
            return Err(PlanError::mapping(
                format!("rank {rank} of {} GPUs", self.gpus),
                format!("ranks are 0..{}", self.gpus),
            ));
        }
        let (attention, experts, ..) = generators(self.gpus, &self.mapping(), &self.order)?;
        let pp = attention.position(rank, Axis::Pp);
        let ep = experts.position(rank, Axis::Ep);
        Ok(RankPlan {
            rank,
            attention: AttentionWays {
                tp: attention.position(rank, Axis::Tp),
                cp: attention.position(rank, Axis::Cp),
                dp: attention.position(rank, Axis::Dp),
                pp,
            },
            experts: ExpertWays {
                etp: experts.position(rank, Axis::Tp),
                ep,
                edp: experts.position(rank, Axis::Dp),
                pp,
            },
            local_experts: ep * self.local_experts..(ep + 1) * self.local_experts,
            layers: self.stage_layers.get(pp as usize).cloned().unwrap_or_default(),
        })
    }
}

/// Finds the best plans.
///
/// # Errors
/// `E0402` for sizes that cannot be, `E0404` for a wrong cluster, `E0405` for a wrong
/// model, `E0406` when nothing fits; each says what would work.
pub fn plan(model: &ModelShape, cluster: &Cluster, request: &Request) -> Result<Vec<Plan>, PlanError> {
    Ok(plan_report(model, cluster, request)?.plans)
}

/// Finds the best plans, with sensitivity and search counts.
///
/// # Errors
/// As [`plan`].
pub fn plan_report(model: &ModelShape, cluster: &Cluster, request: &Request) -> Result<PlanReport, PlanError> {
    model.check()?;
    cluster.check()?;
    check_request(cluster, request)?;
    let request = &completed(request);
    match request.objective {
        Objective::Train => train_report(model, cluster, request),
        Objective::Prefill | Objective::Decode => serve_search::report(model, cluster, request),
    }
}

/// Fills what a pinned mapping or a strategy leaves open as the framework does.
///
/// A mapping with `tp`, `pp` and `ep` is one given mapping: `cp` is then 1 and `etp` follows `tp`,
/// as in Megatron-Core, with the distributed optimizer. The strategies reproduce a published comparison (arXiv 2504.14960).
/// Both run one sequence per micro-batch unless told otherwise.
fn completed(request: &Request) -> Request {
    let mut request = request.clone();
    let fixed = &mut request.fixed;
    let given = fixed.tp.is_some() && fixed.pp.is_some() && fixed.ep.is_some();
    if request.objective == Objective::Train && given {
        fixed.cp = fixed.cp.or(Some(1));
        fixed.etp = fixed.etp.or(fixed.tp);
        let sharding = request.strategy.map_or(Sharding::Optimizer, crate::Strategy::sharding);
        request.sharding = request.sharding.or(Some(sharding));
    }
    let fixed = &mut request.fixed;
    if request.objective == Objective::Train && (given || request.strategy.is_some()) {
        fixed.mbs = fixed.mbs.or(Some(1));
    }
    request
}

fn check_request(cluster: &Cluster, request: &Request) -> Result<(), PlanError> {
    check_gpus(request.gpus)?;
    crate::groups::parse_order(&request.order)?;
    if !(1..=1000).contains(&request.top) {
        return Err(PlanError::mapping(format!("{} plans are asked for", request.top), "ask for 1 to 1000"));
    }
    if let Some(max) = cluster.max_gpus.filter(|&max| request.gpus > max) {
        return Err(PlanError::mapping(
            format!("{} GPUs asked of a cluster of {max}", request.gpus),
            format!("ask for {max} or less, or raise max_gpus in the cluster file"),
        ));
    }
    for (name, limit, example) in [
        ("memory limit", request.memory_limit_gib, "GiB of a GPU, such as 70"),
        ("latency bound", request.latency_bound_ms, "milliseconds, such as 40"),
        ("capacity factor", request.capacity_factor, "rows kept over the mean, such as 1.25"),
    ] {
        if let Some(limit) = limit.filter(|limit| !(*limit > 0.0 && limit.is_finite())) {
            return Err(PlanError::mapping(
                format!("the {name} {limit:?} is not a positive number"),
                format!("give {example}"),
            ));
        }
    }
    let loads = match &request.routing {
        crate::choice::Routing::Usual | crate::choice::Routing::Balanced => Vec::new(),
        crate::choice::Routing::Zipf(s) => vec![*s],
        crate::choice::Routing::Loads(loads) => loads.clone(),
    };
    if let Some(load) = loads.iter().find(|v| !(**v >= 0.0 && v.is_finite())) {
        let message = format!("the load or exponent {load:?} of experts is not finite or negative");
        return Err(PlanError::mapping(message, "give tokens per expert, or an exponent such as zipf:0.8"));
    }
    Ok(())
}

/// Ops of one micro-batch of a training plan on one rank, per layer class with its number of layers;
/// the last entry is the output projection.
///
/// # Errors
/// `E0404` for an unknown release.
pub fn operations(
    model: &ModelShape,
    cluster: &Cluster,
    request: &Request,
    plan: &Plan,
) -> Result<Vec<(u64, Vec<Op>)>, PlanError> {
    let cal = TrainCalibration::built_in()?;
    let software = match request.software_override {
        Some(software) => software,
        None => cal.software_for(cluster, &request.software)?,
    };
    Ok(TrainCx::new(model, cluster, cal, software, request).ops(&plan.mapping(), plan.micro_batch))
}

fn train_report(model: &ModelShape, cluster: &Cluster, request: &Request) -> Result<PlanReport, PlanError> {
    let cal = TrainCalibration::built_in()?;
    let software = match request.software_override {
        Some(software) => software,
        None => cal.software_for(cluster, &request.software)?,
    };
    let cx = TrainCx::new(model, cluster, cal, software, request);
    let found = search(&cx, request.top)?;
    let candidates = feasible_or_smallest(&cx, &found)?;
    let winner = candidates[0];
    let plans: Vec<Plan> = candidates
        .iter()
        .enumerate()
        .map(|(index, c)| Plan { why: (index > 0).then(|| why_slower(&cx, &winner, c)), ..training_plan(&cx, c) })
        .collect();
    Ok(PlanReport {
        schema: 1,
        model: model.name.clone(),
        cluster: cluster.name.clone(),
        gpus: request.gpus,
        plans,
        tie: None,
        sensitivity: sensitivity_training(&cx, &winner),
        evaluated: found.evaluated,
        pruned: found.pruned,
    })
}

/// Feasible candidates; the smallest infeasible one when sizes were pinned; otherwise the refusal.
fn feasible_or_smallest(cx: &TrainCx<'_>, found: &Found) -> Result<Vec<Candidate>, PlanError> {
    if !found.best.is_empty() {
        return Ok(found.best.clone());
    }
    let request = cx.request;
    let Some(smallest) = found.smallest else {
        return Err(PlanError::mapping(
            format!(
                "no mapping of {} GPUs divides a global batch of {} under these constraints",
                request.gpus, request.global_batch
            ),
            "the global batch must be a multiple of dp x micro-batch: use a larger or rounder batch, or fix fewer sizes",
        ));
    };
    if request.fixed != crate::mapping::Fixed::default() {
        return Ok(vec![smallest]);
    }
    let (need, limit) = (smallest.estimate.memory.total() / 1_073_741_824.0, memory_limit(cx) / 1_073_741_824.0);
    let m = smallest.choice.mapping;
    Err(PlanError::no_plan(
        format!("no mapping fits: the smallest needs {need:.1} GiB of {limit:.1} GiB usable per GPU"),
        format!(
            "it is tp={} cp={} pp={} ep={} etp={}; use about {} GPUs or more, a smaller sequence, or GPUs with more memory",
            m.tp,
            m.cp,
            m.pp,
            m.ep,
            m.etp,
            (request.gpus as f64 * need / limit).ceil()
        ),
    ))
}

/// A candidate as a plan.
pub(crate) fn training_plan(cx: &TrainCx<'_>, candidate: &Candidate) -> Plan {
    let (c, e) = (&candidate.choice, &candidate.estimate);
    let request = cx.request;
    let seconds = e.times.total();
    let tokens = request.seq as f64 * (c.dp * c.mbs * e.micro_batches) as f64 / request.gpus as f64 / seconds;
    Plan {
        objective: Objective::Train,
        gpus: request.gpus,
        attention: AttentionWays { tp: c.mapping.tp, cp: c.mapping.cp, dp: c.dp, pp: c.mapping.pp },
        experts: ExpertWays { etp: c.mapping.etp, ep: c.mapping.ep, edp: c.edp, pp: c.mapping.pp },
        order: request.order.clone(),
        micro_batch: c.mbs,
        micro_batches: e.micro_batches,
        vpp: c.vpp,
        recompute: c.recompute,
        recompute_share: cx.recomputed_share(c),
        sharding: c.sharding,
        schedule: request.schedule,
        local_experts: local_experts(cx.model, c.mapping.ep),
        stage_layers: layer_pairs(cx.depth() as usize, c.mapping.pp, c.vpp),
        stage_seconds: cx.all_stages(&cx.layer_set(&c.mapping, c.mbs), c),
        step_ms: 1e3 * seconds,
        mfu: Some(tokens * cx.flops_per_token() / (1e12 * cx.cluster.gpu.bf16_tflops)),
        tokens_per_s_per_gpu: tokens,
        ttft_ms: None,
        tpot_ms: None,
        memory_gib: gib(cx, candidate),
        feasible: e.memory.total() <= memory_limit(cx),
        time_ms: time_ms(candidate),
        why: None,
    }
}

/// Layers per stage as pairs.
pub(crate) fn layer_pairs(layers: usize, stages: u64, virtual_stages: u64) -> Vec<Vec<(usize, usize)>> {
    let pair = |chunks: Vec<Range<usize>>| chunks.into_iter().map(|r| (r.start, r.end)).collect();
    stage_layers(layers, stages, virtual_stages).into_iter().map(pair).collect()
}

/// Milliseconds by cause.
pub(crate) fn time_ms(candidate: &Candidate) -> IndexMap<&'static str, f64> {
    let t = &candidate.estimate.times;
    let kinds = Kind::ALL.into_iter().map(|kind| (kind.name(), t.kinds[kind as usize]));
    let rest = [
        ("bubble", t.bubble),
        ("pipeline_comm", t.pipeline_comm),
        ("data_comm", t.data_comm),
        ("optimizer", t.optimizer),
        ("straggler", t.straggler),
    ];
    kinds.chain(rest).map(|(name, seconds)| (name, 1e3 * seconds)).collect()
}

/// Experts of one expert-parallel rank.
pub(crate) fn local_experts(model: &ModelShape, ep: u64) -> u64 {
    let of = |layer: &crate::model::Layer| match layer.feed_forward {
        FeedForward::Dense { .. } => 0,
        FeedForward::Moe { experts, .. } => experts / ep,
    };
    model.layers.iter().map(of).max().unwrap_or(0)
}
