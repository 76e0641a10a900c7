//! Every change of every attribute of the gallery, judged: `attributes [TARGET|interpreter] [GRAPH..]`.
//!
//! Of changes that reach the same code (operation, attribute, kind of change) one in the gallery is compiled; with
//! `MOEC_ALL=1` all are.

use moec::{
    Target,
    runtime::{Cpu, Device, Sim},
};
use moec_tests::{
    attributes::{Mutant, Subject, Verdict, mutants, settle},
    gallery::{files, on_all_cores, stem},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

fn main() {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_else(|| "x86-64-v4".into());
    let chosen = Target::ALL.into_iter().find(|t| t.name() == name);
    let target = chosen.unwrap_or(Target::X86V4);
    let only: Vec<String> = args.collect();
    let judged = Mutex::new(Vec::new());
    let (keys, all) = (Mutex::new(BTreeSet::new()), std::env::var_os("MOEC_ALL").is_some());
    let files: Vec<_> =
        files("models/systems", "json").into_iter().filter(|f| only.is_empty() || only.contains(&stem(f))).collect();
    on_all_cores(&files, |path| {
        let device: Arc<dyn Device> =
            if target.is_gpu() { Arc::new(Sim::new(moec_sim::Options::default())) } else { Arc::new(Cpu::new(1)) };
        let text = std::fs::read_to_string(path).expect("the file can be read");
        let subject = Subject::new(serde_json::from_str(&text).expect("the file is JSON"));
        let changes = mutants(subject.file());
        let compiles = |m: &Mutant| chosen.is_some() && (all || keys.lock().expect("no panic").insert(m.key.clone()));
        let verdicts = subject.judge_all(&changes, compiles, target, &device);
        for (mutant, verdict) in changes.iter().zip(&verdicts) {
            // Said at once, since the run is long; what shows nowhere is said at the end.
            if let Err(why) = verdict {
                eprintln!("{}: {}: {why}", stem(path), mutant.change);
            }
        }
        let (name, count) = (stem(path), changes.len());
        let named = changes.into_iter().map(|m| Mutant {
            change: format!("{name}: {}", m.change),
            graph: serde_json::Value::Null,
            ..m
        });
        judged.lock().expect("no panic").extend(named.zip(verdicts));
        eprintln!("{name}: {count} changes");
        Ok(())
    });
    let mut judged = judged.into_inner().expect("no panic");
    settle(&mut judged);
    let (mut counts, mut failures) = (BTreeMap::<String, u64>::new(), 0);
    for (mutant, verdict) in &judged {
        let kind = match verdict {
            Ok(Verdict::Refused(_)) => "refused".to_owned(),
            Ok(Verdict::NoValue(_)) => "no value".into(),
            Ok(Verdict::Unsupported(what)) => {
                println!("UNSUPPORTED {}: {what}", mutant.change);
                "unsupported".into()
            }
            Ok(Verdict::Changed) => "changed".into(),
            Ok(Verdict::Unseen(reason)) => format!("unseen: {reason:?}"),
            Ok(Verdict::Read) => "read".into(),
            Err(why) => {
                println!("FAIL {}: {why} [{}]", mutant.change, mutant.place);
                failures += 1;
                "failed".into()
            }
        };
        *counts.entry(kind).or_default() += 1;
    }
    for (kind, n) in counts {
        println!("{n:>6} {kind}");
    }
    println!("{:>6} keys", keys.into_inner().expect("no panic").len());
    std::process::exit(i32::from(failures > 0));
}
