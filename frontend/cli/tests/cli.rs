//! What users see: commands, findings, exit codes.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use support::{Done, TINY, moec_in};

/// The root of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository is there")
}

/// A folder with `config.json`.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("config.json"), TINY).expect("is written");
    folder
}

fn moec(folder: &Path, line: &str) -> Done {
    moec_in(folder, &line.split_whitespace().collect::<Vec<_>>(), "")
}

/// Files below a folder, with their content.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut open = vec![folder.to_owned()];
    let mut files = Vec::new();
    while let Some(path) = open.pop() {
        for entry in fs::read_dir(&path).expect("is a folder").map(|e| e.expect("is read").path()) {
            if entry.is_dir() {
                open.push(entry);
            } else {
                let name = entry.strip_prefix(folder).expect("lies inside").display().to_string();
                files.push((name, fs::read(&entry).expect("is read")));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn compile_says_little_and_writes_everything() {
    let folder = folder();
    let done = moec(folder.path(), "compile config.json -o out --target cpu,sm_90a --no-cubin");
    assert_eq!(done.code, 0, "{}", done.err);
    assert_eq!(done.out, "");
    assert!(done.err.lines().count() < 10, "{}", done.err);
    for line in
        ["   Reading config.json (mixtral: 3 layers, 6 experts, top 2)", " Targeting x86-64-v3, x86-64-v4, sm_90a"]
    {
        assert!(done.err.contains(line), "{line}\n{}", done.err);
    }
    let names: Vec<String> = files(&folder.path().join("out")).into_iter().map(|f| f.0).collect();
    for name in [
        "mixtral.h",
        "mixtral.pc",
        "mixtral.rs",
        "mixtralConfig.cmake",
        "example.c",
        "graph/mixtral.moe",
        "kernels/mixtral.sm_90a.ptx",
        "kernels/mixtral.x86-64-v3.o",
        "kernels/mixtral.x86-64-v4.o",
        "libmixtral.a",
        "manifest.json",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} is not among {names:?}");
    }
}

#[test]
fn equal_input_gives_equal_bytes() {
    let folder = folder();
    for out in ["one", "two"] {
        let done = moec(folder.path(), &format!("compile config.json -q -o {out} --target x86-64-v3,sm_80 --no-cubin"));
        assert_eq!((done.code, done.err.as_str()), (0, ""));
    }
    let (one, two) = (files(&folder.path().join("one")), files(&folder.path().join("two")));
    assert!(!one.is_empty());
    for (a, b) in one.iter().zip(&two) {
        assert_eq!(a.0, b.0);
        assert!(a.1 == b.1, "{} differs", a.0);
    }
    assert_eq!(one.len(), two.len());
}

#[test]
fn an_artefact_runs_and_agrees_with_the_reference() {
    let folder = folder();
    let done = moec(folder.path(), "compile config.json -q -o out --target cpu --outputs all --layer 1");
    assert_eq!(done.code, 0, "{}", done.err);
    let done =
        moec(folder.path(), "run out --input random:9 --weights random:5 --compare --format json -o y.safetensors");
    assert_eq!(done.code, 0, "{}", done.err);
    let result: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    assert_eq!(result["schema"], 1);
    assert_eq!(result["layer"], 1);
    assert_eq!(result["compare"]["passed"], true);
    assert_eq!(result["compare"]["selection_mismatches"], 0);
    let inspected = moec(folder.path(), "inspect y.safetensors");
    assert!(inspected.out.contains("output: F32 [9, 48]"), "{}", inspected.out);
    let inspected = moec(folder.path(), "inspect out");
    assert!(inspected.out.contains("input hidden_states: F32 [T, 48]"), "{}", inspected.out);
}

#[test]
fn a_run_on_the_simulator_agrees_too() {
    let folder = folder();
    let done = moec(folder.path(), "run config.json --device sim --input random:3 --compare");
    assert_eq!(done.code, 0, "{}\n{}", done.out, done.err);
    assert!(done.out.contains("layer 0 on sm_90a: 3 tokens"), "{}", done.out);
    assert!(done.out.contains("agrees with the reference") && done.out.contains("selection exact"), "{}", done.out);
}

#[test]
fn verify_prints_a_line_for_each_case_and_their_sum() {
    let case = root().join("tests/goldens/mixtral__f32_t17.safetensors");
    let done = moec_in(&root(), &["verify".as_ref(), case.as_os_str()], "");
    assert_eq!(done.code, 0, "{}", done.err);
    let lines: Vec<&str> = done.out.lines().collect();
    assert!(lines[0].starts_with("PASS mixtral__f32_t17  out_rel="), "{}", done.out);
    assert!(lines[0].contains("  sel=exact  time="), "{}", done.out);
    assert_eq!(lines[1], "1 passed, 0 failed, 0 skipped");
    let done = moec_in(&root(), &["verify".as_ref(), case.as_os_str(), "--format".as_ref(), "json".as_ref()], "");
    let object: serde_json::Value = serde_json::from_str(&done.out).expect("one object");
    assert_eq!(object["status"], "PASS");
    for key in ["name", "out_max_rel", "out_rms_rel", "selection_mismatches", "reason"] {
        assert!(object.get(key).is_some(), "{key}");
    }
}

#[test]
fn verify_runs_foreign_ptx_and_skips_a_device_that_is_absent() {
    let case = root().join("tests/ptx-cases/softmax_row.safetensors");
    let done = moec_in(&root(), &["verify".as_ref(), case.as_os_str(), "--device".as_ref(), "sim".as_ref()], "");
    assert_eq!(done.code, 0, "{}", done.out);
    let done = moec_in(&root(), &["verify".as_ref(), case.as_os_str(), "--device".as_ref(), "cuda:63".as_ref()], "");
    assert_eq!(done.code, 0, "{}", done.out);
    assert!(done.out.ends_with("0 passed, 0 failed, 1 skipped\n"), "{}", done.out);
}

#[test]
fn a_case_that_differs_fails() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut bytes = fs::read(root().join("tests/goldens/mixtral__f32_t1.safetensors")).expect("is read");
    // The last tensor by position belongs to the weights or results: any change of an exponent shows.
    let end = bytes.len();
    for at in (end - 4096..end).step_by(4) {
        bytes[at + 3] ^= 0x40;
    }
    fs::write(folder.path().join("broken.safetensors"), bytes).expect("is written");
    let done = moec(folder.path(), "verify .");
    assert_eq!(done.code, 1, "{}", done.out);
    assert!(done.out.starts_with("FAIL broken"), "{}", done.out);
    assert!(done.out.ends_with("0 passed, 1 failed, 0 skipped\n"), "{}", done.out);
}

#[test]
fn single_outputs_go_where_they_are_told() {
    let folder = folder();
    let done = moec(folder.path(), "compile config.json --target x86-64-v3 --emit ir,obj=code.o,asm=-");
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out.contains("kernel.gate") && done.out.contains(".text"), "{}", done.out);
    assert!(fs::read(folder.path().join("code.o")).expect("is written").starts_with(b"\x7fELF"));
    let done = moec(
        folder.path(),
        "compile config.json --target sm_80 --no-cubin --emit graph=layer.moe,graph-json=layer.json,dot=-,ptx=k.ptx",
    );
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out.starts_with("digraph"), "{}", done.out);
    assert!(moec(folder.path(), "inspect k.ptx").out.starts_with("PTX for sm_80"));
    for model in ["layer.moe", "layer.json"] {
        let done = moec(folder.path(), &format!("run {model} --input random:3 --compare"));
        assert_eq!(done.code, 0, "{model}: {}{}", done.out, done.err);
    }
    let text = fs::read_to_string(folder.path().join("layer.moe")).expect("is written");
    let done = moec_in(folder.path(), &["opt", "-", "--pass", "fuse-gating", "--print-ir", "changed"], &text);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out.contains("kernel.gate") && done.err.contains("// after fuse-gating"), "{}", done.err);
}

