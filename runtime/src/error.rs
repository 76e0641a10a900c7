//! The one error of this crate: a code, what is wrong, and the next step.

/// What kind of thing went wrong. Once published a code keeps its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Code {
    /// A checkpoint tensor that the artefact needs is not there.
    TensorMissing,
    /// A checkpoint tensor has another shape or type than the artefact needs.
    TensorMismatch,
    /// A file cannot be read or written.
    File,
    /// A checkpoint or weights file does not have the form that it should have.
    FileForm,
    /// The artefact's manifest cannot be used.
    Artefact,
    /// The code object of a program cannot be used.
    CodeObject,
    /// The artefact has no program for this device or processor.
    Target,
    /// An input, output or weight that was passed does not fit the program.
    Argument,
    /// More tokens than the program was compiled for.
    Tokens,
    /// Memory ran out.
    Memory,
    /// No driver, or one that is too old.
    Driver,
    /// The device is missing or does not do what the program needs.
    Device,
    /// The device failed during a launch; the handle has to be made again.
    Launch,
    /// The simulator found a fault in a kernel.
    Simulation,
}

impl Code {
    /// All codes, for `moec explain`.
    pub const ALL: [Self; 14] = [
        Self::TensorMissing,
        Self::TensorMismatch,
        Self::File,
        Self::FileForm,
        Self::Artefact,
        Self::CodeObject,
        Self::Target,
        Self::Argument,
        Self::Tokens,
        Self::Memory,
        Self::Driver,
        Self::Device,
        Self::Launch,
        Self::Simulation,
    ];

    /// The name on screen.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TensorMissing => "E0801",
            Self::TensorMismatch => "E0802",
            Self::File => "E0803",
            Self::FileForm => "E0804",
            Self::Artefact => "E0811",
            Self::CodeObject => "E0812",
            Self::Target => "E0813",
            Self::Argument => "E0821",
            Self::Tokens => "E0822",
            Self::Memory => "E0901",
            Self::Driver => "E0902",
            Self::Device => "E0903",
            Self::Launch => "E0904",
            Self::Simulation => "E0905",
        }
    }

    /// Whether the cause is the machine, not the input (exit code 3).
    pub const fn is_machine(self) -> bool {
        match self {
            Self::File | Self::Memory | Self::Driver | Self::Device | Self::Launch => true,
            Self::TensorMissing
            | Self::TensorMismatch
            | Self::FileForm
            | Self::Artefact
            | Self::CodeObject
            | Self::Target
            | Self::Argument
            | Self::Tokens
            | Self::Simulation => false,
        }
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong, as a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RuntimeError {
    /// Entry of the table behind `moec explain`.
    pub code: Code,
    /// What is, and what was needed; lower case, no full stop.
    pub message: String,
    /// The next step.
    pub help: Option<String>,
}

impl RuntimeError {
    /// An error without a next step.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), help: None }
    }

    /// The same error with a next step.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// A file operation that failed.
    pub fn file(what: &str, path: &std::path::Path, cause: &std::io::Error) -> Self {
        Self::new(Code::File, format!("cannot {what} {}: {cause}", path.display()))
    }
}

/// Result of this crate.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;
