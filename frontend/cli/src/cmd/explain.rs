//! `moec explain`: cause, example and fix of a code.

use crate::{args::Explain, codes, context::Context, failure::Failure};
use moec::ir::nearest;
use serde_json::json;

/// Prints the page.
pub(crate) fn run(cx: &Context, args: &Explain) -> Result<(), Failure> {
    let Some(page) = codes::page(&args.code) else {
        let known: Vec<&str> = codes::PAGES.iter().map(|(code, _)| *code).collect();
        let code: String = args.code.chars().take(60).collect();
        let near = nearest(&code, known.iter().copied()).map_or_else(String::new, |n| format!("; the nearest is {n}"));
        return Err(Failure::Usage(format!("there is no code `{code}`{near}; `moec list codes` lists them")));
    };
    if cx.is_json() {
        let title = codes::title(page);
        return cx.json(&json!({"schema": 1, "code": args.code.to_uppercase(), "title": title, "text": page}));
    }
    cx.result(page)
}
