//! The Phi-3 family: configurations, weights, the forward pass, text.
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | `config.json`, checked once |
//! | [`blocks`] | attention, MLP, mixture of experts, rotary embedding, head |
//! | [`clip`], [`vision`], [`image`] | the encoder of the vision models; from a picture to rows among the tokens; pixels |
//! | [`transformer`] | the decoder, a layer on a screen |
//! | [`family`] | the families by `model_type`; `phi3` has mini, medium and 3.5-mini, `phi3small` small, `phimoe` 3.5-MoE, `phi3_v` the vision models |
//! | [`weights`] | names, shapes and roles of tensors |
//! | [`model`] | opening a folder |
//! | [`format`](mod@format), [`quantize`] | what the matrices are multiplied in; writing them so |
//! | [`session`] | a sequence of tokens and its cache |
//! | [`synth`] | folders with random weights in the published shapes |
//! | [`foreign`] | calls into libraries that may panic at damaged files |
//! | `fable` | the demonstration model, built in |
//! | [`image`] | pictures: decoding, resizing, tiles |
//! | [`text`] | tokenizer, chat templates, conversations |
//!
//! No `unsafe` and no instruction sets here.
#![forbid(unsafe_code)]

pub mod blocks;
pub mod clip;
pub mod config;
#[cfg(feature = "cuda")]
mod cuda;
pub mod error;
#[cfg(feature = "fable")]
pub mod fable;
pub mod family;
pub mod foreign;
pub mod format;
pub mod image;
pub mod model;
mod phi3;
mod phi3small;
mod phi3v;
mod phimoe;
pub mod quantize;
mod running;
pub mod session;
pub mod synth;
pub mod text;
pub mod transformer;
pub mod vision;
pub mod weights;

pub use clip::Clip;
pub use config::{Config, GenerationConfig};
pub use error::Error;
pub use family::Family;
pub use format::WeightFormat;
pub use model::{Model, OpenOptions, Placement, Residency, Source, Text, WeightBytes};
pub use session::{Crossing, Session, SessionOptions};