#[test]
fn plans_and_places_answer_in_the_published_forms() {
    let folder = folder();
    let done = moec(folder.path(), "plan config.json --gpus 8 --seq 512 --global-batch 32 --format json");
    assert_eq!(done.code, 0, "{}", done.err);
    let report: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    assert_eq!((&report["schema"], &report["gpus"]), (&1.into(), &8.into()));
    for key in ["attention", "experts", "micro_batch", "vpp", "step_ms", "mfu", "memory_gib", "feasible", "time_ms"] {
        assert!(report["plans"][0].get(key).is_some(), "{key}");
    }
    let done = moec(folder.path(), "plan config.json --gpus 8 --seq 512 --global-batch 32 --format html");
    assert!(done.out.starts_with("<!doctype html>"));
    let done = moec(folder.path(), "plan --groups --gpus 4 --fix tp=2,ep=2,etp=2");
    let groups: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    assert_eq!(groups["moe"]["ep"], serde_json::json!([[0, 2], [1, 3]]));
    let done = moec(folder.path(), "plan --groups --gpus 4 --fix tp=3");
    assert_eq!(done.code, 1);
    assert!(done.err.starts_with("error[E0402]"), "{}", done.err);
    let cluster = moec(folder.path(), "plan --print-cluster").out;
    for (right, wrong, code, missing) in [
        ("\"nic_gbps\": 50.0", "\"nic_gbps\": \"fast\"", "E0404", false),
        ("\"nic_gbps\": 50.0", "\"nic_gbps\": NaN", "E0404", false),
        ("\"gpus_per_domain\": 8", "\"gpus_per_domain\": 0", "E0404", false),
        ("\"gpus_per_domain\": 8,", "", "E0404", true),
        ("\"nic_gbps\": 50.0", "\"nic_gbps\":", "E01", false),
    ] {
        assert!(cluster.contains(right));
        std::fs::write(folder.path().join("cluster.json"), cluster.replace(right, wrong)).expect("written");
        let done = moec(folder.path(), "plan config.json --gpus 8 --cluster cluster.json");
        assert_eq!(done.code, 1);
        // Of a missing member, the object that it is missing from: the whole file here.
        let line = cluster[..cluster.find(right).expect("there")].lines().count();
        let place = format!("cluster.json:{}:", if missing { 1 } else { line });
        assert!(done.err.contains(code) && done.err.contains(&place), "{place} {}", done.err);
        assert!(done.err.contains("help"), "{}", done.err);
    }
    let line = ["place", "-", "--gpus", "2", "--replicas", "6", "--format", "json"];
    let done = moec_in(folder.path(), &line, "[[90, 132, 40, 61]]");
    let placement: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    assert_eq!(placement["logcnt"], serde_json::json!([[2, 2, 1, 1]]));
}

