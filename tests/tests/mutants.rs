//! The table `tests/mutants.md`, kept: it says enough, and a sample of it is judged again.

use moec_tests::mutate::{
    judge::{Fate, judge_all},
    subject::subjects,
    table::{Judged, digest, rate_of, row_of, total},
};

/// Programs of the sample, and which of their mutants: every so manieth.
const SAMPLE: [(&str, usize); 3] =
    [("up wgmma x128x64 sm_90a", 6), ("down mma x64 sm_89", 8), ("down decode x32 sm_90a", 1)];
/// Share of wrong mutants that must be caught.
const RATE: f64 = 95.0;

const PAGE: &str = include_str!("../mutants.md");

#[test]
fn the_table_has_every_kind_and_its_rate() {
    let all = rate_of(PAGE, "all").expect("the table has a sum");
    assert!(all >= RATE, "{all} % of the wrong mutants are caught");
    for kind in moec_tests::mutate::Kind::ALL {
        assert!(rate_of(PAGE, kind.name()).is_some(), "{} is not in the table", kind.name());
    }
}

#[test]
fn a_sample_of_the_table_is_caught_again() {
    let mut all = Vec::new();
    for (name, every) in SAMPLE {
        let subject = subjects(1, name).into_iter().next().expect("the program is in the list");
        let row = row_of(PAGE, name).unwrap_or_else(|| panic!("{name} is not in the table"));
        if !row.contains(&digest(subject.ptx())) {
            eprintln!("{name} has changed since tests/mutants.md was written");
        }
        let some: Vec<_> = subject.mutants().into_iter().step_by(every).collect();
        all.extend(judge_all(&subject, &some));
    }
    let tally = total(&all);
    let missed: Vec<&Judged> = all.iter().filter(|j| j.fate == Fate::Missed).collect();
    assert!(tally.caught > 15, "{tally:?}");
    assert!(100.0 * tally.rate() >= RATE, "{tally:?}\n{missed:#?}");
}
