//! Phidias.
#![forbid(unsafe_code)]

#[cfg(feature = "hub")]
pub mod hub;
