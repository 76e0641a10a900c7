//! A small derivative-free minimiser for calibration files.
//!
//! Parameters are numbers inside a JSON value, named by pointer, each with bounds.
//! Coordinate steps grow on success and shrink on failure; the order is fixed, so
//! a fit is reproducible. Good enough for some tens of smooth parameters.

use serde_json::Value;

/// One number to fit.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// JSON pointer of the number.
    pub pointer: String,
    /// Smallest value.
    pub low: f64,
    /// Largest value.
    pub high: f64,
}

impl Parameter {
    /// A parameter between two bounds.
    pub fn new(pointer: impl Into<String>, low: f64, high: f64) -> Self {
        Self { pointer: pointer.into(), low, high }
    }
}

/// Minimises `loss` over the parameters, changing `file` in place; gives the smallest loss.
///
/// `rounds` bounds the sweeps; a sweep that improves by less than 1e-6 in total after
/// steps became small ends the search.
pub fn minimise(file: &mut Value, parameters: &[Parameter], rounds: usize, mut loss: impl FnMut(&Value) -> f64) -> f64 {
    let mut steps: Vec<f64> = parameters.iter().map(|p| 0.1 * (p.high - p.low)).collect();
    let mut best = loss(file);
    for _ in 0..rounds {
        let before = best;
        for (p, step) in parameters.iter().zip(&mut steps) {
            let Some(start) = file.pointer(&p.pointer).and_then(Value::as_f64) else { continue };
            let mut improved = false;
            for direction in [1.0, -1.0] {
                let value = (start + direction * *step).clamp(p.low, p.high);
                if value == start {
                    continue;
                }
                set(file, &p.pointer, value);
                let now = loss(file);
                if now < best {
                    best = now;
                    improved = true;
                    // Keep the direction: the next sweep starts from here with a longer step.
                    break;
                }
                set(file, &p.pointer, start);
            }
            *step *= if improved { 1.4 } else { 0.5 };
            *step = step.clamp(1e-4 * (p.high - p.low), 0.5 * (p.high - p.low));
        }
        let small = parameters.iter().zip(&steps).all(|(p, s)| *s <= 2e-3 * (p.high - p.low));
        if small && before - best < 1e-6 {
            break;
        }
    }
    best
}

fn set(file: &mut Value, pointer: &str, value: f64) {
    if let Some(slot) = file.pointer_mut(pointer) {
        *slot = serde_json::json!(value);
    }
}

/// Rounds every fitted number to four significant digits, so that files stay readable.
pub fn round(file: &mut Value, parameters: &[Parameter]) {
    for p in parameters {
        if let Some(value) = file.pointer(&p.pointer).and_then(Value::as_f64) {
            let scale = 10_f64.powf(3.0 - value.abs().max(1e-12).log10().floor());
            set(file, &p.pointer, (value * scale).round() / scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bowl_is_minimised_inside_its_bounds() {
        let mut file = serde_json::json!({"a": 1.0, "b": {"c": 5.0}});
        let parameters = [Parameter::new("/a", 0.0, 2.0), Parameter::new("/b/c", 4.0, 9.0)];
        let at = |v: &Value, p: &str| v.pointer(p).unwrap().as_f64().unwrap();
        let best =
            minimise(&mut file, &parameters, 200, |v| (at(v, "/a") - 0.3).powi(2) + (at(v, "/b/c") - 2.0).powi(2));
        assert!((best - 4.0).abs() < 1e-3, "{best}");
        assert!((at(&file, "/a") - 0.3).abs() < 0.02);
        assert_eq!(at(&file, "/b/c"), 4.0);
    }
}
