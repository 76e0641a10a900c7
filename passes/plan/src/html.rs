//! One self-contained page about a set of plans: no script, no network, inline SVG.
//!
//! It shows the winner's mapping on nodes and links, the timeline of a step, memory
//! per kind for every plan, and each op on the roofline.

mod chart;
mod pipeline;

use crate::{
    choice::{Objective, Request},
    cluster::Cluster,
    error::PlanError,
    model::ModelShape,
    plan::{PlanReport, operations},
    table::{columns, legend, verdict},
};
use std::fmt::Write;

/// Colours are variables, so that a dark page needs only other values.
const STYLE: &str = ":root{color-scheme:light dark;--page:#fff;--ink:#1c2733;--soft:#5b6b7b;--rule:#dde3ea;--panel:#f3f6f9}\
@media(prefers-color-scheme:dark){:root{--page:#14191f;--ink:#e3e9ef;--soft:#9fadbb;--rule:#38434f;--panel:#1e262e}}\
body{font:14px/1.45 system-ui,sans-serif;background:var(--page);color:var(--ink);max-width:70em;margin:2em auto;padding:0 1em}\
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse}td,th{padding:.25em .7em;text-align:right;\
border-bottom:1px solid var(--rule);white-space:nowrap}td:first-child,th:first-child{text-align:left}\
.why{text-align:left;white-space:normal}svg{max-width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--ink)}\
svg .on{fill:#fff}svg .panel{fill:var(--panel);stroke:var(--rule)}svg .grid{stroke:var(--rule)}svg .roof{stroke:var(--ink);fill:none}\
.note{color:var(--soft)}";

/// Text made safe for HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Renders a report.
///
/// # Errors
/// `E0404` when the built-in calibration is damaged; `E0402` for plans changed by hand.
pub fn html(
    report: &PlanReport,
    model: &ModelShape,
    cluster: &Cluster,
    request: &Request,
) -> Result<String, PlanError> {
    let mut page = String::new();
    let title = escape(&format!("{} on {} x {}", report.model, report.gpus, report.cluster));
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
    );
    let _ = write!(
        page,
        "<p class=\"note\">{} choices evaluated, {} branches skipped by a bound.</p>",
        report.evaluated, report.pruned
    );
    page.push_str(&table(report));
    if let Some(tie) = &report.tie {
        let _ = write!(page, "<p>Plan 1: {}.</p>", escape(tie));
    }
    if let Some(best) = report.plans.first() {
        let _ = write!(page, "<h2>Mapping of the best plan</h2>{}", chart::mapping(best, cluster)?);
        let _ = write!(page, "<h2>Timeline of a step</h2>{}", chart::timeline(best));
        if best.attention.pp > 1 {
            let _ = write!(page, "<h2>Pipeline</h2>{}", pipeline::draw(best));
        }
        let _ = write!(page, "<h2>Memory per GPU</h2>{}", chart::memory(&report.plans));
        if best.objective == Objective::Train {
            let ops = operations(model, cluster, request, best)?;
            let _ = write!(page, "<h2>Timeline of a layer</h2>{}", chart::layer_timeline(&ops));
            let _ = write!(page, "<h2>Roofline</h2>{}", chart::roofline(&ops, cluster, request.precision));
        }
    }
    if !report.sensitivity.is_empty() {
        page.push_str("<h2>What else it could be</h2><ul>");
        for s in &report.sensitivity {
            let _ = write!(page, "<li>{}</li>", escape(&s.text));
        }
        page.push_str("</ul>");
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

fn table(report: &PlanReport) -> String {
    let Some(best) = report.plans.first() else { return String::new() };
    let columns = columns(best.objective);
    let heads: String = columns.iter().map(|c| format!("<th>{}</th>", escape(c.head))).collect();
    let mut out = format!("<table><tr><th>plan</th>{heads}<th class=\"why\">why not</th></tr>");
    for (index, plan) in report.plans.iter().enumerate() {
        let cells: String = columns.iter().map(|c| format!("<td>{}</td>", escape(&(c.cell)(plan)))).collect();
        let _ = write!(out, "<tr><td>{}</td>{cells}<td class=\"why\">{}</td></tr>", index + 1, escape(verdict(plan)));
    }
    out + &format!("</table><p class=\"note\">{}</p>", escape(legend(best.objective)))
}