#[test]
fn a_plan_compiles_and_all_ranks_agree_with_one_device() {
    let folder = folder();
    fs::write(folder.path().join("loads.json"), "[[90, 10, 10, 20, 10, 10]]").expect("is written");
    let plan = moec(folder.path(), "plan config.json --gpus 4 --fix tp=2,cp=1,pp=1,ep=2,etp=2 --format json --top 1");
    assert_eq!(plan.code, 0, "{}", plan.err);
    fs::write(folder.path().join("plan.json"), &plan.out).expect("is written");
    let placed = moec(folder.path(), "place loads.json --gpus 2 --replicas 8 --format json");
    assert_eq!(placed.code, 0, "{}", placed.err);
    fs::write(folder.path().join("placed.json"), &placed.out).expect("is written");

    let done =
        moec(folder.path(), "run config.json --plan plan.json --placement placed.json --input random:5 --compare");
    assert_eq!(done.code, 0, "{}{}", done.out, done.err);
    assert!(done.out.contains("agrees with the reference"), "{}", done.out);

    let done = moec(
        folder.path(),
        "compile config.json --plan plan.json --placement placed.json --rank 3 -o rank3 --target x86-64-v3",
    );
    assert_eq!(done.code, 0, "{}", done.err);
    let manifest = fs::read_to_string(folder.path().join("rank3/manifest.json")).expect("is there");
    let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("JSON");
    let chain = &manifest["chains"][0];
    assert_eq!(chain["rank"], 3);
    let groups: Vec<&str> =
        chain["steps"].as_array().expect("steps").iter().filter_map(|s| s["move"]["group"]["name"].as_str()).collect();
    assert_eq!(groups, ["ep", "etp", "etp", "ep"]);
    let done = moec(folder.path(), "run rank3");
    assert_eq!(done.code, 1);
    assert!(done.err.contains("cannot run alone"), "{}", done.err);

    let done = moec(folder.path(), "compile config.json --plan plan.json --rank 4 -o rank4 --target x86-64-v3");
    assert_eq!(done.code, 1);
    assert!(done.err.contains("ranks are 0..4"), "{}", done.err);
}

