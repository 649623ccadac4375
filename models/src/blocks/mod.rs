//! The parts of a layer, and the head.

pub mod attention;
pub mod head;
pub mod mlp;
pub mod moe;
pub mod rope;
