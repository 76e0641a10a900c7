//! The `moec` binary.
fn main() {}
