//! Tests across crates, and what they share.

pub mod any;
pub mod attributes;
pub mod catalog;
pub mod draw;
pub mod forms;
pub mod fuzz;
pub mod gallery;
pub mod hopper;
pub mod layers;
pub mod lowering;
pub mod matrix;
pub mod mutate;
