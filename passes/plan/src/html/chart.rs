//! The four drawings of the report, as SVG text.

use crate::{
    cluster::{Cluster, Precision},
    error::PlanError,
    html::escape,
    layer::{Kind, Op},
    plan::{Plan, RankPlan},
    table::memory_kinds,
};
use std::fmt::Write;

const COLORS: [&str; 13] = [
    "#3b6fb6", "#e08a3c", "#5a9e5f", "#b9504b", "#8063a8", "#7a5f4d", "#cf79b4", "#777f88", "#b3a63a", "#3aa3b3",
    "#99b7dd", "#e6c199", "#4d5560",
];
/// Nodes that are drawn; the others repeat them.
const MAX_NODES: usize = 8;
/// Ranks of a node that are drawn in a line.
const PER_LINE: u64 = 8;
/// Width and height of a rank with its gaps, and the room under a line for links.
const BOX: (u64, u64) = (104, 62);
const LINKS: u64 = 26;

fn color(index: u64) -> &'static str {
    COLORS[(index % COLORS.len() as u64) as usize]
}

/// A group of ranks that is drawn as a line.
struct Group {
    name: &'static str,
    stroke: &'static str,
    ranks: Vec<u64>,
}

/// Groups of rank 0 with more than one rank.
fn first_groups(ranks: &[RankPlan]) -> Vec<Group> {
    let along = |name, stroke, same: &dyn Fn(&RankPlan) -> bool| Group {
        name,
        stroke,
        ranks: ranks.iter().filter(|r| same(r)).map(|r| r.rank).collect(),
    };
    let all = [
        along("tensor", "#3b6fb6", &|r| r.attention.cp == 0 && r.attention.dp == 0 && r.attention.pp == 0),
        along("context", "#b9504b", &|r| r.attention.tp == 0 && r.attention.dp == 0 && r.attention.pp == 0),
        along("expert", "#e08a3c", &|r| r.experts.etp == 0 && r.experts.edp == 0 && r.experts.pp == 0),
        along("pipeline", "#5a9e5f", &|r| r.attention.tp == 0 && r.attention.cp == 0 && r.attention.dp == 0),
    ];
    all.into_iter().filter(|g| g.ranks.len() > 1).collect()
}

/// Names and values of the axes that have more than one way.
fn position(axes: &[(&str, u64, u64)]) -> String {
    let shown = axes.iter().filter(|(_, ways, _)| *ways > 1).map(|(name, _, at)| format!("{name}{at}"));
    shown.collect::<Vec<_>>().join(" ")
}

