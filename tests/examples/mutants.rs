//! Judges every mutant and writes `tests/mutants.md`: `mutants [SEEDS] [PART OF A NAME]`.

use moec_tests::mutate::{
    judge::{Fate, judge_all},
    subject::subjects,
    table::{Row, page, total},
};

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let seeds = args.first().and_then(|n| n.parse().ok()).unwrap_or(2);
    let filter = args.get(1).map_or("", String::as_str);
    let start = std::time::Instant::now();
    let (mut rows, mut all) = (Vec::new(), Vec::new());
    for subject in subjects(seeds, filter) {
        let judged = judge_all(&subject, &subject.mutants());
        for j in judged.iter().filter(|j| matches!(j.fate, Fate::Missed | Fate::Equivalent(_))) {
            let m = &j.mutant;
            println!("{} {} line {}: {} -> {}: {:?}", j.subject, m.entry, m.line, m.was, m.now, j.fate);
            if j.fate == Fate::Missed {
                let around = subject.ptx().lines().enumerate().skip(m.line.saturating_sub(8)).take(16);
                around.for_each(|(i, line)| println!("{:7} | {line}", i + 1));
            }
        }
        rows.push(Row::of(&subject, &judged));
        println!("{:6.1} s {} {:?}", start.elapsed().as_secs_f64(), subject.name(), total(&judged));
        all.extend(judged);
    }
    println!("{:?} {:.2} %", total(&all), 100.0 * total(&all).rate());
    if filter.is_empty() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/mutants.md"), page(&rows, &all))?;
    }
    Ok(())
}