/// Bad files, one thing wrong at a time: each refusal points into the file and says what to do.
#[test]
fn plan_placement_and_load_files_are_pointed_into() {
    let folder = folder();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("is written");
    let refused = |line: &str, place: &str, about: &str| {
        let done = moec(folder.path(), line);
        assert_eq!(done.code, 1, "{line} {about}: {}", done.err);
        assert!(done.err.contains(place) && done.err.contains(about), "{line} {place} {about}: {}", done.err);
        assert!(done.err.contains("help"), "{}", done.err);
    };
    let plan = "{\n\"gpus\": 4,\n\"attention\": {\"tp\": 2},\n\"experts\": {\n\"ep\": 2, \"etp\": 2},\n\"order\": \"tp-cp-ep-dp-pp\"\n}";
    let report = |plan: &str| format!("{{\"schema\": 1, \"plans\": [\n{plan}]}}");
    for (right, wrong, line, about) in [
        ("\"gpus\": 4,", "\"gpus\": NaN,", 2, "NaN"),
        ("\"gpus\": 4,", "\"gpus\": 0,", 2, "at least 1"),
        ("\"gpus\": 4,", "\"gpus\": 1e300,", 2, "gpus"),
        ("\"gpus\": 4,", "\"gpus\": 18446744073709551615,", 2, "outside"),
        ("\"gpus\": 4,", "\"gpus\": \"four\",", 2, "four"),
        ("\"gpus\": 4,", "", 1, "gpus is missing"),
        ("{\"tp\": 2}", "{\"tp\": -2}", 3, "attention.tp is -2"),
        ("{\"tp\": 2}", "{\"tp\": 3}", 3, "not divisible"),
        ("{\"tp\": 2}", "{\"tp\": 2, \"dp\": 7}", 3, "dp = 2"),
        ("{\"tp\": 2}", "[2]", 3, "an object"),
        ("\"ep\": 2,", "\"ep\": null,", 5, "experts.ep is null"),
        ("\"ep\": 2,", "\"ep\": 1152921504606846976,", 5, "outside 1..=4"),
        ("tp-cp-ep-dp-pp", "tp-cp-xp", 6, "axes are"),
        ("\"order\"", "\"stage_layers\": [[[0, 9]], [[9, 4]]], \"order\"", 6, "stage_layers.1.0"),
        ("\"order\": \"tp-cp-ep-dp-pp\"\n}", "\"order\": ", 6, "E01"),
    ] {
        assert!(plan.contains(right));
        let text = plan.replacen(right, wrong, 1);
        write("plan.json", &text);
        refused("run config.json --plan plan.json", &format!("plan.json:{line}:"), about);
        // The same plan as the first one of a report.
        if line == 3 {
            write("plan.json", &report(&text));
            refused("compile config.json --plan plan.json --rank 0 -o out", &format!("plan.json:{}:", line + 1), about);
        }
    }
    write("plan.json", "");
    refused("run config.json --plan plan.json", "plan.json", "the file is empty");
    write("plan.json", "{\"plans\":\n[]}");
    refused("run config.json --plan plan.json", "plan.json:2:", "no plans");
    refused("run config.json --plan .", "cannot read .", "moec plan");
    write("plan.json", &plan.replace("\"etp\"", "\"etpp\": 2, \"etp\""));
    for (text, place, about) in [
        ("{}", "placed.json:1:", "phy2log is missing"),
        ("{\"phy2log\":\n[[0, 1, 2,\n-3, 4, 5]]}", "placed.json:3:", "phy2log.0.3"),
        ("{\"phy2log\":\n[[0, 1, 2]]}", "placed.json:2:", "3 slots for 2"),
        ("{\"phy2log\":\n[[0, NaN]]}", "placed.json:2:", "NaN"),
    ] {
        write("placed.json", text);
        refused("run config.json --plan plan.json --placement placed.json", place, about);
    }
    let misspelt = moec(folder.path(), "run config.json --plan plan.json");
    assert!(misspelt.code == 0 && misspelt.err.contains("did you mean etp?"), "{}", misspelt.err);
    for (text, place, about) in [
        ("[[1, 2,\n3, NaN, 5, 6]]", "loads.json:2:", "NaN"),
        ("[[1, 2,\n3, -4, 5, 6]]", "loads.json:2:4", "expert 3"),
        ("[[1, 2, 3, 4, 5, 6],\n[1]]", "loads.json:2:", "layer 1 has 1"),
        ("[[1, 2, 3,\n\"four\", 5, 6]]", "loads.json:2:", "four"),
        ("{\"weights\":\n[[1]]}", "loads.json:2:", "known keys"),
        ("{\"expert_load\": [1, 2,\n1e300]}", "loads.json:2:", "2^53"),
        ("[[1, 2", "loads.json:1:", "help"),
        ("", "loads.json", "the file is empty"),
        ("[[1, 2]]", "loads.json:1:2", "give 6 loads"),
    ] {
        write("loads.json", text);
        refused("plan config.json --gpus 8 --routing file:loads.json", place, about);
        if !about.starts_with("give") {
            refused("place loads.json --gpus 2", place, about);
        }
    }
    refused("plan config.json --gpus 8 --routing file:.", "cannot read .", "loads");
    write("loads.json", "[[1, 2, 3, 4, 5, 6]]");
    for (text, place, about) in [
        ("", "old.json", "the file is empty"),
        ("[[1, 2", "old.json:1:", "E01"),
        ("[[1, 2]]", "old.json:1:", "phy2log is missing"),
        ("{\"phy2log\":\n[[0, 1, 2, 3, 4, 5]]}", "old.json:1:", "gpu_load is missing"),
        ("{\"phy2log\":\n7}", "old.json:2:", "no list of layers"),
        ("{\"phy2log\":\n[[0, 1],\n7]}", "old.json:3:", "phy2log.1 is no list"),
        ("{\"phy2log\":\n[[0, 1, 2,\n-3, 4, 5]], \"gpu_load\": [[1, 1]]}", "old.json:3:", "phy2log.0.3 is no expert"),
        (
            "{\"phy2log\":\n[[0, 1, 2,\n1e300, 4, 5]], \"gpu_load\": [[1, 1]]}",
            "old.json:3:",
            "phy2log.0.3 is no expert",
        ),
        ("{\"phy2log\":\n[[0, NaN]]}", "old.json:2:", "NaN"),
        ("{\"phy2log\": [[0, 1]],\n\"phy2log\": [[0, 1]]}", "old.json:2:", "phy2log"),
        ("{\"gpu_load\": [[1, 1]], \"phy2log\":\n[[0, 1, 2]]}", "old.json:2:", "3 slots per layer on 2 GPUs"),
        ("{\"gpu_load\": [[]], \"phy2log\":\n[[0, 1, 2]]}", "old.json:2:", "on 0 GPUs"),
        ("{\"gpu_load\": [[1, 1]], \"phy2log\":\n[[0, 1], [0, 1]]}", "old.json:2:", "layers"),
        ("{\"placement\": {\"gpu_load\": [[1, 1]], \"phy2log\":\n[[0, 1.5]]}}", "old.json:2:", "phy2log.0.1"),
    ] {
        write("old.json", text);
        refused("place loads.json --gpus 2 --replicas 6 --from old.json", place, about);
    }
    refused("place loads.json --gpus 2 --replicas 6 --from .", "cannot read .", "moec place");
}

