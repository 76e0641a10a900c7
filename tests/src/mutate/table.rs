//! The table of all mutants.

use super::{Kind, Mutant, judge::Fate, subject::Subject};
use std::{
    collections::BTreeMap,
    fmt::{Display, Write as _},
};

/// A mutant and its fate.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Name of the subject.
    pub subject: String,
    /// The mutant.
    pub mutant: Mutant,
    /// Its fate.
    pub fate: Fate,
}

/// A program of the table: its name, its PTX as a number, and the fates of its mutants in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Name of the subject.
    pub subject: String,
    /// Digest of the PTX: the row is about this text and no other.
    pub digest: String,
    /// Counts of fates.
    pub tally: Tally,
}

impl Row {
    /// The row of a program.
    #[must_use]
    pub fn of(subject: &Subject, fates: &[Judged]) -> Self {
        Self { subject: subject.name().to_owned(), digest: digest(subject.ptx()), tally: total(fates) }
    }

    fn line(&self) -> String {
        format!("| {} | `{}` | {} |", self.subject, self.digest, self.tally.cells())
    }
}

/// The row of a page whose first cell says this.
#[must_use]
pub fn row_of<'a>(page: &'a str, first: &str) -> Option<&'a str> {
    let start = format!("| {first} | ");
    page.lines().find(|l| l.starts_with(&start))
}

/// The rate in a row of a page, in percent; 100 where nothing was wrong.
#[must_use]
pub fn rate_of(page: &str, first: &str) -> Option<f64> {
    let rate = row_of(page, first)?.split(" | ").nth(1)?;
    if rate == "-" { Some(100.0) } else { rate.strip_suffix(" %")?.parse().ok() }
}

/// FNV-1a (Fowler, Noll and Vo), in hexadecimal.
#[must_use]
pub fn digest(text: &str) -> String {
    let fnv = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    format!("{fnv:016x}")
}

/// How many mutants had which fate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Found, refused or wrong.
    pub caught: u64,
    /// Wrong and not seen.
    pub missed: u64,
    /// Correct.
    pub equivalent: u64,
    /// Holding nothing back on these shapes.
    pub idle: u64,
    /// Not run on these shapes.
    pub unreached: u64,
}

impl Tally {
    /// Adds one fate.
    pub fn add(&mut self, fate: &Fate) {
        match fate {
            Fate::Caught(_) => self.caught += 1,
            Fate::Missed => self.missed += 1,
            Fate::Equivalent(_) => self.equivalent += 1,
            Fate::Idle => self.idle += 1,
            Fate::Unreached => self.unreached += 1,
        }
    }

    /// Caught among those that are wrong.
    #[must_use]
    pub fn rate(&self) -> f64 {
        let wrong = self.caught + self.missed;
        if wrong == 0 { 1.0 } else { self.caught as f64 / wrong as f64 }
    }

    fn cells(&self) -> impl Display {
        let Self { caught, missed, equivalent, idle, unreached } = self;
        let rate = if caught + missed == 0 { "-".to_owned() } else { format!("{:.1} %", 100.0 * self.rate()) };
        format!("{rate} | {caught} | {missed} | {equivalent} | {idle} | {unreached}")
    }
}

/// The counts of all fates.
#[must_use]
pub fn total(all: &[Judged]) -> Tally {
    let mut sum = Tally::default();
    all.iter().for_each(|j| sum.add(&j.fate));
    sum
}

/// The page `mutants.md`.
#[must_use]
pub fn page(rows: &[Row], all: &[Judged]) -> String {
    let mut out = String::from(HEAD);
    let columns = "caught of wrong | caught | missed | equivalent | idle | not run";
    let rule = "| --- | --- | --- | --- | --- | --- | --- |";
    let mut kinds: BTreeMap<Kind, Tally> = BTreeMap::new();
    let mut by: BTreeMap<&str, u64> = BTreeMap::new();
    for j in all {
        kinds.entry(j.mutant.kind).or_default().add(&j.fate);
        if let Fate::Caught(what) = &j.fate {
            let what = if what.contains(' ') && what != "wrong numbers" { "error" } else { what };
            *by.entry(what).or_default() += 1;
        }
    }
    let _ = writeln!(out, "\n## By kind\n\n| kind | {columns} |\n{rule}");
    for (kind, tally) in &kinds {
        let _ = writeln!(out, "| {} | {} |", kind.name(), tally.cells());
    }
    let _ = writeln!(out, "| all | {} |", total(all).cells());
    let _ = writeln!(out, "\n## By program\n\n| program | PTX | {columns} |\n| --- {rule}");
    for row in rows {
        let _ = writeln!(out, "{}", row.line());
    }
    let _ = writeln!(out, "\n## Caught by\n\n| first finding | mutants |\n| --- | --- |");
    for (what, n) in &by {
        let _ = writeln!(out, "| {what} | {n} |");
    }
    let _ = writeln!(out, "\n## Missed\n");
    // The same mutant of several programs is one line.
    let mut missed: BTreeMap<(Kind, String, String), Vec<&str>> = BTreeMap::new();
    let mut correct: BTreeMap<(Kind, &str), u64> = BTreeMap::new();
    for j in all {
        let m = &j.mutant;
        match &j.fate {
            Fate::Missed => missed.entry((m.kind, shape(&m.was), shape(&m.now))).or_default().push(&j.subject),
            Fate::Equivalent(why) => *correct.entry((m.kind, why)).or_default() += 1,
            Fate::Caught(_) | Fate::Unreached | Fate::Idle => {}
        }
    }
    if missed.is_empty() {
        let _ = writeln!(out, "None.");
    }
    for ((kind, was, now), mut programs) in missed {
        let n = programs.len();
        programs.dedup();
        let now = if now.is_empty() { "gone".to_owned() } else { format!("`{now}`") };
        let _ = writeln!(out, "- {}: `{was}` -> {now}, {n} times ({})", kind.name(), programs.join(", "));
    }
    let _ = writeln!(out, "\n## Equivalent\n\n| kind | why | mutants |\n| --- | --- | --- |");
    for ((kind, why), n) in correct {
        let _ = writeln!(out, "| {} | {why} | {n} |", kind.name());
    }
    out
}

/// The instruction without its operands, unless they say what it does.
fn shape(text: &str) -> String {
    let (guard, rest) = super::guarded(text).map_or(("", text), |(_, rest)| ("@%p ", rest));
    let words: Vec<&str> = rest.split_whitespace().collect();
    let tells = ["bar", "wait", "fence"].iter().any(|w| rest.contains(w));
    let shown = if tells { words.join(" ") } else { words.first().copied().unwrap_or("").to_owned() };
    format!("{guard}{}", shown.trim_end_matches(';'))
}

const HEAD: &str = "# Mutants

Every barrier, fence, wait, commit, arrival and mask of emitted PTX, taken away one at a time, and what the simulator
says to it over shapes with tails, empty experts and one expert that has all rows, between the launches that stand before
and behind the kernel. Written by `cargo run --release -p moec-tests --example mutants`.

- caught: a finding, an error, or other bits than the kernel as emitted
- missed: nobody saw anything, and no rule says that it is correct
- equivalent: correct all the same, by a rule that is checked for each; the rules are at the end
- idle: a guard that holds nothing back on these shapes, so that its loss cannot show
- not run: the instruction does not run on these shapes (the same one runs in another program of the table)
";
