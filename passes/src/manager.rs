//! Runs passes: verifies after each, times, dumps and collects remarks.

use crate::{PIPELINE, Pass};
use moec_ir::{Diagnostic, Graph, NodeId, Severity, codes};
use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

/// Whether a pass changed the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// The graph is another one.
    Yes,
    /// Nothing was to do.
    No,
}

/// What a pass says about its choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// Name of the pass.
    pub pass: &'static str,
    /// Name of the node that it is about.
    pub node: String,
    /// What was done, or why nothing was.
    pub text: String,
}

/// What a pass may use besides the graph.
#[derive(Debug)]
pub struct PassCx<'a> {
    pass: &'static str,
    remarks: &'a RefCell<Vec<Remark>>,
}

impl PassCx<'_> {
    /// Notes a choice about a node.
    pub fn remark(&self, graph: &Graph, node: NodeId, text: impl Into<String>) {
        let node = graph.node(node).name.clone();
        self.remarks.borrow_mut().push(Remark { pass: self.pass, node, text: text.into() });
    }
}

/// The graph around a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// Name of the pass.
    pub pass: &'static str,
    /// IR text before it.
    pub before: String,
    /// IR text after it.
    pub after: String,
}

/// Time that a pass took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Name of the pass.
    pub pass: &'static str,
    /// Wall-clock time, with verification.
    pub time: Duration,
}

/// What running passes gave besides the graph.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Choices, in order.
    pub remarks: Vec<Remark>,
    /// Texts around each pass, if they were asked for.
    pub dumps: Vec<Dump>,
    /// Time per pass.
    pub timings: Vec<Timing>,
}

/// A pass left a graph that is not valid: a bug of the pass, or a graph that was not valid before.
#[derive(Clone, Debug, thiserror::Error)]
#[error("after {pass}: {}", .findings.iter().map(|d| d.message.as_str()).collect::<Vec<_>>().join("; "))]
pub struct Failure {
    /// Name of the pass, or `input`.
    pub pass: &'static str,
    /// What the verifier found.
    pub findings: Vec<Diagnostic>,
}

fn check(graph: &mut Graph, pass: &'static str) -> Result<(), Failure> {
    graph.infer().map_err(|findings| Failure { pass, findings })?;
    // The factor of a film expert meets weighted rows: there, and there alone, weights rightly count twice.
    let wrong = |d: &Diagnostic| d.severity == Severity::Error && (pass == "input" || d.code != codes::WEIGHTED_TWICE);
    let findings: Vec<_> = moec_ir::verify(graph).into_iter().filter(wrong).collect();
    if findings.is_empty() { Ok(()) } else { Err(Failure { pass, findings }) }
}

/// Runs the whole pipeline.
///
/// # Errors
/// When the graph is not valid, before or after a pass.
pub fn run(graph: &mut Graph, dump: bool) -> Result<Outcome, Failure> {
    run_passes(graph, PIPELINE, dump)
}

/// Runs passes by name.
///
/// # Errors
/// As [`run`]; `Ok(None)` when there is no pass of a name.
pub fn run_named(graph: &mut Graph, names: &[&str], dump: bool) -> Result<Option<Outcome>, Failure> {
    let passes: Option<Vec<Pass>> = names.iter().map(|n| PIPELINE.iter().find(|p| p.name == *n).copied()).collect();
    passes.map(|passes| run_passes(graph, &passes, dump)).transpose()
}

fn run_passes(graph: &mut Graph, passes: &[Pass], dump: bool) -> Result<Outcome, Failure> {
    let remarks = RefCell::default();
    let mut outcome = Outcome::default();
    check(graph, "input")?;
    for pass in passes {
        let start = Instant::now();
        let before = dump.then(|| moec_ir::print(graph));
        (pass.run)(graph, &PassCx { pass: pass.name, remarks: &remarks });
        check(graph, pass.name)?;
        outcome.timings.push(Timing { pass: pass.name, time: start.elapsed() });
        if let Some(before) = before {
            outcome.dumps.push(Dump { pass: pass.name, before, after: moec_ir::print(graph) });
        }
    }
    outcome.remarks = remarks.into_inner();
    Ok(outcome)
}
