//! The Phi-3 family.
#![forbid(unsafe_code)]

pub mod text;
