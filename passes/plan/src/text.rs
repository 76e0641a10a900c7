//! The report for a terminal of 80 columns.

use crate::{
    plan::PlanReport,
    table::{columns, legend, memory_kinds, verdict},
};
use std::fmt::Write;

/// Columns of a terminal.
const WIDTH: usize = 80;
/// Cells of the longest bar.
const BAR: usize = 40;

/// Renders a report in lines of at most 80 columns.
pub fn text(report: &PlanReport) -> String {
    let mut out = wrapped(
        &format!(
            "{} on {} x {}: {} choices evaluated, {} branches skipped by a bound.",
            report.model, report.gpus, report.cluster, report.evaluated, report.pruned
        ),
        "",
    );
    let Some(best) = report.plans.first() else { return out };
    out.push('\n');
    out.push_str(&table(report));
    out.push_str(&wrapped(legend(best.objective), ""));
    if let Some(tie) = &report.tie {
        out.push_str(&wrapped(&format!("1: {tie}"), "   "));
    }
    for (index, plan) in report.plans.iter().enumerate().filter(|(_, p)| p.why.is_some() || !p.feasible) {
        out.push_str(&wrapped(&format!("{}: {}", index + 1, verdict(plan)), "   "));
    }
    let total: f64 = best.time_ms.values().sum();
    out.push_str("\nTime of the best plan, ms\n");
    let times: Vec<(String, f64)> = best.time_ms.iter().map(|(n, t)| (n.replace('_', " "), *t)).collect();
    out.push_str(&bars(&times, total));
    let memory = &best.memory_gib;
    let _ = writeln!(out, "\nMemory of its fullest GPU, {:.1} of {:.1} GiB", memory.total, memory.limit);
    let kinds: Vec<(String, f64)> = memory_kinds(memory).map(|(n, g)| (n.to_owned(), g)).to_vec();
    out.push_str(&bars(&kinds, memory.limit));
    if !report.sensitivity.is_empty() {
        out.push_str("\nChanging one size of it\n");
        report.sensitivity.iter().for_each(|s| out.push_str(&wrapped(&s.text, "  ")));
    }
    out
}

/// Plans as lines, numbers to the right.
fn table(report: &PlanReport) -> String {
    let Some(best) = report.plans.first() else { return String::new() };
    let columns = columns(best.objective);
    let head = std::iter::once(String::new()).chain(columns.iter().map(|c| c.head.to_owned())).collect();
    let rows = report.plans.iter().enumerate().map(|(index, plan)| {
        std::iter::once((index + 1).to_string()).chain(columns.iter().map(|c| (c.cell)(plan))).collect()
    });
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=columns.len()).map(width).collect();
    let gap = if widths.iter().sum::<usize>() + 2 * columns.len() <= WIDTH { 2 } else { 1 };
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        cells.join(&" ".repeat(gap)) + "\n"
    };
    rows.iter().map(line).collect()
}

/// Parts of a whole, largest first, with bars; what is nothing is left out.
fn bars(parts: &[(String, f64)], whole: f64) -> String {
    let mut parts: Vec<&(String, f64)> = parts.iter().filter(|(_, v)| *v > 0.0).collect();
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let width = parts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for (name, value) in parts {
        let share = if whole > 0.0 { (value / whole).clamp(0.0, 1.0) } else { 0.0 };
        let bar = "#".repeat((share * BAR as f64).round() as usize);
        let line = format!("  {name:<width$} {value:>9.2} {:>3.0} %  {bar}", 100.0 * share);
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// Words in lines of at most 80 columns, each after `indent`; a word that is longer stands alone.
fn wrapped(text: &str, indent: &str) -> String {
    let mut out = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && indent.len() + line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(out, "{indent}{line}");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    let _ = writeln!(out, "{indent}{line}");
    out
}
