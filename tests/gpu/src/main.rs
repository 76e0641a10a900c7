//! What runs on a machine that has a GPU and nothing of ours but this program, artefacts and cases.
//!
//! `gpu-runner STEP [--device D] [FOLDER..]` prints one line of JSON for each result, at once, so that a step that is
//! stopped leaves what it had. Devices are those of `moec --device`: `cuda[:N]` (the default), and `sim` to try the
//! program where there is no GPU.

mod bench;
mod cases;
mod routing;

use moec_runtime::{Cuda, Device, Sim};
use std::{process::ExitCode, sync::Arc};

const USAGE: &str = "gpu-runner STEP [OPTIONS]
  device                                   what the device is
  goldens ARTEFACTS CASES [--only A,B]     blocks of the reference library, compared with the simulator too
  ptx CASES                                PTX of other producers
  bench LAYERS ARTEFACTS OUT [--only A,B] [--tokens 1,16] [--seconds S]
                                           times layers, and leaves the routing for the peers in OUT
options: --device cuda[:N]|sim";

/// The device, and the same as one that records graphs if it does.
pub(crate) struct Place {
    device: Arc<dyn Device>,
    cuda: Option<Arc<Cuda>>,
}

/// A failure in words; the program ends with it.
pub(crate) type Result<T> = std::result::Result<T, String>;

/// Prints one result.
pub(crate) fn emit(value: &serde_json::Value) {
    println!("{value}");
}

fn place(name: &str) -> Result<Place> {
    if name == "sim" {
        return Ok(Place { device: Arc::new(Sim::new(moec_sim::Options::default())), cuda: None });
    }
    let ordinal = match name.split_once(':') {
        None if name == "cuda" => 0,
        Some(("cuda", n)) => n.parse().map_err(|_| format!("`{name}` is no device"))?,
        _ => return Err(format!("`{name}` is no device: use cuda, cuda:N or sim")),
    };
    let cuda = Arc::new(Cuda::open(ordinal).map_err(|e| match e.help {
        Some(help) => format!("{}: {}; {help}", e.code, e.message),
        None => format!("{}: {}", e.code, e.message),
    })?);
    Ok(Place { device: Arc::clone(&cuda) as _, cuda: Some(cuda) })
}

/// Options of the command line, by name, and the rest.
#[derive(Default)]
pub(crate) struct Arguments {
    rest: Vec<String>,
    device: Option<String>,
    only: Option<String>,
    tokens: Option<String>,
    seconds: Option<f64>,
}

impl Arguments {
    fn read(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let mut out = Self::default();
        while let Some(a) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{a} needs a value"));
            match a.as_str() {
                "--device" => out.device = Some(value()?),
                "--only" => out.only = Some(value()?),
                "--tokens" => out.tokens = Some(value()?),
                "--seconds" => out.seconds = Some(value()?.parse().map_err(|e| format!("--seconds: {e}"))?),
                _ if a.starts_with("--") => return Err(format!("unknown option {a}\n{USAGE}")),
                _ => out.rest.push(a),
            }
        }
        Ok(out)
    }

    /// Whether `--only` has this name, or is not there.
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.split(',').any(|o| o == name))
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let step = args.next().ok_or(USAGE)?;
    let args = Arguments::read(args)?;
    let rest: Vec<&str> = args.rest.iter().map(String::as_str).collect();
    let here = || place(args.device.as_deref().unwrap_or("cuda"));
    match (step.as_str(), rest.as_slice()) {
        ("device", []) => {
            let here = here()?;
            emit(&match &here.cuda {
                Some(cuda) => serde_json::json!({
                    "device": cuda.device_name(),
                    "capability": cuda.capability(),
                    "driver_cuda": cuda.driver_version(),
                }),
                None => serde_json::json!({ "device": here.device.name() }),
            });
            Ok(())
        }
        ("goldens", [artefacts, folder]) => cases::goldens(&here()?, artefacts.as_ref(), folder.as_ref(), &args),
        ("ptx", [folder]) => cases::ptx(&here()?, folder.as_ref(), &args),
        ("bench", [layers, artefacts, out]) => {
            bench::run(&here()?, layers.as_ref(), artefacts.as_ref(), out.as_ref(), &args)
        }
        _ => Err(USAGE.to_owned()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}
