//! Cut a rank's graph at its collectives.
//!
//! A kernel cannot wait for another rank, so a graph with collectives becomes a chain: programs, each with its own
//! number of tokens, and the moves between them. What runs on received rows is a layer of its own whose tokens
//! are those rows, each with one expert. Ops that do not feed a collective run as late as their users do, so that
//! few values cross.

use crate::Failure;
use moec_ir::{
    DType, Dim, Graph, NodeId, Op, Part, TensorType, Type,
    ops::{
        Binary, BinaryFn, Collective, Combine, Dispatch, Experts, Input, Reduce, ReduceFn, Select, SelectRule, Shape,
    },
};
use std::collections::{BTreeMap, BTreeSet};

/// One step of a chain. Values between steps are tensors by name.
#[derive(Clone, Debug)]
pub enum Stage {
    /// A program: reads its inputs and writes its outputs by name.
    Run(Box<Graph>),
    /// A move of rows between ranks.
    Move(Move),
}

/// A collective over tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    /// What moves where.
    pub op: Collective,
    /// What is moved.
    pub from: Rows,
    /// What arrives.
    pub to: Rows,
    /// The move that a way back undoes, by its place in the chain.
    pub undoes: Option<usize>,
}

/// Names of the tensors of some rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The rows. Before an `all_to_all` those of tokens, `[tokens, ..]`; behind an `all_to_all_back` those of slots,
    /// `[tokens, slots, ..]`; between them `[n, ..]`.
    pub rows: String,
    /// Their experts: `[tokens, slots]` before an `all_to_all`, `[n, 1]` behind it, none on the way back.
    pub experts: Option<String>,
    /// Factors of the rows, in the shape of `experts`, if the experts' input is weighted.
    pub weights: Option<String>,
}

/// Why a graph cannot be cut.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CutError {
    /// A value crosses that has no form as a tensor.
    #[error("node `{node}`: {why}")]
    Crosses {
        /// The node.
        node: String,
        /// What is in the way.
        why: String,
    },
    /// A stage is not a valid graph, which is our bug.
    #[error(transparent)]
    Invalid(#[from] Failure),
}

/// Where a node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// On the rank's own tokens, behind so many rounds of collectives.
    Own(usize),
    /// On received rows, or a collective, or a dispatch that a collective does.
    Away,
}

/// Programs and moves, in order. A graph without collectives is one program.
///
/// # Errors
/// See [`CutError`].
pub fn stages(graph: &Graph) -> Result<Vec<Stage>, CutError> {
    let mut cutter = Cutter { graph, places: BTreeMap::new(), rounds: BTreeMap::new(), chain: Vec::new() };
    cutter.place();
    let last = cutter.places.values().filter_map(|p| if let Place::Own(l) = p { Some(*l) } else { None }).max();
    for level in 0..=last.unwrap_or(0) {
        cutter.own(level)?;
        let starts: Vec<NodeId> = cutter.rounds.iter().filter(|(_, l)| **l == level).map(|(id, _)| *id).collect();
        for start in starts {
            cutter.round(start)?;
        }
    }
    Ok(cutter.chain)
}

struct Cutter<'g> {
    graph: &'g Graph,
    places: BTreeMap<NodeId, Place>,
    /// `all_to_all`s, with the level whose values they move.
    rounds: BTreeMap<NodeId, usize>,
    chain: Vec<Stage>,
}

fn crosses<T>(graph: &Graph, id: NodeId, why: &str) -> Result<T, CutError> {
    Err(CutError::Crosses { node: graph.node(id).name.clone(), why: why.to_owned() })
}

/// A name for a value between programs.
fn name_of(graph: &Graph, id: NodeId, part: Part) -> String {
    if let (Op::Input(input), Part::Whole) = (&graph.node(id).op, part) {
        return input.name.clone();
    }
    let own: String = graph.node(id).name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    match part {
        Part::Whole => format!("v_{own}"),
        Part::Idx => format!("v_{own}_idx"),
        Part::Weights => format!("v_{own}_w"),
    }
}

