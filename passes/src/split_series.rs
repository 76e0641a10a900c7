//! Compute banks in series slot by slot where one of them is no grouped product.
//!
//! Before: banks one behind the other, with modulations, constants or single neurons among them. After: every slot of
//! the route is a row of its own, and each bank has a dispatch and a combine, which `split-banks` knows how to compute;
//! the last one weighs, and the slots of a token are added. A row in between costs what it costs between grouped
//! products: as many rows are written and read.
//! Left alone: what can be computed as it stands, series with attention inside, and routes whose rows cover several
//! tokens.

use crate::{
    Changed, Pass, PassCx,
    split_banks::{bank, between, can_run, kinds, row, series},
};
use moec_ir::{
    Graph, NodeId, Op, Type,
    ops::{Combine, Dispatch, Reduce, ReduceFn, Shape},
};

pub(crate) const PASS: Pass =
    Pass { name: "split-series", about: "banks in series that are no products, slot by slot", run };

/// Banks in series.
struct Series {
    dispatch: NodeId,
    stages: Vec<NodeId>,
    combine: NodeId,
    slots: u64,
    /// Shape of a row of the last bank.
    row: Vec<u64>,
}

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if let Some(found) = find(graph, id) {
            cx.remark(graph, found.stages[0], "banks in series are computed slot by slot");
            split(graph, &found);
            changed = Changed::Yes;
        }
    }
    changed
}

fn find(graph: &Graph, combine: NodeId) -> Option<Series> {
    let (dispatch, stages) = between(graph, combine)?;
    let whole = |id: &NodeId| bank(graph, *id).is_some_and(|parts| parts.iter().all(|part| !part.is_inner()));
    if stages.len() < 2 || !stages.iter().all(whole) || series(&kinds(graph, &stages)).keys().all(can_run) {
        return None;
    }
    let Op::Dispatch(Dispatch { repeat: 1, .. }) = graph.node(dispatch).op else { return None };
    let Some(Type::Route(route)) = graph.operands(combine).get(1).and_then(|r| graph.node(*r).ty.as_ref()) else {
        return None;
    };
    let row = row(graph, *stages.last()?)?;
    Some(Series { dispatch, stages, combine, slots: route.slots, row })
}

fn split(graph: &mut Graph, found: &Series) {
    let (dispatched, combined) = (graph.operands(found.dispatch), graph.operands(found.combine));
    let (&[x, first], &[_, last]) = (&dispatched[..], &combined[..]) else { return };
    let alone = |graph: &mut Graph, route| graph.add("", Op::Shape(Shape::Reshape { to: vec![-1, 1] }), &[route]);
    let moved = alone(graph, first);
    let weighed = if first == last { moved } else { alone(graph, last) };
    let mut rows = graph.add("", Op::Shape(Shape::Repeat { n: found.slots, axis: 0 }), &[x]);
    let copy = |graph: &mut Graph, of: NodeId, op: Op, operands: &[NodeId]| {
        let (id, round) = (graph.add("", op, operands), graph.node(of).round);
        graph.set_round(id, round);
        id
    };
    for (at, stage) in found.stages.iter().enumerate() {
        let (op, bank) = (graph.node(found.dispatch).op.clone(), graph.node(*stage).op.clone());
        let dispatch = if at == 0 { op } else { Op::Dispatch(Dispatch { repeat: 1, weighted: false }) };
        let sorted = copy(graph, found.dispatch, dispatch, &[rows, moved]);
        let given = copy(graph, *stage, bank, &[sorted]);
        rows = if at + 1 == found.stages.len() {
            let combine = graph.node(found.combine).op.clone();
            graph.add("", combine, &[given, weighed])
        } else {
            graph.add("", Op::Combine(Combine { repeat: 1, weighted: false }), &[given, moved])
        };
    }
    let size = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let to = [-1, size(found.slots)].into_iter().chain(found.row.iter().map(|n| size(*n))).collect();
    let apart = graph.add("", Op::Shape(Shape::Reshape { to }), &[rows]);
    let sum = Reduce { function: ReduceFn::Sum, axis: 1, keep: false };
    let sum = copy(graph, found.combine, Op::Reduce(sum), &[apart]);
    graph.replace_uses(found.combine, sum);
    graph.remove(found.combine);
    for id in found.stages.iter().rev() {
        graph.remove(*id);
    }
    if graph.users(found.dispatch).is_empty() {
        graph.remove(found.dispatch);
    }
}
