//! The generated C library: built, linked and run with the C compilers of this machine.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use moec_abi::{DType, Program, embed, header};
use moec_runtime::{InMemory, packed_layer};
use std::{
    fmt::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};
use support::*;

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{text}");
    text
}

fn present(compiler: &str) -> bool {
    let found = Command::new(compiler).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped {compiler}: not on this machine");
    }
    found
}

/// The launcher object, compiled as its README says.
fn launcher() -> &'static [u8] {
    static OBJECT: OnceLock<Vec<u8>> = OnceLock::new();
    OBJECT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let object = folder.path().join("launch.o");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/src/lib.rs");
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
        let flags = "--edition 2024 --crate-name moec_launch --crate-type staticlib --emit obj -C panic=abort \
                     -C opt-level=3 -C codegen-units=1 -C relocation-model=pic --cfg moec_standalone";
        run(Command::new(rustc).args(flags.split_whitespace()).arg(source).arg("-o").arg(&object));
        std::fs::read(object).unwrap()
    })
}

/// Writes `libNAME.a` and `NAME.h` for the small program under this name.
fn library(folder: &Path, name: &str) -> Program {
    let mut program = program("x86-64");
    program.name = name.into();
    let words = moec_abi::encode(&program).unwrap();
    let mut code = KERNELS_C.replace("tiny_", &format!("{name}_"));
    let words: Vec<String> = words.iter().map(|w| format!("{w}u")).collect();
    let _ = writeln!(code, "const uint64_t {name}_program[] = {{{}}};", words.join(","));
    let _ = writeln!(
        code,
        "typedef void kernel(const uint64_t *, uint64_t, uint64_t, void *);\n\
         kernel *const {name}_kernels[] = {{{name}_up, {name}_sum, {name}_add}};"
    );
    let file = |suffix: &str| folder.join(format!("{name}{suffix}"));
    std::fs::write(file("_code.c"), code).unwrap();
    std::fs::write(file("_launch.o"), embed::rename(launcher(), name).unwrap()).unwrap();
    std::fs::write(file(".h"), header::header(&program)).unwrap();
    let flags = ["-O2", "-fPIC", "-ffp-contract=off", "-c"];
    run(Command::new("cc").args(flags).arg(file("_code.c")).arg("-o").arg(file("_code.o")));
    let archive = folder.join(format!("lib{name}.a"));
    run(Command::new("ar").arg("rcs").arg(archive).arg(file("_code.o")).arg(file("_launch.o")));
    program
}

