//! The parts of a layer.

pub mod attention;
pub mod mlp;
pub mod norm;
pub mod rope;
