//! `moec list`: what there is to choose from.

use super::emit::Kind;
use crate::{
    args::{List, Listed},
    codes,
    context::Context,
    failure::Failure,
    wanted,
};
use moec::{
    Target,
    ir::{Op, json::About},
    runtime::{Cpu, Device as _, Sim},
};
use serde_json::json;

/// The graph files of the gallery.
const SYSTEMS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/systems.rs"));

/// Prints a table of names and remarks.
pub(crate) fn run(cx: &Context, args: &List) -> Result<(), Failure> {
    if args.systems {
        return systems(cx, args.what);
    }
    let (key, rows): (&str, Vec<(String, String)>) = match args.what {
        Listed::Targets => ("target", targets()),
        Listed::Passes => {
            let fold = (moec::passes::FOLD.to_owned(), "what one rank runs, with --plan; before all others".to_owned());
            let passes = moec::passes::PIPELINE.iter().map(|p| (p.name.to_owned(), p.about.to_owned()));
            ("pass", [fold].into_iter().chain(passes).collect())
        }
        Listed::Ops => ("op", Op::NAMES.iter().map(|n| ((*n).to_owned(), String::new())).collect()),
        Listed::Emit => ("emit", Kind::ALL.iter().map(|k| (k.name().to_owned(), k.about().to_owned())).collect()),
        Listed::Families => {
            let families = moec::frontend::families().into_iter();
            ("family", families.map(|f| (f.to_owned(), String::new())).collect())
        }
        Listed::Codes => {
            let codes = codes::PAGES.iter();
            ("code", codes.map(|(code, page)| ((*code).to_owned(), codes::title(page).to_owned())).collect())
        }
    };
    if cx.is_json() {
        let rows: Vec<_> = rows.iter().map(|(name, about)| json!({key: name, "about": about})).collect();
        return cx.json(&json!({"schema": 1, "rows": rows}));
    }
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let lines: String =
        rows.iter().map(|(name, about)| format!("{}\n", format!("{name:<width$}  {about}").trim_end())).collect();
    cx.result(lines)
}

/// Research architectures: name, works with their arXiv ids, what is special.
fn systems(cx: &Context, what: Listed) -> Result<(), Failure> {
    if what != Listed::Families {
        return Err(Failure::Usage("`--systems` goes with families: `moec list families --systems`".into()));
    }
    let rows: Vec<(&str, About)> = SYSTEMS.iter().filter_map(|(name, text)| Some((*name, About::of(text)?))).collect();
    if cx.is_json() {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, about)| json!({"system": name, "special": about.special, "works": about.works}))
            .collect();
        return cx.json(&json!({"schema": 1, "rows": rows}));
    }
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut lines = String::new();
    for (name, about) in &rows {
        let works: Vec<String> = about
            .works
            .iter()
            .map(|w| if w.arxiv.is_empty() { w.name.clone() } else { format!("{} ({})", w.name, w.arxiv.join(", ")) })
            .collect();
        lines += &format!("{name:<width$}  {}\n", about.special);
        if !works.is_empty() {
            lines += &format!("{:width$}  {}\n", "", works.join("; "));
        }
    }
    cx.result(lines)
}

/// Targets, and what runs them here.
fn targets() -> Vec<(String, String)> {
    let gpu = wanted::gpu();
    let (cpu, sim) = (Cpu::new(1), Sim::new(moec::sim::Options::default()));
    Target::ALL
        .into_iter()
        .map(|target| {
            let name = target.name();
            let about = if target.is_gpu() {
                let here = gpu.as_ref().filter(|(_, best)| *best == target);
                let simulated = if sim.runs(name).is_ok() { "runs on the simulator" } else { "" };
                here.map_or_else(|| simulated.to_owned(), |(gpu, _)| format!("runs on {gpu} and the simulator"))
            } else {
                match cpu.runs(name) {
                    Ok(()) => "runs on this processor".to_owned(),
                    Err(why) => format!("does not run here: {why}"),
                }
            };
            (name.to_owned(), about)
        })
        .collect()
}