const HOST: &str = r#"
#include "tiny.h"
#include "other.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define CHECK(x) do { if (!(x)) { printf("line %d: %s\n", __LINE__, #x); return 1; } } while (0)
static float number(uint64_t i) { return (float)((i * 2654435761u >> 7) % 2001) / 1000.0f - 1.0f; }
static void *bytes64(uint64_t n) {
    void *p = NULL;
    if (posix_memalign(&p, 64, n ? n : 1)) exit(2);
    memset(p, 0xaa, n ? n : 1);
    return p;
}
int main(int argc, char **argv) {
    enum { T = 77, IN = 24, OUT = 10 };
    static float w[OUT * IN], x[T * IN], y[T * OUT], z[T * OUT];
    const uint64_t shape[2] = {OUT, IN};
    tiny_tensor tensor = {w, 1, 2, NULL};
    tiny_handle *handle = NULL;
    other_handle *second = NULL;
    for (int i = 0; i < OUT * IN; i++) w[i] = number(i);
    for (int i = 0; i < T * IN; i++) x[i] = number(i + 5);
    tensor.shape = shape;

    CHECK(tiny_create(3, NULL) == TINY_NULL_POINTER);
    CHECK(tiny_create(3, &handle) == TINY_OK && handle != NULL);
    CHECK(other_create(0, &second) == OTHER_OK);
    uint64_t wb = tiny_weights_bytes(), sb = tiny_workspace_bytes(T);
    CHECK(tiny_max_tokens() == 1000 && tiny_workspace_bytes(1001) == UINT64_MAX);
    char *weights = bytes64(wb), *workspace = bytes64(sb);
    tiny_io io = {x, y};

    CHECK(tiny_launch(handle, 0, NULL, NULL, 0, NULL) == TINY_OK);
    CHECK(tiny_launch(handle, T, &io, workspace, sb, NULL) == TINY_NOT_BOUND);
    CHECK(tiny_bind(handle, weights, wb) == TINY_WEIGHTS_MISMATCH);
    CHECK(tiny_pack_begin(NULL, wb) == TINY_NULL_POINTER);
    CHECK(tiny_pack_begin(weights + 8, wb) == TINY_MISALIGNED);
    CHECK(tiny_pack_begin(weights, wb - 1) == TINY_WEIGHTS_MISMATCH);
    CHECK(tiny_pack_begin(weights, wb) == TINY_OK);
    CHECK(tiny_bind(handle, weights, wb) == TINY_WEIGHTS_MISMATCH);
    tensor.rank = 1;
    CHECK(tiny_pack_w(&tensor, weights, wb) == TINY_TENSOR_MISMATCH);
    tensor.rank = 2; tensor.dtype = 6;
    CHECK(tiny_pack_w(&tensor, weights, wb) == TINY_PACK_UNSUPPORTED);
    tensor.dtype = 1;
    CHECK(tiny_pack_w(NULL, weights, wb) == TINY_NULL_POINTER);
    CHECK(tiny_pack(9, &tensor, 1, weights, wb) == TINY_BAD_PROGRAM);
    CHECK(tiny_pack_w(&tensor, weights, wb) == TINY_OK);
    if (argc > 1) {
        FILE *f = fopen(argv[1], "rb");
        char *packed = bytes64(wb);
        CHECK(f && fread(packed, 1, wb, f) == wb && fgetc(f) == EOF);
        fclose(f);
        CHECK(memcmp(packed, weights, wb) == 0);
        free(packed);
    }
    CHECK(tiny_bind(handle, weights, wb) == TINY_OK);
    CHECK(other_bind(second, weights, wb) == OTHER_OK);

    CHECK(tiny_launch(NULL, T, &io, workspace, sb, NULL) == TINY_NULL_POINTER);
    CHECK(tiny_launch(handle, 1001, &io, workspace, sb, NULL) == TINY_TOO_MANY_TOKENS);
    CHECK(tiny_launch(handle, T, NULL, workspace, sb, NULL) == TINY_NULL_POINTER);
    CHECK(tiny_launch(handle, T, &io, workspace, sb - 1, NULL) == TINY_WORKSPACE_TOO_SMALL);
    CHECK(tiny_launch(handle, T, &io, workspace + 4, sb, NULL) == TINY_MISALIGNED);
    CHECK(tiny_launch(handle, T, &io, NULL, sb, NULL) == TINY_NULL_POINTER);
    CHECK(tiny_launch(handle, T, &io, workspace, sb, &io) == TINY_STREAM);
    io.output = NULL;
    int status = tiny_launch(handle, T, &io, workspace, sb, NULL);
    CHECK((status & 255) == TINY_NULL_POINTER);
    CHECK(strcmp(tiny_status_text(status), "output output is null") == 0);
    io.output = (char *)y + 1;
    status = tiny_launch(handle, T, &io, workspace, sb, NULL);
    CHECK(strcmp(tiny_status_text(status), "output output is not aligned to 4 bytes") == 0);
    CHECK(strlen(tiny_status_text(TINY_BUSY)) > 0 && strcmp(tiny_status_text(-5), "unknown status") == 0);

    io.output = y;
    other_io io2 = {x, z};
    for (int round = 0; round < 3000; round++) {
        CHECK(tiny_launch(handle, T, &io, workspace, sb, NULL) == TINY_OK);
        CHECK(other_launch(second, T, &io2, workspace, sb, NULL) == OTHER_OK);
        CHECK(memcmp(y, z, sizeof y) == 0);
        memset(workspace, 0xff, sb);
        memset(z, 0, sizeof z);
    }
    for (int i = 0; i < T * OUT; i++) printf("%a\n", y[i]);
    tiny_destroy(handle);
    tiny_destroy(NULL);
    other_destroy(second);
    free(weights);
    free(workspace);
    return 0;
}
"#;

