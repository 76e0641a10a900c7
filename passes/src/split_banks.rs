//! Split banks that mix kinds of experts, and feature-wise modulation into two products.
//!
//! Before: one bank with feed-forward experts, single matrices, modulations and identity, constant
//! or one-neuron experts, or several such banks in series. After: a chain for each kind, or each
//! series of kinds, whose sums are added: those with matrices move rows, the simple ones are
//! computed by a combine in place. Null experts cost nothing, and identity in a series is left out.
//! A modulation `M x * x + A x` is linear in its products, and all slots of a token see the same
//! `x`: its sum over slots is `x` times the sum of the `M x`, plus the sum of the `A x`.

use crate::{Changed, Pass, PassCx, region::zeros};
use moec_ir::{
    Graph, NodeId, Op, Type,
    ops::{BankPart, Binary, BinaryFn, Dispatch, Experts, Film, LinearBank, PartKind},
};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const PASS: Pass =
    Pass { name: "split-banks", about: "separate kinds of experts that are computed in different ways", run };

/// Ways to compute an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    Network,
    Matrix,
    Film,
    /// A function of the row that a combine computes.
    Simple,
    /// A row that does not depend on what comes in.
    Const,
    /// The row itself.
    Same,
    Zero,
    /// No experts: attention of the rows.
    Attention,
}

fn way(kind: &PartKind) -> Way {
    match kind {
        PartKind::Ffn(_) => Way::Network,
        PartKind::Linear(_) => Way::Matrix,
        PartKind::Film(_) => Way::Film,
        PartKind::Const { .. } => Way::Const,
        PartKind::Neuron(_) => Way::Simple,
        PartKind::Identity {} => Way::Same,
        PartKind::Zero {} => Way::Zero,
    }
}

/// Stages with their ways, from first to last: what remains of a series for some of the experts.
pub(crate) type Series = Vec<(usize, Way)>;

/// What stands between a dispatch and its combine.
struct Mixed {
    dispatch: NodeId,
    stages: Vec<NodeId>,
    combine: NodeId,
    /// Experts by what is computed for them.
    series: BTreeMap<Series, BTreeSet<u64>>,
}

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if let Some(mixed) = find(graph, id) {
            let simple = mixed.series.keys().flatten().any(|(_, way)| *way == Way::Simple);
            let text = if simple { "simple experts are computed by the combine" } else { "a bank for each kind" };
            let first = mixed.stages.iter().find(|id| bank(graph, **id).is_some()).copied().unwrap_or(mixed.combine);
            cx.remark(graph, first, text);
            split(graph, &mixed);
            changed = Changed::Yes;
        }
    }
    changed
}

pub(crate) fn bank(graph: &Graph, id: NodeId) -> Option<&[BankPart]> {
    if let Op::Experts(op) = &graph.node(id).op { Some(&op.bank) } else { None }
}

/// The dispatch of what a combine sums, and the banks and attention between them, which nothing else reads.
pub(crate) fn between(graph: &Graph, combine: NodeId) -> Option<(NodeId, Vec<NodeId>)> {
    if !graph.contains(combine) || !matches!(graph.node(combine).op, Op::Combine(_)) {
        return None;
    }
    let mut stages = Vec::new();
    let mut id = *graph.operands(combine).first()?;
    while !matches!(graph.node(id).op, Op::Dispatch(_)) {
        let one = matches!(graph.node(id).op, Op::Experts(_) | Op::Attention(_));
        if !one || graph.users(id).len() != 1 || graph.is_output(id) {
            return None;
        }
        stages.insert(0, id);
        id = *graph.operands(id).first()?;
    }
    Some((id, stages))
}

/// What a combine sums, where that must be split.
fn find(graph: &Graph, combine: NodeId) -> Option<Mixed> {
    let (id, stages) = between(graph, combine)?;
    let kinds = kinds(graph, &stages);
    let mut series = series(&kinds);
    if series.is_empty() && row(graph, *stages.last()?) == row(graph, id) {
        let last = stages.iter().rposition(|id| bank(graph, *id).is_some())?;
        series.insert(vec![(last, Way::Simple)], BTreeSet::new());
    }
    // Inner activations beside whole rows are padded to the row: apart, the widths would differ.
    let parts = || stages.iter().filter_map(|id| bank(graph, *id)).flatten();
    let padded = parts().any(BankPart::is_inner);
    let has = |wanted: Way| series.keys().flatten().any(|(_, way)| *way == wanted);
    // Rows that nothing comes of are not moved.
    let given: usize = series.values().map(BTreeSet::len).sum();
    let moved = kinds.iter().filter(|ways| ways.iter().any(|way| !matches!(way, Way::Zero | Way::Attention))).count();
    let several = series.len() > 1 || series.keys().any(|s| s.len() < stages.len()) || has(Way::Zero) || given < moved;
    let wanted = several && !padded || has(Way::Film);
    // Of several in series, each is a grouped product.
    let whole = given == kinds.len();
    let can = series.keys().all(|s| can_run(s) && (whole && series.len() == 1 || has_bank(s)));
    (wanted && can).then_some(Mixed { dispatch: id, stages, combine, series })
}

