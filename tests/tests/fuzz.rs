//! A little of what `cargo run -p moec-tests --example fuzz` does for as long as one likes.

use moec_tests::fuzz::{TARGETS, run};

#[test]
fn readers_answer_whatever_they_read() {
    // Seeds that have found something before are among them.
    let seeds = [(1, 1000), (158, 500)];
    let failures: Vec<String> = TARGETS
        .iter()
        .flat_map(|target| seeds.map(|(seed, count)| run(target, seed, count)))
        .filter_map(Result::err)
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
