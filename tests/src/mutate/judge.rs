//! What became of a mutant.

use super::{Kind, Mutant, subject::Subject};
use moec_sim::FindingKind;

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
    harmless(subject.ptx(), mutant).map_or(Fate::Missed, Fate::Equivalent)
}

/// Why a mutant is correct, when the text of the kernel shows it.
fn harmless(ptx: &str, mutant: &Mutant) -> Option<&'static str> {
    let lines: Vec<&str> = ptx.lines().map(|l| l.split("//").next().unwrap_or(l).trim()).collect();
    let at = mutant.line - 1;
    match mutant.kind {
        Kind::WarpBarrier => {
            let before = lines[..at].iter().rposition(|l| meets(l) || l.starts_with('{'))?;
            let after = at + 1 + lines[at + 1..].iter().position(|l| meets(l) || l.starts_with("ret"))?;
            if quiet(&lines, before + 1, at) {
                return Some("no shared memory is used since the barrier before, or the start of the kernel");
            }
            quiet(&lines, at + 1, after)
                .then_some("no shared memory is used until the barrier after, or the end of the kernel")
        }
        Kind::Guard if mutant.now.is_empty() => {
            let target = mutant.was.rsplit(char::is_whitespace).next()?.trim_end_matches(';');
            let end = at + lines[at..].iter().position(|l| l.strip_suffix(':') == Some(target))?;
            let stores = |l: &&str| {
                let op = l.split_whitespace().next().unwrap_or("");
                !["ld.", "atom", "red", "cp.", "mbarrier", "bra", "@", "bar", "call"].iter().any(|x| op.starts_with(x))
            };
            lines[at + 1..end].iter().all(|l| stores(&l)).then_some(
                "every lane stores the same value to the same place: stores that differ would be races, others faults",
            )
        }
        Kind::Guard
        | Kind::Barrier
        | Kind::Fence
        | Kind::CopyWait
        | Kind::MbarrierWait
        | Kind::WgmmaWait
        | Kind::LaunchWait
        | Kind::Commit
        | Kind::Arrive
        | Kind::ZeroFill => None,
    }
}

/// Whether the lanes of a warp meet here.
fn meets(line: &str) -> bool {
    line.starts_with("bar.")
}

/// Whether lines use no memory of other lanes, and nobody comes to them from elsewhere.
fn quiet(lines: &[&str], from: usize, to: usize) -> bool {
    let part = &lines[from..to];
    let private = |l: &&str| !["shared", "atom", "red.", "call"].iter().any(|x| l.contains(x));
    let entered = |label: &str| {
        let jumps = |l: &&str| l.contains("bra") && l.trim_end_matches(';').ends_with(label);
        lines[..from].iter().chain(&lines[to..]).any(|l| jumps(&l))
    };
    part.iter().all(|l| private(&l)) && !part.iter().filter_map(|l| l.strip_suffix(':')).any(entered)
}
