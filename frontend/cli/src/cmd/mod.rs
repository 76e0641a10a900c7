//! One file for each command.

pub(crate) mod bench;
pub(crate) mod check;
pub(crate) mod compile;
pub(crate) mod completions;
pub(crate) mod doctor;
mod emit;
pub(crate) mod explain;
pub(crate) mod inspect;
mod ir_dump;
pub(crate) mod list;
pub(crate) mod opt;
pub(crate) mod place;
pub(crate) mod plan;
pub(crate) mod run;
pub(crate) mod spread;
pub(crate) mod tune;
pub(crate) mod verify;