impl Cutter<'_> {
    fn collective(&self, id: NodeId) -> Option<&Collective> {
        match &self.graph.node(id).op {
            Op::Collective(op) => Some(op),
            _ => None,
        }
    }

    /// Whether collectives do a dispatch, and nothing else needs its rows.
    fn is_moved(&self, id: NodeId) -> bool {
        let users = self.graph.users(id);
        matches!(self.graph.node(id).op, Op::Dispatch(_))
            && !users.is_empty()
            && users.iter().all(|u| self.collective(*u).is_some())
    }

    fn place(&mut self) {
        let graph = self.graph;
        // First as early as possible.
        let mut levels: BTreeMap<NodeId, usize> = BTreeMap::new();
        for id in graph.order() {
            let operands = graph.operands(id);
            let above = operands.iter().filter_map(|o| levels.get(o)).copied().max().unwrap_or(0);
            let away = operands.iter().any(|o| {
                matches!(self.collective(*o), Some(Collective::AllToAll { .. } | Collective::AllGather { .. }))
            });
            let back = matches!(self.collective(id), Some(Collective::AllToAllBack { .. }));
            levels.insert(id, above + usize::from(back));
            if matches!(self.collective(id), Some(Collective::AllToAll { .. })) {
                self.rounds.insert(id, above);
            }
            let own = !away && self.collective(id).is_none() && !self.is_moved(id);
            self.places.insert(id, if own { Place::Own(above) } else { Place::Away });
        }
        // Then as late as users and moves allow.
        for id in graph.order().into_iter().rev() {
            let Some(Place::Own(early)) = self.places.get(&id).copied() else { continue };
            if graph.is_output(id) || matches!(graph.node(id).op, Op::Input(_)) {
                continue;
            }
            let needed = graph.users(id).into_iter().map(|user| match self.places.get(&user) {
                Some(Place::Own(level)) => *level,
                Some(Place::Away) | None => levels.get(&user).copied().unwrap_or(early),
            });
            if let Some(late) = needed.min() {
                self.places.insert(id, Place::Own(late.max(early)));
            }
        }
        // Only tensors cross, so that what reads a route or its rows runs with it.
        for id in graph.order() {
            let Some(Place::Own(late)) = self.places.get(&id).copied() else { continue };
            if self.combined(id).is_some() {
                continue;
            }
            let early = graph.operands(id).iter().filter_map(|o| levels.get(o)).copied().max().unwrap_or(0);
            let with = graph.operands(id).into_iter().filter_map(|o| match (self.places.get(&o), &graph.node(o).ty) {
                (Some(Place::Own(level)), Some(Type::Route(_) | Type::Plan(_) | Type::Ragged(_))) => Some(*level),
                _ => None,
            });
            if let Some(level) = with.min().filter(|level| *level < late) {
                self.places.insert(id, Place::Own(level.max(early)));
            }
        }
    }

    /// The program on the rank's own tokens at a level.
    fn own(&mut self, level: usize) -> Result<(), CutError> {
        let graph = self.graph;
        let mut part = Graph::new(graph.name.clone());
        part.weights.clone_from(&graph.weights);
        part.batch_dependent = graph.batch_dependent;
        let mut map = BTreeMap::new();
        let here = |id: NodeId| self.places.get(&id) == Some(&Place::Own(level));
        let nodes: Vec<NodeId> =
            graph.order().into_iter().filter(|id| here(*id) && !matches!(graph.node(*id).op, Op::Input(_))).collect();
        for id in &nodes {
            let node = graph.node(*id);
            let new = if let (Op::Combine(op), Some(back)) = (&node.op, self.combined(*id)) {
                self.combine(&mut part, &mut map, op, (*id, back))?
            } else {
                let mut operands = Vec::new();
                for operand in graph.operands(*id) {
                    operands.push(self.value(&mut part, &mut map, operand)?);
                }
                part.add(node.name.clone(), node.op.clone(), &operands)
            };
            let stored = match (&node.ty, graph.is_output(*id)) {
                (Some(Type::Tensor(ty)), true) => Some(ty.dtype),
                _ => None,
            };
            // A sum over slots has the arithmetic type; results keep theirs.
            let summed = self.combined(*id).and(stored);
            part.set_round(new, node.round.or(summed));
            map.insert(*id, new);
        }
        for output in &graph.outputs {
            let early = matches!(graph.node(output.node).op, Op::Input(_)) && level == 0;
            if let (true, Some(node)) = (here(output.node), map.get(&output.node)) {
                part.output(output.name.clone(), *node, output.part);
            } else if early {
                let node = self.value(&mut part, &mut map, output.node)?;
                part.output(output.name.clone(), node, output.part);
            }
        }
        for (id, wanted) in self.needed_later(level, &nodes) {
            if let Some(node) = map.get(&id) {
                part.output(name_of(graph, id, wanted), *node, wanted);
            }
        }
        if !part.outputs.is_empty() {
            finish(&mut part)?;
            self.chain.push(Stage::Run(Box::new(part)));
        }
        Ok(())
    }

    /// Parts of values of this level that moves and later levels read.
    fn needed_later(&self, level: usize, nodes: &[NodeId]) -> BTreeSet<(NodeId, Part)> {
        let graph = self.graph;
        let mut needed = BTreeSet::new();
        for id in nodes {
            for user in graph.users(*id) {
                let own = match self.places.get(&user) {
                    Some(Place::Own(l)) => Some(*l),
                    Some(Place::Away) | None => None,
                };
                match (&graph.node(user).op, own) {
                    (_, Some(l)) if l == level => {}
                    (Op::Combine(op), Some(_)) if self.combined(user).is_some() => {
                        if op.weighted {
                            needed.insert((*id, Part::Weights));
                        }
                    }
                    (Op::Dispatch(op), None) => {
                        let operands = graph.operands(user);
                        if operands.get(1) == Some(id) {
                            needed.insert((*id, Part::Idx));
                            if op.weighted {
                                needed.insert((*id, Part::Weights));
                            }
                        }
                        if operands.first() == Some(id) {
                            needed.insert((*id, Part::Whole));
                        }
                    }
                    (_, Some(_)) => {
                        needed.insert((*id, Part::Whole));
                    }
                    (_, None) => {}
                }
            }
        }
        needed
    }

    /// The `all_to_all_back` whose rows a combine sums.
    fn combined(&self, combine: NodeId) -> Option<NodeId> {
        let rows = self.graph.operands(combine).first().copied()?;
        matches!(self.collective(rows), Some(Collective::AllToAllBack { .. })).then_some(rows)
    }

    /// An operand in the graph of a level: computed there, or passed in.
    fn value(&self, part: &mut Graph, map: &mut BTreeMap<NodeId, NodeId>, id: NodeId) -> Result<NodeId, CutError> {
        if let Some(node) = map.get(&id) {
            return Ok(*node);
        }
        let ty = match &self.graph.node(id).ty {
            Some(Type::Tensor(ty)) => ty.clone(),
            _ => return crosses(self.graph, id, "only tensors can cross a collective; give each layer its own route"),
        };
        let name = name_of(self.graph, id, Part::Whole);
        let node = part.add(name.clone(), Op::Input(Input { name, ty }), &[]);
        map.insert(id, node);
        Ok(node)
    }

    /// `combine` of rows that came back: a sum over slots.
    fn combine(
        &self,
        part: &mut Graph,
        map: &mut BTreeMap<NodeId, NodeId>,
        op: &Combine,
        (id, back): (NodeId, NodeId),
    ) -> Result<NodeId, CutError> {
        let graph = self.graph;
        let Some(Type::Ragged(rows)) = graph.node(back).ty.clone() else {
            return crosses(graph, back, "gives no rows");
        };
        if op.repeat != 1 {
            return crosses(graph, id, "routes of several tokens cannot be compiled for ranks yet");
        }
        let slots = rows.route.slots;
        let mut shape = vec![rows.route.rows.clone(), Dim::Const(slots)];
        shape.extend(rows.row.iter().copied().map(Dim::Const));
        let rank = rows.row.len();
        let name = name_of(graph, back, Part::Whole);
        let ty = TensorType { dtype: DType::F32, shape };
        let mut sum = match map.get(&back) {
            Some(node) => *node,
            None => part.add(name.clone(), Op::Input(Input { name, ty }), &[]),
        };
        map.insert(back, sum);
        if op.weighted {
            let Some(route) = graph.operands(id).get(1).copied() else { return crosses(graph, id, "has no route") };
            let name = name_of(graph, route, Part::Weights);
            let shape = vec![rows.route.rows.clone(), Dim::Const(slots)];
            let ty = TensorType { dtype: DType::F32, shape };
            let weights = match part.find(&name) {
                Some(node) => node,
                None => part.add(name.clone(), Op::Input(Input { name, ty }), &[]),
            };
            let wide = beside(part, weights, slots, rank);
            sum = part.add("", Op::Binary(Binary { function: BinaryFn::Mul, w: None, c: None }), &[sum, wide]);
        }
        Ok(part.add(
            graph.node(id).name.clone(),
            Op::Reduce(Reduce { function: ReduceFn::Sum, axis: 1, keep: false }),
            &[sum],
        ))
    }

    /// The dispatch that an `all_to_all` does, with its operands.
    fn dispatch(&self, start: NodeId) -> Option<(NodeId, Dispatch, [NodeId; 2])> {
        let dispatch = self.graph.operands(start).first().copied()?;
        let Op::Dispatch(op) = &self.graph.node(dispatch).op else { return None };
        Some((dispatch, op.clone(), <[NodeId; 2]>::try_from(self.graph.operands(dispatch)).ok()?))
    }

    /// A round: rows go out, through the experts that they came for, and back.
    fn round(&mut self, start: NodeId) -> Result<(), CutError> {
        let graph = self.graph;
        let Some((dispatch, op, [x, route])) = self.dispatch(start) else {
            return crosses(graph, start, "moves rows that no dispatch made");
        };
        if op.repeat != 1 {
            return crosses(graph, dispatch, "routes of several tokens cannot be compiled for ranks yet");
        }
        let tensors = |id: NodeId, route: NodeId| Rows {
            rows: name_of(graph, id, Part::Whole),
            experts: Some(name_of(graph, route, Part::Idx)),
            weights: op.weighted.then(|| name_of(graph, route, Part::Weights)),
        };
        let mut undo: Vec<usize> = Vec::new();
        let mut now = (start, tensors(x, route));
        while let Some(op) = self.collective(now.0).cloned() {
            undo.push(self.chain.len());
            let to = tensors(now.0, now.0);
            self.chain.push(Stage::Move(Move { op, from: now.1, to: to.clone(), undoes: None }));
            let next = graph.users(now.0).into_iter().find(|u| {
                matches!(graph.node(*u).op, Op::Experts(_))
                    || matches!(self.collective(*u), Some(Collective::AllGather { .. }))
            });
            let Some(next) = next else { return crosses(graph, now.0, "brings rows that nothing uses") };
            now = (next, to);
        }
        let Op::Experts(experts) = &graph.node(now.0).op else {
            return crosses(graph, now.0, "is not computed on received rows");
        };
        let result = name_of(graph, now.0, Part::Whole);
        let remote = remote(graph, now.0, experts, (&now.1, graph.node(dispatch).round, &result))?;
        self.chain.push(Stage::Run(Box::new(remote)));
        let (mut at, mut rows) = (now.0, result);
        for undoes in undo.into_iter().rev() {
            let next = graph.users(at).into_iter().find(|u| self.collective(*u).is_some());
            let Some((next, op)) = next.and_then(|n| Some((n, self.collective(n)?.clone()))) else {
                return crosses(graph, at, "does not go back to where its rows came from");
            };
            let to = name_of(graph, next, Part::Whole);
            let tensor = |rows: String| Rows { rows, experts: None, weights: None };
            let (from, to_rows) = (tensor(rows), tensor(to.clone()));
            self.chain.push(Stage::Move(Move { op, from, to: to_rows, undoes: Some(undoes) }));
            (at, rows) = (next, to);
        }
        Ok(())
    }
}

