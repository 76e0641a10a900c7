//! Plan dispatches: counts, offsets and gather map of a route in one kernel.
//!
//! Before: `dispatch` copies rows. After: a `kernel.plan` sorts the route by expert, and the
//! product that follows gathers its rows. No row is padded, no empty expert takes space.
//! Left alone: dispatches to simple experts, which a combine computes in place.

use crate::{Changed, Pass, PassCx, region};
use moec_ir::{
    Graph, NodeId, Op, Type,
    ops::{KernelKind, Plan},
};

pub(crate) const PASS: Pass =
    Pass { name: "plan-dispatch", about: "sort routes by expert once, without moving data", run };

fn run(graph: &mut Graph, cx: &PassCx<'_>) -> Changed {
    let mut changed = Changed::No;
    for id in graph.order() {
        if needs_plan(graph, id) {
            plan(graph, id, cx);
            changed = Changed::Yes;
        }
    }
    changed
}

fn needs_plan(graph: &Graph, id: NodeId) -> bool {
    let moves = graph.users(id).iter().any(|user| match &graph.node(*user).op {
        Op::Experts(op) => op.bank.iter().any(|p| !region::is_simple(&p.kind)),
        _ => true,
    });
    let routed = graph.operands(id).get(1).and_then(|r| graph.node(*r).ty.as_ref());
    matches!(graph.node(id).op, Op::Dispatch(_)) && moves && matches!(routed, Some(Type::Route(_)))
}

fn plan(graph: &mut Graph, id: NodeId, cx: &PassCx<'_>) {
    let Op::Dispatch(dispatch) = graph.node(id).op.clone() else { return };
    let [x, route] = graph.operands(id)[..] else { return };
    let plan = graph.add("", Op::Plan(Plan { repeat: dispatch.repeat }), &[route]);
    let planned = graph.add("", Op::Dispatch(dispatch), &[x, plan]);
    let round = graph.node(id).round;
    graph.set_round(planned, round);
    graph.replace_uses(id, planned);
    graph.remove(id);
    match graph.outline(&[plan], KernelKind::Plan, "plan") {
        Ok(kernel) => cx.remark(graph, kernel, "rows are gathered by the first product, none is padded"),
        Err(error) => cx.remark(graph, planned, format!("not planned: {error}")),
    }
}
