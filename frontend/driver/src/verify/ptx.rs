//! Cases of the form `moec-ptx-case-1`: PTX of other producers, for the simulator.

use super::{Bench, CaseResult, Status, execute::refused};
use crate::Error;

/// Runs the case and takes over the simulator's judgement.
pub(super) fn run(name: &str, bytes: &[u8], bench: &Bench) -> Result<CaseResult, Error> {
    let device = bench.device.name();
    if device != "sim" {
        let reason = format!("foreign PTX cannot be checked on {device}; use --device sim");
        return Ok(CaseResult::failed(name.to_owned(), reason));
    }
    // The schedule of a race must not matter, so that one seed says as much as another.
    let outcome = moec_sim::case::run(bytes, 0).map_err(|e| refused(e.to_string()))?;
    Ok(CaseResult {
        name: name.to_owned(),
        status: if outcome.passed() { Status::Pass } else { Status::Fail },
        out_max_rel: None,
        out_rms_rel: None,
        selection_mismatches: None,
        reason: outcome.failure,
    })
}
