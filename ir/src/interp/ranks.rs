//! Several ranks together: their graphs run in step, so that a collective sees the operands of all members.

use super::{
    Array, Failure, InterpError, RaggedValue, Rounding, RouteValue, Run, Step, Value, Weights, bind, result,
    value::{ragged, size},
};
use crate::{Graph, NodeId, Op, ops::Collective};
use indexmap::IndexMap;

/// What one rank runs.
pub struct Rank<'a> {
    /// Its number, by which collectives name it.
    pub id: u64,
    /// Its graph.
    pub graph: &'a Graph,
    /// Its inputs.
    pub inputs: IndexMap<String, Array>,
    /// Its weights.
    pub weights: &'a dyn Weights,
}

/// Computes the results of all ranks. Their graphs have the same nodes in the same order, as `fold-parallelism`
/// leaves them; attributes may differ.
///
/// # Errors
/// As [`interpret`](super::interpret), and when graphs or groups do not fit together.
pub fn interpret_ranks(ranks: &[Rank<'_>], rounding: Rounding) -> Result<Vec<IndexMap<String, Array>>, InterpError> {
    let orders: Vec<Vec<NodeId>> = ranks.iter().map(|r| r.graph.order()).collect();
    let mut states = Vec::new();
    for rank in ranks {
        let (bound, tokens) = bind(rank.graph, &rank.inputs)?;
        let run = Run { weights: rank.weights, rounding, tokens, trace: None };
        states.push((run, bound.into_iter(), Vec::<Option<Value>>::new()));
    }
    let steps = orders.first().map_or(0, Vec::len);
    for at in 0..steps {
        let node = |rank: usize| orders[rank].get(at).map(|id| (*id, ranks[rank].graph.node(*id)));
        let Some((_, first)) = node(0) else { continue };
        let collective = matches!(first.op, Op::Collective(_));
        let failed = |rank: usize, message: String| InterpError::Node {
            node: node(rank).map_or_else(String::new, |(_, n)| format!("{} of rank {rank}", n.name)),
            op: first.op.name(),
            message,
        };
        let mut operands = Vec::new();
        if collective {
            for (rank, (_, _, values)) in states.iter().enumerate() {
                let (id, _) = node(rank).ok_or_else(|| failed(rank, "the graphs of the ranks differ".to_owned()))?;
                let own: Option<Vec<Value>> = ranks[rank]
                    .graph
                    .operands(id)
                    .into_iter()
                    .map(|o| values.get(o.index()).cloned().flatten())
                    .collect();
                operands.push(own.ok_or_else(|| failed(rank, "an operand has no value".to_owned()))?);
            }
        }
        for (rank, (run, inputs, values)) in states.iter_mut().enumerate() {
            let differ = || failed(rank, "the graphs of the ranks differ".to_owned());
            let (id, own) = node(rank).filter(|(_, n)| n.name == first.name).ok_or_else(differ)?;
            let value = match &own.op {
                Op::Collective(op) => {
                    let value = collect(op, &operands, ranks).map_err(|Failure(message)| failed(rank, message))?;
                    super::rounded(value, own, run).map_err(|Failure(message)| failed(rank, message))?
                }
                _ => super::node_value(ranks[rank].graph, id, values, inputs, run, "")?,
            };
            super::keep(values, id, value);
        }
    }
    let results = |(rank, (_, _, values)): (&Rank<'_>, &(_, _, Vec<Option<Value>>))| {
        rank.graph.outputs.iter().map(|o| Ok((o.name.clone(), result(rank.graph, o, values)?))).collect()
    };
    ranks.iter().zip(&states).map(results).collect()
}

/// A row that moves: where it will lie, and where it came from.
struct Moved {
    /// Expert as the receiver counts.
    expert: usize,
    /// Place of the sender in the group.
    member: usize,
    /// Place among the sender's rows.
    row: usize,
}

/// What a rank gets.
fn collect(op: &Collective, all: &[Vec<Value>], ranks: &[Rank<'_>]) -> Step<Value> {
    let group = op.group();
    let members: Vec<&Vec<Value>> = group
        .ranks
        .iter()
        .map(|id| ranks.iter().position(|rank| rank.id == *id).and_then(|at| all.get(at)))
        .collect::<Option<_>>()
        .ok_or_else(|| Failure(format!("group `{}` names a rank that is not there", group.name)))?;
    let operand = |i: usize| -> Step<Vec<&RaggedValue>> {
        members.iter().map(|values| ragged(&values.iter().collect::<Vec<_>>(), i)).collect()
    };
    let at = size(group.at)?;
    match op {
        Collective::AllToAll { experts, .. } => {
            let sent = operand(0)?;
            Ok(arrive(&sent, &routed(&sent, experts, at), experts[at].len() as u64))
        }
        Collective::AllGather { .. } => {
            let sent = operand(0)?;
            Ok(arrive(&sent, &gathered(&sent), sent[at].route.experts))
        }
        Collective::AllToAllBack { experts, .. } => {
            let (rows, sent) = (operand(0)?, operand(1)?);
            let mut back = empty_like(sent[at], rows[at]);
            let width = back.width();
            for (member, rows) in rows.iter().enumerate() {
                for (place, moved) in routed(&sent, experts, member).iter().enumerate() {
                    if moved.member == at {
                        let into = moved.row * width..(moved.row + 1) * width;
                        back.data[into].copy_from_slice(rows.at(place));
                    }
                }
            }
            Ok(Value::Ragged(back))
        }
        Collective::ReduceScatter { .. } => {
            let (rows, sent) = (operand(0)?, operand(1)?);
            let mut sum = empty_like(sent[at], rows[at]);
            let width = sum.width();
            for (place, moved) in gathered(&sent).iter().enumerate() {
                if moved.member == at {
                    let into = &mut sum.data[moved.row * width..(moved.row + 1) * width];
                    for rows in &rows {
                        into.iter_mut().zip(rows.at(place)).for_each(|(s, v)| *s += v);
                    }
                }
            }
            Ok(Value::Ragged(sum))
        }
    }
}

/// Rows that an all-to-all brings to member `to`, in the order in which they lie there.
fn routed(sent: &[&RaggedValue], experts: &[Vec<u64>], to: usize) -> Vec<Moved> {
    let holders = |e: usize| -> Vec<(usize, usize)> {
        let places = experts.iter().enumerate();
        places.filter_map(|(m, list)| list.iter().position(|held| *held == e as u64).map(|at| (m, at))).collect()
    };
    let mut arrived = Vec::new();
    for (member, rows) in sent.iter().enumerate() {
        for (row, (e, token)) in rows.experts.iter().zip(&rows.tokens).enumerate() {
            let holders = holders(*e);
            let Some(turn) = (token + member).checked_rem(holders.len()) else { continue };
            let (holder, expert) = holders[turn];
            if holder == to {
                arrived.push(Moved { expert, member, row });
            }
        }
    }
    arrived.sort_by_key(|m| (m.expert, m.member, m.row));
    arrived
}

/// Rows of all members, sorted by expert, then by member.
fn gathered(sent: &[&RaggedValue]) -> Vec<Moved> {
    let rows = sent.iter().enumerate();
    let mut all: Vec<Moved> = rows
        .flat_map(|(member, rows)| {
            rows.experts.iter().enumerate().map(move |(row, e)| Moved { expert: *e, member, row })
        })
        .collect();
    all.sort_by_key(|m| (m.expert, m.member, m.row));
    all
}

/// The rows that moved, as rows of a route with one slot.
fn arrive(sent: &[&RaggedValue], moved: &[Moved], experts: u64) -> Value {
    let count = moved.len();
    Value::Ragged(RaggedValue {
        route: RouteValue {
            rows: count,
            slots: 1,
            experts,
            ids: moved.iter().map(|m| i64::try_from(m.expert).unwrap_or(-1)).collect(),
            weights: None,
        },
        repeat: 1,
        tokens: (0..count).collect(),
        slots: vec![0; count],
        experts: moved.iter().map(|m| m.expert).collect(),
        row: sent.first().map_or_else(Vec::new, |rows| rows.row.clone()),
        data: moved.iter().flat_map(|m| sent[m.member].at(m.row).iter().copied()).collect(),
    })
}

/// Zeros in the places of `sent`, with rows as `rows` has them.
fn empty_like(sent: &RaggedValue, rows: &RaggedValue) -> RaggedValue {
    let data = vec![0.0; sent.tokens.len() * rows.width()];
    RaggedValue { row: rows.row.clone(), data, ..sent.clone() }
}
