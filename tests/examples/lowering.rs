//! Writes `docs/lowering.md`: what composed forms cost beside plain layers, counted and timed on this machine.

use moec_tests::{
    gallery::{Numbers, data},
    lowering::{pairs, seconds, table},
};
use std::{fmt::Write as _, path::Path};

const HEAD: &str = "# What compositions cost

A layer written with the operations of the graph format must cost no more than the same layer written as one plain
mixture of experts. `tests/tests/lowering.rs` holds each lowering requirement to it, by kernels, memory and counts;
the table below holds forms whose arithmetic is that of the plain layer (width 128, inner width 96, 8 experts, 2 per
token, f32) to it.

`cargo run -p moec-tests --example lowering` writes this page.

## Counted

32 tokens on the simulator, sm_80: warp instructions, bytes read and written in global memory, launches. A test
compares these figures with the compiler's.

<!-- counts -->
";

fn main() -> std::io::Result<()> {
    let mut page = HEAD.to_owned() + &table() + "<!-- end -->\n";
    page += "\n## Timed\n\nMedian of 101 calls with 256 tokens on one core, one machine, one run; for orientation only.\n\n";
    page += "| form | us | plain us | ratio |\n| --- | --- | --- | --- |\n";
    for pair in pairs() {
        let of = |form: &moec_tests::forms::Form| {
            let graph = form.graph();
            seconds(&graph, &data(&graph, 256, 1, Numbers::Small)) * 1e6
        };
        // Between two runs of the plain layer, so that a change of the clock is seen.
        let (before, composed, after) = (of(&pair.plain), of(&pair.composed), of(&pair.plain));
        let plain = f64::min(before, after);
        let _ = writeln!(page, "| {} | {composed:.0} | {plain:.0} | {:.2} |", pair.name, composed / plain);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/lowering.md");
    std::fs::create_dir_all(path.parent().expect("docs is a folder"))?;
    std::fs::write(path, page)
}
