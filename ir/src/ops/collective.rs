//! Rows of other ranks: where a layer is spread over several.

use crate::{
    Dim, RaggedType, RouteType, Type, codes,
    infer::{Cx, OpError, OpResult, arity, want_ragged},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// `%s = collective %d {kind = "all_to_all", group = {name = "ep", ranks = [0, 1], at = 0}, experts = [[0], [1]]}`
///
/// What a rank gives depends on its operands and on those of all members of the group: every member runs a graph
/// with the same collectives in the same order. `passes` makes these ops (`fold-parallelism`); the order of the
/// steps is that of MoE Parallel Folding (arXiv 2504.14960): rows to the ranks that hold their experts, to all
/// shards of an expert, through the experts, and the same way back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Collective {
    /// Rows to the members that hold their experts; rows of experts that nobody holds stay away.
    ///
    /// Of `n` members that hold an expert, the row of token `t` from member `m` goes to number `(t + m) mod n`.
    /// Rows arrive sorted by local expert, then by member, then as they were sent.
    AllToAll {
        /// Members.
        group: Group,
        /// Experts that each member holds, in the order of its local numbers.
        experts: Vec<Vec<u64>>,
    },
    /// `%b = collective %y, %d`: rows `%y` that an `all_to_all` of `%d` brought, back to where they came from.
    /// Rows that were not sent are zero.
    AllToAllBack {
        /// Members.
        group: Group,
        /// As in the `all_to_all`.
        experts: Vec<Vec<u64>>,
    },
    /// The rows of all members, sorted by expert, then by member.
    AllGather {
        /// Members.
        group: Group,
    },
    /// `%q = collective %y, %s`: the sum over members of rows `%y`, for those that are `%s` before the `all_gather`.
    ReduceScatter {
        /// Members.
        group: Group,
    },
}

/// Ranks that do a collective together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Axis of the mapping: `ep`, `etp`.
    pub name: String,
    /// Members, in order.
    pub ranks: Vec<u64>,
    /// Place of this rank among them.
    pub at: u64,
}

impl Group {
    fn check(&self) -> OpResult<()> {
        let wrong = |text: String| Err(OpError::new(codes::VALUE, text));
        let distinct: BTreeSet<&u64> = self.ranks.iter().collect();
        if distinct.len() != self.ranks.len() {
            return wrong(format!("group `{}` names a rank twice", self.name));
        }
        if self.at >= self.ranks.len() as u64 {
            return wrong(format!("place {} in group `{}` of {} ranks", self.at, self.name, self.ranks.len()));
        }
        Ok(())
    }
}

impl Collective {
    /// The group.
    pub const fn group(&self) -> &Group {
        match self {
            Self::AllToAll { group, .. }
            | Self::AllToAllBack { group, .. }
            | Self::AllGather { group }
            | Self::ReduceScatter { group } => group,
        }
    }

    pub(crate) fn infer(&self, _: &Cx<'_>, operands: &[&Type]) -> OpResult<Type> {
        self.group().check()?;
        match self {
            Self::AllToAll { group, experts } => {
                let [rows] = arity(operands)?;
                let rows = want_ragged(rows, "the operand")?;
                let held = held(group, experts, rows)?;
                let route = RouteType { rows: received(rows), slots: 1, experts: held, weighted: false };
                Ok(Type::Ragged(RaggedType { route, repeat: 1, ..rows.clone() }))
            }
            Self::AllGather { .. } => {
                let [rows] = arity(operands)?;
                let rows = want_ragged(rows, "the operand")?;
                let route = RouteType { rows: received(rows), ..rows.route.clone() };
                Ok(Type::Ragged(RaggedType { route, ..rows.clone() }))
            }
            Self::AllToAllBack { group, experts } => {
                let before = back(operands)?;
                held(group, experts, &before)?;
                Ok(Type::Ragged(before))
            }
            Self::ReduceScatter { .. } => back(operands).map(Type::Ragged),
        }
    }
}

/// Rows after one more collective.
const fn received(rows: &RaggedType) -> Dim {
    match rows.route.rows {
        Dim::Received(n) => Dim::Received(n.saturating_add(1)),
        Dim::Const(_) | Dim::Tokens | Dim::Add(..) | Dim::Mul(..) | Dim::CeilDiv(..) => Dim::Received(1),
    }
}

/// Number of experts that this rank holds; the lists are checked.
fn held(group: &Group, experts: &[Vec<u64>], rows: &RaggedType) -> OpResult<u64> {
    let wrong = |text: String| Err(OpError::new(codes::VALUE, text));
    if experts.len() != group.ranks.len() {
        return wrong(format!(
            "experts of {} ranks for group `{}` of {}",
            experts.len(),
            group.name,
            group.ranks.len()
        ));
    }
    for (member, list) in experts.iter().enumerate() {
        let distinct: BTreeSet<&u64> = list.iter().collect();
        if distinct.len() != list.len() {
            return wrong(format!("member {member} of group `{}` holds an expert twice", group.name));
        }
        if let Some(e) = list.iter().find(|e| **e >= rows.route.experts) {
            return wrong(format!("member {member} holds expert {e}, the route has {}", rows.route.experts));
        }
    }
    let own = usize::try_from(group.at).ok().and_then(|at| experts.get(at));
    Ok(own.map_or(0, Vec::len) as u64)
}

/// The type of the second operand with rows of the first.
fn back(operands: &[&Type]) -> OpResult<RaggedType> {
    let [rows, before] = arity(operands)?;
    let (rows, before) = (want_ragged(rows, "the first operand")?, want_ragged(before, "the second operand")?);
    Ok(RaggedType { row: rows.row.clone(), dtype: rows.dtype, ..before.clone() })
}
