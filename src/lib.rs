//! Phidias runs the Phi-3 / 3.5 family of small language models on ordinary CPUs.
#![forbid(unsafe_code)]

pub mod eval;
#[cfg(feature = "hub")]
pub mod hub;

pub use phidias_engine as engine;
pub use phidias_models as models;
pub use phidias_models::{Error, Model, OpenOptions, Session, SessionOptions, WeightFormat};
