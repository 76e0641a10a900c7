//! Cases of the form `moec-ptx-case-1`: PTX of other producers.

use crate::{CaseResult, Status};
use moec_runtime::Device;
use moec_sim::case::Case;

/// Runs the case on `device` and judges it. Faults are for the simulator to find: on other devices they are skipped,
/// since what a wrong kernel does there is undefined.
///
/// # Errors
/// The file is not a case.
pub fn run(name: &str, file: &[u8], device: &dyn Device) -> Result<CaseResult, moec_sim::Error> {
    let case = Case::read(file)?;
    let judged = |failure: Option<String>| {
        let status = if failure.is_none() { Status::Pass } else { Status::Fail };
        CaseResult::bare(name, status, failure)
    };
    if device.name() == "sim" {
        // The schedule of a race must not matter, so that one seed says as much as another.
        return Ok(judged(case.run(&moec_sim::Options::default())?.failure));
    }
    let skip = |reason: String| Ok(CaseResult::bare(name, Status::Skip, Some(reason)));
    if !case.is_correct() {
        return skip("a faulty kernel, which only the simulator can judge".to_owned());
    }
    if let Err(reason) = device.runs(case.target()) {
        return skip(format!("code for {}: {reason}", case.target()));
    }
    match device.machine() {
        Some(mut machine) => Ok(judged(case.run_on(&mut *machine)?)),
        None => Ok(CaseResult::failed(name, format!("{} runs no PTX; use --device sim or cuda", device.name()))),
    }
}
