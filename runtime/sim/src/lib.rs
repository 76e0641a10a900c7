//! A PTX interpreter that runs kernels on the CPU, checks them and counts what they do.
//!
//! It executes the PTX that moec emits for sm_80, sm_89 and sm_90a, and PTX of other producers within the same
//! instruction set. An instruction it does not know is an error with its line, never skipped.
//!
//! ```
//! use moec_sim::{Arg, Launch, Memory, Module, Options, launch};
//!
//! let ptx = "
//! .version 8.0
//! .target sm_80
//! .address_size 64
//! .visible .entry double(.param .u64 x) {
//!   .reg .b32 %r<3>;
//!   .reg .b64 %rd<3>;
//!   ld.param.u64 %rd0, [x];
//!   mov.u32 %r0, %tid.x;
//!   mul.wide.u32 %rd1, %r0, 4;
//!   add.s64 %rd2, %rd0, %rd1;
//!   ld.global.u32 %r1, [%rd2];
//!   add.u32 %r2, %r1, %r1;
//!   st.global.u32 [%rd2], %r2;
//!   ret;
//! }";
//! let module = Module::parse(ptx)?;
//! let mut memory = Memory::new();
//! let x = memory.alloc(16, 256);
//! memory.write(x, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0])?;
//! let report = launch(
//!     &module,
//!     &mut memory,
//!     &Launch { entry: "double", grid: [1; 3], block: [4, 1, 1], cluster: [1; 3], dynamic_shared: 0, args: vec![Arg::U64(x)], dependent: false },
//!     &Options::default(),
//! )?;
//! assert!(report.findings.is_empty());
//! assert_eq!(memory.read(x, 16)?, [2, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0, 8, 0, 0, 0]);
//! # Ok::<(), moec_sim::Error>(())
//! ```
//!
//! The way of a module: [`lex`] to tokens, [`parse`] to the module as written, [`decode`] to compact instructions over
//! slots. The way of a launch: [`launch()`] lays out memory, and [`exec`] runs clusters of blocks. [`clock`] and
//! [`shadow`] are the race detector, [`num`] the number formats, [`mod@case`] the files that pair PTX with results.
//!
//! It does not model caches, timing, or which of several correct orders hardware picks.

pub mod case;
mod clock;
mod counts;
mod decode;
mod error;
mod exec;
mod launch;
mod lex;
mod memory;
mod module;
mod num;
mod op;
mod order;
mod parse;
mod report;
mod shadow;
mod space;
mod syntax;
mod tensormap;
mod together;

pub use error::Error;
pub use launch::{Arg, Lanes, Launch, Options, launch};
pub use memory::Memory;
pub use module::{EntryInfo, Module};
pub use report::{Counts, Finding, FindingKind, Report, Tally};
pub use tensormap::{MapType, Swizzle, TensorMapDesc};