fn host(folder: &Path) -> PathBuf {
    let source = folder.join("host.c");
    std::fs::write(&source, HOST).unwrap();
    source
}

#[test]
fn two_libraries_link_into_one_host_and_run() {
    let folder = tempfile::tempdir().unwrap();
    let program = library(folder.path(), "tiny");
    library(folder.path(), "other");
    let w: Vec<f32> = (0..IN * OUT).map(number).collect();
    let mut tensors = InMemory::new();
    tensors.insert("l3.w", DType::F32, vec![OUT, IN], bytes(&w)).unwrap();
    let packed = folder.path().join("weights.bin");
    std::fs::write(&packed, packed_layer(&program, "l3.", &tensors).unwrap()).unwrap();
    let x: Vec<f32> = (0..77 * IN).map(|i| number(i + 5)).collect();
    let wanted = reference(77, &x, &w);
    for compiler in ["gcc", "clang"] {
        if !present(compiler) {
            continue;
        }
        let program = folder.path().join(format!("host-{compiler}"));
        let flags = ["-std=gnu99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"];
        let mut cc = Command::new(compiler);
        cc.args(flags).arg(host(folder.path())).arg("-o").arg(&program);
        run(cc.arg("-L").arg(folder.path()).args(["-ltiny", "-lother", "-lpthread"]));
        let text = run(Command::new(&program).arg(&packed));
        let got: Vec<f32> = text.lines().map(hexadecimal).collect();
        assert_eq!(got, wanted, "{compiler}");
    }
}

/// A number as `%a` prints it.
fn hexadecimal(text: &str) -> f32 {
    let (negative, rest) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (digits, exponent) = rest.strip_prefix("0x").unwrap().split_once('p').unwrap();
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let mantissa = u64::from_str_radix(&format!("{whole}{fraction}"), 16).unwrap() as f64;
    let value = mantissa * 2f64.powi(exponent.parse::<i32>().unwrap() - 4 * fraction.len() as i32);
    (if negative { -value } else { value }) as f32
}

#[test]
fn the_header_is_also_cpp() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tiny.h"), header::header(&program("x86-64"))).unwrap();
    let source = folder.path().join("host.cpp");
    std::fs::write(
        &source,
        "#include \"tiny.h\"\n#include \"tiny.h\"\nint main() { return tiny_status_text(TINY_OK) == nullptr; }\n",
    )
    .unwrap();
    for compiler in ["g++", "clang++"] {
        if present(compiler) {
            let flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "-c", "-o", "/dev/null"];
            run(Command::new(compiler).args(flags).arg(&source));
        }
    }
}

#[test]
fn the_launcher_cannot_panic_and_needs_only_libc() {
    let folder = tempfile::tempdir().unwrap();
    let object = folder.path().join("launch.o");
    std::fs::write(&object, embed::rename(launcher(), "model_1").unwrap()).unwrap();
    let text = run(Command::new("nm").arg(&object));
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            ["U", name] => assert!(
                name.starts_with("pthread_")
                    || ["model_1_program", "model_1_kernels", "memcpy", "memset", "memmove", "free", "clock_gettime"]
                        .contains(name)
                    || ["posix_memalign", "sched_yield", "sigfillset", "sysconf"].contains(name),
                "{name} is not of libc, or a way to panic"
            ),
            [_, kind, name] if kind.chars().all(|c| c.is_ascii_uppercase()) => {
                assert!(name.starts_with("model_1_"), "{name} would clash");
            }
            _ => {}
        }
    }
}

#[test]
fn statuses_of_header_and_launcher_are_the_same() {
    let launcher: Vec<(&str, u32)> =
        moec_launch::status::Status::ALL.iter().map(|(status, name, _)| (*name, status.0.cast_unsigned())).collect();
    assert_eq!(header::statuses().collect::<Vec<_>>(), launcher);
}