#[test]
fn places_are_pages_moves_and_measures_too() {
    let folder = folder();
    fs::write(folder.path().join("loads.json"), "[[90, 10, 10, 20, 10, 10]]").expect("is written");
    let page = moec(folder.path(), "place loads.json --gpus 2 --replicas 8 --format html");
    assert!(page.code == 0 && page.out.contains("<svg") && !page.out.contains("http"), "{}", page.err);
    let old = moec(folder.path(), "place loads.json --gpus 2 --replicas 6 --format json");
    fs::write(folder.path().join("old.json"), &old.out).expect("is written");
    let moves = moec(folder.path(), "place loads.json --gpus 2 --replicas 8 --from old.json");
    assert!(moves.code == 0 && moves.out.contains("experts are copied"), "{}{}", moves.out, moves.err);
    // What it printed is a placement to start from, too.
    let printed = moec(folder.path(), "place loads.json --gpus 2 --replicas 8 --from old.json --format json");
    fs::write(folder.path().join("new.json"), &printed.out).expect("is written");
    let none = moec(folder.path(), "place loads.json --gpus 2 --replicas 8 --from new.json");
    assert!(none.code == 0 && none.out.starts_with("0 experts are copied"), "{}{}", none.out, none.err);
    let cluster = moec(folder.path(), "plan --cluster dgx-h100 --print-cluster");
    fs::write(folder.path().join("cluster.json"), &cluster.out).expect("is written");
    let plan = moec(
        folder.path(),
        "plan config.json --gpus 8 --cluster cluster.json --recompute full --sharding full --schedule zero-bubble --overlap 0.5",
    );
    assert_eq!(plan.code, 0, "{}", plan.err);
    let step = |line: &str| {
        let plan =
            moec(folder.path(), &format!("plan config.json --gpus 64 --fix tp=1,pp=1,ep=2 --format json {line}"));
        let plan: serde_json::Value = serde_json::from_str(&plan.out).expect("JSON");
        plan["plans"][0]["step_ms"].as_f64().expect("a time")
    };
    assert!(step("--gpus-per-node 1") > step(""), "experts exchange rows between nodes");
}

