//! Plans how a Mixture-of-Experts model is spread over GPUs.
//!
//! A plan is a folded mapping (MoE Parallel Folding, arXiv 2504.14960): attention on
//! `tp x cp x dp x pp`, experts on `etp x ep x edp x pp`, over the same ranks. The
//! crate gives rank groups in Megatron-Core's order ([`groups()`]), a roofline cost
//! model with fitted efficiencies, and a search over mappings ([`plan()`]).
//!
//! It depends on no other crate of the project: a frontend fills [`ModelShape`] or
//! lets it read a `config.json`; a machine is a [`Cluster`], preset or file.
//! Nothing here prints, reads files or looks at the clock.

pub mod backend;
pub mod calibration;
pub mod choice;
pub mod cluster;
pub mod collective;
mod config;
pub mod error;
pub mod explain;
pub mod fit;
pub mod groups;
pub mod html;
pub mod layer;
pub mod mapping;
mod members;
pub mod memory;
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod ranks;
pub mod schedule;
pub mod search;
pub mod serve;
mod serve_search;
mod stages;
mod table;
pub mod text;
pub mod train;

pub use choice::{Objective, Recompute, Request, Routing, Schedule, Sharding, Strategy};
pub use cluster::{Cluster, Precision};
pub use error::PlanError;
pub use groups::{Groups, groups};
pub use mapping::{DEFAULT_ORDER, Fixed, Mapping};
pub use model::ModelShape;
pub use plan::{Plan, PlanReport, plan, plan_report};
