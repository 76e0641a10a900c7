//! What can go wrong in code generation.

use thiserror::Error;

/// A failure of code generation. `Unsupported` is the user's to solve; the others are our bugs.
#[derive(Debug, Error)]
pub enum CodegenError {
    /// The graph asks for something that no emitter of the target can do.
    #[error("{node}: {what}")]
    Unsupported {
        /// Node of the graph.
        node: String,
        /// What cannot be compiled, and what would work.
        what: String,
    },
    /// MLIR refused a module that an emitter made.
    #[error("MLIR refused generated code at {stage}: {text}")]
    Mlir {
        /// Stage of the pipeline.
        stage: &'static str,
        /// What MLIR said.
        text: String,
    },
    /// LLVM refused a module that an emitter made.
    #[error("LLVM refused generated code at {stage}: {text}")]
    Llvm {
        /// Stage of the pipeline.
        stage: &'static str,
        /// What LLVM said.
        text: String,
    },
}

impl CodegenError {
    pub(crate) fn llvm(stage: &'static str, text: &str) -> Self {
        Self::Llvm { stage, text: text.to_owned() }
    }
}
