//! The pipeline of a step: what every stage works on, and when it waits.

use crate::{
    choice::Schedule,
    plan::Plan,
    schedule::{Block, Pass, blocks},
};
use std::fmt::Write;

/// Blocks that are drawn, about.
const MAX_BLOCKS: usize = 2000;
/// Stages that are drawn; of more, the first and the last ones.
const MAX_STAGES: usize = 16;
/// Height of a stage, width of the drawing, and where time begins.
const ROW: usize = 22;
const WIDTH: f64 = 900.0;
const LEFT: f64 = 64.0;

const FORWARD: &str = "#3b6fb6";
const BACKWARD: &str = "#e08a3c";
const WEIGHT: &str = "#5a9e5f";

/// Micro-batches that are drawn: three rounds of the stages, fewer where that is too much to read.
fn drawn_micro_batches(plan: &Plan) -> u64 {
    let (stages, vpp) = (plan.attention.pp, plan.vpp);
    let rows = stages.min(MAX_STAGES as u64);
    let rounds = (1..=3).rev().find(|r| (3 * rows * vpp * stages * r) as usize <= MAX_BLOCKS).unwrap_or(1);
    plan.micro_batches.min(stages * rounds)
}

fn name(schedule: Schedule, vpp: u64) -> &'static str {
    match schedule {
        Schedule::OneForwardOneBackward if vpp > 1 => "Interleaved 1F1B",
        Schedule::OneForwardOneBackward => "1F1B",
        Schedule::ZeroBubble => "ZB1P",
        Schedule::DualPipe => "DualPipe",
    }
}

/// One block; later chunks of a rank, or the other direction, are fainter.
fn block(b: &Block, y: usize, scale: f64, chunks: usize) -> String {
    let (fill, pass) = match b.pass {
        Pass::Forward => (FORWARD, "forward"),
        Pass::Backward => (BACKWARD, "backward"),
        Pass::Weight => (WEIGHT, "weight gradient"),
    };
    let (x, width) = (LEFT + scale * b.start, scale * (b.end - b.start));
    let opacity = 1.0 - 0.5 * b.chunk as f64 / chunks.max(1) as f64;
    let mut svg = format!(
        "<rect class=\"block\" x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"{}\" fill=\"{fill}\" fill-opacity=\"{opacity:.2}\"><title>{pass} of micro-batch {}{}: {:.2} to {:.2} ms</title></rect>",
        ROW - 4,
        b.micro_batch,
        if chunks > 1 { format!(", chunk {}", b.chunk) } else { String::new() },
        1e3 * b.start,
        1e3 * b.end
    );
    if width > 14.0 {
        let _ = write!(svg, "<text class=\"on\" x=\"{:.2}\" y=\"{}\">{}</text>", x + 3.0, y + 13, b.micro_batch);
    }
    svg
}

/// Stages of the plan from top to bottom, time from left to right.
pub(super) fn draw(plan: &Plan) -> String {
    let stages = plan.stage_seconds.len();
    let micro_batches = drawn_micro_batches(plan);
    let all = blocks(plan.schedule, &plan.stage_seconds, plan.vpp, micro_batches);
    let end = all.iter().map(|b| b.end).fold(0.0, f64::max).max(1e-12);
    let scale = (WIDTH - LEFT - 4.0) / end;
    let shown: Vec<usize> =
        (0..stages).filter(|s| stages <= MAX_STAGES || *s < MAX_STAGES / 2 || *s + MAX_STAGES / 2 >= stages).collect();
    let height = shown.len() * ROW + 4;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" role=\"img\" aria-label=\"pipeline schedule\">"
    );
    let chunks = match plan.schedule {
        Schedule::OneForwardOneBackward => plan.vpp as usize,
        Schedule::ZeroBubble => 1,
        Schedule::DualPipe => 2,
    };
    let mut busy = Vec::new();
    for (row, stage) in shown.iter().enumerate() {
        let y = row * ROW + 4;
        let _ = write!(
            svg,
            "<text x=\"0\" y=\"{}\">stage {stage}</text><rect class=\"panel\" x=\"{LEFT}\" y=\"{y}\" width=\"{:.2}\" height=\"{}\"/>",
            y + 13,
            WIDTH - LEFT - 4.0,
            ROW - 4
        );
        let own = all.iter().filter(|b| b.rank == *stage);
        own.clone().for_each(|b| svg.push_str(&block(b, y, scale, chunks)));
        busy.push(own.map(|b| b.end - b.start).sum::<f64>());
    }
    let idle = |busy: f64| 100.0 * (1.0 - busy / end).max(0.0);
    let most = busy.iter().copied().fold(0.0, f64::max);
    let least = busy.iter().copied().fold(f64::INFINITY, f64::min);
    let (ms, n) = (1e3 * end, plan.micro_batches);
    let _ = write!(
        svg,
        "</svg><p class=\"note\">{}: <span style=\"color:{FORWARD}\">■</span> forward, <span style=\"color:{BACKWARD}\">■</span> backward",
        name(plan.schedule, plan.vpp)
    );
    if plan.schedule != Schedule::OneForwardOneBackward {
        let _ = write!(svg, " of inputs, <span style=\"color:{WEIGHT}\">■</span> gradients of weights");
    }
    let _ = write!(
        svg,
        ", grey: idle. Numbers are micro-batches{}. ",
        match plan.schedule {
            Schedule::OneForwardOneBackward if plan.vpp > 1 => "; the fainter, the later the chunk",
            Schedule::OneForwardOneBackward | Schedule::ZeroBubble => "",
            Schedule::DualPipe => "; the fainter ones enter at the last stage",
        }
    );
    if shown.len() < stages {
        let _ = write!(svg, "The first and last {} of {stages} stages are drawn. ", MAX_STAGES / 2);
    }
    if micro_batches < n {
        let _ = write!(
            svg,
            "A step of {micro_batches} of the {n} micro-batches is drawn, so that idle time looks larger. "
        );
    }
    let _ = write!(
        svg,
        "{ms:.1} ms; a stage idles {:.1}% to {:.1}% of it. Transfers and gradient traffic are not drawn.</p>",
        idle(most),
        idle(least)
    );
    svg
}