/// Ranks as boxes on their nodes: fill is the expert-parallel position, border the stage, the label names both
/// mappings. The nodes drawn are those that the groups of rank 0 touch, then the first ones; lines join the ranks
/// of those groups, over NVLink inside a node and over the network between nodes.
pub(super) fn mapping(plan: &Plan, cluster: &Cluster) -> Result<String, PlanError> {
    let per_node = cluster.gpus_per_domain.clamp(1, plan.gpus.max(1));
    let ranks = (0..plan.gpus).map(|rank| plan.rank(rank)).collect::<Result<Vec<_>, _>>()?;
    let groups = first_groups(&ranks);
    let nodes_of = |g: &Group| g.ranks.iter().map(|r| r / per_node).collect::<std::collections::BTreeSet<_>>();
    let mut nodes: std::collections::BTreeSet<u64> = [0].into();
    for group in &groups {
        nodes.extend(nodes_of(group).into_iter().take(MAX_NODES / 2));
    }
    let all = plan.gpus.div_ceil(per_node);
    nodes.extend(0..if all <= MAX_NODES as u64 { all } else { MAX_NODES as u64 / 2 });
    let lines = per_node.min(plan.gpus).div_ceil(PER_LINE);
    let nodes: Vec<u64> = nodes.into_iter().take((2 * MAX_NODES / lines as usize).clamp(1, MAX_NODES)).collect();
    let columns = per_node.min(plan.gpus).min(PER_LINE);
    let tall = lines * BOX.1 + LINKS;
    let (width, height) = (80 + columns * BOX.0, nodes.len() as u64 * (tall + 12) + 6);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" width=\"{width}\" role=\"img\" aria-label=\"mapping on nodes\">"
    );
    for (line, node) in nodes.iter().enumerate() {
        let y = 4 + line as u64 * (tall + 12);
        let _ = write!(
            svg,
            "<rect x=\"68\" y=\"{y}\" width=\"{}\" height=\"{tall}\" rx=\"6\" class=\"panel\"/><text x=\"2\" y=\"{}\">node {node}</text>",
            columns * BOX.0 + 8,
            y + tall / 2
        );
    }
    let place = |rank: u64| {
        let line = nodes.iter().position(|n| *n == rank / per_node)? as u64;
        let at = rank % per_node;
        Some((74 + at % PER_LINE * BOX.0, 10 + line * (tall + 12) + at / PER_LINE * BOX.1))
    };
    let (a, e) = (&plan.attention, &plan.experts);
    for r in &ranks {
        let Some((x, y)) = place(r.rank) else { continue };
        let (at, ex) = (&r.attention, &r.experts);
        let first = position(&[("t", a.tp, at.tp), ("c", a.cp, at.cp), ("d", a.dp, at.dp), ("p", a.pp, at.pp)]);
        let second = position(&[("et", e.etp, ex.etp), ("e", e.ep, ex.ep), ("ed", e.edp, ex.edp)]);
        let _ = write!(
            svg,
            "<g><rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"56\" rx=\"4\" fill=\"{}\" fill-opacity=\"0.3\" stroke=\"{}\"/>\
             <text x=\"{}\" y=\"{}\">rank {}</text><text x=\"{}\" y=\"{}\">{first}</text><text x=\"{}\" y=\"{}\">{second}</text></g>",
            BOX.0 - 8,
            color(ex.ep),
            color(at.pp),
            x + 6,
            y + 16,
            r.rank,
            x + 6,
            y + 32,
            x + 6,
            y + 48
        );
    }
    for (index, group) in groups.iter().enumerate() {
        let drop = 60 + 6 * index as u64;
        let seen: Vec<(u64, u64)> = group.ranks.iter().filter_map(|r| place(*r)).collect();
        // A group that goes on in the next line of its node is not joined across the boxes.
        for pair in seen.windows(2).filter(|p| p[0].0 == p[1].0 || p[0].1 == p[1].1) {
            let ((x0, y0), (x1, y1)) = (pair[0], pair[1]);
            // A line down the page runs between the boxes.
            let shift = if x0 == x1 { BOX.0 - 4 } else { BOX.0 / 2 - 4 };
            let _ = write!(
                svg,
                "<path d=\"M{} {} L{} {}\" stroke=\"{}\" stroke-width=\"2.5\" fill=\"none\"><title>{} group of rank 0</title></path>",
                x0 + shift,
                y0 + drop,
                x1 + shift,
                y1 + drop,
                group.stroke,
                group.name
            );
        }
    }
    svg.push_str("</svg><p class=\"note\">");
    for group in &groups {
        let span = match nodes_of(group).len() {
            1 => format!("NVLink, {:.0} GB/s one way", cluster.gpu.nvlink_gbps),
            n => format!("{n} nodes, {:.0} GB/s per GPU between them", cluster.nic_gbps),
        };
        let (name, stroke, count) = (group.name, group.stroke, group.ranks.len());
        let _ = write!(svg, "<span style=\"color:{stroke}\">■</span> {name} group of rank 0: {count} ranks, {span}. ");
    }
    let more =
        if all > nodes.len() as u64 { format!(" {} of {all} nodes are drawn.", nodes.len()) } else { String::new() };
    let _ = write!(
        svg,
        "Positions: t tensor, c context, d data, p stage; et, e, ed the same of experts. Fill: expert-parallel position; border: stage.{more}</p>"
    );
    Ok(svg)
}

