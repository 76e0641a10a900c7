//! Settings of the integer solver shared by all programs.

use microlp::{SolveOptions, Variable};
use std::time::Duration;

/// A time limit and a known solution to start from.
pub(crate) fn options(limit: Duration, hint: Vec<(Variable, f64)>) -> SolveOptions {
    let mut options = SolveOptions::default();
    options.time_limit = Some(limit);
    options.warm_start = Some(hint);
    options
}
