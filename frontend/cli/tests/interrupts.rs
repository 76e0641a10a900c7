//! Ctrl-C at any moment: the exit code says so, and what is on disk is the old or the new, never a part.

#[allow(dead_code, reason = "each test uses a part")]
mod support;

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use support::TINY;

fn names(folder: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("a folder")
        .map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

#[test]
fn an_interrupted_compile_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("config.json"), TINY).expect("written");
    let compile = || {
        Command::new(env!("CARGO_BIN_EXE_moec"))
            .args(["compile", "config.json", "-o", "out", "--target", "x86-64-v3", "-q"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts")
    };
    let start = Instant::now();
    assert_eq!(compile().wait().expect("ends").code(), Some(0));
    let whole = start.elapsed();
    let complete = names(&folder.path().join("out"));
    let (mut interrupted, turns) = (0, 24);
    for turn in 0..turns {
        if turn % 2 == 0 {
            fs::remove_dir_all(folder.path().join("out")).ok();
        }
        let mut child = compile();
        // From the first moment to a little after the end.
        std::thread::sleep(whole * turn / (turns - 4));
        let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).stderr(Stdio::null()).status();
        kill.expect("kill runs");
        let asked = Instant::now();
        let code = child.wait().expect("ends").code();
        // Far more than any machine needs: a process that hangs is meant, not a slow one.
        assert!(asked.elapsed() < Duration::from_secs(120), "still running {:?} after the signal", asked.elapsed());
        match code {
            Some(130) => interrupted += 1,
            // Before the handler is there, the signal ends the process itself.
            Some(0) | None => {}
            Some(other) => panic!("exit {other}"),
        }
        let left = names(folder.path());
        assert!(left.iter().all(|n| n == "config.json" || n == "out"), "left behind: {left:?}");
        if left.contains(&"out".to_owned()) {
            assert_eq!(names(&folder.path().join("out")), complete, "a part of an artefact");
        }
    }
    assert!(interrupted > turns / 4, "only {interrupted} of {turns} were interrupted");
}
