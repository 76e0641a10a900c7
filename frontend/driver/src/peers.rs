//! Other implementations of the same layer, timed beside ours.

use crate::Error;
use moec_frontend::FormFacts;
use moec_ir::Code;
use serde::Deserialize;
use serde_json::json;
use std::{
    io::Write as _,
    process::{Command, Stdio},
};

/// The script, which is handed to Python as it is.
const SCRIPT: &str = include_str!("peers.py");

/// What a peer took.
#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// One row for each number of tokens.
    pub rows: Vec<PeerRow>,
}

/// Time for one number of tokens.
#[derive(Clone, Debug, Deserialize)]
pub struct PeerRow {
    /// Tokens of a call.
    pub tokens: u64,
    /// Half of the calls took less.
    pub median_ms: f64,
    /// Calls that were measured.
    pub launches: usize,
}

/// Times gated experts of these sizes in PyTorch: softmax router, uniform routing, experts one after another.
///
/// # Errors
/// Python or PyTorch is not there, or the script fails.
pub fn torch(facts: &FormFacts, dtype: &str, device: &str, threads: u32, tokens: &[u64]) -> Result<Peer, Error> {
    let failed = |what: String| {
        let help = "install PyTorch for `python3`, or leave out --peers";
        Error::machine(Code("E0803"), format!("PyTorch could not be timed: {what}"), help)
    };
    let request = json!({
        "hidden": facts.expert_input, "inner": facts.expert_inner, "experts": facts.experts, "top_k": facts.top_k,
        "dtype": if dtype == "bf16" { "bfloat16" } else { "float32" },
        "device": if device.starts_with("cuda") { "cuda" } else { "cpu" },
        "threads": threads, "tokens": tokens,
    });
    let mut child = Command::new("python3")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(format!("python3: {e}")))?;
    if let Some(mut input) = child.stdin.take() {
        // A script that ends early says why on stderr.
        let _ = writeln!(input, "{request}");
    }
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(said.lines().last().unwrap_or("it ended without a word").to_owned()));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| failed(format!("its answer: {e}")))
}
