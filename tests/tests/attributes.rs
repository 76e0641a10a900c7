//! Attributes have an effect or are refused: a sample; `cargo run -p moec-tests --example attributes` does all.

use moec::{
    host_target,
    runtime::{Cpu, Device},
};
use moec_tests::{
    attributes::{Cause, Subject, Verdict, mutants, settle},
    gallery::{every_file, files, stem},
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

#[test]
fn no_attribute_is_ignored() {
    // A few graphs, and of their changes one in twenty of those that can run as kernels.
    let chosen = ["softmax_top_k", "dynamic_topp", "mixlora", "promoe_two_step"];
    let mut sample = files("models/systems", "json");
    sample.retain(|path| chosen.contains(&stem(path).as_str()));
    let (next, judged) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    every_file(&sample, |path| {
        let text = std::fs::read_to_string(path).expect("the file can be read");
        let subject = Subject::new(serde_json::from_str(&text).expect("the file is JSON"), 9);
        let device: Arc<dyn Device> = Arc::new(Cpu::new(1));
        let verdicts = mutants(subject.file()).into_iter().map(|mutant| {
            let compiles = subject.runs(&mutant) && next.fetch_add(1, Ordering::Relaxed) % 20 == 7;
            let verdict = subject.judge(&mutant, compiles.then_some((host_target(), &device)));
            (mutant, verdict)
        });
        let verdicts: Vec<_> = verdicts.collect();
        judged.lock().expect("no panic").extend(verdicts);
        Ok(())
    });
    let mut judged = judged.into_inner().expect("no panic");
    settle(&mut judged);
    let wrong = judged.iter().filter_map(|(m, v)| v.as_ref().err().map(|why| format!("{}: {why}", m.change)));
    let wrong: Vec<String> = wrong.collect();
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), judged.len(), wrong.join("\n"));
}

#[test]
fn an_iteration_that_does_not_settle_is_told_from_a_wrong_one() {
    let path = files("models/systems", "json").into_iter().find(|path| stem(path) == "sparse_transport");
    let text = std::fs::read_to_string(path.expect("a graph of the gallery")).expect("the file can be read");
    let mut file: serde_json::Value = serde_json::from_str(&text).expect("the file is JSON");
    let verdict = |file: &serde_json::Value| {
        let subject = Subject::new(file.clone(), 9);
        let device: Arc<dyn Device> = Arc::new(Cpu::new(1));
        let change = mutants(file).into_iter().find(|m| m.attribute == "gamma" && subject.runs(m)).expect("a change");
        subject.judge(&change, Some((host_target(), &device)))
    };
    assert_eq!(verdict(&file), Ok(Verdict::Changed));
    // Long steps: the last bits of each decide where the next one leads.
    let node = file["nodes"].as_array_mut().into_iter().flatten().find(|node| node["op"] == "transport");
    let node = node.expect("a transport");
    (node["steps"], node["eta"]) = (41.into(), 1.5.into());
    assert_eq!(verdict(&file), Ok(Verdict::Numbers(Cause::Sensitive)));
}
