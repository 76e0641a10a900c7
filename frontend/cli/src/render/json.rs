//! Findings as JSON objects, one a line.

use super::position;
use moec::ir::{Diagnostic, Severity};
use serde_json::{Value, json};

/// A finding; `text` is what its places point into.
pub(crate) fn diagnostic(finding: &Diagnostic, text: Option<&str>) -> Value {
    let labels: Vec<Value> = finding
        .labels
        .iter()
        .map(|label| {
            let place = text.map(|t| position(t, label.span.start));
            json!({
                "start": label.span.start,
                "end": label.span.end,
                "line": place.map(|p| p.0),
                "col": place.map(|p| p.1),
                "text": label.text,
                "primary": label.primary,
            })
        })
        .collect();
    let severity = match finding.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Remark => "remark",
    };
    json!({
        "schema": 1,
        "kind": "diagnostic",
        "code": finding.code.0,
        "severity": severity,
        "message": finding.message,
        "file": finding.file,
        "labels": labels,
        "help": finding.help,
        "notes": finding.notes,
    })
}
