//! What became of a mutant.

use super::{Kind, Mutant, subject::Subject, table::Judged};
use moec_sim::{FindingKind, Lanes};
use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The fate of a mutant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A finding or an error, or `wrong numbers`.
    Caught(String),
    /// The mutated instruction does not run on these shapes.
    Unreached,
    /// The guard holds nothing back on these shapes.
    Idle,
    /// Correct all the same, for this reason.
    Equivalent(&'static str),
    /// Wrong, and nobody saw it.
    Missed,
}

/// The fates of mutants of a subject, in their order; found on all cores.
#[must_use]
pub fn judge_all(subject: &Subject, mutants: &[Mutant]) -> Vec<Judged> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((i, mutant)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, mutants.get(i)?)))
                {
                    let judged = Judged {
                        subject: subject.name().to_owned(),
                        mutant: mutant.clone(),
                        fate: judge(subject, mutant),
                    };
                    done.lock().expect("no thread panics").insert(i, judged);
                }
            });
        }
    });
    done.into_inner().expect("no thread panics").into_values().collect()
}

/// Runs a mutant over all shapes and seeds of its subject until it is caught.
#[must_use]
pub fn judge(subject: &Subject, mutant: &Mutant) -> Fate {
    let ptx = mutant.apply(subject.ptx());
    for run in subject.runs() {
        match subject.run(&ptx, run) {
            Err(fault) => return Fate::Caught(fault.what),
            Ok(out) if out != run.expected => return Fate::Caught("wrong numbers".to_owned()),
            Ok(_) => {}
        }
    }
    let probe = mutant.probe(subject.ptx());
    let reached = subject
        .runs()
        .iter()
        .any(|run| subject.run(&probe, run).is_err_and(|f| f.kinds.contains(&FindingKind::Trap) || f.kinds.is_empty()));
    if !reached {
        return if mutant.probe.starts_with("trap") { Fate::Unreached } else { Fate::Idle };
    }
    harmless(subject, mutant).map_or(Fate::Missed, Fate::Equivalent)
}

/// Why a mutant is correct, when the text of the kernel shows it, or its results under the worst schedules.
fn harmless(subject: &Subject, mutant: &Mutant) -> Option<&'static str> {
    let lines: Vec<&str> = subject.ptx().lines().map(|l| l.split("//").next().unwrap_or(l).trim()).collect();
    let at = mutant.line - 1;
    match mutant.kind {
        Kind::WarpBarrier => {
            let before = lines[..at].iter().rposition(|l| meets(l) || *l == "{")?;
            let after = at + 1 + lines[at + 1..].iter().position(|l| meets(l) || l.starts_with("ret"))?;
            if quiet(&lines, before + 1, at) {
                return Some("no shared memory is used since the barrier before, or the start of the kernel");
            }
            if quiet(&lines, at + 1, after) {
                return Some("no shared memory is used until the barrier after, or the end of the kernel");
            }
            // What a lane stores and another one loads (or stores too) comes out wrong in one of the two orders.
            let ptx = mutant.apply(subject.ptx());
            [Lanes::Ascending, Lanes::Descending].iter().all(|lanes| subject.gives_the_same(&ptx, *lanes)).then_some(
                "each lane uses only what it stored itself: the result is the same whichever lane goes first",
            )
        }
        Kind::Commit | Kind::CopyWait if mutant.was.starts_with("cp.async") => {
            let without = mutant.apply(subject.ptx());
            let after: Vec<&str> = without.lines().map(|l| l.split("//").next().unwrap_or(l).trim()).collect();
            let (before, after) = (complete_copies(&lines, at)?, complete_copies(&after, at)?);
            (before == after).then_some("the same copies are complete at every barrier and use of shared memory")
        }
        Kind::ZeroFill => subject
            .gives_the_same(&mutant.unwritten(subject.ptx())?, Lanes::Together)
            .then_some("the zeros are not used: with NaN in their place the result is the same"),
        // A guard orders nothing: it means what memory holds afterwards, and what would be a fault or a race.
        Kind::Guard => {
            let ptx = mutant.apply(subject.ptx());
            let all = [Lanes::Together, Lanes::Ascending, Lanes::Descending];
            all.iter().all(|lanes| subject.gives_the_same(&ptx, *lanes)).then_some(
                "what it holds back is neither a fault nor unordered, and no byte comes out other, whichever lane goes first",
            )
        }
        Kind::Barrier => {
            let end = at + 1 + lines[at + 1..].iter().position(|l| l.starts_with("ret"))?;
            let idle = |l: &str| ["ld.", "st.", "atom", "red.", "cp.", "call"].iter().all(|x| !l.contains(x));
            (lines[at + 1..end].iter().all(|l| idle(l)) && quiet(&lines, at + 1, end))
                .then_some("no memory is used until the end of the kernel")
        }
        // The fence orders what was initialised before it, as does any meeting of those who use it.
        Kind::Fence if mutant.was.starts_with("fence.mbarrier_init") => {
            let met = |l: &str| {
                if subject.blocks_are_alone() {
                    l.starts_with("bar.sync")
                } else {
                    l == "barrier.cluster.arrive.aligned;"
                }
            };
            let used = |l: &str| ["mapa", "mbarrier.", "cp.async.bulk"].iter().any(|used| l.contains(used));
            let rest = &lines[at + 1..];
            let meeting = rest.iter().position(|l| met(l))?;
            (!rest[..meeting].iter().any(|l| used(l))).then_some(
                "all who use the mbarriers meet between their initialisation and every use, which orders both",
            )
        }
        Kind::LaunchWait if subject.stands_alone(&mutant.entry) => {
            Some("what runs beside the launch before, up to the next one that waits for all, shares no memory with it")
        }
        // Where a thread that lost its wait uses what launches before wrote, the simulator finds a race.
        Kind::LaunchWait => {
            let ptx = mutant.apply(subject.ptx());
            let entries: Vec<&str> = ptx.split_inclusive(".entry ").collect();
            let own = entries.iter().position(|text| text.starts_with(&format!("{}(", mutant.entry)))?;
            let trapping = |(i, text): (usize, &&str)| match i == own {
                true => text.replace("griddepcontrol.wait;", "trap;"),
                false => (**text).to_owned(),
            };
            let others: String = entries.iter().enumerate().map(trapping).collect();
            let waits = |run| subject.run(&others, run).is_err_and(|f| f.kinds.contains(&FindingKind::Trap));
            subject.runs().iter().all(waits).then_some(
                "what goes on without it uses nothing of the launches before, and other blocks of every launch still wait",
            )
        }
        Kind::Fence | Kind::CopyWait | Kind::MbarrierWait | Kind::WgmmaWait | Kind::Commit | Kind::Arrive => None,
    }
}

