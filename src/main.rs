//! Command line.
#![forbid(unsafe_code)]
fn main() {}
