//! `moec opt`: passes on IR text.

use super::ir_dump;
use crate::{args::Opt, context::Context, failure::Failure, wanted};
use moec::{Error, ir, passes};

/// Runs the passes and prints the graphs.
pub(crate) fn run(cx: &Context, args: &Opt) -> Result<(), Failure> {
    ir_dump::check(&args.print_ir)?;
    let names: Vec<&str> = if args.pass.is_empty() {
        passes::PIPELINE.iter().map(|p| p.name).collect()
    } else {
        args.pass.iter().map(String::as_str).collect()
    };
    if let Some(unknown) = names.iter().find(|n| passes::PIPELINE.iter().all(|p| p.name != **n)) {
        return Err(ir_dump::unknown_pass(unknown));
    }
    let source = wanted::model(cx, &args.file)?;
    let mut text = String::new();
    for form in &source.model.forms {
        let mut graph = form.graph.clone();
        let outcome = passes::run_named(&mut graph, &names, !args.print_ir.is_empty()).map_err(Error::from)?;
        if let Some(outcome) = outcome {
            ir_dump::print(cx, &args.print_ir, &outcome)?;
            if args.remarks || cx.verbose {
                for remark in &outcome.remarks {
                    cx.stderr(&format!("remark[{}]: {}: {}\n", remark.pass, remark.node, remark.text));
                }
            }
        }
        text.push_str(&ir::print(&graph));
    }
    match &args.output {
        Some(path) => Ok(moec::files::write(path, text.as_bytes())?),
        None => cx.result(text),
    }
}
