//! The text form of graphs: prints and parses exactly.
//!
//! ```text
//! moe.graph @qwen3_moe {
//!   weights {
//!     gate.weight: bf16[128, 2048] from "{p}gate.weight"
//!   }
//!   %x = input "x" : bf16[T, 2048]
//!   %l = linear %x {w = "gate.weight"} : bf16[T, 128] round bf16
//!   %q = select %l {rule = "topk", k = 8} : route[T, 8 of 128]
//!   return topk_indices = %q.idx
//! }
//! ```
//!
//! The type of a rounded value is the type that it is rounded to. A weight without `from` is stored under its own name. Sizes that differ between experts are
//! lists: `f32[(12, 3, 0), 16]`. A kernel holds its body in braces; `use` lists the weights that
//! it shares with the graph around it. `//` starts a comment.

mod lex;
mod parse;
mod print;
mod types;

pub use parse::parse;
pub use print::print;

/// Whether a name needs no quotes. Names that end like a part of a route do.
fn is_bare(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.')
        && !name.ends_with(".idx")
        && !name.ends_with(".w")
}

/// Whether a key, output or weight needs no quotes: as names, but no number.
fn is_word(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.')
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
}
