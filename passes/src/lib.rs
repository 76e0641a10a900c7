//! Passes: graph to graph, until every op is part of a kernel.
//!
//! The pipeline is one list ([`PIPELINE`]). Each pass is one file with one name; the manager
//! verifies the graph after each and can dump it. No pass changes what a graph means.

mod clean_up;
mod fold_parallelism;
mod fuse_batch;
mod fuse_combine;
mod fuse_dense;
mod fuse_expert_ffn;
mod fuse_gating;
mod fuse_rows;
mod manager;
mod plan_dispatch;
mod region;
mod share_base;
mod split_banks;
mod split_einsums;
mod split_series;
mod split_widths;
mod stages;

pub use fold_parallelism::{FOLD, Fold, FoldError, fold_parallelism};
pub use manager::{Changed, Dump, Failure, Outcome, PassCx, Remark, Timing, run, run_named};
pub use stages::{CutError, Move, Rows, Stage, stages};

use moec_ir::Graph;

/// A pass: its name is the name of its file, its dump, its timing row and its remarks.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Name, with dashes.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// The pass.
    pub run: fn(&mut Graph, &PassCx<'_>) -> Changed,
}

/// All passes, in the order in which they run.
pub const PIPELINE: &[Pass] = &[
    clean_up::PASS,
    split_einsums::PASS,
    fuse_gating::PASS,
    split_widths::PASS,
    split_series::PASS,
    split_banks::PASS,
    share_base::PASS,
    plan_dispatch::PASS,
    fuse_expert_ffn::PASS,
    fuse_dense::PASS,
    fuse_combine::PASS,
    fuse_rows::PASS,
    fuse_batch::PASS,
];
