//! Compiles the two objects that every generated C library holds: the launcher and the chooser.

use std::{env, path::PathBuf, process::Command};

const LAUNCH: &str = "../../runtime/launch/src";
const FORMAT: &str = "../../runtime/abi/src/format.rs";
const CHOOSE: &str = "launcher/choose.rs";

fn main() {
    println!("cargo::rerun-if-changed={LAUNCH}");
    println!("cargo::rerun-if-changed={FORMAT}");
    println!("cargo::rerun-if-changed={CHOOSE}");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let objects = [
        (format!("{LAUNCH}/lib.rs"), "moec_launch", "launch.o", &["--cfg", "moec_standalone"][..]),
        (CHOOSE.to_owned(), "moec_choose", "choose.o", &[]),
    ];
    for (source, name, object, more) in objects {
        // One object that needs libc alone; the flags are those of the launcher's README.
        let status = Command::new(variable("RUSTC"))
            .args(["--edition", "2024", "--crate-name", name, "--crate-type", "staticlib", "--emit", "obj"])
            .args(["-C", "panic=abort", "-C", "opt-level=3", "-C", "codegen-units=1", "-C", "relocation-model=pic"])
            .args(["--target", &variable("TARGET")])
            .args(more)
            .arg(&source)
            .arg("-o")
            .arg(out.join(object))
            .status();
        assert!(status.as_ref().is_ok_and(|s| s.success()), "compiling {source}: {status:?}");
    }
}
