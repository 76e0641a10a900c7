//! IR around passes, for `--print-ir`.

use crate::{context::Context, failure::Failure};
use moec::{
    ir::nearest,
    passes::{Dump, FOLD, Outcome, PIPELINE},
};

/// What is printed.
enum When {
    Before(String),
    After(String),
    All,
    Changed,
}

/// Reads the values of `--print-ir`.
fn parse(texts: &[String]) -> Result<Vec<When>, Failure> {
    let known: Vec<&str> = PIPELINE.iter().map(|p| p.name).collect();
    let pass = |name: &str| {
        // Runs with --plan only, before the others.
        if known.contains(&name) || name == FOLD {
            return Ok(name.to_owned());
        }
        Err(unknown_pass(name))
    };
    texts
        .iter()
        .map(|text| match text.split_once('=').unwrap_or((text, "")) {
            ("before", name) => pass(name).map(When::Before),
            ("after", name) => pass(name).map(When::After),
            ("all", "") => Ok(When::All),
            ("changed", "") => Ok(When::Changed),
            _ => {
                Err(Failure::Usage(format!("`--print-ir {text}` is not known: before=PASS, after=PASS, all, changed")))
            }
        })
        .collect()
}

/// There is no pass of this name.
pub(crate) fn unknown_pass(name: &str) -> Failure {
    let known: Vec<&str> = PIPELINE.iter().map(|p| p.name).collect();
    let near = nearest(name, known.iter().copied()).map_or_else(String::new, |n| format!("; the nearest is `{n}`"));
    Failure::Usage(format!("there is no pass `{name}`: {}{near}", known.join(", ")))
}

/// Checks the values before anything runs.
pub(crate) fn check(texts: &[String]) -> Result<(), Failure> {
    parse(texts).map(|_| ())
}

/// Prints the dumps that were asked for to stderr.
pub(crate) fn print(cx: &Context, texts: &[String], outcome: &Outcome) -> Result<(), Failure> {
    let wanted = parse(texts)?;
    let asked = |test: &dyn Fn(&When) -> bool| wanted.iter().any(test);
    for dump in &outcome.dumps {
        let Dump { pass, before, after } = dump;
        let changed = before != after;
        if asked(&|w| matches!(w, When::Before(name) if name == pass)) {
            cx.stderr(&format!("// before {pass}\n{before}\n"));
        }
        let after_wanted = asked(&|w| match w {
            When::After(name) => name == pass,
            When::All => true,
            When::Changed => changed,
            When::Before(_) => false,
        });
        if after_wanted {
            cx.stderr(&format!("// after {pass}{}\n{after}\n", if changed { "" } else { ", unchanged" }));
        }
    }
    Ok(())
}
