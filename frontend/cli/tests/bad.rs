//! Inputs that somebody may well have: `tests/bad/NNN-name/` holds one, and what `moec check` says to it, or the command
//! in its file `command`.
//!
//! `MOEC_BLESS=1 cargo test -p moec-cli --test bad` writes what is said now.

mod support;

use std::{fs, io::Write as _, path::Path};
use support::{TINY, moec_in};

/// What is run in the folder of a case: its command, or a check of the only file besides `expected.txt`.
fn command(case: &Path) -> Vec<String> {
    if let Ok(line) = fs::read_to_string(case.join("command")) {
        return line.split_whitespace().map(str::to_owned).collect();
    }
    let names = fs::read_dir(case).expect("a folder").map(|e| e.expect("an entry").file_name());
    let mut names = names.map(|n| n.into_string().expect("UTF-8")).filter(|n| n != "expected.txt");
    let input = names.next().unwrap_or_else(|| panic!("{} has no input", case.display()));
    vec!["check".to_owned(), input]
}

#[test]
fn every_input_gets_its_answer() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/bad");
    let mut cases: Vec<_> = fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    cases.sort();
    assert!(cases.len() > 60, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let done = moec_in(&case, &command(&case), "");
        let said = format!("exit {}\n{}{}", done.code, done.out, done.err);
        let file = case.join("expected.txt");
        if std::env::var_os("MOEC_BLESS").is_some() {
            fs::write(file, said).expect("the file can be written");
        } else if fs::read_to_string(&file).ok().as_ref() != Some(&said) {
            wrong.push(format!("{}:\n{said}", case.display()));
        }
    }
    assert!(wrong.is_empty(), "{} answers differ; MOEC_BLESS=1 if they are meant\n{}", wrong.len(), wrong.join("\n"));
}

/// What `check` says to a config that a test makes.
fn refused(config: &[u8], code: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("config.json"), config).expect("written");
    let done = moec_in(folder.path(), &["check", "config.json"], "");
    assert_eq!(done.code, 1, "{}", done.err);
    assert!(done.err.starts_with(&format!("error[{code}]")), "{}", done.err);
    assert!(done.err.len() < 4000, "{} bytes of message", done.err.len());
}

#[test]
fn deep_nesting_does_not_use_up_the_stack() {
    refused("[".repeat(100_000).as_bytes(), "E0108");
    refused("{\"a\":".repeat(100_000).as_bytes(), "E0108");
}

#[test]
fn a_million_keys_are_too_many() {
    let keys: String = (0..1_000_000).map(|i| format!("\"k{i}\":0,")).collect();
    refused(format!("{{{}\"z\": 0}}", keys).as_bytes(), "E0110");
}

#[test]
fn a_long_string_is_too_much() {
    refused(format!("{{\"a\": \"{}\"}}", "x".repeat(100 << 20)).as_bytes(), "E0109");
}

#[test]
fn a_huge_file_is_not_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut file = fs::File::create(folder.path().join("config.json")).expect("created");
    file.write_all(TINY.as_bytes()).expect("written");
    file.set_len(1 << 30).expect("a sparse file");
    let done = moec_in(folder.path(), &["check", "config.json"], "");
    assert_eq!(done.code, 1, "{}", done.err);
    assert!(done.err.starts_with("error[E0109]"), "{}", done.err);
}

#[test]
fn endless_input_is_not_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let done = moec_in(folder.path(), &["check", "-"], &" ".repeat(64 << 20));
    assert_eq!(done.code, 1, "{}", done.err);
    assert!(done.err.starts_with("error[E0109]"), "{}", done.err);
}
