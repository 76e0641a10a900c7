//! Why a command ends without success, and with which code.

use moec::{
    Error,
    ir::{Code, Diagnostic},
    runtime::RuntimeError,
};

/// The end of a command that did not do what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The input was refused.
    Refused(Vec<Diagnostic>),
    /// A comparison failed; it has been reported.
    Different,
    /// The command line does not make sense.
    Usage(String),
    /// The machine: disk, driver, tool, permission.
    Machine(Box<Diagnostic>),
    /// Our bug.
    Bug(String),
    /// Nobody reads the output any more.
    Closed,
}

impl Failure {
    /// Exit code of the process.
    pub(crate) const fn exit_code(&self) -> u8 {
        match self {
            Self::Refused(_) | Self::Different => 1,
            Self::Usage(_) => 2,
            Self::Machine(_) => 3,
            Self::Bug(_) => 101,
            Self::Closed => 0,
        }
    }

    /// Input that is refused without a place in a file.
    pub(crate) fn refused(code: &'static str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Refused(vec![Diagnostic::error(Code(code), message).help(help)])
    }

    /// A problem of the machine.
    pub(crate) fn machine(code: &'static str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Machine(Box::new(Diagnostic::error(Code(code), message).help(help)))
    }
}

impl From<Vec<Diagnostic>> for Failure {
    fn from(findings: Vec<Diagnostic>) -> Self {
        // Files that cannot be read are the machine's business only when they are there.
        Self::Refused(findings)
    }
}

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        let mut finding = Diagnostic::error(Code(error.code.as_str()), error.message);
        finding.help = error.help;
        if error.code.is_machine() { Self::Machine(Box::new(finding)) } else { Self::Refused(vec![finding]) }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Input(findings) => Self::Refused(findings),
            Error::Unsupported { node, what } => Self::refused(
                "E0403",
                format!("{node}: {what}"),
                "`moec list targets` lists the targets; try another one",
            ),
            Error::Internal(text) => Self::Bug(text),
            Error::Runtime(error) => error.into(),
            Error::File { path, message } => {
                Self::machine("E0803", format!("{path}: {message}"), "check the path and its permissions")
            }
            Error::Machine { code, message, help } => {
                Self::Machine(Box::new(Diagnostic::error(code, message).help(help)))
            }
        }
    }
}
