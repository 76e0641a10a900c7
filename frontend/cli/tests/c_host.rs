//! The generated C library: built and run with the C compilers of this machine, on the interpreter's numbers.

#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

mod support;

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{fs, path::Path, process::Command};
use support::{TINY, moec_in};

const TOKENS: usize = 11;
const HIDDEN: usize = 48;

fn run(command: &mut Command) {
    let output = command.output().expect("the compiler starts");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{text}");
    assert_eq!(text, "", "{command:?}");
}

fn moec(folder: &Path, line: &str) {
    let done = moec_in(folder, &line.split_whitespace().collect::<Vec<_>>(), "");
    assert_eq!(done.code, 0, "{line}\n{}{}", done.out, done.err);
}

fn present(compiler: &str) -> bool {
    let found = Command::new(compiler).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped {compiler}: not on this machine");
    }
    found
}

/// An artefact, its packed weights, and rows with the results that the runtime and the interpreter agree on.
fn artefact(folder: &Path) {
    fs::write(folder.join("config.json"), TINY).expect("is written");
    moec(folder, "compile config.json -q -o out --target cpu");
    let rows: Vec<u8> =
        (0..TOKENS * HIDDEN).flat_map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0).to_le_bytes()).collect();
    fs::write(folder.join("inputs.bin"), &rows).expect("is written");
    let view = TensorView::new(Dtype::F32, vec![TOKENS, HIDDEN], &rows).expect("a tensor");
    let file = safetensors::serialize([("hidden_states", view)], None).expect("a file");
    fs::write(folder.join("x.safetensors"), file).expect("is written");
    moec(
        folder,
        "run out -q --weights random:7 --input x.safetensors --compare -o y.safetensors --save-weights weights.bin",
    );
}

#[test]
fn the_example_host_gives_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    artefact(folder);
    let file = fs::read(folder.join("y.safetensors")).expect("is read");
    let file = SafeTensors::deserialize(&file).expect("a file");
    let expected = file.tensor("output").expect("the output").data().to_vec();
    for (compiler, standard) in [("gcc", "c11"), ("clang", "c11")] {
        if !present(compiler) {
            continue;
        }
        run(Command::new(compiler)
            .args(["-O2", "-Wall", "-Wextra", "-Werror", &format!("-std={standard}"), "example.c", "-I.", "-L."])
            .args(["-lmixtral", "-lpthread", "-lm", "-o", "example"])
            .current_dir(folder.join("out")));
        run(Command::new("out/example")
            .args(["weights.bin", "inputs.bin", "outputs.bin", &TOKENS.to_string()])
            .current_dir(folder));
        let got = fs::read(folder.join("outputs.bin")).expect("is read");
        assert!(got == expected, "the C host and the runtime differ");
        let status = Command::new("out/example").args(["x", "y"]).current_dir(folder).status().expect("runs");
        assert_eq!(status.code(), Some(2));
    }
}

#[test]
fn headers_are_c99_and_cxx17_and_builds_link_side_by_side() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    fs::write(folder.join("config.json"), TINY).expect("is written");
    moec(folder, "compile config.json -q -o one --target cpu");
    fs::write(folder.join("config.json"), TINY.replace("\"intermediate_size\": 40", "\"intermediate_size\": 56"))
        .expect("is written");
    moec(folder, "compile config.json -q -o two --target cpu");
    // Two builds of one model in one program: each file of C sees its own.
    for (which, main) in [
        ("one", ""),
        (
            "two",
            "#include <stdio.h>\nuint64_t other(void);\nint main(void) { printf(\"%d\\n\", other() != mixtral_weights_bytes()); return 0; }\n",
        ),
    ] {
        let own = if main.is_empty() {
            "uint64_t other(void);\nuint64_t other(void) { return mixtral_weights_bytes(); }\n"
        } else {
            main
        };
        fs::write(folder.join(format!("{which}.c")), format!("#include \"mixtral.h\"\n{own}")).expect("is written");
    }
    for compiler in ["gcc", "clang"] {
        if !present(compiler) {
            continue;
        }
        for which in ["one", "two"] {
            run(Command::new(compiler)
                .args(["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-c", &format!("{which}.c")])
                .args([format!("-I{which}")])
                .current_dir(folder));
        }
        run(Command::new(compiler)
            .args(["one.o", "two.o", "one/libmixtral.a", "two/libmixtral.a", "-lpthread", "-lm", "-o", "both"])
            .current_dir(folder));
        let output = Command::new("./both").current_dir(folder).output().expect("runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n");
        let cxx = if compiler == "gcc" { "g++" } else { "clang++" };
        fs::write(folder.join("all.cpp"), "#include \"mixtral.h\"\n").expect("is written");
        if present(cxx) {
            run(Command::new(cxx)
                .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-Ione", "all.cpp"])
                .current_dir(folder));
        }
    }
}
