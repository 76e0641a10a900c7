//! Runs every case file of `tests/ptx-cases` under several seeds.

use moec_sim::case::Case;
use moec_sim::{Error, Options};
use std::path::Path;

#[test]
fn every_case_passes_under_every_seed() -> Result<(), Error> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/ptx-cases");
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .map_err(|e| Error::Case(e.to_string()))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "safetensors"))
        .collect();
    files.sort();
    assert!(files.len() >= 58, "only {} cases in {}", files.len(), folder.display());
    let mut failures = Vec::new();
    for file in &files {
        let bytes = std::fs::read(file).map_err(|e| Error::Case(e.to_string()))?;
        let case = match Case::read(&bytes) {
            Ok(c) => c,
            Err(e) => {
                failures.push(format!("{}: {e}", file.display()));
                continue;
            }
        };
        for seed in 0..4 {
            match case.run(&Options { seed, max_instructions: 50_000_000, ..Options::default() }) {
                Ok(o) => failures.extend(o.failure.map(|f| format!("{} (seed {seed}): {f}", o.case))),
                Err(e) => failures.push(format!("{} (seed {seed}): {e}", case.name())),
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}
