//! The `moec` binary: the only crate that prints, exits or reads the environment.

mod args;
mod cmd;
mod codes;
mod context;
mod failure;
mod render;
mod wanted;

use args::{Cli, Command};
use clap::Parser as _;
use context::Context;
use failure::Failure;
use std::process::ExitCode;

fn main() -> ExitCode {
    moec::interrupt::watch();
    std::panic::set_hook(Box::new(|info| {
        let text = format!(
            "error: {info}\n  = note: this is a bug in moec {}\n  = help: report it with the command line and the model that shows it\n",
            env!("CARGO_PKG_VERSION")
        );
        // When stderr is closed there is nobody to tell.
        let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), text.as_bytes());
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe is no failure of ours.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let cx = Context::new(&cli.global);
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&cx, cli.command))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            cx.failure(&failure);
            ExitCode::from(failure.exit_code())
        }
        Err(_) => {
            moec::files::remove_unfinished();
            ExitCode::from(101)
        }
    }
}

fn run(cx: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Compile(args) => cmd::compile::run(cx, &args),
        Command::Check(args) => cmd::check::run(cx, &args),
        Command::Verify(args) => cmd::verify::run(cx, &args),
        Command::Run(args) => cmd::run::run(cx, &args),
        Command::Bench(args) => cmd::bench::run(cx, &args),
        Command::Plan(args) => cmd::plan::run(cx, &args),
        Command::Place(args) => cmd::place::run(cx, &args),
        Command::Inspect(args) => cmd::inspect::run(cx, &args),
        Command::Opt(args) => cmd::opt::run(cx, &args),
        Command::List(args) => cmd::list::run(cx, &args),
        Command::Explain(args) => cmd::explain::run(cx, &args),
        Command::Doctor => cmd::doctor::run(cx),
        Command::Completions(args) => cmd::completions::run(cx, &args),
    }
}
