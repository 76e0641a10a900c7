//! `moec completions`: scripts for shells, from the same description as the parser.

use crate::{
    args::{Cli, Completions},
    context::Context,
    failure::Failure,
};
use clap::CommandFactory as _;

/// Writes the script.
pub(crate) fn run(cx: &Context, args: &Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "moec", &mut script);
    cx.result(script)
}
