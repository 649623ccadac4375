//! The Phi-3 family: configurations, weights, the forward pass, text.
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | `config.json`, checked once |
//! | [`blocks`] | attention, MLP, norm, rotary embedding |
//! | [`transformer`] | the decoder, a layer on a screen |
//! | [`phi3`] | tensor names, shapes and roles of Phi-3-mini, medium and 3.5-mini |
//! | [`model`] | opening a folder, quantizing it |
//! | [`session`] | a sequence of tokens and its cache |
//! | [`synth`] | folders with random weights in the published shapes |
//! | `fable` | the demonstration model, built in |
//! | [`text`] | tokenizer, chat templates, conversations |
//!
//! No `unsafe` and no instruction sets here.
#![forbid(unsafe_code)]

pub mod blocks;
pub mod config;
#[cfg(feature = "fable")]
pub mod fable;
pub mod model;
pub mod phi3;
pub mod session;
pub mod synth;
pub mod text;
pub mod transformer;

pub use config::{Config, GenerationConfig};
pub use model::{Error, Model, OpenOptions, Source, Text, WeightFormat};
pub use session::{Crossing, Session, SessionOptions};
