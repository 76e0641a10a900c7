//! Checkpoints that are broken, incomplete or hostile.

use moec_frontend::{Checkpoint, read_config, weights::bind};
use std::{fs, path::Path};

/// A safetensors file.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend(vec![0; data]);
    bytes
}

/// The code of a file with these bytes.
fn code(bytes: &[u8]) -> &'static str {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path).err().map_or("ok", |e| e.code.0)
}

fn folder_code(path: &Path) -> &'static str {
    Checkpoint::open(path).err().map_or("ok", |e| e.code.0)
}

const GOOD: &str = r#"{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[0],"data_offsets":[16,16]}}"#;

#[test]
fn a_good_file_is_read_by_position() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    fs::write(&path, file(&format!("{GOOD}   "), 16)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().shape, [2, 2]);
    let mut bytes = [1; 4];
    checkpoint.read("a", 4, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4]);
    assert_eq!(checkpoint.read("a", 4, &mut [0; 13]).unwrap_err().code.0, "E0303");
    assert_eq!(checkpoint.metadata()["k"], "v");
}

#[test]
fn lengths_that_do_not_fit_are_e0306() {
    assert_eq!(code(&[0; 7]), "E0306");
    assert_eq!(code(&[0; 8]), "E0306");
    assert_eq!(code(&(1u64 << 63).to_le_bytes()), "E0306");
    assert_eq!(code(&file(GOOD, 16)[..40]), "E0306");
    assert_eq!(code(b""), "E0306");
}

#[test]
fn headers_that_are_not_objects_are_e0306() {
    for header in ["[]", "nonsense", "{\"a\":", " {}", "{} garbage", "\u{fffd}", "{\"a\":1}", "{\"a\":{}}"] {
        assert_eq!(code(&file(header, 0)), "E0306", "{header}");
    }
    assert_eq!(code(&file("{}", 0)), "ok");
    let mut latin = file("{\"_\":{}}", 0);
    latin[10] = 0xff;
    assert_eq!(code(&latin), "E0306");
}

#[test]
fn offsets_that_do_not_tile_the_file_are_e0306() {
    let two = |a: &str, b: &str| {
        let header = format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        );
        code(&file(&header, 8))
    };
    assert_eq!(two("[0,4]", "[4,8]"), "ok");
    assert_eq!(two("[4,8]", "[0,4]"), "ok");
    assert_eq!(two("[0,4]", "[3,7]"), "E0306");
    assert_eq!(two("[0,4]", "[5,9]"), "E0306");
    assert_eq!(two("[4,0]", "[4,8]"), "E0306");
    assert_eq!(two("[0,4]", "[0,4]"), "E0306");
    assert_eq!(two("[0,4]", "[-4,0]"), "E0306");
    assert_eq!(code(&file(GOOD, 17)), "E0306");
}

#[test]
fn shapes_that_are_not_the_byte_count_are_e0306() {
    let shape =
        |shape: &str| code(&file(&format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,16]}}}}"#), 16));
    assert_eq!(shape("[4]"), "ok");
    assert_eq!(shape("[5]"), "E0306");
    assert_eq!(shape("[4294967296,4294967296,4]"), "E0306");
    assert_eq!(shape("\"4\""), "E0306");
}

#[test]
fn foreign_files_are_named() {
    assert_eq!(code(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "E0312");
    let message = |bytes: &[u8]| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        fs::write(&path, bytes).unwrap();
        Checkpoint::open(&path).unwrap_err().message
    };
    assert!(message(b"PK\x03\x04............").contains("zip"));
    assert!(message(b"\x1f\x8b..............").contains("gzip"));
    assert!(message(b"\n<!DOCTYPE html><html></html>").contains("HTML"));
}

#[test]
fn pickles_and_archives_are_never_opened() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(folder_code(folder.path()), "E0301");
    fs::write(folder.path().join("pytorch_model.bin"), b"x").unwrap();
    assert_eq!(folder_code(folder.path()), "E0310");
    assert_eq!(folder_code(&folder.path().join("model.pt")), "E0310");
    assert_eq!(folder_code(&folder.path().join("model.zip")), "E0313");
}

/// A folder with an index and shards.
fn sharded(map: &str, shards: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), format!("{{\"weight_map\": {map}}}")).unwrap();
    for (name, tensor) in shards {
        let header = format!(r#"{{"{tensor}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        fs::write(folder.path().join(name), file(&header, 1)).unwrap();
    }
    folder
}