/// What each expert computes at each stage.
pub(crate) fn kinds(graph: &Graph, stages: &[NodeId]) -> Vec<Vec<Way>> {
    let banks: Vec<Option<&[BankPart]>> = stages.iter().map(|id| bank(graph, *id)).collect();
    let count = banks.iter().flatten().flat_map(|parts| parts.iter()).map(|p| p.ids[1]).max().unwrap_or(0);
    let of = |parts: &[BankPart], expert: u64| {
        let part = parts.iter().find(|p| (p.ids[0]..p.ids[1]).contains(&expert));
        part.map_or(Way::Zero, |p| way(&p.kind))
    };
    let row = |expert| banks.iter().map(|parts| parts.map_or(Way::Attention, |parts| of(parts, expert))).collect();
    (0..count).map(row).collect()
}

/// What is computed for each expert that gives something. A stage that passes rows on is left out, and so is all that
/// stands before rows that do not depend on it.
pub(crate) fn series(kinds: &[Vec<Way>]) -> BTreeMap<Series, BTreeSet<u64>> {
    let mut series: BTreeMap<Series, BTreeSet<u64>> = BTreeMap::new();
    for (expert, ways) in (0..).zip(kinds) {
        let mut own = Series::new();
        for (at, way) in ways.iter().enumerate() {
            match way {
                Way::Same => {}
                Way::Zero => own = vec![(at, Way::Zero)],
                Way::Const => own = vec![(at, Way::Simple)],
                Way::Network | Way::Matrix | Way::Film | Way::Simple | Way::Attention => own.push((at, *way)),
            }
        }
        if own.is_empty() {
            own.push((ways.len() - 1, Way::Simple));
        }
        if own.last().is_some_and(|(_, way)| *way != Way::Zero) {
            series.entry(own).or_default().insert(expert);
        }
    }
    series
}

/// Whether a bank says which experts the series is for.
fn has_bank(series: &Series) -> bool {
    series.iter().any(|(_, way)| !matches!(way, Way::Attention | Way::Zero))
}

/// Shape of one dispatched row.
pub(crate) fn row(graph: &Graph, id: NodeId) -> Option<Vec<u64>> {
    match &graph.node(id).ty {
        Some(Type::Ragged(rows)) => Some(rows.row.clone()),
        Some(Type::Tensor(_) | Type::Route(_) | Type::Plan(_)) | None => None,
    }
}

/// Whether there are kernels for a series: of several in a row, each is a grouped product.
pub(crate) fn can_run(series: &Series) -> bool {
    let product = |way: Way| matches!(way, Way::Network | Way::Matrix | Way::Attention);
    let rest = if let [(_, Way::Zero), rest @ ..] = &series[..] { rest } else { series };
    series.len() == 1 || rest.iter().all(|(_, way)| product(*way))
}

/// The bank for some of the experts, each as `kept` says; the others give nothing.
fn only(bank: &[BankPart], experts: &BTreeSet<u64>, kept: impl Fn(&PartKind) -> Option<PartKind>) -> Op {
    let mut parts: Vec<(bool, BankPart)> = Vec::new();
    for part in bank {
        let first = parts.len();
        for id in part.ids[0]..part.ids[1] {
            let own = experts.contains(&id);
            match parts[first..].last_mut() {
                Some((as_before, run)) if *as_before == own => run.ids[1] = id + 1,
                Some(_) | None => {
                    let place = usize::try_from(id - part.ids[0]).unwrap_or(usize::MAX);
                    let numbers = part.numbers.get(place..).unwrap_or_default().to_vec();
                    let kind = if own { kept(&part.kind) } else { None };
                    let kind = kind.unwrap_or(PartKind::Zero {});
                    parts.push((own, BankPart { ids: [id, id + 1], numbers, kind, base_id: part.base_id }));
                }
            }
        }
    }
    Op::Experts(Experts { bank: parts.into_iter().map(|(_, part)| part).collect() })
}

/// A chain under construction: what is dispatched, through which stages, and how it is summed.
struct Chain<'a> {
    mixed: &'a Mixed,
    x: NodeId,
    route: [NodeId; 2],
    combine: Op,
}

