//! What became of a mutant.

use super::{Mutant, subject::Subject};
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
fn harmless(_ptx: &str, _mutant: &Mutant) -> Option<&'static str> {
    None
}
