//! A little of what `cargo run -p moec-tests --example fuzz` does for as long as one likes.

use moec_tests::fuzz::{TARGETS, run};

#[test]
fn readers_answer_whatever_they_read() {
    let failures: Vec<String> = TARGETS.iter().filter_map(|target| run(target, 1, 1500).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
