//! Runs compiled programs on CPU threads, and views stored tensors; `core` only.
//!
//! The same code serves `moec-runtime` and, compiled on its own, every generated C library.
#![no_std]

pub mod view;