#[test]
fn shards_must_be_there_and_agree_with_the_index() {
    let good =
        sharded(r#"{"a": "1.safetensors", "b": "2.safetensors"}"#, &[("1.safetensors", "a"), ("2.safetensors", "b")]);
    assert_eq!(folder_code(good.path()), "ok");
    let missing = sharded(r#"{"a": "1.safetensors", "b": "2.safetensors"}"#, &[("1.safetensors", "a")]);
    assert_eq!(folder_code(missing.path()), "E0302");
    let twice =
        sharded(r#"{"a": "1.safetensors", "b": "2.safetensors"}"#, &[("1.safetensors", "a"), ("2.safetensors", "a")]);
    assert_eq!(folder_code(twice.path()), "E0308");
    let swapped =
        sharded(r#"{"a": "1.safetensors", "b": "2.safetensors"}"#, &[("1.safetensors", "b"), ("2.safetensors", "a")]);
    assert_eq!(folder_code(swapped.path()), "E0308");
    let absent = sharded(r#"{"a": "1.safetensors", "b": "1.safetensors"}"#, &[("1.safetensors", "a")]);
    assert_eq!(folder_code(absent.path()), "E0303");
}

#[test]
fn names_that_leave_the_folder_are_e0307() {
    for name in [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "x\\u0000",
        "a\\\\b",
        "NUL",
        "nul.safetensors",
        "com1",
        "..",
        "",
        &"x".repeat(5000),
    ] {
        let folder = sharded(&format!(r#"{{"a": "{name}"}}"#), &[]);
        assert_eq!(folder_code(folder.path()), "E0307", "{name}");
    }
}

#[cfg(unix)]
#[test]
fn links_that_leave_the_folder_are_e0307() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("x.safetensors");
    fs::write(&target, file("{}", 0)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("model.safetensors");
    symlink(&target, &link).unwrap();
    assert_eq!(folder_code(folder.path()), "E0307");
    fs::remove_file(&link).unwrap();
    symlink(&link, &link).unwrap();
    assert_eq!(folder_code(folder.path()), "E0307");

    // The cache of a model hub: snapshots link into blobs.
    let snapshot = outside.path().join("models--a--b/snapshots/1");
    let blobs = outside.path().join("models--a--b/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("abc"), file("{}", 0)).unwrap();
    symlink("../../blobs/abc", snapshot.join("model.safetensors")).unwrap();
    assert_eq!(folder_code(&snapshot), "ok");
}

#[cfg(unix)]
#[test]
fn pipes_and_folders_are_e0309_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("model.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(folder_code(folder.path()), "E0309");
    fs::remove_file(&pipe).unwrap();
    fs::create_dir(&pipe).unwrap();
    assert_eq!(folder_code(folder.path()), "E0309");
    assert_eq!(folder_code(Path::new("/dev/null")), "E0309");
}

#[test]
fn a_file_that_changes_is_e0311() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, file(GOOD, 16)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    fs::write(&path, &file(GOOD, 16)[..60]).unwrap();
    assert_eq!(checkpoint.read("a", 0, &mut [0; 16]).unwrap_err().code.0, "E0311");
}

/// Codes of binding a small Mixtral to these tensors.
fn bound(change: impl Fn(&str, &str, Vec<u64>) -> Option<(String, Vec<u64>)>) -> Vec<(&'static str, Option<String>)> {
    let text = r#"{"model_type": "mixtral", "torch_dtype": "bfloat16", "hidden_size": 4, "intermediate_size": 6,
        "num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}"#;
    let form = &read_config(text, "config.json").unwrap().forms[0];
    let p = "model.layers.0.block_sparse_moe.";
    let mut tensors = vec![(format!("{p}gate.weight"), vec![2, 4])];
    for e in 0..2 {
        tensors.push((format!("{p}experts.{e}.w1.weight"), vec![6, 4]));
        tensors.push((format!("{p}experts.{e}.w2.weight"), vec![4, 6]));
        tensors.push((format!("{p}experts.{e}.w3.weight"), vec![6, 4]));
    }
    let (mut header, mut at) = (Vec::new(), 0);
    for (name, shape) in tensors {
        let Some((dtype, shape)) = change(&name, "BF16", shape) else { continue };
        let bytes = shape.iter().product::<u64>() * if dtype == "F32" { 4 } else { 2 };
        header
            .push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{at},{}]}}"#, at + bytes));
        at += bytes;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, file(&format!("{{{}}}", header.join(",")), usize::try_from(at).unwrap())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    match bind(form, 0, &checkpoint) {
        Ok((bindings, warnings)) => {
            assert_eq!(bindings.len(), 7);
            warnings.into_iter().map(|w| (w.code.0, w.help)).collect()
        }
        Err(errors) => errors.into_iter().map(|e| (e.code.0, e.help)).collect(),
    }
}

#[test]
fn binding_checks_names_types_and_shapes() {
    let keep = |dtype: &str, shape: Vec<u64>| Some((dtype.to_owned(), shape));
    assert_eq!(bound(|_, d, s| keep(d, s)), []);
    let missing = bound(|n, d, s| if n.ends_with("1.w3.weight") { None } else { keep(d, s) });
    assert_eq!(missing[0].0, "E0303");
    let wrong_type = bound(|n, _, s| keep(if n.ends_with("gate.weight") { "I16" } else { "BF16" }, s));
    assert_eq!(wrong_type[0].0, "E0304");
    let transposed = bound(|n, d, s| keep(d, if n.ends_with("0.w1.weight") { vec![4, 6] } else { s }));
    assert_eq!(transposed, [("E0305", Some("it looks transposed".to_owned()))]);
    let zero = bound(|n, d, s| keep(d, if n.ends_with("0.w1.weight") { vec![0, 4] } else { s }));
    assert_eq!(zero[0].0, "E0305");
    let wide = bound(|n, _, s| keep(if n.ends_with("gate.weight") { "F32" } else { "BF16" }, s));
    assert_eq!(wide[0].0, "W0301");
}
