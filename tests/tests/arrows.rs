//! Which crate may use which: read from `cargo metadata`.

use serde_json::Value;
use std::{collections::BTreeMap, process::Command};

/// Allowed arrows between our crates; tests may use everything.
const ALLOWED: &[(&str, &[&str])] = &[
    ("mlir-c-link", &[]),
    ("moec-abi", &[]),
    ("moec-ir", &[]),
    ("moec-launch", &[]),
    ("moec-place", &[]),
    ("moec-plan", &[]),
    ("moec-sim", &[]),
    ("moec-frontend", &["moec-ir"]),
    ("moec-passes", &["moec-ir"]),
    ("moec-codegen", &["mlir-c-link", "moec-abi", "moec-ir"]),
    ("moec-runtime", &["moec-abi", "moec-launch", "moec-sim"]),
    ("moec-check", &["moec-abi", "moec-runtime", "moec-sim"]),
    (
        "moec",
        &[
            "moec-abi",
            "moec-check",
            "moec-codegen",
            "moec-frontend",
            "moec-ir",
            "moec-passes",
            "moec-place",
            "moec-plan",
            "moec-runtime",
            "moec-sim",
        ],
    ),
    ("moec-cli", &["moec"]),
];

fn metadata() -> Value {
    // Crates of other systems were not downloaded by building.
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--filter-platform", &host, "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo writes JSON")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().expect("a list").iter()
}

#[test]
fn crates_use_only_what_the_architecture_allows() {
    let metadata = metadata();
    let ours: Vec<&str> = list(&metadata["packages"])
        .filter(|p| list(&metadata["workspace_members"]).any(|id| id == &p["id"]))
        .map(|p| text(&p["name"]))
        .collect();
    let mut wrong = Vec::new();
    for package in list(&metadata["packages"]).filter(|p| ours.contains(&text(&p["name"]))) {
        let name = text(&package["name"]);
        if name.starts_with("moec-tests") {
            continue;
        }
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            wrong.push(format!("{name} is not in the list of this test"));
            continue;
        };
        for dependency in list(&package["dependencies"]).filter(|d| d["kind"] != "dev") {
            let on = text(&dependency["name"]);
            if ours.contains(&on) && !allowed.contains(&on) {
                wrong.push(format!("{name} -> {on}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn the_runtime_needs_no_compiler() {
    let metadata = metadata();
    let names: BTreeMap<&str, &str> = list(&metadata["packages"]).map(|p| (text(&p["id"]), text(&p["name"]))).collect();
    let uses: BTreeMap<&str, Vec<&str>> = list(&metadata["resolve"]["nodes"])
        .map(|node| {
            let normal = list(&node["deps"]).filter(|d| list(&d["dep_kinds"]).any(|k| k["kind"] != "dev"));
            (text(&node["id"]), normal.map(|d| text(&d["pkg"])).collect())
        })
        .collect();
    let runtime = names.iter().find(|(_, name)| **name == "moec-runtime").expect("the runtime is a package").0;
    let mut open = vec![*runtime];
    let mut seen: Vec<&str> = Vec::new();
    while let Some(id) = open.pop() {
        if !seen.contains(&id) {
            seen.push(id);
            open.extend(uses.get(id).into_iter().flatten());
        }
    }
    let compilers = ["llvm", "mlir", "melior", "inkwell", "moec-codegen", "moec-ir", "moec-passes", "moec-frontend"];
    let found: Vec<&str> =
        seen.iter().map(|id| names[id]).filter(|name| compilers.iter().any(|c| name.contains(c))).collect();
    assert!(seen.len() > 10 && found.is_empty(), "{found:?}");
}
