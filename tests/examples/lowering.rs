//! Writes `docs/lowering.md`: what composed forms cost beside plain layers, counted and timed on this machine.

use moec_tests::{
    gallery::{Numbers, data},
    lowering::{pairs, seconds, table},
};
use std::{fmt::Write as _, path::Path};

const HEAD: &str = "# What compositions cost

A layer written with the operations of the graph format must cost no more than the same layer written as one plain
mixture of experts.

## Requirements

Each has a test in `tests/tests/lowering.rs`, which looks at kernels, memory, or counts of the simulator.

| | requirement | what its test finds |
| --- | --- | --- |
| 1 | scores, adjust, select and weigh are one kernel | 48 chains of rules: one gate, 5 kernels a layer; with 128 experts no value has a number for each of them |
| 2 | rows are not padded, empty experts are free | all rows to one expert: no more operations than even rows; 60 experts without rows: equal operations |
| 2 | null experts are free, identity is folded | half of the slots null: at most 0.6 of the operations, all of them: at most 0.05; no kernel more |
| 3 | the base product runs once per token | 3 products for 4 slots, as for 1; in all less than 0.8 of a plain layer |
| 4 | a shared factor runs once per token and group | 2 groups: 1/2 of 4 groups, 1 group: 1/4, exactly; packed bytes within 5 % of the factors |
| 5 | work follows the widths | one expert of four at half of all widths: 0.45 to 0.55 of the operations; a quarter: 0.2 to 0.3 |
| 6 | product keys form nothing of the square | 4096 experts: less memory than one number each, fewer bytes read than the tables |
| 7 | Monet sums over i, then over j | two products, no value with both axes of the gates |
| 8 | blocks that are not chosen are not read | 1 block of 8: less than 1/3 of the bytes of all 8 |
| 9 | a segment is routed once | 64 tokens in segments of 4: a gate of 16 rows |
| 10 | a route of an earlier value needs nothing of the layer | all gates read inputs alone, and run first |
| 11 | a loop uses the same weights | 3 passes: the packed bank of 1 |
| 12 | the narrow value is dispatched | what crosses to experts and back has the width of the bottleneck |
| 13 | codes are decoded in the kernel | 2, 4 and 8 bits: packed bytes are codes and scales, exactly; bytes read at most 1.1 of them |

## Counted

Forms whose arithmetic is that of a plain layer (width 128, inner width 96, 8 experts, 2 per token, f32) beside it: 32
tokens on the simulator, sm_80: warp instructions, bytes read and written in global memory, launches. A test fails
beyond 1.02 of these figures, and beyond 1.05 of the plain layer.

<!-- counts -->
";

fn main() -> std::io::Result<()> {
    let mut page = HEAD.to_owned() + &table().0 + "<!-- end -->\n";
    page += "\n## Timed\n\nThe same on one core with 256 tokens: the shortest of 1800 calls with weights at twelve places, in turn \
             with those of the plain\nlayer (`cargo run --release -p moec-tests --example lowering` writes this page).\n\n";
    page += "| form | us | plain us | ratio |\n| --- | --- | --- | --- |\n";
    for pair in pairs() {
        let (composed, plain) = (pair.composed.graph(), pair.plain.graph());
        let data = [&composed, &plain].map(|graph| data(graph, 256, 1, Numbers::Small));
        let [us, of] = seconds([(&composed, &data[0]), (&plain, &data[1])]).map(|s| s * 1e6);
        let _ = writeln!(page, "| {} | {us:.0} | {of:.0} | {:.2} |", pair.name, us / of);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/lowering.md");
    std::fs::create_dir_all(path.parent().expect("docs is a folder"))?;
    std::fs::write(path, page)
}