/// Ops of the commonest layer in the order in which a rank runs them, and the backward pass.
pub(super) fn layer_timeline(ops: &[(u64, Vec<Op>)]) -> String {
    let Some((count, list)) = ops.iter().max_by_key(|(count, _)| *count) else { return String::new() };
    let sum = |backward: bool| list.iter().filter(|o| o.backward == backward).map(|o| o.seconds).sum::<f64>();
    let longest = sum(false).max(sum(true)).max(1e-12);
    let mut svg =
        String::from("<svg viewBox=\"0 0 900 84\" width=\"900\" role=\"img\" aria-label=\"timeline of a layer\">");
    for (y, backward, name) in [(4, false, "forward"), (46, true, "backward")] {
        let _ = write!(svg, "<text x=\"0\" y=\"{}\">{name}</text>", y + 22);
        let mut x = 70.0;
        let run: Vec<&Op> = list.iter().filter(|o| o.backward == backward).collect();
        let ordered: Vec<&&Op> = if backward { run.iter().rev().collect() } else { run.iter().collect() };
        for op in ordered {
            let width = 820.0 * op.seconds / longest;
            let kind = Kind::ALL.iter().position(|k| *k == op.kind).unwrap_or(0) as u64;
            let name = escape(op.name);
            let _ = write!(
                svg,
                "<rect x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"34\" fill=\"{}\" stroke=\"#fff\" stroke-opacity=\"0.6\" stroke-width=\"0.5\"><title>{name}: {:.1} us</title></rect>",
                color(kind),
                1e6 * op.seconds
            );
            if width > 6.0 * name.len() as f64 + 6.0 {
                let _ = write!(svg, "<text x=\"{:.2}\" y=\"{}\" class=\"on\">{name}</text>", x + 4.0, y + 21);
            }
            x += width;
        }
    }
    format!(
        "{svg}</svg><p class=\"note\">One micro-batch in one of {count} equal layers: {:.2} ms forward, {:.2} ms backward. Colours as above.</p>",
        1e3 * sum(false),
        1e3 * sum(true)
    )
}

/// Causes in order of their place in a step, as one bar with a legend.
pub(super) fn timeline(plan: &Plan) -> String {
    let total: f64 = plan.time_ms.values().sum();
    let mut svg = String::from("<svg viewBox=\"0 0 900 44\" width=\"900\" role=\"img\" aria-label=\"timeline\">");
    let mut legend = String::from("<table class=\"compact\"><tr><th>cause</th><th>ms</th><th>share</th></tr>");
    let mut x = 0.0;
    for (index, (name, ms)) in plan.time_ms.iter().enumerate().filter(|(_, (_, ms))| **ms > 0.0) {
        let share = if total > 0.0 { ms / total } else { 0.0 };
        let name = escape(&name.replace('_', " "));
        let fill = color(index as u64);
        let _ = write!(
            svg,
            "<rect x=\"{x:.2}\" y=\"4\" width=\"{:.2}\" height=\"36\" fill=\"{fill}\"><title>{name}: {ms:.2} ms</title></rect>",
            900.0 * share
        );
        x += 900.0 * share;
        let _ = write!(
            legend,
            "<tr><td><span style=\"color:{fill}\">■</span> {name}</td><td>{ms:.2}</td><td>{:.1}%</td></tr>",
            100.0 * share
        );
    }
    svg + "</svg>" + &legend + "</table>"
}

/// Memory by kind, one bar per plan, with the limit.
pub(super) fn memory(plans: &[Plan]) -> String {
    let kinds = |p: &Plan| memory_kinds(&p.memory_gib);
    let largest = plans.iter().map(|p| p.memory_gib.total.max(p.memory_gib.limit)).fold(1.0, f64::max);
    let scale = 640.0 / largest;
    let height = plans.len() * 30 + 34;
    let mut svg = format!("<svg viewBox=\"0 0 900 {height}\" width=\"900\" role=\"img\" aria-label=\"memory\">");
    for (row, plan) in plans.iter().enumerate() {
        let y = row * 30 + 4;
        let mut x = 70.0;
        let _ = write!(svg, "<text x=\"0\" y=\"{}\">plan {}</text>", y + 16, row + 1);
        for (index, (name, gib)) in kinds(plan).into_iter().enumerate() {
            let _ = write!(
                svg,
                "<rect x=\"{x:.2}\" y=\"{y}\" width=\"{:.2}\" height=\"22\" fill=\"{}\"><title>{name}: {gib:.2} GiB</title></rect>",
                gib * scale,
                color(index as u64)
            );
            x += gib * scale;
        }
        let limit = 70.0 + plan.memory_gib.limit * scale;
        let _ = write!(
            svg,
            "<line x1=\"{limit:.2}\" x2=\"{limit:.2}\" y1=\"{y}\" y2=\"{}\" stroke=\"#b00020\" stroke-width=\"2\"/><text x=\"{:.2}\" y=\"{}\">{:.1} GiB</text>",
            y + 22,
            x.max(limit) + 6.0,
            y + 16,
            plan.memory_gib.total
        );
    }
    let y = plans.len() * 30 + 20;
    let mut x = 70;
    if let Some(plan) = plans.first() {
        for (index, (name, _)) in kinds(plan).into_iter().enumerate() {
            let _ = write!(
                svg,
                "<rect x=\"{x}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{}\"/><text x=\"{}\" y=\"{y}\">{name}</text>",
                y - 9,
                color(index as u64),
                x + 14
            );
            x += 110;
        }
    }
    svg + "</svg><p class=\"note\">The red line is the usable memory of a GPU.</p>"
}