/// The program on received rows: a layer whose tokens are the rows, each with one expert.
fn remote(
    graph: &Graph,
    id: NodeId,
    experts: &Experts,
    (received, weighted, result): (&Rows, Option<DType>, &str),
) -> Result<Graph, CutError> {
    let Some(Type::Ragged(ty)) = graph.operands(id).first().and_then(|o| graph.node(*o).ty.clone()) else {
        return crosses(graph, id, "takes no rows");
    };
    let mut part = Graph::new(graph.name.clone());
    part.weights.clone_from(&graph.weights);
    let input = |part: &mut Graph, name: &str, dtype: DType, row: Vec<u64>| {
        let shape = [Dim::Tokens].into_iter().chain(row.into_iter().map(Dim::Const)).collect();
        let op = Op::Input(Input { name: name.to_owned(), ty: TensorType { dtype, shape } });
        part.add(name, op, &[])
    };
    let mut x = input(&mut part, &received.rows, ty.dtype, ty.row.clone());
    let ids = input(&mut part, received.experts.as_deref().unwrap_or_default(), DType::I32, vec![1]);
    if let Some(name) = &received.weights {
        let weights = input(&mut part, name, DType::F32, vec![1]);
        let wide = beside(&mut part, weights, 1, ty.row.len() - 1);
        x = part.add("", Op::Binary(Binary { function: BinaryFn::Mul, w: None, c: None }), &[x, wide]);
        part.set_round(x, weighted);
    }
    let route = Op::Select(Select::from(SelectRule::Given { experts: ty.route.experts }));
    let route = part.add("route", route, &[ids]);
    let sent = part.add("rows", Op::Dispatch(Dispatch { repeat: 1, weighted: false }), &[x, route]);
    let through = part.add(graph.node(id).name.clone(), Op::Experts(experts.clone()), &[sent]);
    part.set_round(through, graph.node(id).round);
    let y = part.add("sum", Op::Combine(Combine { repeat: 1, weighted: false }), &[through, route]);
    // Sums of shards are not rounded before they are added.
    part.set_round(y, Some(DType::F32));
    part.output(result, y, Part::Whole);
    finish(&mut part)?;
    Ok(part)
}

/// Weights `[rows, slots]` with so many axes of size 1 behind them.
fn beside(part: &mut Graph, weights: NodeId, slots: u64, axes: usize) -> NodeId {
    if axes == 0 {
        return weights;
    }
    let to = [-1, i64::try_from(slots).unwrap_or(i64::MAX)].into_iter().chain(std::iter::repeat_n(1, axes)).collect();
    part.add("", Op::Shape(Shape::Reshape { to }), &[weights])
}

/// Types the graph and forgets weights that it does not use.
fn finish(part: &mut Graph) -> Result<(), CutError> {
    let used: BTreeSet<String> = part
        .ids()
        .into_iter()
        .flat_map(|id| part.node(id).op.weights().into_iter().cloned().collect::<Vec<_>>())
        .collect();
    part.weights.retain(|name, _| used.contains(name));
    crate::run_named(part, &[], false)?;
    Ok(())
}
