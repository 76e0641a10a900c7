//! Runs kernels of another architecture: a program without a library, linked once for all kernels, that reads the
//! memory of a launch from its input, calls a kernel and writes the result, under `qemu-user`.

use crate::{harness::Memory, kernel::Argument};
use inkwell::{
    OptimizationLevel,
    context::Context,
    targets::{CodeModel, FileType, InitializationConfig, RelocMode, Target as LlvmTarget, TargetTriple},
};
use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

/// Where the memory of a launch lies in the program.
const BASE: u64 = 0x1000_0000;
/// Its size.
const BYTES: u64 = 256 << 20;
/// Numbers before the arguments: kernel, first item, last item, items at a time, scratch, result, bytes of the result.
const HEAD: u64 = 64;

const START: &str = "
.globl _start
_start:
    movz x20, #0x1000, lsl #16
    mov x21, x20
1:  mov x0, #0
    mov x1, x21
    movz x2, #0x10, lsl #16
    mov x8, #63
    svc #0
    cmp x0, #0
    b.le 2f
    add x21, x21, x0
    b 1b
2:  ldr x9, [x20]
    adrp x10, table
    add x10, x10, :lo12:table
    ldr x26, [x10, x9, lsl #3]
    ldp x23, x24, [x20, #8]
    ldr x25, [x20, #24]
3:  cmp x23, x24
    b.ge 4f
    add x27, x23, x25
    cmp x27, x24
    csel x27, x27, x24, lt
    add x0, x20, #64
    mov x1, x23
    mov x2, x27
    ldr x3, [x20, #32]
    blr x26
    mov x23, x27
    b 3b
4:  ldp x21, x22, [x20, #40]
5:  cbz x22, 6f
    mov x0, #1
    mov x1, x21
    mov x2, x22
    mov x8, #64
    svc #0
    add x21, x21, x0
    sub x22, x22, x0
    b 5b
6:  mov x0, #0
    mov x8, #93
    svc #0
";

/// Whether there is an emulator.
pub(crate) fn is_here() -> bool {
    Command::new("qemu-aarch64").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// A linked program with some kernels.
pub(crate) struct Program {
    folder: tempfile::TempDir,
    kernels: Vec<String>,
}

impl Program {
    /// Links an object with these kernels.
    pub(crate) fn new(object: &[u8], kernels: Vec<String>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let table: Vec<_> = kernels.iter().map(|k| format!(".quad {k}\n")).collect();
        let memory = format!(".section .launch,\"aw\",%nobits\n.space {BYTES}\n");
        let start = format!("{START}\n.data\n.balign 8\ntable:\n{}\n{memory}", table.concat());
        std::fs::write(path("kernels.o"), object).expect("object written");
        std::fs::write(path("start.o"), assemble(&start)).expect("object written");
        let linked = Command::new(linker())
            .args(["-flavor", "gnu", "-static", "-z", "norelro"])
            .arg(format!("--section-start=.launch={BASE:#x}"))
            .arg("-o")
            .args([path("program"), path("start.o"), path("kernels.o")])
            .status()
            .expect("the linker of the Rust tool chain runs");
        assert!(linked.success(), "kernels need symbols that are not there");
        Self { folder, kernels }
    }

    /// Runs all items of a kernel, `grain` at a time.
    pub(crate) fn run(&self, kernel: &str, args: &[Argument<'_>], items: u64, grain: u64, scratch: &Memory) {
        let mut image = vec![0_u8; (HEAD + 8 * args.len() as u64) as usize];
        let mut place = |memory: &Memory| {
            // No two buffers share a line.
            image.resize(image.len().next_multiple_of(64) + 64, 0);
            let at = BASE + image.len() as u64;
            image.extend_from_slice(memory.slice::<u8>());
            at
        };
        let scratch = place(scratch);
        let mut out = None;
        let values: Vec<u64> = args
            .iter()
            .map(|arg| match arg {
                Argument::Read(memory) => place(memory),
                Argument::Write(memory) => {
                    let at = place(memory);
                    out = Some((at, *memory));
                    at
                }
                Argument::Value(value) => *value,
            })
            .collect();
        let (at, out) = out.expect("a kernel writes something");
        let number = self.kernels.iter().position(|k| k == kernel).expect("a kernel of the program") as u64;
        let head = [number, 0, items, grain, scratch, at, out.slice::<u8>().len() as u64, 0];
        for (i, value) in head.iter().chain(&values).enumerate() {
            image[i * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        assert!((image.len() as u64) < BYTES, "the launch is too large for the program");
        let mut child = Command::new("qemu-aarch64")
            .arg(self.folder.path().join("program"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the emulator runs");
        let mut input = child.stdin.take().expect("a pipe");
        // All of it is read before anything is written.
        input.write_all(&image).expect("the program reads");
        drop(input);
        let result = child.wait_with_output().expect("the program ends");
        assert!(result.status.success(), "{kernel}: {}", result.status);
        out.replace(&result.stdout);
    }
}

fn assemble(text: &str) -> Vec<u8> {
    LlvmTarget::initialize_aarch64(&InitializationConfig::default());
    let context = Context::create();
    let module = context.create_module("start");
    module.set_inline_assembly(text);
    let triple = TargetTriple::create("aarch64-unknown-linux-gnu");
    let machine = LlvmTarget::from_triple(&triple)
        .expect("the target is there")
        .create_target_machine(&triple, "generic", "", OptimizationLevel::None, RelocMode::Static, CodeModel::Default)
        .expect("the machine is there");
    module.set_triple(&triple);
    machine.write_to_memory_buffer(&module, FileType::Object).expect("assembles").as_slice().to_vec()
}

/// The linker that comes with Rust.
fn linker() -> PathBuf {
    let output = Command::new("rustc").args(["--print", "target-libdir"]).output().expect("rustc runs");
    let libraries = PathBuf::from(String::from_utf8(output.stdout).expect("UTF-8").trim());
    libraries.with_file_name("bin").join("rust-lld")
}
