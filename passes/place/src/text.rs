//! A placement for a terminal of 80 columns.

use crate::{
    affinity::AffinityPlacement, grouping::GroupingPlacement, layout::Replicated, least_loaded::LeastLoaded,
    placement::Placement,
};
use std::fmt::Write as _;

/// Columns of a terminal.
const WIDTH: usize = 80;
/// Most items of a list that are written out.
const SHOWN: usize = 64;

/// Renders a placement in lines of at most 80 columns.
pub fn text(placement: &Placement) -> String {
    let mut out = String::new();
    match placement {
        Placement::Replicated(slots) => layers(&mut out, slots, |_| String::new()),
        Placement::Bounded(bounded) => layers(&mut out, &bounded.slots, |layer| {
            let bound = bounded.lower_bound.get(layer).copied().unwrap_or(0.0);
            let least = if bounded.optimal.get(layer) == Some(&true) { ", which is least" } else { "" };
            format!("  no placement has a peak below {bound:.0}{least}\n")
        }),
        Placement::Affinity(placed) => affine(&mut out, placed),
        Placement::MoeTuner(tuner) => affine(&mut out, &tuner.placed),
        Placement::Grouping(GroupingPlacement { placed, remote_share, contiguous_remote_share, .. }) => {
            affine(&mut out, placed);
            for (layer, (now, before)) in remote_share.iter().zip(contiguous_remote_share).enumerate() {
                let (now, before) = (100.0 * now, 100.0 * before);
                let _ =
                    writeln!(out, "layer {layer}: {now:.1} % of rows go to another GPU, {before:.1} % contiguously");
            }
        }
        Placement::LeastLoaded(layer) => spilled(&mut out, 0, layer),
        Placement::LeastLoadedLayers { layers } => {
            layers.iter().enumerate().for_each(|(index, layer)| spilled(&mut out, index, layer));
        }
    }
    out.push_str(match placement.replicated() {
        Some(_) => "`--format json` prints which expert lies in which slot\n",
        None => "`--format json` prints which tokens of an expert go where\n",
    });
    out
}

fn layers(out: &mut String, slots: &Replicated, further: impl Fn(usize) -> String) {
    for (layer, load) in slots.gpu_load.iter().enumerate() {
        let worst = slots.max_over_mean.get(layer).copied().unwrap_or(1.0);
        let plain = slots.contiguous_no_replica_max_over_mean.as_ref().and_then(|p| p.get(layer));
        let plain = plain.map_or_else(String::new, |p| format!(", {p:.3} without placement"));
        let _ = writeln!(out, "layer {layer}: busiest over mean {worst:.3}{plain}");
        list(out, "load of the GPUs", load.iter().map(|l| format!("{l:.0}")));
        out.push_str(&further(layer));
        let many = slots.logcnt.get(layer).into_iter().flatten().enumerate().filter(|(_, n)| **n > 1);
        list(out, "experts with replicas", many.map(|(e, n)| format!("{e} x{n}")));
    }
}

fn affine(out: &mut String, placed: &AffinityPlacement) {
    layers(out, &placed.slots, |_| String::new());
    let best = if placed.optimal { ", the most" } else { "" };
    let _ = writeln!(
        out,
        "{:.1} % stay on a GPU from layer to layer{best}; contiguously {:.1} %",
        100.0 * placed.local_share,
        100.0 * placed.contiguous_local_share
    );
}

fn spilled(out: &mut String, layer: usize, plan: &LeastLoaded) {
    let (now, before) = (plan.max_over_mean, plan.native_max_over_mean);
    let _ = writeln!(out, "layer {layer}: busiest over mean {now:.3}, {before:.3} without spilling");
    list(out, "load of the GPUs", plan.gpu_load.iter().map(u64::to_string));
    let moved = plan.weight_transfers.iter().map(|(expert, from, to, ..)| format!("{expert} from {from} to {to}"));
    list(out, "experts that are copied", moved);
}

/// A list with its name, in lines; nothing where it is empty.
fn list(out: &mut String, name: &str, items: impl Iterator<Item = String>) {
    let items: Vec<String> = items.collect();
    if items.is_empty() {
        return;
    }
    let mut line = format!("  {name}:");
    for (index, item) in items.iter().take(SHOWN).enumerate() {
        let item = if index + 1 < items.len() { format!("{item},") } else { item.clone() };
        if line.len() + 1 + item.len() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = "   ".to_owned();
        }
        line.push(' ');
        line.push_str(&item);
    }
    let _ = writeln!(out, "{line}");
    if items.len() > SHOWN {
        let _ = writeln!(out, "    and {} more", items.len() - SHOWN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Input, Method, Options, place};

    #[test]
    fn every_method_fits_a_terminal() {
        let loads: Vec<String> = (0..256_u64).map(|e| (e * e * 977 % 100_003).to_string()).collect();
        let loads = Input::from_json(&format!("[[{}]]", loads.join(","))).unwrap();
        let trace: String = (0..64).map(|t| format!("[[{}], [{}]]\n", t % 16, (t * 5 + 1) % 16)).collect();
        let trace = Input::from_jsonl(&trace).unwrap();
        for method in Method::ALL {
            let (input, gpus) = match method {
                Method::Eplb | Method::Balance | Method::LeastLoaded | Method::LeastLoadedPaper => (&loads, 128),
                Method::OnePerRank => (&loads, 300),
                Method::Ilp | Method::Affinity | Method::AffinityIlp | Method::MoeTuner | Method::Grouping => {
                    (&trace, 4)
                }
            };
            let options =
                Options { method: Some(method), gpus: Some(gpus), time_limit_s: Some(1.0), ..Options::default() };
            let text = text(&place(input, &options).unwrap());
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{method:?}: {text}");
            assert!(text.lines().count() > 3 && text.contains("busiest over mean"), "{method:?}: {text}");
        }
    }
}
