//! Findings and results as text and as JSON.

pub(crate) mod human;
pub(crate) mod json;

/// Line and column, both from 1, of a byte of a text; columns count characters.
pub(crate) fn position(text: &str, at: usize) -> (usize, usize) {
    let at = (0..=at.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    let before = &text[..at];
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}
