//! Phidias.
#![forbid(unsafe_code)]
