//! The one error type of the planner.
//!
//! Every refusal carries a code, what is wrong, and a next step that would work.

use serde::Serialize;

/// Mapping or size that cannot be: sizes do not divide, products do not match, more ways than experts.
pub const E_MAPPING: &str = "E0402";
/// Cluster description that is malformed or physically impossible.
pub const E_CLUSTER: &str = "E0404";
/// Model description that lacks a needed size or holds an impossible one.
pub const E_MODEL: &str = "E0405";
/// No mapping fits the memory, the latency bound or the constraints given.
pub const E_NO_PLAN: &str = "E0406";

/// Why the planner refused, and what to do instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct PlanError {
    /// Stable code, such as `E0402`.
    pub code: &'static str,
    /// What is wrong, in one sentence.
    pub message: String,
    /// What would work.
    pub help: String,
    /// Member of the user's file that it is about, such as `gpu.hbm_gbps` or `collectives.3`.
    pub at: Option<String>,
}

impl PlanError {
    /// A refused mapping or size (`E0402`).
    pub fn mapping(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { code: E_MAPPING, message: message.into(), help: help.into(), at: None }
    }

    /// A refused cluster description (`E0404`).
    pub fn cluster(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { code: E_CLUSTER, message: message.into(), help: help.into(), at: None }
    }

    /// A refused model description (`E0405`).
    pub fn model(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { code: E_MODEL, message: message.into(), help: help.into(), at: None }
    }

    /// Nothing fits (`E0406`).
    pub fn no_plan(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { code: E_NO_PLAN, message: message.into(), help: help.into(), at: None }
    }

    /// Says in which member of the file the one lies that it is about.
    #[must_use]
    pub fn under(self, member: &str) -> Self {
        let at = match (member, self.at.as_deref()) {
            ("", at) => at.map(str::to_owned),
            (member, None | Some("")) => Some(member.to_owned()),
            (member, Some(at)) => Some(format!("{member}.{at}")),
        };
        Self { at, ..self }
    }

    /// Says which member of the file it is about.
    #[must_use]
    pub fn at(self, member: impl Into<String>) -> Self {
        Self { at: Some(member.into()), ..self }
    }
}
