//! The engine.

pub mod sampling;
