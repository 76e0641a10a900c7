//! Judges every mutant and writes `tests/mutants.md`: `mutants [SEEDS] [PART OF A NAME]`.

use moec_tests::mutate::{
    judge::{Fate, judge},
    mutants,
    subject::subjects,
    table::{Judged, page, total},
};

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let seeds = args.first().and_then(|n| n.parse().ok()).unwrap_or(3);
    let filter = args.get(1).map_or("", String::as_str);
    let start = std::time::Instant::now();
    let mut all = Vec::new();
    for subject in subjects(seeds, filter) {
        let from = all.len();
        for mutant in mutants(subject.ptx()) {
            let fate = judge(&subject, &mutant);
            if matches!(fate, Fate::Missed | Fate::Equivalent(_)) {
                println!(
                    "{} {} line {}: {} -> {}: {fate:?}",
                    subject.name(),
                    mutant.entry,
                    mutant.line,
                    mutant.was,
                    mutant.now
                );
            }
            all.push(Judged { subject: subject.name().to_owned(), mutant, fate });
        }
        println!("{:6.1} s {} {:?}", start.elapsed().as_secs_f64(), subject.name(), total(&all[from..]));
    }
    println!("{:?} {:.2} %", total(&all), 100.0 * total(&all).rate());
    if filter.is_empty() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/mutants.md"), page(&all))?;
    }
    Ok(())
}
