//! One self-contained page about a placement: load per GPU before and after, layer by layer. No script, no network.

use crate::layout::{Replicated, max_over_mean};
use crate::loads::Loads;
use std::fmt::Write;

/// Layers that get a chart of their own, busiest first.
const CHARTS: usize = 16;

const STYLE: &str = "body{font:14px/1.45 system-ui,sans-serif;color:#1c2733;max-width:64em;margin:2em auto;padding:0 1em}\
h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .3em}svg{max-width:100%;height:auto}\
svg text{font:11px system-ui,sans-serif;fill:#1c2733}.note{color:#5b6b7b}.before{fill:#b9c3cd}.after{fill:#3b6fb6}\
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}";

/// Loads of the GPUs when experts lie in order, without copies: equal runs of consecutive experts.
fn in_order(load: &[f64], gpus: usize) -> Vec<f64> {
    (0..gpus).map(|g| load[load.len() * g / gpus..load.len() * (g + 1) / gpus].iter().sum()).collect()
}

/// The page for a placement of `loads`.
pub fn html(loads: &Loads, placed: &Replicated) -> String {
    let gpus = placed.gpu_load.first().map_or(0, Vec::len).max(1);
    let before: Vec<Vec<f64>> = loads.layers().iter().map(|layer| in_order(layer, gpus)).collect();
    let worst = |all: &[Vec<f64>]| all.iter().map(|layer| max_over_mean(layer)).fold(1.0, f64::max);
    let slots = placed.phy2log.first().map_or(0, Vec::len);
    let title = format!("{} experts in {slots} slots on {gpus} GPUs", loads.experts());
    // Writing to a string cannot fail.
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head>\
         <body><h1>{title}</h1><p>Busiest GPU over the mean, worst of {} layers: <b>{:.3}</b>, {:.3} with experts in order and \
         no copies.<br><span class=\"key\" style=\"background:#b9c3cd\"></span>before<span class=\"key\" \
         style=\"background:#3b6fb6\"></span>after<span class=\"note\"> (the line is the mean)</span></p>",
        loads.layers().len(),
        worst(&placed.gpu_load),
        worst(&before)
    );
    if before.len() > 1 {
        let ratios = |all: &[Vec<f64>]| all.iter().map(|layer| max_over_mean(layer)).collect::<Vec<f64>>();
        let _ = write!(
            page,
            "<h2>Busiest over mean, by layer</h2>{}",
            bars(&ratios(&before), &ratios(&placed.gpu_load), 1.0)
        );
    }
    let mut order: Vec<usize> = (0..before.len()).collect();
    order.sort_by(|a, b| max_over_mean(&before[*b]).total_cmp(&max_over_mean(&before[*a])));
    if order.len() > CHARTS {
        let _ = write!(page, "<p class=\"note\">The {CHARTS} layers that were busiest before:</p>");
    }
    order.truncate(CHARTS);
    order.sort_unstable();
    for layer in order {
        let Some(after) = placed.gpu_load.get(layer) else { continue };
        let copies = placed.logcnt.get(layer).map_or(0, |counts| counts.iter().filter(|n| **n > 1).count());
        let mean = after.iter().sum::<f64>() / gpus as f64;
        let _ = write!(
            page,
            "<h2>Layer {layer}</h2><p class=\"note\">{:.3} before, {:.3} after; {copies} experts have copies</p>{}",
            max_over_mean(&before[layer]),
            max_over_mean(after),
            bars(&before[layer], after, mean)
        );
    }
    page.push_str("</body></html>\n");
    page
}

/// Pairs of bars with a line at `mean`.
fn bars(before: &[f64], after: &[f64], mean: f64) -> String {
    let (height, left) = (120.0, 8.0);
    let pair = (880.0 / before.len().max(1) as f64).clamp(6.0, 48.0);
    let bar = pair * 0.4;
    let top = before.iter().chain(after).copied().fold(f64::MIN_POSITIVE, f64::max);
    let width = left * 2.0 + pair * before.len() as f64;
    let mut svg =
        format!("<svg viewBox=\"0 0 {width:.0} 142\" width=\"{width:.0}\" role=\"img\" aria-label=\"load per GPU\">");
    for (i, (b, a)) in before.iter().zip(after).enumerate() {
        let x = left + pair * i as f64;
        for (value, class, x) in [(b, "before", x), (a, "after", x + bar)] {
            let h = height * value / top;
            let _ = write!(
                svg,
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{bar:.1}\" height=\"{h:.1}\"><title>{i}: {value:.0} {class}</title></rect>",
                4.0 + height - h
            );
        }
        if pair >= 16.0 || i % 8 == 0 {
            let _ = write!(svg, "<text x=\"{:.1}\" y=\"138\" text-anchor=\"middle\">{i}</text>", x + bar);
        }
    }
    let y = 4.0 + height - height * mean / top;
    let _ = write!(
        svg,
        "<line x1=\"0\" y1=\"{y:.1}\" x2=\"{width:.0}\" y2=\"{y:.1}\" stroke=\"#b9504b\" stroke-dasharray=\"4 3\"/></svg>"
    );
    svg
}
