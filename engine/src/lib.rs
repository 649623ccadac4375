//! The engine.

pub mod generate;
pub mod sampling;