#[test]
fn bench_gives_rows() {
    let folder = folder();
    let done = moec(folder.path(), "bench config.json --tokens 1,8 --reps 3 --routing all-to-one --format json");
    assert_eq!(done.code, 0, "{}", done.err);
    let rows: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    assert_eq!(rows["rows"].as_array().map(Vec::len), Some(2));
    let row = &rows["rows"][1];
    assert_eq!(row["experts_hit"], 2.0, "all tokens choose the same experts: {row}");
    for key in ["median_ms", "p5_ms", "p95_ms", "gb_per_s", "gflop_per_s", "floor_share"] {
        assert!(row[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {row}");
    }
    let done = moec(folder.path(), "bench config.json --tokens 2 --device sim --format json");
    assert_eq!(done.code, 0, "{}", done.err);
    let rows: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    for key in ["instructions", "bytes_global", "registers", "sectors_global", "lane_instructions"] {
        assert!(rows["rows"][0][key].as_u64().is_some_and(|v| v > 0), "{key}");
    }
}

#[test]
fn tuning_goes_on_and_its_table_compiles() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = TINY.replace("float32", "bfloat16");
    fs::write(folder.path().join("config.json"), config).expect("is written");
    let tried = || -> usize {
        let text = fs::read_to_string(folder.path().join("table.json")).expect("was written");
        let table: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        table["tried"].as_array().map_or(0, Vec::len)
    };
    let line = "bench config.json --tokens 4 --device sim --target sm_80 --tune table.json --budget 1s";
    for _ in 0..2 {
        let before = if folder.path().join("table.json").is_file() { tried() } else { 0 };
        let done = moec(folder.path(), line);
        assert_eq!(done.code, 0, "{}", done.err);
        assert!(done.err.contains("us"), "{}", done.err);
        assert!(tried() > before, "{}", done.err);
    }
    let done = moec(folder.path(), "compile config.json -o out --target sm_80 --no-cubin --tuned table.json");
    assert_eq!(done.code, 0, "{}", done.err);
    let other = moec(folder.path(), &line.replace("--tokens 4", "--tokens 5"));
    assert!(other.code == 1 && other.err.contains("E0404"), "{}", other.err);
    let cpu = moec(folder.path(), "bench config.json --tune table.json");
    assert!(cpu.code == 1 && cpu.err.contains("--device cuda"), "{}", cpu.err);
}

#[test]
fn every_list_has_rows_and_every_code_a_page() {
    let folder = folder();
    for what in ["targets", "passes", "ops", "emit", "families", "codes"] {
        let done = moec(folder.path(), &format!("list {what}"));
        assert!(done.code == 0 && done.out.lines().count() > 5, "{what}: {}", done.out);
    }
    let done = moec(folder.path(), "list families --systems");
    let graphs = std::fs::read_dir(root().join("tests/models/systems")).expect("the gallery");
    for file in graphs.filter_map(|f| f.ok()?.file_name().to_str()?.strip_suffix(".json").map(str::to_owned)) {
        assert!(done.out.lines().any(|line| line.starts_with(&format!("{file} "))), "{file} is not listed");
    }
    assert!(done.out.contains("MoMa, training (2407.21770)"), "{}", done.out);
    let done = moec(folder.path(), "list codes --format json");
    let list: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    let codes = list["rows"].as_array().expect("rows");
    assert!(codes.len() > 100);
    let page = moec(folder.path(), "explain e0203");
    assert!(page.out.starts_with("# E0203: "), "{}", page.out);
    assert_eq!(moec(folder.path(), "doctor").code, 0);
    assert!(moec(folder.path(), "completions bash").out.contains("moec"));
}

/// Bad inputs: what stands in the file, the exit code, and what has to be said.
#[test]
fn bad_models_are_refused_with_a_code_and_a_place() {
    let replaced = |from: &str, to: &str| {
        assert!(TINY.contains(from), "{from}");
        TINY.replace(from, to)
    };
    let cases: &[(&str, String, &[&str])] = &[
        ("empty", "  \n".into(), &["error[E0101]", "the file is empty"]),
        ("cut off", TINY[..120].into(), &["error[E0103]", "--> model.json:"]),
        ("comma", replaced("100\n", "100,\n"), &["error[E0103]", "comma"]),
        ("two values", format!("{TINY}{TINY}"), &["error[E0104]"]),
        ("a list", "[1, 2]".into(), &["error[E0105]"]),
        ("twice", replaced("\"vocab_size\": 100", "\"vocab_size\": 100, \"vocab_size\": 100"), &["error[E0106]"]),
        ("deep", "[".repeat(100_000), &["error[E0108]"]),
        ("NaN", replaced("100\n", "NaN\n"), &["error[E0111]"]),
        (
            "text for a number",
            replaced("\"num_local_experts\": 6", "\"num_local_experts\": \"6\""),
            &["error[E0201]", "^"],
        ),
        (
            "no experts",
            replaced("\"num_local_experts\": 6", "\"num_local_experts\": 0"),
            &["error[E0202]", "model.json:12:"],
        ),
        (
            "too many",
            replaced("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 7"),
            &["error[E0203]", "model.json:10:26", "asks for 7", "help: "],
        ),
        ("missing", replaced("  \"hidden_size\": 48,\n", ""), &["error[E0204]", "hidden_size"]),
        ("unknown type", replaced("\"mixtral\"", "\"mixtrel\""), &["error[E0205]", "mixtral"]),
        (
            "misspelt",
            replaced("\"num_experts_per_tok\"", "\"num_expert_per_tok\""),
            &["error[E0208]", "num_experts_per_tok"],
        ),
        ("activation", replaced("\"silu\"", "\"silo\""), &["error[E0212]", "silu"]),
        (
            "quantised",
            replaced("\"vocab_size\"", "\"quantization_config\": {\"quant_method\": \"magic\"}, \"vocab_size\""),
            &["error[E0213]"],
        ),
    ];
    let folder = folder();
    for (what, text, expected) in cases {
        fs::write(folder.path().join("model.json"), text).expect("is written");
        let done = moec(folder.path(), "compile model.json -o out");
        assert_eq!(done.code, 1, "{what}: {}", done.err);
        assert_eq!(done.out, "", "{what}");
        for part in *expected {
            assert!(done.err.contains(part), "{what}: no `{part}` in\n{}", done.err);
        }
        assert!(!folder.path().join("out").exists(), "{what}");
    }
    let done = moec_in(folder.path(), &["check", "-", "--format", "json"], &cases[10].1);
    let finding: serde_json::Value = serde_json::from_str(done.err.trim()).expect("one object");
    assert_eq!((&finding["code"], &finding["schema"], &finding["file"]), (&"E0203".into(), &1.into(), &"-".into()));
    assert_eq!((&finding["labels"][0]["line"], &finding["labels"][0]["primary"]), (&10.into(), &true.into()));
}

#[test]
fn a_finding_looks_as_it_should() {
    let folder = folder();
    fs::write(folder.path().join("bad.json"), TINY.replace("per_tok\": 2", "per_tok\": 7")).expect("is written");
    let done = moec(folder.path(), "check bad.json");
    let lines: Vec<&str> = done.err.lines().collect();
    assert!(lines[0].starts_with("error[E0203]: "), "{}", done.err);
    assert_eq!(lines[1], "  --> bad.json:10:26");
    assert_eq!(lines[2], "   |");
    assert_eq!(lines[3], "10 |   \"num_experts_per_tok\": 7,");
    assert!(lines[4].starts_with("   |                          ^ "), "{}", done.err);
    assert!(lines.iter().any(|l| l.starts_with("   = help: ")), "{}", done.err);
}

#[test]
fn wrong_usage_and_the_machine_have_their_own_codes() {
    let folder = folder();
    fs::write(folder.path().join("file"), "").expect("is written");
    fs::create_dir(folder.path().join("full")).expect("is made");
    fs::write(folder.path().join("full/other"), "").expect("is written");
    let cases: &[(&str, i32, &str)] = &[
        ("compile config.json", 2, "-o DIR"),
        ("compile config.json -o out --emit irr", 2, "the nearest is `ir`"),
        ("compile config.json -o out --target sm_91", 1, "error[E0401]"),
        ("compile config.json -o out --layer 7", 1, "error[E0215]"),
        ("compile config.json -o out --print-ir after=nothing", 2, "there is no pass `nothing`"),
        ("compile nowhere.json -o out", 1, "error[E0112]"),
        ("compile config.json -o file --target x86-64-v3", 3, "error[E0602]"),
        ("compile config.json -o full --target x86-64-v3", 3, "error[E0602]"),
        ("compile config.json -o no/such/out --target x86-64-v3", 3, "error[E0601]"),
        ("run config.json --device gpu", 2, "devices: cpu, sim, cuda"),
        ("run config.json --input random:x", 2, "number of tokens"),
        ("run config.json --weights nowhere", 1, "error[E03"),
        ("run config.json --input random:99999999999999", 1, "error[E0822]"),
        ("run config.json --layer 9", 1, "error[E0215]"),
        ("bench config.json --routing often", 2, "uniform, zipf:S"),
        ("verify nowhere", 1, "error[E0314]"),
        ("explain E9999", 2, "there is no code"),
        ("list ops --systems", 2, "moec list families --systems"),
        ("plan config.json --gpus 8 --cluster abacus", 1, "error[E0404]"),
        ("place file --gpus 2", 1, "error[E0101]"),
        ("frobnicate", 2, "frobnicate"),
    ];
    for (line, code, text) in cases {
        let done = moec(folder.path(), line);
        assert_eq!(done.code, *code, "{line}: {}", done.err);
        assert!(done.err.contains(text), "{line}: no `{text}` in\n{}", done.err);
    }
    let left: Vec<String> = files(folder.path()).into_iter().map(|f| f.0).collect();
    assert_eq!(left, ["config.json", "file", "full/other"]);
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let line = format!("{} list codes | head -n 1", env!("CARGO_BIN_EXE_moec"));
    let output = Command::new("bash").args(["-o", "pipefail", "-c", &line]).output().expect("bash runs");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn examples_of_help_run() {
    let folder = folder();
    std::os::unix::fs::symlink(root().join("tests"), folder.path().join("tests")).expect("is linked");
    let top = moec(folder.path(), "--help").out;
    assert!(top.lines().count() <= 40 && top.lines().all(|l| l.chars().count() <= 100), "{top}");
    let names: Vec<&str> = top
        .lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.split_whitespace().next())
        .collect();
    assert!(names.len() >= 13, "{names:?}");
    for name in names {
        let help = moec(folder.path(), &format!("{name} --help")).out;
        let example = help.split("Example: ").nth(1).unwrap_or_else(|| panic!("{name} has no example"));
        let example: String = example.lines().collect::<Vec<_>>().join(" ");
        let line = example.replace("moec ", &format!("{} ", env!("CARGO_BIN_EXE_moec")));
        let output = Command::new("bash").args(["-ec", &line]).current_dir(folder.path()).output().expect("bash runs");
        assert!(output.status.success(), "{example}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}
