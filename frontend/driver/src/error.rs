//! What can go wrong, by whose concern it is.

use moec_ir::{Code, Diagnostic};
use thiserror::Error;

/// A failure of the driver.
#[derive(Debug, Error)]
pub enum Error {
    /// The user's input was refused.
    #[error("{}", .0.iter().map(|d| d.message.as_str()).collect::<Vec<_>>().join("; "))]
    Input(Vec<Diagnostic>),
    /// A graph asks for something that no kernel of the target can do.
    #[error("{node}: {what}")]
    Unsupported {
        /// Node of the graph.
        node: String,
        /// What cannot be compiled.
        what: String,
    },
    /// Our bug: a pass or an emitter made something invalid.
    #[error("{0}")]
    Internal(String),
    /// The machine: devices, drivers.
    #[error("{0}")]
    Runtime(#[from] moec_runtime::RuntimeError),
    /// The machine: files.
    #[error("{path}: {message}")]
    File {
        /// As the user named it.
        path: String,
        /// What the system said.
        message: String,
    },
    /// The machine: files that cannot be written, tools that fail.
    #[error("{message}")]
    Machine {
        /// Entry of the table behind `moec explain`.
        code: Code,
        /// What is, and what was needed.
        message: String,
        /// The next step.
        help: String,
    },
}

impl Error {
    pub(crate) fn machine(code: Code, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Machine { code, message: message.into(), help: help.into() }
    }

    /// Input that is refused without a place in a file.
    pub(crate) fn refused(code: &'static str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Input(vec![Diagnostic::error(Code(code), message).help(help)])
    }
}

impl From<moec_codegen::CodegenError> for Error {
    fn from(error: moec_codegen::CodegenError) -> Self {
        match error {
            moec_codegen::CodegenError::Unsupported { node, what } => Self::Unsupported { node, what },
            error @ (moec_codegen::CodegenError::Mlir { .. } | moec_codegen::CodegenError::Llvm { .. }) => {
                Self::Internal(error.to_string())
            }
        }
    }
}

impl From<moec_passes::Failure> for Error {
    fn from(failure: moec_passes::Failure) -> Self {
        if failure.pass == "input" { Self::Input(failure.findings) } else { Self::Internal(failure.to_string()) }
    }
}
