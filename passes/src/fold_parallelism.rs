//! Rewrite a layer for one rank of a folded mapping.
//!
//! Before: a layer that one device runs. After: what one rank runs on its own tokens. Between dispatch and experts
//! rows go to the rank that holds their expert (`all_to_all` over `ep`) and to all shards of it (`all_gather` over
//! `etp`); the bank holds the experts of this rank, each cut along its inner width; sums of shards and rows come
//! back the same way (`reduce_scatter`, `all_to_all_back`). This is the dispatcher of MoE Parallel Folding
//! (arXiv 2504.14960, section 3.3).
//! Left alone: routers and shared experts, which each rank computes for its own tokens, and simple experts
//! (identity, constant, null, one neuron), which cost less than moving a row.

use crate::{Failure, region};
use moec_ir::{
    Extent, Graph, NodeId, Op, View, WeightSpec,
    ops::{BankPart, Collective, Experts, Ffn, Group, PartKind},
};

/// Name of the pass, in dumps.
pub const FOLD: &str = "fold-parallelism";

/// What one rank is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fold {
    /// Ranks that share the experts, and the place of this one.
    pub ep: Group,
    /// Ranks that share each expert's inner width, and the place of this one.
    pub etp: Group,
    /// Experts that each member of `ep` holds; an expert may be held by several. Repeated ids count once.
    pub experts: Vec<Vec<u64>>,
}

/// Why a graph cannot be folded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FoldError {
    /// A value of one token depends on other tokens, which may be on other ranks.
    #[error("node `{node}` ({op}) looks at several tokens at once, and a rank has only some of them")]
    MixesTokens {
        /// The node.
        node: String,
        /// Its operation.
        op: &'static str,
    },
    /// No bank of experts with matrices behind a dispatch.
    #[error("the layer has no experts that could be spread over ranks")]
    NoExperts,
    /// An expert is on no rank.
    #[error("expert {0} is on no rank")]
    Nowhere(u64),
    /// A rank would have no expert.
    #[error("member {0} of the expert parallel group holds no expert")]
    Empty(usize),
    /// An expert cannot be cut along its inner width.
    #[error("experts of node `{node}` cannot be cut into {ways}: {why}")]
    Uncut {
        /// The node.
        node: String,
        /// Shards.
        ways: usize,
        /// What is in the way.
        why: String,
    },
    /// The rewritten graph is not valid, which is our bug.
    #[error(transparent)]
    Invalid(#[from] Failure),
}

/// The graph that one rank runs.
///
/// # Errors
/// See [`FoldError`].
pub fn fold_parallelism(graph: &Graph, fold: &Fold) -> Result<Graph, FoldError> {
    let mut graph = graph.clone();
    crate::run_named(&mut graph, &["split-banks"], false)?;
    if let Some(id) = graph.order().into_iter().find(|id| mixes_tokens(&graph, *id)) {
        let node = graph.node(id);
        return Err(FoldError::MixesTokens { node: node.name.clone(), op: node.op.name() });
    }
    let banks: Vec<NodeId> = graph.order().into_iter().filter(|id| is_spread(&graph, *id)).collect();
    if banks.is_empty() {
        return Err(FoldError::NoExperts);
    }
    for id in banks {
        spread(&mut graph, id, fold)?;
    }
    let used: Vec<String> = graph
        .ids()
        .into_iter()
        .flat_map(|id| graph.node(id).op.weights().into_iter().cloned().collect::<Vec<_>>())
        .collect();
    graph.weights.retain(|name, _| used.contains(name));
    crate::run_named(&mut graph, &[], false)?;
    Ok(graph)
}

/// Whether a row of the value depends on several rows of an operand.
fn mixes_tokens(graph: &Graph, id: NodeId) -> bool {
    let op = &graph.node(id).op;
    op.is_batch_dependent() || matches!(op, Op::Attention(_) | Op::Count(_) | Op::Described(_))
}

/// A bank with matrices over dispatched rows.
fn is_spread(graph: &Graph, id: NodeId) -> bool {
    let Op::Experts(op) = &graph.node(id).op else { return false };
    let rows = graph.operands(id).first().copied();
    op.bank.iter().any(|p| !region::is_simple(&p.kind))
        && rows.is_some_and(|rows| matches!(graph.node(rows).op, Op::Dispatch(_)))
}

