//! Fable, the demonstration model that is built into the program.
//!
//! A small Phi-3 trained on fairy tales; `models/fable/README.md` tells how. It is read by the same
//! code as a downloaded model: its safetensors bytes lie in the program's own pages.

use crate::error::Error;
use crate::model::{Model, OpenOptions, Source, Text};
use phidias_engine::Bytes;

/// What it is called in messages.
pub const NAME: &str = "fable (built in)";

/// Bytes on a boundary that every tensor's alignment divides, as in a mapped file.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../fable/model.safetensors"));

/// Its configuration and weights.
/// # Errors
/// As [`Source::open`]; never for the files it was built with, as the tests show.
pub fn source() -> Result<Source, Error> {
    let config = include_bytes!("../fable/config.json");
    let generation = include_bytes!("../fable/generation_config.json");
    Source::from_bytes(NAME, config, generation, Bytes::from(&WEIGHTS.0))
}

/// Its tokenizer and chat template.
/// # Errors
/// As [`Text::open`].
pub fn text() -> Result<Text, Error> {
    let tokenizer = include_bytes!("../fable/tokenizer.json");
    let config = include_bytes!("../fable/tokenizer_config.json");
    Ok(Text::from_bytes(NAME, tokenizer, config)?)
}

/// Opens it.
/// # Errors
/// As [`Model::open`].
pub fn open(options: OpenOptions<'_>) -> Result<Model, Error> {
    Model::from_source(source()?, Some(text()?), options)
}
