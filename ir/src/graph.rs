//! The graph: nodes with one value each, over petgraph.

use crate::{DType, Op, Type, Weight, WeightName};
use indexmap::{IndexMap, IndexSet};
use petgraph::{Direction, stable_graph::NodeIndex, stable_graph::StableDiGraph, visit::EdgeRef};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

/// A node, which is also the value that it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// Position in the graph's storage; stable while the node lives.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
    fn raw(self) -> NodeIndex<u32> {
        NodeIndex::new(self.0 as usize)
    }
}

/// An operation in a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// Name in the user's file or IR text, without `%`. Names are unique in a graph.
    pub name: String,
    /// Type that the stored value is rounded to, where the model rounds between ops.
    /// `None`: the value stays in the arithmetic type (f32).
    pub round: Option<DType>,
    /// Type of the value, set by [`Graph::infer`].
    pub ty: Option<Type>,
}

/// Which part of a value an output exposes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The value itself (a tensor).
    Whole,
    /// Expert ids of a route, `[rows, slots]` i32.
    Idx,
    /// Weights of a route, `[rows, slots]` f32.
    Weights,
}

/// A named result.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Name in the interface.
    pub name: String,
    /// The value.
    pub node: NodeId,
    /// Which part of it.
    pub part: Part,
}

/// One layer, or a chain of layers: a graph of ops with weights by name.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Name of the graph; a C identifier.
    pub name: String,
    /// Weights by name, in order of first use.
    pub weights: IndexMap<WeightName, Weight>,
    /// Results, in the order of the interface.
    pub outputs: Vec<Output>,
    /// Whether results may depend on the other rows of the batch.
    pub batch_dependent: bool,
    dag: StableDiGraph<Node, u32>,
    /// Names of all nodes; absent after a node was handed out to change, made again when needed.
    names: Option<Names>,
}

/// Names in use, and where to go on when a name is asked for again.
#[derive(Clone, Debug, Default)]
struct Names {
    taken: IndexSet<String>,
    next: BTreeMap<String, u64>,
}

impl PartialEq for Graph {
    fn eq(&self, other: &Self) -> bool {
        let rank =
            |g: &Self| -> IndexMap<NodeId, usize> { g.order().into_iter().enumerate().map(|(i, n)| (n, i)).collect() };
        let (ranks, others) = (rank(self), rank(other));
        let place = |ranks: &IndexMap<NodeId, usize>, n: NodeId| ranks.get(&n).copied();
        let nodes_equal = self.len() == other.len()
            && ranks.len() == others.len()
            && ranks.keys().zip(others.keys()).all(|(a, b)| {
                self.node(*a) == other.node(*b)
                    && self.operands(*a).into_iter().map(|n| place(&ranks, n)).collect::<Vec<_>>()
                        == other.operands(*b).into_iter().map(|n| place(&others, n)).collect::<Vec<_>>()
            });
        let outputs_equal =
            self.outputs.len() == other.outputs.len()
                && self.outputs.iter().zip(&other.outputs).all(|(a, b)| {
                    a.name == b.name && a.part == b.part && place(&ranks, a.node) == place(&others, b.node)
                });
        self.name == other.name
            && self.weights == other.weights
            && self.batch_dependent == other.batch_dependent
            && nodes_equal
            && outputs_equal
    }
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Adds a node after its operands. A taken name gets a number appended.
    pub fn add(&mut self, name: impl Into<String>, op: Op, operands: &[NodeId]) -> NodeId {
        let name = self.free_name(name.into());
        let node = self.dag.add_node(Node { op, name, round: None, ty: None });
        let id = NodeId(u32::try_from(node.index()).unwrap_or(u32::MAX));
        for (i, operand) in operands.iter().enumerate() {
            self.dag.add_edge(operand.raw(), node, u32::try_from(i).unwrap_or(u32::MAX));
        }
        id
    }

    /// The name, with a number appended when it is taken.
    fn free_name(&mut self, name: String) -> String {
        let dag = &self.dag;
        let names = self.names.get_or_insert_with(|| Names {
            taken: dag.node_weights().map(|n| n.name.clone()).collect(),
            next: BTreeMap::new(),
        });
        let name = if !name.is_empty() && !names.taken.contains(&name) {
            name
        } else {
            let stem = if name.is_empty() { "v".to_owned() } else { name };
            let next = names.next.entry(stem.clone()).or_insert(1);
            while names.taken.contains(&format!("{stem}_{next}")) {
                *next += 1;
            }
            format!("{stem}_{next}")
        };
        names.taken.insert(name.clone());
        name
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.dag.node_count()
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Declares a result.
    pub fn output(&mut self, name: impl Into<String>, node: NodeId, part: Part) {
        self.outputs.push(Output { name: name.into(), node, part });
    }

    /// The node behind an id of this graph.
    ///
    /// # Panics
    /// When the node was removed or belongs to another graph, which is a bug of the caller.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.dag[id.raw()]
    }