impl Chain<'_> {
    /// Adds the chain of these stages.
    fn add(&self, graph: &mut Graph, name: &str, x: NodeId, stages: &[(usize, Op)]) -> NodeId {
        let copy = |graph: &mut Graph, name: &str, of: NodeId, op: Op, operands: &[NodeId]| {
            let (id, round) = (graph.add(name, op, operands), graph.node(of).round);
            graph.set_round(id, round);
            id
        };
        let dispatch = graph.node(self.mixed.dispatch).op.clone();
        let mut rows = copy(graph, "", self.mixed.dispatch, dispatch, &[x, self.route[0]]);
        for (at, op) in stages {
            let stage = self.mixed.stages[*at];
            let operands = [&[rows], graph.operands(stage).get(1..).unwrap_or_default()].concat();
            rows = copy(graph, name, stage, op.clone(), &operands);
        }
        graph.add("", self.combine.clone(), &[rows, self.route[1]])
    }
}

const fn binary(function: BinaryFn, c: Option<f64>) -> Op {
    Op::Binary(Binary { function, w: None, c })
}

fn split(graph: &mut Graph, mixed: &Mixed) {
    let (dispatched, combined) = (graph.operands(mixed.dispatch), graph.operands(mixed.combine));
    let (&[x, first], &[_, second]) = (&dispatched[..], &combined[..]) else { return };
    let combine = graph.node(mixed.combine).op.clone();
    let chain = Chain { mixed, x, route: [first, second], combine };
    let mut sum = None;
    for (series, experts) in &mixed.series {
        let part = if let [(at, Way::Film)] = series[..] {
            film(graph, &chain, at, experts)
        } else {
            let simple = series.iter().any(|(_, way)| *way == Way::Simple);
            let stages = series.iter().filter(|(_, way)| *way != Way::Zero).map(|(at, _)| {
                let stage = mixed.stages[*at];
                let bank = bank(graph, stage).map(|bank| only(bank, experts, |kind| Some(kind.clone())));
                (*at, bank.unwrap_or_else(|| graph.node(stage).op.clone()))
            });
            let stages: Vec<(usize, Op)> = stages.collect();
            let x = match series[..] {
                [(at, Way::Zero), ..] => {
                    let before = at.checked_sub(1).and_then(|before| row(graph, mixed.stages[before]));
                    zeros(graph, x, if let Some(&[n]) = before.as_deref() { Some(n) } else { None })
                }
                _ => x,
            };
            chain.add(graph, if simple { "simple" } else { "heavy" }, x, &stages)
        };
        sum = Some(match sum {
            None => part,
            Some(sum) => graph.add("", binary(BinaryFn::Add, None), &[sum, part]),
        });
    }
    let Some(sum) = sum else { return };
    let round = graph.node(mixed.combine).round;
    graph.set_round(sum, round);
    graph.replace_uses(mixed.combine, sum);
    graph.remove(mixed.combine);
    for id in mixed.stages.iter().rev() {
        graph.remove(*id);
    }
    if graph.users(mixed.dispatch).is_empty() {
        graph.remove(mixed.dispatch);
    }
}

/// Modulations: the sum of the scaled rows and that of the added ones.
fn film(graph: &mut Graph, chain: &Chain<'_>, at: usize, experts: &BTreeSet<u64>) -> NodeId {
    let half = |graph: &Graph, bank_of: fn(&Film) -> LinearBank| {
        let linear = |kind: &PartKind| match kind {
            PartKind::Film(film) => Some(PartKind::Linear(bank_of(film))),
            PartKind::Ffn(_)
            | PartKind::Linear(_)
            | PartKind::Const { .. }
            | PartKind::Neuron(_)
            | PartKind::Identity {}
            | PartKind::Zero {} => None,
        };
        (at, only(bank(graph, chain.mixed.stages[at]).unwrap_or_default(), experts, linear))
    };
    let mul = half(graph, |film| LinearBank { w: film.mul.clone(), bias: film.mul_bias.clone() });
    let add = half(graph, |film| LinearBank { w: film.add.clone(), bias: film.add_bias.clone() });
    // The factor meets the row as the expert sees it: weighted rows carry their weight once more.
    let mut scaling = chain.combine.clone();
    let dispatch = &graph.node(chain.mixed.dispatch).op;
    if let (Op::Dispatch(Dispatch { weighted: true, .. }), Op::Combine(combine)) = (dispatch, &mut scaling) {
        combine.weighted = true;
    }
    let scaling = Chain { combine: scaling, ..*chain };
    let mul = scaling.add(graph, "mul", chain.x, &[mul]);
    let add = chain.add(graph, "add", chain.x, &[add]);
    let scaled = graph.add("", binary(BinaryFn::Mul, None), &[chain.x, mul]);
    graph.add("", binary(BinaryFn::Add, None), &[scaled, add])
}
