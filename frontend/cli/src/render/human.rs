//! Findings as text with carets into the user's file.

use super::position;
use moec::ir::{Diagnostic, Label, Severity};
use std::fmt::Write as _;

/// Most characters of a line that are shown.
const WIDTH: usize = 100;

fn paint(text: &str, code: &str, color: bool) -> String {
    if color { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
}

/// A line of progress: a verb in its column, and the rest.
pub(crate) fn progress(verb: &str, text: &str, color: bool) -> String {
    format!("{} {text}", paint(&format!("{verb:>10}"), "1;32", color))
}

/// The first line of a finding.
pub(crate) fn headline(severity: &str, code: Option<&str>, message: &str, color: bool) -> String {
    let tone = match severity {
        "error" => "1;31",
        "warning" => "1;33",
        _ => "1;36",
    };
    let head = code.map_or_else(|| severity.to_owned(), |code| format!("{severity}[{code}]"));
    format!("{}: {}\n", paint(&head, tone, color), printable(message))
}

/// Characters that a terminal would act on, made visible.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '\t' => out.push(' '),
            c if c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c) => {
                out.extend(c.escape_unicode());
            }
            c => out.push(c),
        }
    }
    out
}

/// A finding; `text` is what its places point into.
pub(crate) fn diagnostic(finding: &Diagnostic, text: Option<&str>, color: bool) -> String {
    let severity = match finding.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Remark => "remark",
    };
    let mut out = headline(severity, Some(finding.code.0), &finding.message, color);
    let file = finding.file.as_deref().map(|f| if f == "-" { "stdin" } else { f });
    match (file, text, finding.labels.is_empty()) {
        (Some(file), Some(text), false) => out.push_str(&places(file, text, &finding.labels, color)),
        (Some(file), ..) => {
            let _ = writeln!(out, "  {} {}", paint("-->", "1;34", color), printable(file));
        }
        (None, ..) => {}
    }
    for note in &finding.notes {
        let _ = writeln!(out, "   {} note: {}", paint("=", "1;34", color), printable(note));
    }
    if let Some(help) = &finding.help {
        let _ = writeln!(out, "   {} help: {}", paint("=", "1;34", color), printable(help));
    }
    out
}

/// The lines that labels point at, each with a mark below.
fn places(file: &str, text: &str, labels: &[Label], color: bool) -> String {
    let blue = |text: &str| paint(text, "1;34", color);
    let main = labels.iter().find(|l| l.primary).or_else(|| labels.first());
    let Some(main) = main else { return String::new() };
    let (line, column) = position(text, main.span.start);
    let mut marks: Vec<(usize, usize, &Label)> = labels
        .iter()
        .map(|label| {
            let (line, column) = position(text, label.span.start);
            (line, column, label)
        })
        .collect();
    marks.sort_by_key(|(line, column, _)| (*line, *column));
    let gutter = marks.last().map_or(1, |m| m.0.to_string().len());
    let pad = " ".repeat(gutter);
    let mut out = format!("{pad}{} {}:{line}:{column}\n", blue("-->"), printable(file));
    let _ = writeln!(out, "{pad} {}", blue("|"));
    let lines: Vec<&str> = text.split('\n').collect();
    let mut shown = 0;
    for (line, column, label) in marks {
        let source = lines.get(line - 1).copied().unwrap_or("").trim_end_matches('\r');
        let (window, skipped) = window(source, column);
        if line != shown {
            let _ = writeln!(out, "{} {} {}", blue(&format!("{line:>gutter$}")), blue("|"), printable(&window));
            shown = line;
        }
        let before: String = window.chars().take(column - 1 - skipped).collect();
        let inside = text.get(label.span.start..label.span.end.max(label.span.start)).unwrap_or("");
        let wide = inside.split('\n').next().unwrap_or("").chars().count();
        let room = window.chars().count().saturating_sub(before.chars().count());
        let mark = if label.primary { "^" } else { "-" }.repeat(wide.clamp(1, room.max(1)));
        let tone = if label.primary { "1;31" } else { "1;34" };
        let offset = " ".repeat(printable(&before).chars().count());
        let _ = writeln!(
            out,
            "{pad} {} {offset}{}",
            blue("|"),
            paint(format!("{mark} {}", printable(&label.text)).trim_end(), tone, color)
        );
    }
    out
}

/// The part of a long line around a column, and how many characters were left out before it.
fn window(line: &str, column: usize) -> (String, usize) {
    let count = line.chars().count();
    if count <= WIDTH {
        return (line.to_owned(), 0);
    }
    let start = (column - 1).saturating_sub(WIDTH / 2).min(count.saturating_sub(WIDTH));
    (line.chars().skip(start).take(WIDTH).collect(), start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moec::ir::{Code, Span};

    #[test]
    fn a_finding_points_into_the_text() {
        let text = "{\n  \"num_experts\": 8,\n  \"k\": 9\n}\n";
        let span = |mark: char| text.find(mark).map_or(Span::default(), |at| Span { start: at, end: at + 1 });
        let finding = Diagnostic {
            file: Some("config.json".to_owned()),
            ..Diagnostic::error(Code("E0203"), "more experts per token than experts")
                .primary(span('9'), "asks for 9")
                .secondary(span('8'), "8 experts")
                .help("set k to 8 or less")
        };
        let shown = diagnostic(&finding, Some(text), false);
        assert_eq!(
            shown,
            "error[E0203]: more experts per token than experts\n --> config.json:3:8\n  |\n\
             2 |   \"num_experts\": 8,\n  |                  - 8 experts\n\
             3 |   \"k\": 9\n  |        ^ asks for 9\n   = help: set k to 8 or less\n"
        );
    }

    #[test]
    fn terminals_are_not_sent_control_characters() {
        assert_eq!(printable("a\u{1b}[31mb"), "a\\u{1b}[31mb");
    }

    #[test]
    fn long_lines_are_cut_around_the_mark() {
        let (shown, skipped) = window(&"x".repeat(500), 250);
        assert_eq!((shown.len(), skipped), (WIDTH, 199));
    }
}
