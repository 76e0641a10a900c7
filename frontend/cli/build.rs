//! Lists the pages of `codes/` for `moec explain`.

use std::{env, fmt::Write as _, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=codes");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let folder = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("codes");
    let mut pages: Vec<PathBuf> = fs::read_dir(&folder)
        .expect("the folder of codes is part of the source")
        .map(|entry| entry.expect("its entries can be read").path())
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect();
    pages.sort();
    let mut table = String::from("&[\n");
    for page in pages {
        let code = page.file_stem().expect("a page has a name").to_string_lossy().into_owned();
        writeln!(table, "    ({code:?}, include_str!({:?})),", page.display().to_string())
            .expect("writing to a string cannot fail");
    }
    table.push_str("]\n");
    fs::write(PathBuf::from(variable("OUT_DIR")).join("pages.rs"), table).expect("cargo gives a folder to write to");
}
