//! Pages that are made from the code say what the code does. `MOEC_BLESS=1` writes them anew.

use moec_tests::{catalog, gallery::files, lowering};
use std::path::Path;

/// The page must be what the file holds.
fn kept(name: &str, page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    if std::env::var_os("MOEC_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().expect("docs is a folder")).expect("the folder can be made");
        std::fs::write(&path, page).expect("the page can be written");
        return;
    }
    let held = std::fs::read_to_string(&path).expect("run with MOEC_BLESS=1 first");
    let differs = held.lines().zip(page.lines()).find(|(a, b)| a != b);
    assert!(held == page, "docs/{name} is not what the code says; MOEC_BLESS=1 writes it anew\n{differs:?}");
}

#[test]
fn systems() {
    kept("systems.md", &catalog::page());
}

#[test]
fn every_graph_names_its_file_and_says_what_is_special() {
    for path in files("models/systems", "json") {
        let text = std::fs::read_to_string(&path).expect("the file can be read");
        let about = moec_ir::json::About::of(&text).unwrap_or_else(|| panic!("{} has no `about`", path.display()));
        assert!(!about.special.is_empty() && !about.special.ends_with('.'), "{}", path.display());
        let value: serde_json::Value = serde_json::from_str(&text).expect("the file is JSON");
        assert_eq!(value["name"], moec_tests::gallery::stem(&path), "the name of a graph is that of its file");
    }
}

/// The counted part of `docs/lowering.md`; the timed part is written by the example `lowering`.
#[test]
fn compositions_cost_no_more_than_a_plain_layer() {
    let (table, worst) = lowering::table();
    assert!(worst <= 1.05, "a form costs {worst} of the plain layer\n{table}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/lowering.md");
    let held = std::fs::read_to_string(&path).expect("the example `lowering` writes the page");
    let (Some((head, rest)), Some((_, tail))) = (held.split_once("<!-- counts -->\n"), held.split_once("<!-- end -->"))
    else {
        panic!("docs/lowering.md has no counts")
    };
    if std::env::var_os("MOEC_BLESS").is_some() {
        let page = format!("{head}<!-- counts -->\n{table}<!-- end -->{tail}");
        return std::fs::write(&path, page).expect("the page can be written");
    }
    // Kernels may become better without a word here; they may not become worse by more than this.
    let figures = |line: &str| {
        let cells: Vec<String> = line.split('|').map(|cell| cell.trim().to_owned()).collect();
        let number = |i: usize| cells.get(i).and_then(|c| c.parse::<f64>().ok());
        (cells.get(1).cloned(), number(2).zip(number(4)))
    };
    for (now, before) in table.lines().zip(rest.lines()) {
        let ((name, now), (held, before)) = (figures(now), figures(before));
        assert_eq!(name, held, "docs/lowering.md lists other forms; MOEC_BLESS=1 writes it anew\n{table}");
        let (Some((instructions, bytes)), Some((most, moved))) = (now, before) else { continue };
        assert!(
            instructions <= most * 1.02 && bytes <= moved * 1.02,
            "{name:?} costs more than docs/lowering.md says; MOEC_BLESS=1 writes it anew\n{table}"
        );
    }
}
