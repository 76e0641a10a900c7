//! Every change of every attribute of the gallery, judged: `attributes interpreter [GRAPH..]`, by the interpreter alone;
//! `attributes TARGET [seed=N] [minutes=N] [tokens=N] [done=FILE] [GRAPH..]`, compiled and run.
//!
//! Of changes that reach the same code (operation, attribute, kind of change) one in the gallery is compiled: in a graph
//! that compiles quickly, which one the seed says. A run that ends with its minutes leaves in the file what it did; the
//! next one takes what is left. Attributes that no change was compiled of come first.

use moec::{
    Target,
    runtime::{Cpu, Device, Sim},
};
use moec_tests::{
    attributes::{Mutant, Subject, UNSEEN, Verdict, mutants, settle},
    draw::Draw,
    gallery::{files, on_all_cores, stem},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

fn main() {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_else(|| "x86-64-v4".into());
    let (options, only): (Vec<String>, Vec<String>) = args.partition(|a| a.contains('='));
    let option = |name: &str| options.iter().find_map(|o| o.strip_prefix(name)?.strip_prefix('='));
    let number = |name: &str, otherwise: u64| option(name).and_then(|n| n.parse().ok()).unwrap_or(otherwise);
    let mut files = files("models/systems", "json");
    files.retain(|f| only.is_empty() || only.contains(&stem(f)));
    let subjects: Vec<(String, Subject)> =
        files.iter().map(|path| (stem(path), subject(path, number("tokens", 9)))).collect();
    let mut judged = match Target::ALL.into_iter().find(|t| t.name() == name) {
        Some(target) => {
            let end = Instant::now() + Duration::from_secs(60 * number("minutes", 100_000));
            compiled(&subjects, target, number("seed", 0), end, option("done").map(PathBuf::from))
        }
        None => interpreted(&subjects),
    };
    report(&mut judged);
}

type Judged = Vec<(Mutant, Result<Verdict, String>)>;

fn subject(path: &Path, tokens: u64) -> Subject {
    let text = std::fs::read_to_string(path).expect("the file can be read");
    Subject::new(serde_json::from_str(&text).expect("the file is JSON"), tokens)
}

/// All changes, by the interpreter.
fn interpreted(subjects: &[(String, Subject)]) -> Judged {
    let judged = Mutex::new(Vec::new());
    on_all_cores(subjects, |(name, subject)| {
        let changes = mutants(subject.file()).into_iter();
        let all: Judged = changes.map(|m| (named(name, &m), subject.judge(&m, None))).collect();
        judged.lock().expect("no panic").extend(all);
        Ok(())
    });
    let mut judged = judged.into_inner().expect("no panic");
    settle(&mut judged);
    judged
}

/// Changes that reach different code, compiled, until the end.
fn compiled(subjects: &[(String, Subject)], target: Target, seed: u64, end: Instant, done: Option<PathBuf>) -> Judged {
    let text = done.as_ref().and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    let mut keys: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let before = keys.len();
    let mut draw = Draw(seed);
    let all: Vec<Vec<Mutant>> = subjects.iter().map(|(_, subject)| mutants(subject.file())).collect();
    let mut order: Vec<(usize, usize)> =
        all.iter().enumerate().flat_map(|(i, list)| (0..list.len()).map(move |j| (i, j))).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, draw.place(i + 1));
    }
    let costs: Vec<usize> = subjects.iter().map(|(_, subject)| subject.cost()).collect();
    order.sort_by_key(|(i, _)| costs[*i]);
    let mut places: BTreeSet<String> =
        all.iter().flatten().filter(|m| keys.contains(&m.key)).map(|m| m.place.clone()).collect();
    let runs_first = |(i, j): &(usize, usize)| {
        let mutant = &all[*i][*j];
        !keys.contains(&mutant.key) && subjects[*i].1.runs(mutant) && keys.insert(mutant.key.clone())
    };
    order.retain(runs_first);
    let (first, rest): (Vec<_>, Vec<_>) =
        order.into_iter().partition(|(i, j)| places.insert(all[*i][*j].place.clone()));
    eprintln!("{} keys to compile, {} of new attributes; {before} done before", first.len() + rest.len(), first.len());
    let order = [first, rest].concat();
    let log =
        done.map(|path| OpenOptions::new().create(true).append(true).open(path).expect("the file can be written"));
    let (log, judged) = (Mutex::new(log), Mutex::new(Vec::new()));
    on_all_cores(&order, |(i, j)| {
        if Instant::now() > end {
            return Ok(());
        }
        let (device, (name, subject), mutant) = (device(target), &subjects[*i], &all[*i][*j]);
        let start = Instant::now();
        let verdict = match subject.judge(mutant, Some((target, &device))) {
            // That is for the interpreter to say, over all changes; the kernels agree with it.
            Err(why) if why == UNSEEN => Ok(Verdict::Changed),
            verdict => verdict,
        };
        if let Err(why) = &verdict {
            eprintln!("{name}: {}: {why}", mutant.change);
        } else if let Some(log) = log.lock().expect("no panic").as_mut() {
            writeln!(log, "{}", mutant.key).expect("the file can be written");
        }
        if start.elapsed().as_secs() > 20 {
            eprintln!("{name}: {}: {} s", mutant.change, start.elapsed().as_secs());
        }
        judged.lock().expect("no panic").push((named(name, mutant), verdict));
        Ok(())
    });
    let judged = judged.into_inner().expect("no panic");
    eprintln!("{} compiled, {} left", judged.len(), order.len() - judged.len());
    judged
}

fn device(target: Target) -> Arc<dyn Device> {
    if target.is_gpu() { Arc::new(Sim::new(moec_sim::Options::default())) } else { Arc::new(Cpu::new(1)) }
}

/// The change with its graph's name, without the graph.
fn named(name: &str, mutant: &Mutant) -> Mutant {
    Mutant { change: format!("{name}: {}", mutant.change), graph: serde_json::Value::Null, ..mutant.clone() }
}

/// Prints failures and counts; the exit code says whether there are failures.
fn report(judged: &mut Judged) {
    judged.sort_by(|(a, _), (b, _)| a.change.cmp(&b.change));
    let (mut counts, mut failures) = (BTreeMap::<String, u64>::new(), 0);
    for (mutant, verdict) in judged {
        let kind = match verdict {
            Ok(Verdict::Refused(_)) => "refused".to_owned(),
            Ok(Verdict::NoValue(_)) => "no value".into(),
            Ok(Verdict::Unsupported(what)) => {
                println!("UNSUPPORTED {}: {what}", mutant.change);
                "unsupported".into()
            }
            Ok(Verdict::Changed) => "changed".into(),
            Ok(Verdict::Numbers(cause)) => {
                println!("NUMBERS {}: {cause:?}", mutant.change);
                format!("numbers: {cause:?}")
            }
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
    std::process::exit(i32::from(failures > 0));
}
