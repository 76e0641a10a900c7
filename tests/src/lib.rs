//! Tests across crates, and what they share.

pub mod layers;
pub mod mutate;