/// How many copies of a thread are complete at each line after `at` that meets others or uses shared memory, in the
/// kernel around `at`; nothing if a loop takes part, or a guard.
fn complete_copies(lines: &[&str], at: usize) -> Option<Vec<usize>> {
    let start = lines[..at].iter().rposition(|l| *l == "{")?;
    let end = at + lines[at..].iter().position(|l| *l == "}")?;
    let (mut seen, mut groups, mut open, mut done) = (Vec::new(), Vec::new(), 0, 0);
    for (i, line) in lines.iter().enumerate().take(end).skip(start + 1) {
        let (op, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let last = rest.trim_end_matches(';').rsplit(char::is_whitespace).next().unwrap_or("");
        if line.contains("bra") {
            let target = lines[start..i].iter().position(|l| l.strip_suffix(':') == Some(last));
            if target.is_some_and(|t| lines[start + t..i].iter().any(|l| l.contains("cp.async"))) {
                return None;
            }
        } else if op.starts_with("cp.async.commit_group") {
            groups.push(std::mem::take(&mut open));
        } else if op.starts_with("cp.async.wait_group") {
            done = done.max(groups.len().saturating_sub(last.parse().ok()?));
        } else if op.starts_with("cp.async.c") {
            open += 1;
        } else if line.contains("cp.async") {
            return None;
        } else if i > at && (meets(line) || op.contains("shared") || op.starts_with("ret")) {
            seen.push(groups[..done].iter().sum());
        }
    }
    Some(seen)
}

/// Whether the lanes of a warp meet here.
fn meets(line: &str) -> bool {
    line.starts_with("bar.")
}

/// Whether lines use no memory of other lanes, and nobody comes to them from elsewhere.
fn quiet(lines: &[&str], from: usize, to: usize) -> bool {
    let part = &lines[from..to];
    let private = |l: &str| !["shared", "atom", "red.", "call"].iter().any(|x| l.contains(x));
    let entered = |label: &str| {
        let jumps = |l: &str| l.contains("bra") && l.trim_end_matches(';').ends_with(label);
        lines[..from].iter().chain(&lines[to..]).any(|l| jumps(l))
    };
    part.iter().all(|l| private(l)) && !part.iter().filter_map(|l| l.strip_suffix(':')).any(entered)
}
