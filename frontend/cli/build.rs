//! Lists the pages of `codes/` for `moec explain`, and the graphs of research architectures for
//! `moec list families --systems`.

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let write = |name: &str, table: String| fs::write(out.join(name), table).expect("the build folder can be written");
    write("pages.rs", table(&here.join("codes"), "md"));
    write("systems.rs", table(&here.join("../../tests/models/systems"), "json"));
}

/// Files of a folder as a list of their stems and contents.
fn table(folder: &Path, extension: &str) -> String {
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .expect("the folder is part of the source")
        .map(|entry| entry.expect("its entries can be read").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    let mut table = String::from("&[\n");
    for file in files {
        let stem = file.file_stem().expect("a file has a name").to_string_lossy().into_owned();
        writeln!(table, "    ({stem:?}, include_str!({:?})),", file.display().to_string())
            .expect("writing to a string cannot fail");
    }
    table.push_str("]\n");
    table
}
