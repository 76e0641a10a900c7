//! The four drawings of the report, as SVG text.

use crate::{
    cluster::{Cluster, Precision},
    error::PlanError,
    html::escape,
    layer::{Kind, Op},
    plan::Plan,
};
use std::fmt::Write;

const COLORS: [&str; 12] = [
    "#3b6fb6", "#e08a3c", "#5a9e5f", "#b9504b", "#8063a8", "#7a5f4d", "#cf79b4", "#777f88", "#b3a63a", "#3aa3b3",
    "#99b7dd", "#e6c199",
];
/// Ranks that are drawn; larger jobs repeat the pattern.
const MAX_DRAWN: u64 = 64;

fn color(index: u64) -> &'static str {
    COLORS[(index % COLORS.len() as u64) as usize]
}

/// Ranks as boxes on their nodes: fill is the expert-parallel position, the label names both mappings,
/// and lines join the ranks of the first groups: TP inside, EP below, PP between nodes.
pub(super) fn mapping(plan: &Plan, cluster: &Cluster) -> Result<String, PlanError> {
    let per_node = cluster.gpus_per_domain.clamp(1, 16);
    let drawn = plan.gpus.min(MAX_DRAWN);
    let nodes = drawn.div_ceil(per_node);
    let (width, height) = (60 + per_node * 78, nodes * 96 + 20);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" width=\"{width}\" role=\"img\" aria-label=\"mapping on nodes\">"
    );
    let place = |rank: u64| (50 + rank % per_node * 78, 10 + rank / per_node * 96);
    for node in 0..nodes {
        let _ = write!(
            svg,
            "<rect x=\"42\" y=\"{}\" width=\"{}\" height=\"84\" rx=\"6\" fill=\"#f3f6f9\" stroke=\"#c8d2dc\"/><text x=\"2\" y=\"{}\">node {node}</text>",
            4 + node * 96,
            per_node * 78 + 6,
            46 + node * 96
        );
    }
    for rank in 0..drawn {
        let r = plan.rank(rank)?;
        let (x, y) = place(rank);
        let _ = write!(
            svg,
            "<g><rect x=\"{x}\" y=\"{y}\" width=\"70\" height=\"56\" rx=\"4\" fill=\"{}\" fill-opacity=\"0.3\" stroke=\"{}\"/>\
             <text x=\"{}\" y=\"{}\">rank {rank}</text><text x=\"{}\" y=\"{}\">t{} c{} d{} p{}</text><text x=\"{}\" y=\"{}\">et{} e{} ed{}</text></g>",
            color(r.experts.ep),
            color(r.attention.pp),
            x + 5,
            y + 16,
            x + 5,
            y + 32,
            r.attention.tp,
            r.attention.cp,
            r.attention.dp,
            r.attention.pp,
            x + 5,
            y + 48,
            r.experts.etp,
            r.experts.ep,
            r.experts.edp
        );
    }
    let mut link = |ranks: &[u64], drop: u64, stroke: &str, name: &str| {
        for pair in ranks.windows(2).filter(|p| p[0] < drawn && p[1] < drawn) {
            let ((x0, y0), (x1, y1)) = (place(pair[0]), place(pair[1]));
            let _ = write!(
                svg,
                "<path d=\"M{} {} L{} {}\" stroke=\"{stroke}\" stroke-width=\"2\" fill=\"none\"><title>{name}</title></path>",
                x0 + 35,
                y0 + drop,
                x1 + 35,
                y1 + drop
            );
        }
    };
    let along = |same: &dyn Fn(&crate::plan::RankPlan) -> bool| -> Result<Vec<u64>, PlanError> {
        let ranks = (0..drawn).map(|rank| plan.rank(rank)).collect::<Result<Vec<_>, _>>()?;
        Ok(ranks.iter().filter(|r| same(r)).map(|r| r.rank).collect())
    };
    let tp = along(&|r| r.attention.cp == 0 && r.attention.dp == 0 && r.attention.pp == 0)?;
    let ep = along(&|r| r.experts.etp == 0 && r.experts.edp == 0 && r.experts.pp == 0)?;
    let pp = along(&|r| r.attention.tp == 0 && r.attention.cp == 0 && r.attention.dp == 0)?;
    link(&tp, 62, "#3b6fb6", "first tensor-parallel group");
    link(&ep, 68, "#e08a3c", "first expert-parallel group");
    link(&pp, 74, "#5a9e5f", "first pipeline group");
    svg.push_str("</svg>");
    let more = if plan.gpus > drawn { format!("; the pattern repeats over {} GPUs", plan.gpus) } else { String::new() };
    let _ = write!(
        svg,
        "<p class=\"note\">Positions: t tensor, c context, d data, p pipeline; et, e, ed the same for experts. Fill: expert-parallel position, border: \
         stage. Lines: first tensor (blue), expert (orange) and pipeline (green) group. Inside a node: NVLink {:.0} GB/s one way; between nodes {:.0} GB/s per GPU{more}.</p>",
        cluster.gpu.nvlink_gbps, cluster.nic_gbps
    );
    Ok(svg)
}

/// Causes in order of their place in a step, as one bar with a legend.
pub(super) fn timeline(plan: &Plan) -> String {
    let total: f64 = plan.time_ms.values().sum();
    let mut svg = String::from("<svg viewBox=\"0 0 900 44\" width=\"900\" role=\"img\" aria-label=\"timeline\">");
    let mut legend = String::from("<table><tr><th>cause</th><th>ms</th><th>share</th></tr>");
    let mut x = 0.0;
    for (index, (name, ms)) in plan.time_ms.iter().enumerate() {
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
    let kinds = |p: &Plan| {
        let m = &p.memory_gib;
        [
            ("weights", m.weights),
            ("gradients", m.gradients),
            ("optimizer", m.optimizer),
            ("activations", m.activations),
            ("kv cache", m.kv_cache),
            ("buffers", m.buffers),
            ("fragmentation", m.fragmentation),
        ]
    };
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
            x + 6.0,
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
    let x_of = |intensity: f64| 60.0 + 800.0 * ((intensity.max(0.1).log10() + 1.0) / 6.0).clamp(0.0, 1.0);
    let y_of = |rate: f64| 330.0 - 300.0 * ((rate / peak).max(1e-4).log10() / 4.0 + 1.0).clamp(0.0, 1.02);
    let mut svg = String::from("<svg viewBox=\"0 0 900 370\" width=\"900\" role=\"img\" aria-label=\"roofline\">");
    let ridge = peak / hbm;
    let _ = write!(
        svg,
        "<path d=\"M{:.1} {:.1} L{:.1} {:.1} L860 {:.1}\" stroke=\"#1c2733\" fill=\"none\" stroke-width=\"1.5\"/>\
         <text x=\"640\" y=\"{:.1}\">{:.0} TFLOP/s</text><text x=\"64\" y=\"362\">operations per byte, 0.1 to 100000 (logarithmic)</text>",
        x_of(0.1),
        y_of(0.1 * hbm),
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
