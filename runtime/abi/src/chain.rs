//! Chains: programs of one rank, and the moves of rows between ranks that come between them.

use serde::{Deserialize, Serialize};

/// What one rank runs for a layer form that is spread over several ranks.
///
/// Steps read and write tensors by name. They start from the inputs of the layer, for the tokens of this rank; the
/// number of tokens of a program is the number of rows of its first input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Name of the form.
    pub name: String,
    /// The rank, as groups count.
    pub rank: u64,
    /// Layers of the model that it serves.
    pub layers: Vec<u64>,
    /// Steps, in order.
    pub steps: Vec<Step>,
    /// Tensors that are results of the layer.
    pub outputs: Vec<String>,
}

/// One step of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Launches the program of this name.
    Run(String),
    /// Moves rows between the ranks of a group.
    Move(Move),
}

/// A collective over rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// What moves where.
    pub kind: MoveKind,
    /// The ranks that take part.
    pub group: Group,
    /// What is moved.
    pub from: Rows,
    /// What arrives.
    pub to: Rows,
}

/// Ranks that do a collective together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Axis of the mapping: `ep`, `etp`.
    pub name: String,
    /// Members, in order.
    pub ranks: Vec<u64>,
    /// Place of this rank among them.
    pub at: u64,
}

/// What a move does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveKind {
    /// The row of a token goes once to a holder of each of its experts: of `n` holders, that of token `t` and member
    /// `m` to number `(t + m) mod n`.
    AllToAll {
        /// Experts that each member holds, in the order of its local numbers.
        experts: Vec<Vec<u64>>,
    },
    /// Every member gets the rows of all, in the order of members.
    AllGather,
    /// Rows of the members are added in their order, and each gets those that it had gathered.
    ReduceScatter {
        /// The step that it undoes.
        undoes: usize,
    },
    /// Rows go back to the slots that they came from; a slot whose row stayed away gets zeros.
    AllToAllBack {
        /// The step that it undoes.
        undoes: usize,
    },
}

/// Names of the tensors of some rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// The rows: `[tokens, ..]` before an all-to-all, `[tokens, slots, ..]` behind the way back, `[n, ..]` between.
    pub rows: String,
    /// Their experts: `[tokens, slots]` before an all-to-all, `[n, 1]` behind it; none on the way back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<String>,
    /// Their factors, in the shape of `experts`, if the experts' input is weighted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
}