fn spread(graph: &mut Graph, id: NodeId, fold: &Fold) -> Result<(), FoldError> {
    let Op::Experts(op) = graph.node(id).op.clone() else { return Ok(()) };
    let Some(rows) = graph.operands(id).first().copied() else { return Ok(()) };
    let part_of = |e: u64| op.bank.iter().find(|p| p.ids[0] <= e && e < p.ids[1]);
    let moves = |e: &u64| part_of(*e).is_some_and(|p| !matches!(p.kind, PartKind::Zero {}));
    let experts: Vec<Vec<u64>> = fold
        .experts
        .iter()
        .map(|list| {
            let mut list: Vec<u64> = list.iter().copied().filter(moves).collect();
            list.sort_unstable();
            list.dedup();
            list
        })
        .collect();
    let end = op.bank.last().map_or(0, |p| p.ids[1]);
    if let Some(e) = (0..end).filter(moves).find(|e| !experts.iter().any(|list| list.contains(e))) {
        return Err(FoldError::Nowhere(e));
    }
    if let Some(member) = experts.iter().position(Vec::is_empty) {
        return Err(FoldError::Empty(member));
    }
    let own = usize::try_from(fold.ep.at).ok().and_then(|at| experts.get(at)).cloned().unwrap_or_default();
    let mut bank: Vec<BankPart> = Vec::new();
    let mut last = None;
    for (local, e) in (0..).zip(own) {
        let Some(at) = op.bank.iter().position(|p| p.ids[0] <= e && e < p.ids[1]) else { continue };
        let part = &op.bank[at];
        match bank.last_mut() {
            Some(run) if last == Some(at) => {
                run.ids[1] = local + 1;
                run.numbers.push(part.number(e));
            }
            Some(_) | None => bank.push(BankPart {
                ids: [local, local + 1],
                base_id: 0,
                numbers: vec![part.number(e)],
                kind: part.kind.clone(),
            }),
        }
        last = Some(at);
    }
    let ways = fold.etp.ranks.len();
    if ways > 1 {
        let name = graph.node(id).name.clone();
        for part in &mut bank {
            cut_part(graph, part, fold.etp.at, ways as u64).map_err(|why| FoldError::Uncut {
                node: name.clone(),
                ways,
                why,
            })?;
        }
    }
    let there = Op::Collective(Collective::AllToAll { group: fold.ep.clone(), experts: experts.clone() });
    let sent = graph.add("sent", there, &[rows]);
    let gathered = if ways > 1 {
        graph.add("gathered", Op::Collective(Collective::AllGather { group: fold.etp.clone() }), &[sent])
    } else {
        sent
    };
    let local = graph.add("local", Op::Experts(Experts { bank }), &[gathered]);
    let summed = if ways > 1 {
        let op = Op::Collective(Collective::ReduceScatter { group: fold.etp.clone() });
        graph.add("summed", op, &[local, sent])
    } else {
        local
    };
    let back = Op::Collective(Collective::AllToAllBack { group: fold.ep.clone(), experts });
    let back = graph.add("back", back, &[summed, rows]);
    let round = graph.node(id).round;
    graph.set_round(back, round);
    graph.replace_uses(id, back);
    graph.remove(id);
    Ok(())
}

/// Which rows (axis 0) or columns (axis 1) of a matrix are kept.
#[derive(Clone, Copy)]
struct Cut {
    axis: usize,
    start: u64,
    len: u64,
}

/// Keeps shard `at` of `ways` of the inner width.
fn cut_part(graph: &mut Graph, part: &mut BankPart, at: u64, ways: u64) -> Result<(), String> {
    let ffn = match &mut part.kind {
        PartKind::Ffn(ffn) => ffn,
        PartKind::Linear(_) => return Err("they are single matrices, which have no inner width".to_owned()),
        PartKind::Film(_)
        | PartKind::Const { .. }
        | PartKind::Neuron(_)
        | PartKind::Identity {}
        | PartKind::Zero {} => return Ok(()),
    };
    if ffn.a8 {
        return Err("their activations are rounded by rows of the whole inner width".to_owned());
    }
    let rows = spec_size(graph, &ffn.up, 0)?;
    let inner = if ffn.packed { rows / 2 } else { rows };
    let (start, end) = (inner * at / ways, inner * (at + 1) / ways);
    if start == end {
        return Err(format!("their inner width is {inner}"));
    }
    let tag = format!("{}of{ways}", at + 1);
    let rows = Cut { axis: 0, start, len: end - start };
    let mut shard = if ffn.packed {
        // The first half holds the values, the second the gate.
        let second = Cut { start: inner + start, ..rows };
        let (gate_tag, up_tag) = (format!("gate.{tag}"), format!("up.{tag}"));
        Ffn {
            gate: Some(cut(graph, &ffn.up, second, &gate_tag)?),
            gate_bias: ffn.up_bias.as_ref().map(|b| cut(graph, b, second, &gate_tag)).transpose()?,
            up: cut(graph, &ffn.up, rows, &up_tag)?,
            up_bias: ffn.up_bias.as_ref().map(|b| cut(graph, b, rows, &up_tag)).transpose()?,
            packed: false,
            ..(**ffn).clone()
        }
    } else {
        let mut each = |spec: &Option<WeightSpec>| spec.as_ref().map(|s| cut(graph, s, rows, &tag)).transpose();
        Ffn {
            gate: each(&ffn.gate)?,
            gate_bias: each(&ffn.gate_bias)?,
            up_bias: each(&ffn.up_bias)?,
            up: cut(graph, &ffn.up, rows, &tag)?,
            ..(**ffn).clone()
        }
    };
    shard.down = ffn.down.as_ref().map(|d| cut(graph, d, Cut { axis: 1, ..rows }, &tag)).transpose()?;
    // The shards are summed, so that one of them adds the bias.
    shard.down_bias = ffn.down_bias.clone().filter(|_| at == 0);
    **ffn = shard;
    Ok(())
}