    /// The node behind an id, to change.
    ///
    /// # Panics
    /// As [`Graph::node`].
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.names = None;
        &mut self.dag[id.raw()]
    }

    /// The operation of a node, to change without its name.
    pub(crate) fn op_mut(&mut self, id: NodeId) -> &mut Op {
        &mut self.dag[id.raw()].op
    }

    pub(crate) fn set_type(&mut self, id: NodeId, ty: Option<Type>) {
        self.dag[id.raw()].ty = ty;
    }

    /// Where the stored value is rounded to.
    pub fn set_round(&mut self, id: NodeId, round: Option<DType>) {
        self.dag[id.raw()].round = round;
    }

    /// Takes the name away until [`Graph::rename`] gives one, so that other nodes may have it.
    pub(crate) fn unname(&mut self, id: NodeId) {
        let old = std::mem::take(&mut self.dag[id.raw()].name);
        if let Some(names) = &mut self.names {
            names.taken.swap_remove(&old);
        }
    }

    /// Names a node; a taken name gets a number appended.
    pub fn rename(&mut self, id: NodeId, name: impl Into<String>) {
        self.unname(id);
        let name = self.free_name(name.into());
        self.dag[id.raw()].name = name;
    }

    /// Whether the node is still part of the graph.
    pub fn contains(&self, id: NodeId) -> bool {
        self.dag.contains_node(id.raw())
    }

    /// Operands of a node, in order.
    pub fn operands(&self, id: NodeId) -> Vec<NodeId> {
        let mut edges: Vec<(u32, NodeId)> = self
            .dag
            .edges_directed(id.raw(), Direction::Incoming)
            .map(|e| (*e.weight(), NodeId(u32::try_from(e.source().index()).unwrap_or(u32::MAX))))
            .collect();
        edges.sort_unstable();
        edges.into_iter().map(|(_, n)| n).collect()
    }

    /// Users of a node, in order of creation; a node that uses the value twice appears twice.
    pub fn users(&self, id: NodeId) -> Vec<NodeId> {
        let mut users: Vec<NodeId> = self
            .dag
            .edges_directed(id.raw(), Direction::Outgoing)
            .map(|e| NodeId(u32::try_from(e.target().index()).unwrap_or(u32::MAX)))
            .collect();
        users.sort_unstable();
        users
    }

    /// Whether the value is a result of the graph.
    pub fn is_output(&self, id: NodeId) -> bool {
        self.outputs.iter().any(|o| o.node == id)
    }

    /// All nodes, in the order in which they were added.
    pub fn ids(&self) -> Vec<NodeId> {
        self.dag.node_indices().map(|n| NodeId(u32::try_from(n.index()).unwrap_or(u32::MAX))).collect()
    }

    /// All nodes, operands before users, otherwise in the order of creation.
    /// Nodes on a cycle are left out, so a short order means a cycle.
    pub fn order(&self) -> Vec<NodeId> {
        let bound = self.dag.node_indices().next_back().map_or(0, |n| n.index() + 1);
        let mut waiting = vec![0usize; bound];
        let mut ready = BinaryHeap::new();
        for node in self.dag.node_indices() {
            let operands = self.dag.edges_directed(node, Direction::Incoming).count();
            waiting[node.index()] = operands;
            if operands == 0 {
                ready.push(Reverse(node.index()));
            }
        }
        let mut order = Vec::with_capacity(self.dag.node_count());
        while let Some(Reverse(index)) = ready.pop() {
            order.push(NodeId(u32::try_from(index).unwrap_or(u32::MAX)));
            for edge in self.dag.edges_directed(NodeIndex::new(index), Direction::Outgoing) {
                let user = edge.target().index();
                waiting[user] -= 1;
                if waiting[user] == 0 {
                    ready.push(Reverse(user));
                }
            }
        }
        order
    }

    /// Inputs, in the order of the interface.
    pub fn inputs(&self) -> Vec<NodeId> {
        self.ids().into_iter().filter(|n| matches!(self.node(*n).op, Op::Input(_))).collect()
    }

    /// The node of this name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.ids().into_iter().find(|n| self.node(*n).name == name)
    }

    /// Lets users of `old`, and the outputs, use `new` instead.
    pub fn replace_uses(&mut self, old: NodeId, new: NodeId) {
        let edges: Vec<_> = self
            .dag
            .edges_directed(old.raw(), Direction::Outgoing)
            .map(|e| (e.id(), e.target(), *e.weight()))
            .collect();
        for (edge, target, position) in edges {
            if target != new.raw() {
                self.dag.remove_edge(edge);
                self.dag.add_edge(new.raw(), target, position);
            }
        }
        for output in &mut self.outputs {
            if output.node == old {
                output.node = new;
            }
        }
    }

    /// Removes a node without users; a node that is still used stays.
    pub fn remove(&mut self, id: NodeId) {
        if self.users(id).is_empty() && !self.is_output(id) {
            self.names = None;
            self.dag.remove_node(id.raw());
        }
    }
}
