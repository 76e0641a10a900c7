//! Other implementations of the same layer, timed beside ours.

use crate::Error;
use moec_frontend::FormFacts;
use moec_ir::Code;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// The script, which is handed to Python as it is.
const SCRIPT: &str = include_str!("peers.py");

/// An implementation that waits to be timed. It holds its weights from one number of tokens to the next.
#[derive(Debug)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
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

#[derive(Deserialize)]
struct Start {
    name: String,
    version: String,
}

impl Peer {
    /// Gated experts of these sizes in PyTorch: softmax router, uniform routing, experts one after another.
    ///
    /// # Errors
    /// Python or PyTorch is not there, or the script fails.
    pub fn torch(facts: &FormFacts, dtype: &str, device: &str, threads: u32) -> Result<Self, Error> {
        let request = json!({
            "hidden": facts.expert_input, "inner": facts.expert_inner, "experts": facts.experts, "top_k": facts.top_k,
            "dtype": if dtype == "bf16" { "bfloat16" } else { "float32" },
            "device": if device.starts_with("cuda") { "cuda" } else { "cpu" },
            "threads": threads,
        });
        let mut child = Command::new("python3")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| failed(&format!("python3: {e}")))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Internal("a child process without pipes".to_owned()));
        };
        let output = BufReader::new(output);
        let mut peer = Self { name: String::new(), version: String::new(), child, input, output };
        let start: Start = peer.ask(&request.to_string())?;
        (peer.name, peer.version) = (start.name, start.version);
        Ok(peer)
    }

    /// Times the layer.
    ///
    /// # Errors
    /// The script fails.
    pub fn time(&mut self, tokens: u64) -> Result<PeerRow, Error> {
        self.ask(&tokens.to_string())
    }

    fn ask<T: DeserializeOwned>(&mut self, question: &str) -> Result<T, Error> {
        let mut answer = String::new();
        // A script that ends early says why on stderr.
        let _ = writeln!(self.input, "{question}").and_then(|()| self.output.read_line(&mut answer));
        if answer.is_empty() {
            let mut said = String::new();
            let _ = self.child.stderr.take().map(|mut e| e.read_to_string(&mut said));
            return Err(failed(said.lines().last().unwrap_or("it ended without a word")));
        }
        serde_json::from_str(&answer).map_err(|e| failed(&format!("its answer: {e}")))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Nothing is asked any more; whether it had ended already does not matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn failed(what: &str) -> Error {
    let help = "install PyTorch for `python3`, or leave out --peers";
    Error::machine(Code("E0803"), format!("PyTorch could not be timed: {what}"), help)
}