/// A size of the composed value, the same for all experts.
fn spec_size(graph: &Graph, spec: &WeightSpec, axis: usize) -> Result<u64, String> {
    let of = |name: &str| match graph.weights.get(name).and_then(|w| w.shape.get(axis)) {
        Some(Extent::Fixed(n)) => Ok(*n),
        Some(Extent::PerExpert(_)) => Err(format!("`{name}` has another width for each expert")),
        None => Err(format!("`{name}` has no axis {axis}")),
    };
    match spec {
        WeightSpec::Plain(name)
        | WeightSpec::Base { base: name, .. }
        | WeightSpec::Grouped { codes: name, .. }
        | WeightSpec::Ternary { codes: name, .. } => of(name),
        WeightSpec::Mul { mul: [a, b], .. } => of(if axis == 0 { a } else { b }),
        WeightSpec::Take { take, ids, axis: taken } if *taken == 0 => of(if axis == 0 { ids } else { take }),
        WeightSpec::Slice { slice, .. } | WeightSpec::Take { take: slice, .. } => {
            Err(format!("`{slice}` is cut among the experts already"))
        }
    }
}

/// The composed value with some of its rows or columns.
fn cut(graph: &mut Graph, spec: &WeightSpec, cut: Cut, tag: &str) -> Result<WeightSpec, String> {
    let mut part = |name: &str, cut: Cut| keep(graph, name, cut, tag);
    Ok(match spec {
        WeightSpec::Plain(name) => WeightSpec::Plain(part(name, cut)?),
        WeightSpec::Mul { mul: [a, b], group } => {
            let mul = if cut.axis == 0 { [part(a, cut)?, b.clone()] } else { [a.clone(), part(b, cut)?] };
            WeightSpec::Mul { mul, group: group.clone() }
        }
        WeightSpec::Base { base, a, b, scale } => {
            let (a, b) = if cut.axis == 0 { (a.clone(), part(b, cut)?) } else { (part(a, cut)?, b.clone()) };
            WeightSpec::Base { base: part(base, cut)?, a, b, scale: *scale }
        }
        WeightSpec::Grouped { codes, scale, zero, group_size, bits } => {
            let groups = if cut.axis == 0 {
                cut
            } else if cut.start.is_multiple_of(*group_size) && cut.len.is_multiple_of(*group_size) {
                Cut { start: cut.start / group_size, len: cut.len / group_size, ..cut }
            } else {
                return Err(format!("a shard of {} inputs splits groups of {group_size} that share a scale", cut.len));
            };
            WeightSpec::Grouped {
                codes: part(codes, cut)?,
                scale: part(scale, groups)?,
                zero: part(zero, groups)?,
                group_size: *group_size,
                bits: bits.clone(),
            }
        }
        WeightSpec::Ternary { codes, scale } => {
            // The scale is repeated along axes of size 1 and aligned at the last axis.
            let shape = graph.weights.get(scale).map(|w| w.shape.clone()).unwrap_or_default();
            let own = (cut.axis + shape.len()).checked_sub(2);
            let scale = match own.and_then(|axis| Some((axis, shape.get(axis)?))) {
                Some((axis, size)) if *size != Extent::Fixed(1) => keep(graph, scale, Cut { axis, ..cut }, tag)?,
                Some(_) | None => scale.clone(),
            };
            WeightSpec::Ternary { codes: keep(graph, codes, cut, tag)?, scale }
        }
        WeightSpec::Take { take, ids, axis: 0 } if cut.axis == 0 => {
            WeightSpec::Take { take: take.clone(), ids: part(ids, cut)?, axis: 0 }
        }
        WeightSpec::Take { take, ids, axis: 1 } if cut.axis == 1 => {
            WeightSpec::Take { take: take.clone(), ids: part(ids, Cut { axis: 0, ..cut })?, axis: 1 }
        }
        WeightSpec::Slice { slice, .. } | WeightSpec::Take { take: slice, .. } => {
            return Err(format!("`{slice}` is cut among the experts already"));
        }
    })
}

/// Declares the rows or columns of a weight under a name of their own.
fn keep(graph: &mut Graph, name: &str, cut: Cut, tag: &str) -> Result<String, String> {
    let own = format!("{name}.{tag}");
    let mut weight = graph.weights.get(name).cloned().ok_or_else(|| format!("`{name}` is not declared"))?;
    let size = weight.shape.get_mut(cut.axis).ok_or_else(|| format!("`{name}` has no axis {}", cut.axis))?;
    match size {
        Extent::Fixed(n) if cut.start + cut.len <= *n => *size = Extent::Fixed(cut.len),
        Extent::Fixed(n) => return Err(format!("`{name}` has {n} entries on axis {}", cut.axis)),
        Extent::PerExpert(_) => return Err(format!("`{name}` has another width for each expert")),
    }
    weight.source.view.push(View::Slice { axis: cut.axis as u64, start: cut.start, len: cut.len, step: 1 });
    graph.weights.insert(own.clone(), weight);
    Ok(own)
}
