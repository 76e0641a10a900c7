//! What can stop a simulation before or during a launch.

/// An error of the interpreter; faults of the simulated program are [`crate::Finding`]s instead.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not PTX as far as the parser knows it.
    #[error("PTX line {line}: {message}")]
    Parse {
        /// Line of the PTX, from 1.
        line: u32,
        /// What was found and what was needed.
        message: String,
    },
    /// An instruction, or a form of one, that the interpreter does not have. It is never skipped.
    #[error("PTX line {line}: the simulator does not know `{instruction}`: {message}")]
    Unsupported {
        /// Line of the PTX, from 1.
        line: u32,
        /// The instruction as written, with its suffixes.
        instruction: String,
        /// What about it is unknown.
        message: String,
    },
    /// The module has no such kernel.
    #[error("the module has no entry `{0}`")]
    NoEntry(String),
    /// The arguments do not fit the parameters of the kernel.
    #[error("arguments of `{entry}`: {message}")]
    Args {
        /// The kernel.
        entry: String,
        /// Which argument and why.
        message: String,
    },
    /// Grid, block, cluster or shared memory cannot be launched.
    #[error("launch of `{entry}`: {message}")]
    Launch {
        /// The kernel.
        entry: String,
        /// What is out of range.
        message: String,
    },
    /// An access of the host outside an allocation.
    #[error("device memory: {0}")]
    Memory(String),
    /// The launch ran longer than it was allowed to.
    #[error("`{entry}` executed more than {max} warp instructions")]
    Limit {
        /// The kernel.
        entry: String,
        /// The limit of [`crate::Options`].
        max: u64,
    },
    /// A tensor map that no driver would encode.
    #[error("tensor map: {0}")]
    TensorMap(String),
    /// A case file that does not follow its format.
    #[error("case file: {0}")]
    Case(String),
}
