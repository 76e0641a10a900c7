//! What every command has: how to speak, and the texts that findings point into.

use crate::{
    args::{Color, Format, Global},
    failure::Failure,
    render::{human, json},
};
use moec::ir::Diagnostic;
use serde_json::Value;
use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{self, IsTerminal as _, Read as _, Write as _},
    path::Path,
};

/// Largest text that is read from stdin, one byte more than a model may have.
const STDIN_BYTES: u64 = (16 << 20) + 1;

/// How a command speaks.
pub(crate) struct Context {
    /// Form of results.
    pub format: Format,
    /// Nothing but results and errors.
    pub quiet: bool,
    /// More than usual.
    pub verbose: bool,
    color: bool,
    /// Texts that have no file.
    texts: RefCell<BTreeMap<String, String>>,
}

impl Context {
    /// From the flags of the command line.
    pub(crate) fn new(global: &Global) -> Self {
        let color = match global.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                let wanted = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty() && v != "0");
                wanted("CLICOLOR_FORCE")
                    || (io::stderr().is_terminal()
                        && std::env::var_os("NO_COLOR").is_none()
                        && std::env::var_os("TERM").is_none_or(|t| t != "dumb"))
            }
        };
        Self { format: global.format, quiet: global.quiet, verbose: global.verbose, color, texts: RefCell::default() }
    }

    /// Whether results are JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Everything on stdin, as bytes; remembered for findings.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn stdin(&self) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        io::stdin()
            .lock()
            .take(STDIN_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|e| Failure::machine("E0601", format!("cannot read stdin: {e}"), "name a file instead of -"))?;
        self.texts.borrow_mut().insert("-".to_owned(), String::from_utf8_lossy(&bytes).into_owned());
        Ok(bytes)
    }

    /// Writes a result to stdout.
    ///
    /// # Errors
    /// Nobody reads it, or it cannot be written.
    pub(crate) fn result(&self, text: impl AsRef<[u8]>) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref()).and_then(|()| out.flush()).map_err(|error| {
            if error.kind() == io::ErrorKind::BrokenPipe {
                return Failure::Closed;
            }
            let help = "make room, or use another place";
            Failure::machine("E0603", format!("cannot write to stdout: {error}"), help)
        })
    }

    /// Writes a JSON result, one object on a line.
    ///
    /// # Errors
    /// As [`result`](Self::result).
    pub(crate) fn json(&self, value: &Value) -> Result<(), Failure> {
        self.result(format!("{value}\n"))
    }

    /// Says what is going on, for people.
    pub(crate) fn say(&self, verb: &str, text: &str) {
        if !self.quiet && !self.is_json() {
            self.stderr(&format!("{}\n", human::progress(verb, text, self.color)));
        }
    }

    /// As [`say`](Self::say), with `-v` alone.
    pub(crate) fn detail(&self, verb: &str, text: &str) {
        if self.verbose {
            self.say(verb, text);
        }
    }

    /// Text on stderr; when it is closed there is nobody to tell.
    pub(crate) fn stderr(&self, text: &str) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Reports findings.
    pub(crate) fn report(&self, findings: &[Diagnostic]) {
        for finding in findings {
            let text = finding.file.as_deref().and_then(|file| self.text(file));
            let shown = if self.is_json() {
                format!("{}\n", json::diagnostic(finding, text.as_deref()))
            } else {
                human::diagnostic(finding, text.as_deref(), self.color)
            };
            self.stderr(&shown);
        }
    }

    /// Text of a file that a finding points into.
    fn text(&self, file: &str) -> Option<String> {
        if let Some(text) = self.texts.borrow().get(file) {
            return Some(text.clone());
        }
        let path = Path::new(file);
        let small = std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() <= STDIN_BYTES);
        small.then(|| std::fs::read(path).ok()).flatten().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Reports why a command ends.
    pub(crate) fn failure(&self, failure: &Failure) {
        match failure {
            Failure::Refused(findings) => self.report(findings),
            Failure::Machine(finding) => self.report(std::slice::from_ref(finding)),
            Failure::Usage(text) => {
                self.stderr(&human::headline("error", None, text, self.color));
                self.stderr("  = help: `moec --help` and `moec COMMAND --help` list what there is\n");
            }
            Failure::Bug(text) => {
                self.stderr(&human::headline("error", None, text, self.color));
                self.stderr(
                    "  = note: this is a bug in moec\n  = help: report it with the command line and the model that shows it\n",
                );
            }
            Failure::Different | Failure::Closed => {}
        }
    }
}