/// Ops over arithmetic intensity, with the roof of the machine.
pub(super) fn roofline(ops: &[(u64, Vec<Op>)], cluster: &Cluster, precision: Precision) -> String {
    let (peak, hbm) = (cluster.peak_flops(precision), cluster.hbm());
    let points: Vec<&Op> =
        ops.iter().flat_map(|(_, list)| list).filter(|o| o.flops > 0.0 && o.seconds > 0.0 && o.bytes > 0.0).collect();
    // Whole decades around the points and the ridge.
    let ridge = peak / hbm;
    let decades = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
        (low.max(1e-3).log10().floor(), high.max(1e-2).log10().ceil())
    };
    let (x0, x1) = decades(&mut points.iter().map(|o| o.flops / o.bytes).chain([ridge / 10.0, ridge * 2.0]));
    let (y0, y1) = decades(&mut points.iter().map(|o| o.flops / o.seconds).chain([peak / 10.0, peak * 1.01]));
    let x_of = |intensity: f64| 60.0 + 800.0 * (intensity.max(1e-3).log10() - x0) / (x1 - x0);
    let y_of = |rate: f64| 330.0 - 310.0 * (rate.max(1.0).log10() - y0) / (y1 - y0);
    let mut svg = String::from("<svg viewBox=\"0 0 900 370\" width=\"900\" role=\"img\" aria-label=\"roofline\">");
    for decade in x0 as i64..=x1 as i64 {
        let x = x_of(10_f64.powi(decade as i32));
        let _ = write!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"20\" y2=\"330\" class=\"grid\"/><text x=\"{x:.1}\" y=\"344\" text-anchor=\"middle\">{}</text>",
            10_f64.powi(decade as i32)
        );
    }
    for decade in y0 as i64..=y1 as i64 {
        let y = y_of(10_f64.powi(decade as i32));
        let _ = write!(
            svg,
            "<line x1=\"60\" x2=\"860\" y1=\"{y:.1}\" y2=\"{y:.1}\" class=\"grid\"/><text x=\"54\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            y + 4.0,
            10_f64.powi(decade as i32 - 12)
        );
    }
    let foot = 10_f64.powf(x0).max(10_f64.powf(y0) / hbm);
    let _ = write!(
        svg,
        "<path d=\"M{:.1} {:.1} L{:.1} {:.1} L860 {:.1}\" class=\"roof\" stroke-width=\"1.5\"/>\
         <text x=\"856\" y=\"{:.1}\" text-anchor=\"end\">{:.0} TFLOP/s</text><text x=\"64\" y=\"362\">operations per byte; on the left TFLOP/s</text>",
        x_of(foot),
        y_of(foot * hbm),
        x_of(ridge),
        y_of(peak),
        y_of(peak),
        y_of(peak) - 6.0,
        peak / 1e12
    );
    for op in points {
        let rate = op.flops / op.seconds;
        let fill = color(Kind::ALL.iter().position(|k| *k == op.kind).unwrap_or(0) as u64);
        let pass = if op.backward { "backward" } else { "forward" };
        let _ = write!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{}\" fill=\"{fill}\" fill-opacity=\"0.7\"><title>{} {pass}: {:.1} TFLOP/s, {:.0} operations per byte, {:.1} us</title></circle>",
            x_of(op.flops / op.bytes),
            y_of(rate),
            if op.backward { 4 } else { 6 },
            escape(op.name),
            rate / 1e12,
            op.flops / op.bytes,
            1e6 * op.seconds
        );
    }
    let mut out = svg
        + "</svg><table><tr><th>op</th><th>layers</th><th>pass</th><th>GFLOP</th><th>MB</th><th>us</th><th>share of peak</th></tr>";
    for (count, list) in ops {
        for op in list {
            let _ = write!(
                out,
                "<tr><td>{}</td><td>{count}</td><td>{}</td><td>{:.1}</td><td>{:.1}</td><td>{:.1}</td><td>{:.0}%</td></tr>",
                escape(op.name),
                if op.backward { "backward" } else { "forward" },
                op.flops / 1e9,
                op.bytes / 1e6,
                1e6 * op.seconds,
                100.0 * op.flops / op.seconds.max(1e-12) / peak
            );
        }
    }
    out + "</table>"
}
